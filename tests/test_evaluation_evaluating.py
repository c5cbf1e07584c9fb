"""``evaluate``: its modes, what an edit does and a random one does not, going on after a kill."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from alike import alike
from deltas import bits, same_bits
from evaluations import LAYER, Choosy, Greedy, Killed, facts, means, run, tight
from families import tiny

from goldenlayers import evaluation
from goldenlayers.delta import LowRank, WeightDelta
from goldenlayers.editors import EDITORS, InContext, Rome, edit_each
from goldenlayers.errors import UserError
from goldenlayers.evaluation import evaluate
from goldenlayers.evaluation.plan import EvaluationPlan
from goldenlayers.models import Model
from goldenlayers.statistics import KeyStatistics


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny("llama", "sentencepiece_bpe")


@pytest.fixture(scope="module")
def statistics(model: Model) -> KeyStatistics:
    return KeyStatistics.identity({LAYER: model.layers[LAYER].down.in_features})


def test_an_edit_installs_the_fact_and_a_random_change_of_its_length_does_not() -> None:
    model = tiny("gpt2", "byte_level_bpe")
    answers = ["the", "is", "in", "of"]  # one token each: a tiny random model can be moved there
    # The subject ends the prompt, so that little has to carry the change to the answer.
    wanted = [
        dataclasses.replace(f, target=a, prompt=f"The capital of {f.subject}")
        for f, a in zip(facts(), answers, strict=True)
    ]
    how = {
        "layer": LAYER,
        "method": Rome(steps=60, prefixes=0, kl_factor=0, weight_decay=1e-6),
        "statistics": KeyStatistics.identity({LAYER: model.layers[LAYER].down.in_features}),
    }
    before = bits(model.hf)
    found = evaluate(model, wanted, **how)
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
        dataclasses.replace(f, target=a)
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
    again = evaluate(model, facts(), method=delta)
    with delta.applied(model):
        inside = evaluate(model, facts())
    assert again.rows == alike(found.rows) and inside.rows == alike(found.rows)
    assert inside.method == "applied"


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
    assert found.rows == alike(whole.rows)
    assert len(new) == len(whole.rows) - len(torn) and before < len(whole.rows)
    assert found.summary.to_json() == alike(whole.summary.to_json())


def test_finished_rows_need_no_model_pass(
    model: Model, statistics: KeyStatistics, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(model, statistics)

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("scored again")

    monkeypatch.setattr(evaluation, "EvaluationPlan", never)
    assert run(model, statistics, done=whole.rows).rows == whole.rows


@pytest.mark.parametrize("mode", ["single", "sequential"])
def test_an_edit_that_fails_leaves_its_fact_unscored_and_the_rest_goes_on(
    model: Model, statistics: KeyStatistics, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    found = run(model, statistics, Choosy({"italy"}), mode=mode)
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
    with pytest.raises(UserError, match="abnormal"):
        run(model, statistics, Choosy(everyone))


def test_facts_that_all_fail_are_unscored_where_others_were_scored(
    model: Model, statistics: KeyStatistics, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[dict[str, Any]] = []
    some = Choosy({"brazil", "japan"})
    found = run(model, statistics, some, chunk=2, on_rows=kept.extend)
    lost = [r for r in found.rows if r["fact"] in ("brazil", "japan")]
    assert len(lost) == 10 and {r["score"] for r in lost} == {None}
    assert {r["fact"] for r in found.rows if r["score"] is not None} == {"france", "italy"}
    # What was scored may also come from an earlier call.
    done = [r for r in kept if r["fact"] in ("france", "italy")]
    assert run(model, statistics, some, chunk=2, done=done).rows == alike(found.rows)
    everyone = Choosy({f.id for f in facts()})
    with pytest.raises(UserError, match="abnormal"):
        run(model, statistics, everyone, chunk=2, done=lost)  # rows, but none with a score


METRICS = ["rewrite", "locality", "generation", "fluency", "kl", "counterfact", "perplexity"]


def test_rows_are_the_same_where_memory_is_tight(
    model: Model, statistics: KeyStatistics, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "The capital of Italy is Rome. The tower is in the city of Paris. " * 2
    how = {"metrics": METRICS, "text": text, "text_tokens": 60}
    whole = run(model, statistics, **how)
    tried = tight(monkeypatch, 2)
    found = run(model, statistics, **how)
    assert max(tried) > 2  # larger batches were tried
    assert [r["score"] for r in found.rows] == alike([r["score"] for r in whole.rows])


@pytest.mark.parametrize("metric", ["rewrite", "locality", "generation", "fluency"])
def test_memory_too_small_for_one_text_is_the_users_error(
    model: Model, monkeypatch: pytest.MonkeyPatch, metric: str
) -> None:
    tight(monkeypatch, 0)
    with pytest.raises(UserError, match=r"memory ran out on a text of \d+ tokens alone.*--dtype"):
        evaluate(model, facts(), metrics=[metric])


def test_edits_are_made_of_fewer_facts_where_memory_is_tight(
    model: Model, statistics: KeyStatistics, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(model, statistics)
    assert run(model, statistics, Greedy(1)).rows == alike(whole.rows)


@pytest.mark.parametrize(
    ("mode", "said"),
    [
        ("single", "memory ran out on fact 'france' alone"),
        ("batch", "memory ran out in evaluating"),
        ("sequential", "memory ran out in evaluating"),
    ],
)
def test_memory_too_small_for_an_edit_is_the_users_error(
    model: Model, statistics: KeyStatistics, monkeypatch: pytest.MonkeyPatch, mode: str, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        run(model, statistics, Greedy(0, "memit"), mode=mode)


def test_in_context_tells_the_fact_and_leaks_no_judged_subject(model: Model) -> None:
    found = evaluate(model, facts(), "in-context", demonstrations=2)
    asked = {"rewrite", "rephrase", "locality", "locality_neighbour", "portability"}
    assert {r["metric"] for r in found.rows} == asked
    prefix = InContext(demonstrations=3).prefix(facts()[0], facts(), 0)
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


def test_an_editor_of_others_is_judged_by_name_and_as_an_object(
    model: Model, statistics: KeyStatistics
) -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Ours(Rome):
        name = "ours"

    settings: dict[str, Any] = {"steps": 3, "prefixes": 1, "prefix_tokens": 3}
    how: dict[str, Any] = {"layer": -3, "statistics": statistics, "metrics": ["rewrite"]}
    EDITORS.register("ours", Ours)
    try:
        named = evaluate(model, facts(), "ours", **how, **settings)
    finally:
        EDITORS.unregister("ours")
    given = evaluate(model, facts(), Ours(**settings), **how)
    assert named.rows == alike(given.rows) and named.method == given.method == "ours"
    assert named.layer == LAYER and named.settings["edit"] == Ours(**settings).to_json()
    with pytest.raises(UserError, match="unknown method 'ours'"):
        evaluate(model, facts(), "ours", **how)
    with pytest.raises(UserError, match=r"rome has no setting 'epsilon'.*ft-l"):
        evaluate(model, facts(), "rome", epsilon=1.0, **how)
    with pytest.raises(UserError, match="no option 'steps'"):
        evaluate(model, facts(), steps=3)
    with pytest.raises(UserError, match=r"Model\.wrap"):
        evaluate(model.hf, facts())  # type: ignore[arg-type]


def test_the_summary_is_plain_json_with_counts(model: Model) -> None:
    found = json.loads(json.dumps(evaluate(model, facts()).to_json(), allow_nan=False))
    one = found["metrics"]["rewrite"]
    assert {"mean", "se", "low", "high", "scored", "unscored"} <= one.keys()
    assert one["scored"] == 4 and found["metrics"]["portability"]["unscored"] == 4
    assert found["metrics"]["portability"]["mean"] is None
    assert not math.isnan(found["overall"]["mean"])
    assert found["settings"]["metrics"] == ["rewrite", "rephrase", "locality", "portability"]
