"""``golden evaluate`` on a tiny model in a folder: table, run folder, going on after a kill."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
from alike import alike
from evaluation_slow import TEXT, slow_perplexity
from families import save, tiny

from goldenlayers.cli import main
from goldenlayers.datasets import load_facts, write_jsonl
from goldenlayers.delta import WeightDelta
from goldenlayers.editors import InContext
from goldenlayers.evaluation import evaluate
from goldenlayers.evaluation.plan import EvaluationPlan
from goldenlayers.facts import Fact, Probe
from goldenlayers.models import load
from goldenlayers.statistics import KeyStatistics
from goldenlayers.store import RunFolder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save(tiny("llama", "sentencepiece_bpe"), folder)
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
    found, wanted = (
        ordered([json.loads(line) for line in lines.splitlines()]) for lines in (text, whole)
    )
    assert found == alike(wanted)
    a, b = (
        json.loads((tmp_path / name / "summary.json").read_text(encoding="utf-8"))
        for name in ("run", "whole")
    )
    assert a["metrics"] == alike(b["metrics"])


QUICK = ["--limit", "4", "--layer", "1", "--statistics", "none"]
QUICK += ["--set", "steps", "4", "prefixes", "1", "prefix_tokens", "3"]
SETTINGS: dict[str, Any] = {"steps": 4, "prefixes": 1, "prefix_tokens": 3}


def results(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    run = RunFolder.open(folder)
    return run.rows("scores.jsonl"), run.json("summary.json")


def ordered(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(rows, key=lambda row: (row["fact"], row["metric"], row["probe"]))


def by_library(checkpoint: Path, **how: Any) -> list[dict[str, Any]]:
    """The rows of the same evaluation in Python."""
    model = load(str(checkpoint))
    facts = load_facts("starter", limit=4)
    free = load_facts("starter", limit=304)
    judged = {fact.subject.casefold() for fact in facts}
    others = [fact for fact in free if fact.subject.casefold() not in judged]
    statistics = KeyStatistics.identity({1: model.layers[1].down.in_features})
    how = {"statistics": statistics, "others": others, **how}
    return ordered(evaluate(model, facts, **how).rows)


@pytest.mark.parametrize(
    ("method", "mode"), [("rome", "single"), ("memit", "batch"), ("memit", "sequential")]
)
def test_an_editor_is_judged_as_in_python(
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    method: str,
    mode: Literal["single", "batch", "sequential"],
) -> None:
    out = tmp_path / "run"
    assert golden(checkpoint, out, "--method", method, "--mode", mode, *QUICK) == 0
    shown = capsys.readouterr().out
    assert f"{method} at layer 1, {mode}: 4 facts" in shown
    assert ("What is left of an edit" in shown) == (mode == "sequential")
    rows, summary = results(out)
    assert ordered(rows) == alike(
        by_library(checkpoint, method=method, mode=mode, layer=1, **SETTINGS)
    )
    assert (summary["method"], summary["mode"], summary["layer"]) == (method, mode, 1)
    assert summary["settings"]["edit"]["steps"] == 4
    assert any(row["evidence"].get("after") != row["evidence"].get("before") for row in rows)
    assert (out / "delta.json").is_file() == (mode != "single")
    assert ("retention" in summary) == (mode == "sequential")
    if mode == "sequential":
        assert [one["age"] for one in summary["retention"]] == [[n, n] for n in range(4)]


def test_steps_of_two_facts_and_a_setting_of_another_method(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = ["--method", "memit", "--mode", "sequential", "--step", "2"]
    assert golden(checkpoint, tmp_path / "run", *steps, *QUICK) == 0
    rows, summary = results(tmp_path / "run")
    how: dict[str, Any] = {"method": "memit", "mode": "sequential", "layer": 1, **SETTINGS}
    assert ordered(rows) == alike(by_library(checkpoint, step=2, **how))
    assert ordered(rows) != alike(by_library(checkpoint, **how))
    ages = [one["age"] for one in summary["retention"]]
    assert ages == [[0, 0], [0, 0], [2, 2], [2, 2]]  # by edits that came after the whole step
    capsys.readouterr()
    for more, said in (
        (["--step", "2"], "--mode sequential"),
        ([*steps[2:], "--method", "rome", *QUICK], "rome edits one fact at a time"),
        (["--method", "in-context", "--set", "steps", "2"], "in-context has no setting 'steps'"),
        (["--method", "in-context", "--layer", "1"], "--layer is for an editor"),
        (["--layer", "1"], "--layer is for an editor"),
        (["--set", "steps", "2"], "--set is for an editor"),
        (["--preset", "rome/gpt2-xl"], "--preset is for an editor"),
    ):
        assert golden(checkpoint, tmp_path / "bad", *more) == 2
        assert said in " ".join(capsys.readouterr().err.split())


def test_a_saved_delta_is_judged_as_the_run_that_made_it(checkpoint: Path, tmp_path: Path) -> None:
    batch, again = tmp_path / "batch", tmp_path / "again"
    assert golden(checkpoint, batch, "--method", "memit", "--mode", "batch", *QUICK) == 0
    assert golden(checkpoint, again, "--delta", str(batch), "--limit", "4") == 0
    rows, summary = results(again)
    assert ordered(rows) == alike(ordered(results(batch)[0]))
    assert (summary["method"], summary["layer"]) == ("memit", 1)
    assert golden(checkpoint, tmp_path / "base", "--limit", "4") == 0
    assert ordered(rows) != alike(ordered(results(tmp_path / "base")[0]))


def test_a_delta_is_judged_on_the_facts_it_holds(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert golden(checkpoint, run, "--method", "memit", "--mode", "batch", *QUICK) == 0
    held = [row["id"] for row in WeightDelta.load(run).facts]
    capsys.readouterr()
    # Among all facts of the data, and whatever they are called there.
    assert golden(checkpoint, tmp_path / "all", "--delta", str(run)) == 0
    shown = capsys.readouterr()
    n_facts = len(load_facts("starter"))
    assert f"holds {len(held)} of the {n_facts} facts of starter: only these" in shown.err
    assert f"batch: {len(held)} facts" in shown.out
    assert {row["fact"] for row in results(tmp_path / "all")[0]} == set(held)
    few = ["--delta", str(run), "--limit", "2"]
    assert golden(checkpoint, tmp_path / "few", *few) == 0
    assert {row["fact"] for row in results(tmp_path / "few")[0]} < set(held)
    # A fact with another answer is another fact.
    facts = [dataclasses.replace(f, target="nothing") for f in load_facts("starter")[:4]]
    write_jsonl(facts, tmp_path / "others.jsonl")
    command = ["evaluate", str(checkpoint), str(tmp_path / "others.jsonl"), "--delta", str(run)]
    assert main(command) == 2
    assert "holds none of the 4 facts" in capsys.readouterr().err


def test_in_context_tells_with_the_examples_that_were_asked_for(
    checkpoint: Path, tmp_path: Path
) -> None:
    more = ["--method", "in-context", "--limit", "4", "--set", "demonstrations", "2"]
    assert golden(checkpoint, tmp_path / "run", *more) == 0
    rows, summary = results(tmp_path / "run")
    two, eight = (
        by_library(checkpoint, method=InContext(demonstrations=count)) for count in (2, 8)
    )
    assert ordered(rows) == alike(two)
    assert ordered(rows) != alike(eight)
    assert (summary["method"], summary["layer"]) == ("in-context", None)


def test_perplexity_is_of_the_text_that_was_given(checkpoint: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    more = ["--metrics", "perplexity", "rewrite", "--text", str(text), "--text-tokens", "50"]
    assert golden(checkpoint, tmp_path / "base", *more) == 0
    base = results(tmp_path / "base")[1]["metrics"]
    wanted = slow_perplexity(load(str(checkpoint)), TEXT, 50)
    assert base["perplexity"]["mean"] == pytest.approx(wanted, rel=1e-4)
    more += ["--method", "memit", "--mode", "batch", *QUICK]
    assert golden(checkpoint, tmp_path / "run", *more) == 0
    edited = results(tmp_path / "run")[1]["metrics"]
    assert edited["perplexity_before"]["mean"] == pytest.approx(wanted, rel=1e-4)
    assert edited["perplexity"]["mean"] != pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize(
    ("method", "mode"), [("rome", "single"), ("memit", "batch"), ("memit", "sequential")]
)
def test_a_run_whose_rows_were_cut_goes_on_to_the_same_end(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, mode: str
) -> None:
    more = ["--method", method, "--mode", mode, *QUICK]
    assert golden(checkpoint, tmp_path / "whole", *more) == 0
    rows, summary = results(tmp_path / "whole")

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(RunFolder, "write_json", killed)
    assert golden(checkpoint, tmp_path / "run", *more) == 130
    monkeypatch.undo()
    scores = tmp_path / "run.part" / "scores.jsonl"
    lines = scores.read_bytes().splitlines(keepends=True)
    assert len(lines) == len(rows) > 12
    scores.write_bytes(b"".join(lines[:-7]) + lines[-7][:20])  # torn in the middle of a row
    assert golden(checkpoint, tmp_path / "run", *more) == 0
    found, figures = results(tmp_path / "run")
    assert ordered(found) == alike(ordered(rows))
    assert {**figures, "seconds": 0} == alike({**summary, "seconds": 0})


def test_what_was_scored_right_after_an_edit_cannot_be_scored_later(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    more = ["--method", "memit", "--mode", "sequential", *QUICK]
    monkeypatch.setattr(RunFolder, "write_json", killed)
    assert golden(checkpoint, tmp_path / "run", *more) == 130
    monkeypatch.undo()
    scores = tmp_path / "run.part" / "scores.jsonl"
    lines = scores.read_text(encoding="utf-8").splitlines()
    before = [json.loads(line) for line in lines]
    first_fact = [row["fact"] == before[0]["fact"] for row in before]
    kept = [line for line, stays in zip(lines, first_fact, strict=True) if stays]
    scores.write_text("\n".join(kept) + "\n", encoding="utf-8")
    assert golden(checkpoint, tmp_path / "run", *more) == 0
    old, new = (
        {row["fact"]: row for row in rows if row["metric"] == "rewrite_at_once"}
        for rows in (before, results(tmp_path / "run")[0])
    )
    first, *lost, last = old
    unchecked = {f: {k: v for k, v in old[f].items() if k != "check"} for f in (first, last)}
    assert new[first] == unchecked[first] and new[last] == alike(unchecked[last])
    for fact in lost:
        assert new[fact]["score"] is None and "right after its edit" in new[fact]["reason"]


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
    for costly in ("locating.locate", "statistics.key_statistics"):
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


def test_all_probes_counts_in_what_contradicts_the_edit(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bent = Probe("The main city of France is", "Paris")
    straight = Probe("The main city of Italy is", "Rome")
    data = Fact("France", "The capital of France is", "Rome", "Paris", locality=(bent, straight))
    write_jsonl([data], tmp_path / "facts.jsonl")

    def scored(name: str, *more: str) -> dict[str, Any]:
        out, facts = str(tmp_path / name), str(tmp_path / "facts.jsonl")
        assert main(["evaluate", str(checkpoint), facts, "--out", out, *more]) == 0
        return RunFolder.open(out).json("summary.json")["metrics"]

    apart = scored("apart")
    said = capsys.readouterr().out
    assert "1 locality probe left out: they ask what the edit changes" in " ".join(said.split())
    assert apart["locality"]["scored"] == apart["locality_contradicting"]["scored"] == 1
    every = scored("every", "--all-probes")
    assert every["locality"]["scored"] == 2 and "locality_contradicting" not in every
    assert every["locality_subject"]["scored"] == every["locality_neighbour"]["scored"] == 1
    assert RunFolder.open(tmp_path / "every").config["settings"]["all_probes"] is True
