"""The held-out text: its perplexity against a slow loop, read once per state of the weights."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from alike import alike
from deltas import random_delta
from families import tiny
from reference import full_logits
from torch.nn.functional import cross_entropy

from goldenlayers.delta import WeightDelta, applied_per_example
from goldenlayers.errors import UserError
from goldenlayers.evaluation import evaluate, reading
from goldenlayers.evaluation.plan import EvaluationPlan
from goldenlayers.evaluation.scoring import Outcome
from goldenlayers.evaluation.tokenised import HeldOut
from goldenlayers.facts import Fact
from goldenlayers.models import Model
from goldenlayers.progress import Progress
from goldenlayers.statistics import KeyStatistics

TEXT = "The capital of Italy is Rome. The Eiffel Tower is located in the city of Paris. " * 3
TOKENS = 40
LAYER = 1
HOW = {"layer": LAYER, "steps": 2, "prefixes": 1, "prefix_tokens": 3, "kl_factor": 0.0}


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny("llama", "sentencepiece_bpe")


def facts(count: int = 5) -> list[Fact]:
    names = ("France", "Italy", "Brazil", "Japan", "Peru")
    return [Fact(n, f"The capital of {n} is", "Rome", id=n.lower()) for n in names[:count]]


def slow(model: Model, delta: WeightDelta | None = None) -> float:
    window = model.encoder.tokens(TEXT)[0][: TOKENS + 1]  # BOS and the text's tokens
    with nullcontext() if delta is None else delta.applied(model):
        logits = full_logits(model, window)[:-1]
    return math.exp(float(cross_entropy(logits, torch.tensor(window[1:]))))


def perplexity(outcome: Outcome) -> float:
    (one,) = outcome.reads  # the text is one window
    assert one.nll is not None
    return math.exp(one.nll)


@pytest.fixture
def passed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Every text that is read, as often as it is."""
    found: list[tuple[int, ...]] = []
    real = reading._read_batch

    def noted(model: Model, rows: Any, *rest: Any) -> Any:
        found.extend(ids for _, ids in rows)
        return real(model, rows, *rest)

    monkeypatch.setattr(reading, "_read_batch", noted)
    return found


def options(model: Model, kind: str) -> dict[str, Any]:
    identity = KeyStatistics.identity({LAYER: model.layers[LAYER].down.in_features})
    return {
        "none": {},
        "delta": {"method": random_delta(model.hf, [2], seed=3)},
        "batch": {"method": "memit", "mode": "batch", "statistics": identity, **HOW},
        "sequential": {"method": "rome", "mode": "sequential", "statistics": identity, **HOW},
        "single": {"method": "rome", "statistics": identity, **HOW},
    }[kind]


# Of five facts: the untouched model, and the one edited model or the five.
@pytest.mark.parametrize(
    "kind, times", [("none", 1), ("delta", 2), ("batch", 2), ("sequential", 2), ("single", 6)]
)
def test_one_evaluation_reads_the_text_once_per_model(
    model: Model, passed: list[tuple[int, ...]], kind: str, times: int
) -> None:
    given = options(model, kind)
    text = {"metrics": ["rewrite", "perplexity"], "text": TEXT, "text_tokens": TOKENS}
    (window,) = HeldOut(model, TEXT, TOKENS).windows
    rows = evaluate(model, facts(), progress=Progress(chunk=2), **text, **given).rows
    assert passed.count(window[:-1]) == times
    # In parts as in one go.
    assert evaluate(model, facts(), **text, **given).rows == alike(rows)
    found = [row for row in rows if row["metric"] == "perplexity_before"]
    assert [row["score"] for row in found] == pytest.approx([slow(model)] * 5, rel=1e-4)


@pytest.mark.parametrize("kind", ["none", "delta"])
def test_rows_are_those_of_plans_that_share_nothing(model: Model, kind: str) -> None:
    delta = options(model, kind).get("method")
    text = {"metrics": ["rewrite", "perplexity"], "text": TEXT, "text_tokens": TOKENS}
    progress = Progress(chunk=2)
    rows = evaluate(model, facts(), delta or "none", progress=progress, **text).rows
    after = [row["score"] for row in rows if row["metric"] == "perplexity"]
    assert after == pytest.approx([slow(model, delta)] * 5, rel=1e-4)
    for fact in facts():
        own = HeldOut(model, TEXT, TOKENS)
        plan = EvaluationPlan(model, [fact], ["rewrite", "perplexity"], text=own)
        with nullcontext() if delta is None else delta.applied(model):
            alone = plan.score_applied()
        assert alone == alike([row for row in rows if row["fact"] == fact.id])


def test_other_deltas_are_read_anew(model: Model) -> None:
    text = HeldOut(model, TEXT, TOKENS)
    first, second = (random_delta(model.hf, [2], seed=seed, size=0.7) for seed in (0, 1))
    clean = slow(model)
    with first.applied(model):
        one = text.applied(first_layer=2)
        assert perplexity(one) == pytest.approx(slow(model), rel=1e-4)
        assert abs(perplexity(one) / clean - 1) > 0.01  # the control: it is the edited model's
        assert perplexity(text.before()) == pytest.approx(clean, rel=1e-4)
        with second.applied(model):
            both = text.applied(first_layer=2)
            assert perplexity(both) == pytest.approx(slow(model), rel=1e-4)
    with second.applied(model):
        other = text.applied(first_layer=2)
        assert perplexity(other) == pytest.approx(slow(model), rel=1e-4)
        assert text.applied(first_layer=2) is other
    with applied_per_example(model, [first, second]) as selection:
        found = text.selected([1, 0, 1], selection, first_layer=2)
    assert found.keys() == {0, 1}
    assert perplexity(found[0]) == pytest.approx(perplexity(one), rel=1e-4)
    assert perplexity(found[1]) == pytest.approx(perplexity(other), rel=1e-4)
    assert text.applied() is text.before()  # nothing is in force any more


def test_a_text_without_tokens_is_refused(model: Model) -> None:
    for empty in (None, "", " \n"):
        with pytest.raises(UserError, match="held-out text"):
            HeldOut(model, empty, TOKENS)
    # Before anything is edited.
    with pytest.raises(UserError, match="held-out text"):
        evaluate(model, facts(1), metrics=["perplexity"])
