"""``golden evaluate`` on a tiny model in a folder: table, run folder, going on after a kill."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from families import tiny

from goldenlayers.cli import main
from goldenlayers.commands import evaluate as command
from goldenlayers.evaluation.plan import EvaluationPlan
from goldenlayers.store import RunFolder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    model = tiny("llama", "sentencepiece_bpe")
    model.hf.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return folder


def golden(checkpoint: Path, out: Path, *more: str) -> int:
    return main(["evaluate", str(checkpoint), "starter", "--limit", "20", "--out", str(out), *more])


def test_the_base_rate_as_table_rows_and_summary(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert golden(checkpoint, tmp_path / "run") == 0
    shown = capsys.readouterr().out
    assert "locality" in shown and "100.0" in shown and "unscored" in shown
    run = RunFolder.open(tmp_path / "run")
    rows, summary = run.rows("scores.jsonl"), run.json("summary.json")
    assert summary["metrics"]["locality"]["mean"] == 100
    counted = [m["scored"] + m["unscored"] for m in summary["metrics"].values()]
    assert sum(counted) == len(rows) and summary["n_facts"] == 20
    assert golden(checkpoint, tmp_path / "run") == 2  # taken


def test_a_killed_run_goes_on(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert golden(checkpoint, tmp_path / "whole") == 0
    real, scored = EvaluationPlan.score_applied, []

    def dying(self: EvaluationPlan, **options: Any) -> Any:
        if scored:
            raise KeyboardInterrupt
        scored.append(1)
        return real(self, **options)

    monkeypatch.setattr(EvaluationPlan, "score_applied", dying)
    assert golden(checkpoint, tmp_path / "run") == 130
    monkeypatch.setattr(EvaluationPlan, "score_applied", real)
    part = tmp_path / "run.part" / "scores.jsonl"
    kept = part.read_text(encoding="utf-8")
    part.write_text(kept + '{"fact": "torn', encoding="utf-8")
    assert golden(checkpoint, tmp_path / "run", "--batch-size", "3") == 0
    text = (tmp_path / "run" / "scores.jsonl").read_text(encoding="utf-8")
    assert text.startswith(kept)
    whole = (tmp_path / "whole" / "scores.jsonl").read_text(encoding="utf-8")
    assert sorted(text.splitlines()) == sorted(whole.splitlines())
    a, b = (
        json.loads((tmp_path / name / "summary.json").read_text(encoding="utf-8"))
        for name in ("run", "whole")
    )
    assert a["metrics"] == b["metrics"]


def test_bad_input_exits_2_without_a_traceback(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for more in (
        ["--metrics", "rewrit"],
        ["--method", "rom"],
        ["--metrics", "perplexity"],
        ["--batch-size", "0"],
        ["--delta", str(tmp_path / "nothing")],
        ["--method", "rome", "--layer", "99"],
    ):
        assert golden(checkpoint, tmp_path / "bad", *more) == 2
        assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("command", ["evaluate", "edit"])
def test_a_batch_by_an_editor_of_single_facts_is_refused_before_the_layer_is_sought(
    checkpoint: Path,
    tmp_path: Path,
    command: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for costly in ("locate.locate", "statistics.key_statistics"):
        monkeypatch.setattr(f"goldenlayers.{costly}", None)
    facts = ["starter"] if command == "evaluate" else ["--facts", "starter"]
    arguments = [command, str(checkpoint), *facts, "--out", str(tmp_path / "run")]
    for method in ("rome", "r-rome"):
        batch = ["--method", method, "--mode", "batch"]
        assert main([*arguments, *batch, "--limit", "3"]) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert f"{method} edits one fact at a time, not 3 together. Use --mode sequential" in said
    assert list(tmp_path.iterdir()) == []
    # One fact is no batch, and other editors can: those go on to look for a layer.
    for more in (["--limit", "1"], ["--limit", "3", "--method", "emmet"]):
        with pytest.raises(TypeError):
            main([*arguments, "--method", "rome", "--mode", "batch", *more])


def test_an_unknown_metric_is_told_with_its_near_matches_before_the_work(
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("goldenlayers.models.load", lambda *a, **_: asked.append(a))
    for wrong, near in (("rewrit", "rewrite"), ("localty", "locality"), ("fluencey", "fluency")):
        assert golden(checkpoint, tmp_path / "bad", "--metrics", "kl", wrong) == 2
        shown = capsys.readouterr()
        message = f"unknown metric '{wrong}'. Did you mean '{near}'"
        assert shown.out == "" and message in " ".join(shown.err.split())
    assert not asked and list(tmp_path.iterdir()) == []


def test_the_layer_is_chosen_on_other_facts_than_the_judged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from goldenlayers.config import EvaluateConfig
    from goldenlayers.datasets import load_facts
    from goldenlayers.locate import LayerRanking

    judged = load_facts("starter", limit=10)
    seen: list[Any] = []

    def locate(_model: Any, facts: Any, *_: Any, **__: Any) -> LayerRanking:
        seen.extend(facts)
        return LayerRanking.fixed("lga", 4, 2)

    monkeypatch.setattr("goldenlayers.locate.locate", locate)
    config = EvaluateConfig(model="none")
    assert command.auto_layer(config, None, judged) == 2  # type: ignore[arg-type]
    assert len(seen) >= 50
    assert not {f.subject.casefold() for f in seen} & {f.subject.casefold() for f in judged}
