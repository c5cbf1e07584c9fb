"""Scores of the plan against one text at a time through the model's own logits."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from alike import alike
from evaluation_slow import TOKENIZER, deltas_of, facts, forced, model_of, slow_scores
from reference import full_logits

from goldenlayers.delta import Dense, WeightDelta
from goldenlayers.errors import UserError
from goldenlayers.evaluation.metrics import METRICS, questions
from goldenlayers.evaluation.plan import EvaluationPlan
from goldenlayers.evaluation.reading import Reading, merge
from goldenlayers.evaluation.summary import summarise
from goldenlayers.facts import Fact, Probe

ALL_BUT_PERPLEXITY = [name for name in METRICS if name != "perplexity"]


@pytest.mark.parametrize("name", list(TOKENIZER))
def test_scores_equal_the_slow_loop(name: str) -> None:
    model = model_of(name)
    data, deltas = facts(), deltas_of(model)
    metrics = ["rewrite", "rephrase", "locality", "portability", "counterfact"]
    rows = EvaluationPlan(model, data, metrics).score(deltas)
    found = {(r["fact"], r["metric"], r["probe"]): r["score"] for r in rows}
    moved = 0
    for fact, delta in zip(data, deltas, strict=True):
        for (metric, probe), score in slow_scores(model, fact, delta).items():
            assert found[fact.id, metric, probe] == pytest.approx(score, abs=1e-3), (metric, probe)
            moved += metric == "locality" and score < 100
    assert moved  # the deltas do something that is seen


@pytest.mark.parametrize("name", ["gpt2", "gemma3", "opt"])
def test_one_delta_per_fact_equals_the_applied_model(name: str) -> None:
    model = model_of(name)
    data, deltas = facts(), deltas_of(model, layers=(1, 3))
    plan = EvaluationPlan(model, data, ["rewrite", "locality", "counterfact", "kl"])
    single = plan.score(deltas)
    together = []
    for i, delta in enumerate(deltas):
        with delta.applied(model):
            together += plan.score_applied(facts=[i])
    assert [r["probe"] for r in single] == [r["probe"] for r in together]
    assert [r["score"] for r in single] == alike([r["score"] for r in together])


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_rows_do_not_depend_on_the_batches_or_on_kept_states(name: str) -> None:
    model = model_of(name)
    data, deltas = facts(), deltas_of(model)
    metrics = ["rewrite", "rephrase", "locality", "portability", "generation"]
    one = EvaluationPlan(model, data, metrics, batch_size=1)
    many = EvaluationPlan(model, data, metrics)
    bare = EvaluationPlan(model, data, metrics)
    bare.baseline()
    bare._states = None
    assert many.baseline() and many._states is not None and many._states.layers == (1, 2, 3)
    rows = many.score(deltas)
    assert one.score(deltas) == alike(rows) and bare.score(deltas) == alike(rows)
    assert many.score(deltas) == rows  # again, from the same plan
    for i, delta in enumerate(deltas):
        alone = EvaluationPlan(model, data[i : i + 1], metrics).score([delta])
        assert alone == alike([r for r in rows if r["fact"] == data[i].id])


def test_dense_and_mixed_edits_share_a_pass() -> None:
    model = model_of("llama")
    data = facts()
    low = deltas_of(model)[0]
    ((name, change),) = low.changes.items()
    dense = WeightDelta({name: Dense(change.dense)})
    failed = UserError("the subject has an abnormal key")
    plan = EvaluationPlan(model, data)
    rows = plan.score([dense, low, failed])
    wanted = plan.score([low, low, None])
    assert rows[: len(rows) - 4] == alike(wanted[: len(wanted) - 4])
    lost = [r for r in rows if r["fact"] == "tongue"]
    assert all(r["score"] is None for r in lost)
    assert lost[0]["reason"] == "the edit failed: the subject has an abnormal key"


def test_an_unedited_model_is_at_the_base_rate() -> None:
    model = model_of("gemma3")
    plan = EvaluationPlan(model, facts(), ALL_BUT_PERPLEXITY)
    rows = plan.score_applied()
    by = {m: [r["score"] for r in rows if r["metric"] == m] for m in {r["metric"] for r in rows}}
    assert {s for s in by["locality"] if s is not None} == {100.0}
    assert by["kl"] == alike([0.0] * len(by["kl"]))
    for fact in facts():
        got, want, _ = forced(model, fact.prompt, fact.target)
        (row,) = [r for r in rows if r["fact"] == fact.id and r["metric"] == "rewrite"]
        assert row["score"] == pytest.approx(
            100 * sum(a == b for a, b in zip(got, want, strict=True)) / len(got), abs=1e-3
        )


def test_a_zero_delta_scores_as_no_edit() -> None:
    model = model_of("llama")
    plan = EvaluationPlan(model, facts(), ["rewrite", "locality", "kl"])
    nothing = [delta * 0.0 for delta in deltas_of(model)]
    assert plan.score(nothing) == alike(plan.score([None] * 3))


def test_before_is_the_untouched_model_even_inside_applied() -> None:
    model = model_of("llama")
    delta = deltas_of(model)[1]
    outside = EvaluationPlan(model, facts())
    outside.baseline()
    with delta.applied(model):
        wanted = outside.score_applied()
        inside = EvaluationPlan(model, facts())  # made while the delta is in force
        assert inside.score_applied() == alike(wanted)
        with pytest.raises(UserError, match="while a delta is applied"):
            inside.score([None] * 3)
    assert any(r["metric"] == "locality" and (r["score"] or 0) < 100 for r in wanted)


def test_a_prefix_stands_before_every_probe() -> None:
    model = model_of("llama")
    fact = facts()[0]
    prefix = "New fact: The capital of France is Rome.\n"
    rows = EvaluationPlan(model, [fact]).score([prefix])
    for n, prompt in enumerate(fact.rephrasings):
        got, want, _ = forced(model, prefix + prompt, fact.target)
        share = 100 * sum(a == b for a, b in zip(got, want, strict=True)) / len(got)
        (row,) = [r for r in rows if r["metric"] == "rephrase" and r["probe"] == n]
        assert row["score"] == pytest.approx(share, abs=1e-3)
    (row,) = [r for r in rows if r["metric"] == "locality" and r["probe"] == 1]
    before = forced(model, "The capital of Brazil is", "the city of gold")[0]
    after = forced(model, prefix + "The capital of Brazil is", "the city of gold")[0]
    share = 100 * sum(a == b for a, b in zip(before, after, strict=True)) / len(before)
    assert row["score"] == pytest.approx(share, abs=1e-3)


def test_a_prefix_that_overflows_the_context_is_unscored() -> None:
    model = model_of("llama")
    rows = EvaluationPlan(model, facts()[:1]).score(["Rome is a city. " * 200])
    assert {r["score"] for r in rows} == {None}
    assert {r["reason"] for r in rows} == {"the text is longer than the model's context"}


# --- data as it comes ---------------------------------------------------------------------------


def test_missing_probes_are_counted_with_their_reason() -> None:
    model = model_of("gpt2")
    bare = facts()[2]
    rows = EvaluationPlan(model, [bare], ALL_BUT_PERPLEXITY).score_applied()
    reasons = {r["metric"]: r.get("reason") for r in rows}
    assert reasons["rewrite"] is None
    assert reasons["rephrase"] == "the fact has no rephrasings"
    assert reasons["locality"] == "the fact has no locality probes"
    assert reasons["portability"] == "the fact has no portability probes"
    assert reasons["efficacy_success"] == "the fact has no old answer"
    summary = summarise(rows)
    assert math.isnan(summary.metrics["rephrase"].mean)
    assert summary.metrics["rephrase"].unscored == 1
    assert summary.overall_of == ("rewrite",)


def test_a_probe_longer_than_the_context_is_unscored_and_the_rest_is_scored() -> None:
    model = model_of("gpt2")
    fact = dataclasses.replace(
        facts()[0],
        locality=(Probe("Rome is a city. " * 300, "Rome"), Probe("The capital of Italy is")),
        rephrasings=("word " * 2000 + "France has the capital",),
    )
    rows = EvaluationPlan(model, [fact]).score(deltas_of(model, 1))
    long = [r for r in rows if r["score"] is None]
    assert [(r["metric"], r["probe"]) for r in long] == [
        ("rephrase", 0),
        ("locality", 0),
        ("locality_neighbour", 0),
    ]
    assert {r["reason"] for r in long} == {"the text is longer than the model's context"}
    assert all(r["score"] is not None for r in rows if r not in long)


@pytest.mark.parametrize(
    ("subject", "prompt", "answer"),
    [
        ("باريس", "عاصمة فرنسا باريس وعاصمة إيطاليا", "روما"),
        ("東京", "日本の首都東京は", "大阪"),
        ("Zürich", "Zürich liegt in der Stadt", "Köln"),
        ("🙂", "The sign 🙂 means", "🙃🙃"),
    ],
)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_other_scripts_are_scored(name: str, subject: str, prompt: str, answer: str) -> None:
    model = model_of(name)
    fact = Fact(
        subject,
        prompt,
        answer,
        id="x",
        locality=(Probe(prompt),),
        rephrasings=(prompt,),
        portability=(Probe(prompt, answer),),
    )
    rows = EvaluationPlan(model, [fact], ["rewrite", "rephrase", "locality", "generation"])
    scored = rows.score(deltas_of(model, 1))
    assert all(r["score"] is not None for r in scored)
    (rewrite,) = [r for r in scored if r["metric"] == "rewrite"]
    assert len(rewrite["evidence"]["answer"]) == len(
        model.encoder.encode(prompt, answer).answer_ids
    )


def test_a_model_that_breaks_down_is_unscored_not_wrong() -> None:
    model = model_of("llama")
    delta = deltas_of(model, 1)[0] * 1e30
    rows = EvaluationPlan(model, facts()[:1], ["rewrite", "counterfact"]).score([delta * 1e8])
    assert {r["score"] for r in rows} == {None}
    broken = [r for r in rows if r["reason"] == "the model's output is not a number"]
    assert len(broken) == 9  # all but the neighbour whose own answer is the new one


def test_nothing_is_dropped() -> None:
    model = model_of("gpt2")
    asked = questions(facts(), ALL_BUT_PERPLEXITY)
    rows = EvaluationPlan(model, facts(), ALL_BUT_PERPLEXITY).score_applied()
    assert [(r["fact"], r["metric"], r["probe"]) for r in rows] == [
        (facts()[u.fact].id, metric, u.probe) for u in asked for metric in u.row_metrics
    ]


def test_equal_ids_unknown_metrics_and_a_missing_text_are_refused() -> None:
    model = model_of("gpt2")
    with pytest.raises(UserError, match="two facts have the id"):
        EvaluationPlan(model, [facts()[0]] * 2)
    with pytest.raises(UserError, match="rewrite"):
        EvaluationPlan(model, facts(), ["rewrit"])
    with pytest.raises(UserError, match="held-out text"):
        EvaluationPlan(model, facts(), ["perplexity"])
    with pytest.raises(UserError, match="2 edits for 3 facts"):
        EvaluationPlan(model, facts()).score([None, None])


def test_equal_texts_and_beginnings_share_a_row() -> None:
    def reading(*ids: int, carrier: int = -1) -> Any:
        return Reading(ids, (len(ids) - 1,), carrier=carrier)

    given = [
        reading(1, 2),
        reading(1, 2, 3),
        reading(1, 2),
        reading(1, 3),
        reading(1, 2, carrier=0),
    ]
    rows, home = merge(given)
    assert sorted(rows) == [(-1, (1, 2, 3)), (-1, (1, 3)), (0, (1, 2))]
    assert rows[home[-1, (1, 2)]] == (-1, (1, 2, 3))


@pytest.mark.parametrize("name", ["gpt2", "gemma3"])
def test_soft_scores_are_probabilities(name: str) -> None:
    """Against whole logits, one prompt at a time: the answer's mean probability per token, and how
    much is left of the untouched model's predictions, the rarer tokens taken as one.
    """
    model = model_of(name)
    fact, delta = facts()[0], deltas_of(model)[0]
    rows = EvaluationPlan(model, facts()[:1]).score([delta])
    soft = {(r["metric"], r["probe"]): r.get("soft") for r in rows}

    def predictions(prompt: str, answer: str) -> tuple[torch.Tensor, tuple[int, ...]]:
        encoding = model.encoder.encode(prompt, answer)
        logits = full_logits(model, list(encoding.ids)).double()
        return logits[encoding.n_prompt - 1 : -1].softmax(-1), encoding.answer_ids

    probe = fact.locality[1]
    was, _ = predictions(probe.prompt, probe.answer or "")
    with delta.applied(model):
        answered, ids = predictions(fact.prompt, fact.target)
        now, _ = predictions(probe.prompt, probe.answer or "")
    wanted = 100 * answered[range(len(ids)), ids].log().mean().exp()
    assert soft["rewrite", 0] == pytest.approx(float(wanted), rel=1e-4)
    left = []
    for p, q in zip(was, now, strict=True):
        top = p.topk(8).indices
        rest = min(1 - p[top].sum(), 1 - q[top].sum())
        left.append(torch.minimum(p[top], q[top]).sum() + rest)
        assert left[-1] >= torch.minimum(p, q).sum() - 1e-9  # never less than all tokens apart
    assert soft["locality", 1] == pytest.approx(100 * float(torch.stack(left).mean()), rel=1e-4)
    assert soft["locality_neighbour", 1] == soft["locality", 1]
    assert float(soft["locality", 1] or 100) < 99.9
    untouched = EvaluationPlan(model, facts()[:1]).score([None])
    assert {r["soft"] for r in untouched if r["metric"] == "locality"} == {100}
