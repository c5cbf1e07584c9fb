"""``golden locate`` with causal tracing token by token, and with the race of layers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from alike import alike
from families import save, tiny
from interrupts import stop_locating_at_the_second_batch
from sweep_helpers import some_facts

from goldenlayers.cli import main
from goldenlayers.comparing import LocateRun
from goldenlayers.locating.grid import ROLES, TracingGrid
from goldenlayers.locating.ranking import LayerRanking
from goldenlayers.racing import Contest
from goldenlayers.store import RunFolder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, and four facts."""
    folder = tmp_path_factory.mktemp("locate")
    save(tiny("llama"), folder / "model")
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


def test_stopped_while_locating_it_does_not_go_on_with_the_grid(
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stop_locating_at_the_second_batch(monkeypatch)
    monkeypatch.setattr("goldenlayers.locating.tracing.tracing_grid", None)
    more = ("--method", "cma", "--grid", 2, "--batch-size", 1)
    assert main(command(place, tmp_path / "run", *more)) == 130
    run = RunFolder.open(tmp_path / "run")
    ranking = LayerRanking.from_json(run.json("ranking.json"))
    assert ranking.interrupted and ranking.n_facts == 1 == len(list(run.rows("per_fact.jsonl")))
    shown = capsys.readouterr()
    assert "the choice has no heat map" in shown.err and "1 of 4 facts" in shown.out


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
        (["--editor-set", "steps", 3], "editor is for the method race, not lga"),
        (["--method", "race", "--editor-set", "steps", "x"], "--editor-set steps is 'x'"),
    ]:
        assert main(command(place, tmp_path / "run", *more)) == 2
        assert words in " ".join(capsys.readouterr().err.split())
    without = ("locate", place / "model", place / "facts.jsonl", "--method", "cma", "--grid", 2)
    assert main([str(a) for a in without]) == 2
    assert "--grid needs a run folder" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


RACE = ("--method", "race", "--editor", "ft-m", "--editor-set", "steps", 1, "ft_lr", 0.01)


def test_a_race_is_a_run_as_any_other(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = (*RACE, "--set", "edits", 40, "subject", 0.5)
    assert main(command(place, tmp_path / "run", *more)) == 0
    shown = capsys.readouterr()
    run = RunFolder.open(tmp_path / "run")
    ranking = LayerRanking.from_json(run.json("ranking.json"))
    evidence = ranking.evidence
    assert ranking.method == "race" and evidence is not None and evidence.editor == "ft-m"
    rows = run.rows("per_fact.jsonl")
    assert len(rows) == ranking.n_facts and evidence.edits <= 40
    assert run.config["settings"]["editor_set"] == {"steps": "1", "ft_lr": "0.01"}
    assert " layers with ft-m: about" in shown.err
    said = " ".join(shown.out.split())
    assert f"was chosen by {evidence.edits} edits with ft-m in" in said
    assert "facts have no locality probes" in said and "layer score facts wins" in said
    assert run.file("ranking.svg").read_text("utf-8").count("golden layer: ") == 1
    read = LocateRun.read(run)
    assert read.label == "race ft-m edits 40 subject 0.5"
    assert main(["run", str(run.path), "--out", str(tmp_path / "again")]) == 0
    again = RunFolder.open(tmp_path / "again")
    assert again.rows("per_fact.jsonl") == alike(rows)


def test_a_race_that_is_stopped_leaves_what_it_knows(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, calls = Contest._edited, list[int]()

    def stopped(self: Contest, layer: int, places: Any) -> list[float]:
        calls.append(layer)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return real(self, layer, places)

    monkeypatch.setattr(Contest, "_edited", stopped)
    assert main(command(place, tmp_path / "run", *RACE)) == 130
    ranking = LayerRanking.from_json(RunFolder.open(tmp_path / "run").json("ranking.json"))
    assert ranking.interrupted and ranking.n_facts >= 3
    assert "it was interrupted" in " ".join(capsys.readouterr().out.split())


def test_a_record_with_flags_that_are_gone_says_so(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(place, tmp_path / "run")) == 0
    record = tmp_path / "run" / "config.yaml"
    text = record.read_text("utf-8")
    record.write_text(text.replace("  bootstrap: 0", "  bootstrap: 0\n  verify: 5"), "utf-8")
    capsys.readouterr()
    assert main(["run", str(record), "--out", str(tmp_path / "again")]) == 2
    assert "unknown setting 'verify'" in " ".join(capsys.readouterr().err.split())


def test_lga_says_what_other_fences_would_choose(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(place, tmp_path / "run", "--tokens", "no-sink")) == 0
    shown = capsys.readouterr()
    assert "Without fences the choice is layer" in shown.out and "with kappa 1.5" in shown.out
    assert "--method race makes real edits" in shown.err
    assert LocateRun.read(RunFolder.open(tmp_path / "run")).label == "lga mlp sequence no-sink"
