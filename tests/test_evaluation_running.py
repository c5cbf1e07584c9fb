"""``evaluate``: its modes, what an edit does and a random one does not, going on after a kill."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from deltas import bits, same_bits
from families import tiny

from goldenlayers.delta import LowRank, WeightDelta
from goldenlayers.editors import EDITORS, EditSettings, edit_each
from goldenlayers.errors import UserError
from goldenlayers.evaluation import evaluate, running
from goldenlayers.evaluation.plan import EvaluationPlan
from goldenlayers.facts import Fact, Probe
from goldenlayers.models.model import Model
from goldenlayers.statistics import KeyStatistics

LAYER = 1
SETTINGS = EditSettings(steps=40, prefixes=1, prefix_tokens=3, lr=0.5, kl_factor=0.0)
PLACES = [("France", "Rome"), ("Italy", "Paris"), ("Brazil", "Ulm"), ("Japan", "gold")]


def facts() -> list[Fact]:
    return [
        Fact(
            id=subject.lower(),
            subject=subject,
            prompt=f"The capital of {subject} is",
            target_new=answer,
            rephrasings=(f"The capital city of {subject} is",),
            locality=(Probe("The composer of the opera is", "Albert", "neighborhood"),),
        )
        for subject, answer in PLACES
    ]


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny("llama", "sentencepiece_bpe")


@pytest.fixture(scope="module")
def statistics(model: Model) -> KeyStatistics:
    return KeyStatistics.identity({LAYER: model.layers[LAYER].down.in_features})


def run(model: Model, statistics: Any, method: str = "rome", **options: Any) -> Any:
    given = {"layer": LAYER, "settings": SETTINGS, "statistics": statistics, **options}
    return evaluate(model, facts(), method=method, **given)


def means(rows: Any, metric: str) -> float:
    scores = [r["score"] for r in rows if r["metric"] == metric and r["score"] is not None]
    return sum(scores) / len(scores)


def test_an_edit_installs_the_fact_and_a_random_change_of_its_length_does_not() -> None:
    model = tiny("gpt2", "byte_level_bpe")
    answers = ["the", "is", "in", "of"]  # one token each: a tiny random model can be moved there
    # The subject ends the prompt, so that little has to carry the change to the answer.
    wanted = [
        dataclasses.replace(f, target_new=a, prompt=f"The capital of {f.subject}")
        for f, a in zip(facts(), answers, strict=True)
    ]
    how = {
        "layer": LAYER,
        "settings": EditSettings(steps=60, prefixes=0, kl_factor=0, weight_decay=1e-6),
        "statistics": KeyStatistics.identity({LAYER: model.layers[LAYER].down.in_features}),
    }
    before = bits(model.hf)
    found = evaluate(model, wanted, method="rome", **how)
    assert same_bits(model.hf, before)
    base = evaluate(model, wanted)
    assert means(base.rows, "locality") == 100
    assert means(found.rows, "rewrite") == 100 and means(base.rows, "rewrite") <= 25
    real = edit_each(model, wanted, **how)
    generator = torch.Generator().manual_seed(0)
    random = []
    for delta in real:
        ((name, change),) = delta.changes.items()
        assert isinstance(change, LowRank)
        noise = LowRank(
            torch.randn(change.left.shape, generator=generator),
            torch.randn(change.right.shape, generator=generator),
        )
        random.append(WeightDelta({name: noise.scaled(change.norm() / noise.norm())}))
    assert means(EvaluationPlan(model, wanted).score(random), "rewrite") <= 25
    # Neither another fact's edit nor another fact's answer is rewarded.
    assert means(EvaluationPlan(model, wanted).score([*real[1:], real[0]]), "rewrite") <= 25
    moved = [
        dataclasses.replace(f, target_new=a)
        for f, a in zip(wanted, [*answers[1:], answers[0]], strict=True)
    ]
    assert means(EvaluationPlan(model, moved).score(real), "rewrite") == 0


@pytest.mark.parametrize("method", ["memit", "ft-m"])
def test_batch_scores_all_facts_under_one_delta(
    model: Model, statistics: KeyStatistics, method: str, tmp_path: Path
) -> None:
    found = run(model, statistics, method, mode="batch", work=tmp_path)
    delta = WeightDelta.load(tmp_path)
    assert len(delta.facts) == 4
    again = evaluate(model, facts(), delta=delta)
    with delta.applied(model):
        inside = evaluate(model, facts())
    assert found.rows == again.rows == inside.rows
    assert inside.method == "applied"


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
    assert [r for r in plain if r["metric"] != "rewrite_at_once"] == wanted
    # The last fact has had no time to be forgotten.
    assert at_once[-1]["score"] == final[-1]["score"]


class Killed(Exception):  # noqa: N818
    pass


@pytest.mark.parametrize("mode", ["single", "sequential"])
def test_a_killed_run_goes_on_without_scoring_again(
    model: Model, statistics: KeyStatistics, tmp_path: Path, mode: str
) -> None:
    whole = run(model, statistics, mode=mode, chunk=1, work=tmp_path / "whole")
    kept: list[dict[str, Any]] = []

    def take(rows: list[dict[str, Any]]) -> None:
        kept.extend(rows)
        if len({r["fact"] for r in kept}) == 2:
            raise Killed

    work = tmp_path / "killed"
    work.mkdir()
    with pytest.raises(Killed):
        run(model, statistics, mode=mode, chunk=1, work=work, on_rows=take)
    before = len(kept)
    # A kill between two rows of one fact: what is missing of it is added, nothing comes twice.
    torn = kept[:-1] if mode == "single" else kept
    new: list[dict[str, Any]] = []
    found = run(model, statistics, mode=mode, chunk=1, work=work, done=torn, on_rows=new.extend)
    assert found.rows == whole.rows
    assert len(new) == len(whole.rows) - len(torn) and before < len(whole.rows)
    assert found.summary.to_json() == whole.summary.to_json()


def test_finished_rows_need_no_model_pass(
    model: Model, statistics: KeyStatistics, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(model, statistics)

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("scored again")

    monkeypatch.setattr(running, "EvaluationPlan", never)
    assert run(model, statistics, done=whole.rows).rows == whole.rows


def test_sequential_rows_without_their_edits_are_refused(
    model: Model, statistics: KeyStatistics
) -> None:
    row = {"fact": "france", "metric": "rewrite_at_once", "probe": 0, "score": 100.0}
    with pytest.raises(UserError, match="are gone"):
        run(model, statistics, mode="sequential", done=[row])


class Choosy:
    """ROME that refuses one fact."""

    name = "rome"
    needs_statistics = True
    edits_together = False

    def __init__(self, refuse: set[str]) -> None:
        self.refuse = refuse
        self.inner = EDITORS["rome"]

    def each(self, bench: Any, facts: Any, layer: int) -> Any:
        if any(fact.id in self.refuse for fact in facts):
            raise UserError("the subject's key is abnormal")
        return self.inner.each(bench, facts, layer)

    def together(self, bench: Any, facts: Any, layer: int) -> Any:
        return self.each(bench, facts, layer)[0]


@pytest.mark.parametrize("mode", ["single", "sequential"])
def test_an_edit_that_fails_leaves_its_fact_unscored_and_the_rest_goes_on(
    model: Model, statistics: KeyStatistics, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.setattr(running, "editor", lambda _name: Choosy({"italy"}))
    found = run(model, statistics, mode=mode)
    lost = [r for r in found.rows if r["fact"] == "italy"]
    assert {r["score"] for r in lost} == {None}
    assert "the edit failed: the subject's key is abnormal" in {r["reason"] for r in lost}
    others = [r for r in found.rows if r["metric"] == "rewrite" and r["fact"] != "italy"]
    assert all(r["score"] is not None for r in others) and len(others) == 3
    assert found.summary.metrics["rewrite"].unscored == 1


def test_an_edit_that_fails_for_all_facts_alike_is_an_error(
    model: Model, statistics: KeyStatistics, monkeypatch: pytest.MonkeyPatch
) -> None:
    everyone = {fact.id for fact in facts()}
    monkeypatch.setattr(running, "editor", lambda _name: Choosy(everyone))
    with pytest.raises(UserError, match="abnormal"):
        run(model, statistics)


def test_in_context_tells_the_fact_and_leaks_no_judged_subject(model: Model) -> None:
    found = evaluate(model, facts(), method="in-context", settings=EditSettings(demonstrations=2))
    assert {r["metric"] for r in found.rows} == {"rewrite", "rephrase", "locality", "portability"}
    prefix = running.prefix_for(facts()[0], facts(), 3, 0)
    assert "New fact: The capital of France is Rome." in prefix
    assert prefix.count("France") == 1
    with pytest.raises(UserError, match="changes no weights"):
        evaluate(model, facts(), method="in-context", mode="batch")


def test_what_cannot_be_asked_is_refused(model: Model, statistics: KeyStatistics) -> None:
    with pytest.raises(UserError, match="no facts"):
        evaluate(model, [])
    with pytest.raises(UserError, match="'rome'"):
        evaluate(model, facts(), method="rom")
    with pytest.raises(UserError, match="Give a layer"):
        evaluate(model, facts(), method="rome")
    with pytest.raises(UserError, match="batch"):
        run(model, statistics, mode="batched")
    with pytest.raises(UserError, match="one fact at a time"):
        run(model, statistics, mode="batch")  # ROME
    with pytest.raises(UserError, match="batch size"):
        evaluate(model, facts(), batch_size=0)


def test_the_summary_is_plain_json_with_counts(model: Model) -> None:
    found = json.loads(json.dumps(evaluate(model, facts()).to_json(), allow_nan=False))
    one = found["metrics"]["rewrite"]
    assert {"mean", "se", "low", "high", "scored", "unscored"} <= one.keys()
    assert one["scored"] == 4 and found["metrics"]["portability"]["unscored"] == 4
    assert found["metrics"]["portability"]["mean"] is None
    assert not math.isnan(found["overall"]["mean"])
    assert found["settings"]["metrics"] == ["rewrite", "rephrase", "locality", "portability"]
