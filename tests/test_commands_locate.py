"""``golden locate`` with causal tracing token by token, and with settings of the race."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import tiny
from interrupts import stop_locating_at_the_second_batch
from sweep_helpers import some_facts

from goldenlayers.cli import main
from goldenlayers.locating.grid import ROLES, TracingGrid
from goldenlayers.locating.ranking import LayerRanking
from goldenlayers.store import RunFolder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, and four facts."""
    folder = tmp_path_factory.mktemp("locate")
    model = tiny("llama")
    model.hf.save_pretrained(folder / "model")
    model.tokenizer.save_pretrained(folder / "model")
    rows = [
        {"id": f.id, "subject": f.subject, "prompt": f.prompt, "target_new": f.target,
         "target_old": f.target_old}
        for f in some_facts(4)
    ]  # fmt: skip
    (folder / "facts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(autouse=True)
def taken_for_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Causal tracing follows answers that the model gives; a random one gives none of these."""
    monkeypatch.setattr(
        "goldenlayers.locating.known.known_facts", lambda _model, facts, **_: list(facts)
    )


def command(place: Path, out: Path, *more: object) -> list[str]:
    data = (place / "model", place / "facts.jsonl")
    return [str(a) for a in ("locate", *data, "--bootstrap", 0, "--out", out, *more)]


@pytest.mark.parametrize("n", [1, 2])
def test_the_grid_and_its_heat_map(
    place: Path, tmp_path: Path, n: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(place, tmp_path / "run", "--method", "cma", "--grid", n)) == 0
    run = RunFolder.open(tmp_path / "run")
    record = run.json("grid.json")
    grids = {name: TracingGrid.from_json(grid) for name, grid in record["facts"].items()}
    mean = TracingGrid.from_json(record["mean"])
    assert len(grids) == n == mean.n_facts and mean.tokens == ROLES
    rows = {row["fact"]: row for row in run.rows("per_fact.jsonl")}
    for name, grid in grids.items():
        # The ranking's effect is that of the subject's last token, with the same noise.
        np.testing.assert_allclose(grid.effect[grid.lookup], rows[name]["phi"], atol=1e-6)
        assert grid.clean == pytest.approx(rows[name]["clean"], abs=1e-6)
        assert grid.effect.shape[1] == 4
    of_last = np.mean([grid.effect[grid.lookup] for grid in grids.values()], axis=0)
    np.testing.assert_allclose(mean.effect[2], of_last)
    drawn = run.file("heatmap.svg").read_text("utf-8")
    words = " ".join(" ".join(re.findall(r">([^<]+)<", drawn)).split())  # a long title is broken
    assert (f"mean of {n} facts" in words) == (n > 1)
    assert run.file("heatmap.png").stat().st_size > 0
    assert "grid.json" in capsys.readouterr().err
    # It is repeated from its folder.
    assert main(["run", str(run.path), "--out", str(tmp_path / "again")]) == 0
    assert RunFolder.open(tmp_path / "again").json("grid.json") == record


def test_more_facts_than_there_are(place: Path, tmp_path: Path) -> None:
    assert main(command(place, tmp_path / "run", "--method", "cma", "--grid", 500)) == 0
    run = RunFolder.open(tmp_path / "run")
    traced = set(run.json("grid.json")["facts"])
    assert traced == {row["fact"] for row in run.rows("per_fact.jsonl")}


def test_a_stopped_grid_leaves_the_ranking(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("goldenlayers.locating.tracing.tracing_grid", stopped)
    assert main(command(place, tmp_path / "run", "--method", "cma", "--grid", 2)) == 130
    run = RunFolder.open(tmp_path / "run")
    assert run.json("ranking.json")["method"] == "cma" and not run.file("grid.json").exists()
    assert "has no heat map" in capsys.readouterr().err


def test_stopped_while_locating_it_does_not_go_on_with_the_race(
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def race(*_args: Any, **_more: Any) -> Any:
        raise AssertionError("the race began")

    stop_locating_at_the_second_batch(monkeypatch)
    monkeypatch.setattr("goldenlayers.racing.verify", race)
    more = ("--verify", 2, "--batch-size", 1)
    assert main(command(place, tmp_path / "run", *more)) == 130
    run = RunFolder.open(tmp_path / "run")
    ranking = LayerRanking.from_json(run.json("ranking.json"))
    assert ranking.interrupted and ranking.n_facts == 1 == len(list(run.rows("per_fact.jsonl")))
    assert not run.file("verified.json").exists()
    shown = capsys.readouterr()
    assert "the choice is not verified" in shown.err and "1 of 4 facts" in shown.out


def test_what_does_not_go_together_is_refused_before_the_work(
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("goldenlayers.models.load", None)
    for more, words in [
        (["--grid", 2], "--grid is for causal tracing, and the method is lga. Add --method cma"),
        (["--method", "cma", "--grid", 0], "--grid is 0. Expected 1 or more"),
        (["--verify-set", "steps", 3], "--verify-set is for --verify. Add --verify 5"),
        (["--verify", 2, "--verify-set", "stepz", 3], "rome has no setting 'stepz'"),
        (["--verify", 2, "--verify-set", "steps", "x"], "--verify-set steps is 'x'"),
    ]:
        assert main(command(place, tmp_path / "run", *more)) == 2
        assert words in " ".join(capsys.readouterr().err.split())
    without = ("locate", place / "model", place / "facts.jsonl", "--method", "cma", "--grid", 2)
    assert main([str(a) for a in without]) == 2
    assert "--grid needs a run folder" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_race_edits_with_its_settings(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from goldenlayers.racing import verify as real

    seen: list[Any] = []

    def watched(*arguments: Any, **options: Any) -> Any:
        seen.append(arguments[3])
        return real(*arguments, **options)

    monkeypatch.setattr("goldenlayers.racing.verify", watched)
    race = ("--verify", 2, "--verify-facts", 1, "--verify-method", "ft-m")
    changes = ("--verify-set", "steps", 1, "ft_lr", 0.01)
    assert main(command(place, tmp_path / "run", *race, *changes)) == 0
    assert (seen[0].steps, seen[0].ft_lr) == (1, 0.01)
    assert RunFolder.open(tmp_path / "run").config["settings"]["verify_set"] == {
        "steps": "1",
        "ft_lr": "0.01",
    }
