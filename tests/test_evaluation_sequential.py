"""Edits in turn: what is forgotten, and going on after a kill at the worst moments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from alike import alike
from evaluations import LAYER, Choosy, Killed, facts, quick, run
from families import tiny
from safetensors.torch import load_file, save_file

from goldenlayers.delta import WeightDelta
from goldenlayers.errors import UserError
from goldenlayers.evaluation import batch
from goldenlayers.evaluation.plan import EvaluationPlan
from goldenlayers.models import Model
from goldenlayers.statistics import KeyStatistics


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny("llama", "sentencepiece_bpe")


@pytest.fixture(scope="module")
def statistics(model: Model) -> KeyStatistics:
    return KeyStatistics.identity({LAYER: model.layers[LAYER].down.in_features})


def test_sequential_shows_what_is_forgotten(
    model: Model, statistics: KeyStatistics, tmp_path: Path
) -> None:
    found = run(model, statistics, mode="sequential", work=tmp_path)
    at_once = [r for r in found.rows if r["metric"] == "rewrite_at_once"]
    final = [r for r in found.rows if r["metric"] == "rewrite"]
    assert [r["step"] for r in at_once] == [r["step"] for r in final] == [0, 1, 2, 3]
    total = WeightDelta.load(tmp_path)
    assert [entry["id"] for entry in total.facts] == [f.id for f in facts()]
    plan = EvaluationPlan(model, facts())
    plan.baseline()
    with total.applied(model):
        wanted = plan.score_applied()
    plain = [{k: v for k, v in r.items() if k != "step"} for r in found.rows]
    assert [r for r in plain if r["metric"] != "rewrite_at_once"] == alike(wanted)
    # The last fact has had no time to be forgotten.
    assert at_once[-1]["score"] == alike(final[-1]["score"])
    curve = found.to_json()["retention"]
    assert [one["age"] for one in curve] == [[0, 0], [1, 1], [2, 2], [3, 3]]
    assert [one["rewrite"] for one in curve] == [r["score"] for r in final[::-1]]
    assert [one["rewrite_at_once"] for one in curve] == [r["score"] for r in at_once[::-1]]
    assert "retention" not in run(model, statistics).to_json()


def test_sequential_rows_without_their_edits_are_refused(
    model: Model, statistics: KeyStatistics
) -> None:
    step = [fact.id for fact in facts()].index("france")
    row = {"fact": "france", "metric": "rewrite_at_once", "probe": 0, "score": 100.0, "step": step}
    with pytest.raises(UserError, match="are gone"):
        run(model, statistics, mode="sequential", done=[row])


def kill_at(monkeypatch: pytest.MonkeyPatch, name: str, time: int) -> None:
    """Die when a file called ``name`` is moved into place for the ``time``-th time."""
    real, seen = Path.replace, []

    def replace(self: Path, target: Any) -> Path:
        if Path(target).name == name:
            seen.append(target)
            if len(seen) == time:
                raise Killed
        return real(self, target)

    monkeypatch.setattr(Path, "replace", replace)


@pytest.mark.parametrize(
    ("mode", "time"), [("batch", 1), ("sequential", 1), ("sequential", 2), ("sequential", 4)]
)
def test_a_kill_between_the_two_files_of_the_delta(
    model: Model,
    statistics: KeyStatistics,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mode: str,
    time: int,
) -> None:
    how = {"method": "memit", "mode": mode}
    whole = run(model, statistics, work=tmp_path / "whole", **how)
    kept: list[dict[str, Any]] = []
    kill_at(monkeypatch, "delta.json", time)
    with pytest.raises(Killed):
        run(model, statistics, work=tmp_path / "killed", on_rows=kept.extend, **how)
    monkeypatch.undo()
    assert len(kept) == time - 1  # the fact in the delta has no row yet
    assert not (tmp_path / "killed" / "delta.json").exists()
    found = run(model, statistics, work=tmp_path / "killed", done=kept, **how)
    assert found.rows == alike(whole.rows)
    for name in ("delta.json", "delta.safetensors"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


# Every direction of the identity is kept, so AlphaEdit has one to write in.
EDITOR = quick("alphaedit", null_space=1.5, null_space_absolute=True)
ALPHAEDIT: dict[str, Any] = {"method": EDITOR, "mode": "sequential"}


def keys_in(folder: Path) -> int:
    (file,) = folder.glob("previous_keys*")
    return load_file(file)[str(LAYER)].shape[1]


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_kill_beside_the_keys_that_alphaedit_keeps_clear_of(
    model: Model,
    statistics: KeyStatistics,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
) -> None:
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    whole = run(model, statistics, work=tmp_path / "whole", **ALPHAEDIT)
    assert keys_in(tmp_path / "whole") == 4
    kept: list[dict[str, Any]] = []
    real = batch.store

    def store(folder: Path | None, delta: WeightDelta) -> None:
        dying = len(delta.facts) == 3
        if moment == "after" or not dying:
            real(folder, delta)
        if dying:
            raise Killed

    monkeypatch.setattr(batch, "store", store)
    with pytest.raises(Killed):
        run(model, statistics, work=tmp_path / "killed", on_rows=kept.extend, **ALPHAEDIT)
    monkeypatch.undo()
    found = run(model, statistics, work=tmp_path / "killed", done=kept, **ALPHAEDIT)
    assert found.rows == alike(whole.rows)
    assert keys_in(tmp_path / "killed") == 4
    delta, undisturbed = (WeightDelta.load(tmp_path / name) for name in ("killed", "whole"))
    for name in delta.changes:
        assert delta.dense(name).equal(undisturbed.dense(name))


def test_keys_that_do_not_belong_to_the_edits_are_refused(
    model: Model, statistics: KeyStatistics, tmp_path: Path
) -> None:
    rows = run(model, statistics, work=tmp_path, **ALPHAEDIT).rows
    (file,) = tmp_path.glob("previous_keys*")
    save_file(load_file(file), tmp_path / "previous_keys.3.safetensors")
    file.unlink()
    with pytest.raises(UserError, match=r"keys of the 4 edits .* previous_keys\.4"):
        run(model, statistics, done=rows, work=tmp_path, **ALPHAEDIT)


def test_an_edit_that_fails_leaves_no_keys(
    model: Model, statistics: KeyStatistics, tmp_path: Path
) -> None:
    class Late(Choosy):
        """Fails when the keys are there already."""

        def together(self, work: Any, facts: Any) -> Any:
            delta = self.inner.together(self._inside(work), facts)
            self._look(facts)
            return delta

    late = Late({"italy"}, EDITOR)
    run(model, statistics, late, mode="sequential", work=tmp_path)
    assert len(WeightDelta.load(tmp_path).facts) == keys_in(tmp_path) == 3


def test_steps_of_two_facts_go_on_after_a_kill(
    model: Model, statistics: KeyStatistics, tmp_path: Path
) -> None:
    how: dict[str, Any] = {"method": "memit", "mode": "sequential", "step": 2}
    whole = run(model, statistics, work=tmp_path / "whole", **how)
    steps = {row["fact"]: row["step"] for row in whole.rows}
    assert list(steps.values()) == [0, 0, 1, 1]
    quickly = [row for row in whole.rows if row["metric"] == "rewrite_at_once"]
    assert [row["step"] for row in quickly] == [0, 0, 1, 1]
    kept: list[dict[str, Any]] = []

    def torn(rows: list[dict[str, Any]]) -> None:
        kept.append(rows[0])  # of two facts
        raise Killed

    with pytest.raises(Killed):
        run(model, statistics, work=tmp_path / "killed", on_rows=torn, **how)
    found = run(model, statistics, work=tmp_path / "killed", done=kept, **how)
    assert found.rows == alike(whole.rows)
    # A fact that cannot be edited is left out of its step.
    how["method"] = Choosy({"italy"}, "memit")
    found = run(model, statistics, work=tmp_path / "less", **how)
    assert [row["id"] for row in WeightDelta.load(tmp_path / "less").facts] == [
        fact.id for fact in facts() if fact.id != "italy"
    ]
    lost = [row for row in found.rows if row["score"] is None and row["metric"] == "rewrite"]
    assert [row["fact"] for row in lost] == ["italy"]
    with pytest.raises(UserError, match="rome edits one fact at a time"):
        run(model, statistics, mode="sequential", step=2)
    with pytest.raises(UserError, match="nothing is edited in turn"):
        run(model, statistics, "memit", mode="batch", step=2)
