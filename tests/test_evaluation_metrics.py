"""Metrics as objects: their questions, their rows, and metrics from outside the package."""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterator

import pytest
from evaluation_slow import TEXT, deltas_of, facts, forced, model_of

from goldenlayers.errors import UserError
from goldenlayers.evaluation import DEFAULT_METRICS, METRICS, Metric, Question, Scoring, evaluate
from goldenlayers.evaluation.metrics import Around, lower_is_better, metrics_of, questions
from goldenlayers.evaluation.plan import EvaluationPlan
from goldenlayers.evaluation.rows import Expected, problem, score_range
from goldenlayers.evaluation.scoring import POSITIVE, Outcome, Score, Scored, Words
from goldenlayers.evaluation.summary import fact_scores
from goldenlayers.facts import Fact


def ask(fact: Fact, around: Around) -> Iterator[Question]:
    for n, prompt in enumerate((fact.prompt, *fact.rephrasings)):
        yield Question("belief", n, prompt=prompt, answer=fact.target)


def believed(question: Question, before: Outcome, after: Outcome, words: Words) -> Scored:
    was, now = (math.exp(-(side.reads[0].nll or 0)) for side in (before, after))
    return [Score(100 * now, {"before": was}), Score(100 * (now - was), {})]


BELIEF = Metric(
    "belief", ask, Scoring(believed, rows=(("", (0, 100)), ("_gain", (-100, 100))), nll=True)
)


@pytest.fixture
def registered() -> Iterator[None]:
    METRICS.register("belief", BELIEF)
    yield
    METRICS.unregister("belief")


def test_a_metric_from_outside_is_scored_as_a_slow_loop_would() -> None:
    model = model_of("llama")
    data, deltas = facts(), deltas_of(model)
    rows = EvaluationPlan(model, data, ["rewrite", BELIEF]).score(deltas)
    found = {(r["fact"], r["metric"], r["probe"]): r["score"] for r in rows}
    for fact, delta in zip(data, deltas, strict=True):
        for n, prompt in enumerate((fact.prompt, *fact.rephrasings)):
            was = math.exp(-forced(model, prompt, fact.target)[2])
            with delta.applied(model):
                now = math.exp(-forced(model, prompt, fact.target)[2])
            assert found[fact.id, "belief", n] == pytest.approx(100 * now, abs=1e-3)
            gain = found[fact.id, "belief_gain", n]
            assert gain == pytest.approx(100 * (now - was), abs=1e-3) and gain != 0


def test_a_metric_is_asked_for_as_an_object_or_once_registered_by_name(registered: None) -> None:
    model = model_of("gpt2")
    by_name = evaluate(model, facts(), metrics=["belief"])
    METRICS.unregister("belief")
    found = evaluate(model, facts(), metrics=[BELIEF])
    assert found.rows == by_name.rows and found.settings["metrics"] == ["belief"]
    assert found["belief"].mean == found.summary.metrics["belief"].mean > 0
    assert found["belief_gain"].mean == 0
    with pytest.raises(UserError, match=r"no row is of 'beleif'.*Did you mean 'belief'"):
        found["beleif"]
    with pytest.raises(UserError, match="unknown metric 'belief'"):
        evaluate(model, facts(), metrics=["belief"])


def test_its_rows_are_checked_like_ours(registered: None) -> None:
    row = {"fact": "f", "metric": "belief", "probe": 0, "score": 101.0}
    assert "no score of 0 to 100 of 'belief'" in problem(row)
    assert not problem({**row, "metric": "belief_gain", "score": -99.0})
    assert not problem({**row, "metric": "nobody_knows", "score": 1e9})
    expected = Expected(facts(), ["belief"])
    fine = {"fact": "tongue", "metric": "belief_gain", "probe": 0, "score": 1.0}
    assert expected.problem(fine) == ""
    assert "no probe 1 of 'belief_gain'" in expected.problem({**fine, "probe": 1})


def test_a_metric_of_the_held_out_text_needs_one(registered: None) -> None:
    def surprise(question: Question, before: Outcome, after: Outcome, words: Words) -> Scored:
        return [Score(sum(read.nll or 0 for read in after.reads), {})]

    def once(fact: Fact, around: Around) -> Iterator[Question]:
        yield Question("surprise", 0)

    metric = Metric("surprise", once, Scoring(surprise, "held-out", (("", POSITIVE),)))
    model = model_of("gpt2")
    with pytest.raises(UserError, match="needs a held-out text"):
        evaluate(model, facts(), metrics=[metric])
    found = evaluate(model, facts()[:1], metrics=[metric, "perplexity"], text=TEXT, text_tokens=40)
    assert found["surprise"].mean == pytest.approx(math.log(found["perplexity"].mean), abs=1e-5)


def test_workers_get_metrics_as_objects() -> None:
    for metric in (*METRICS.values(), BELIEF):
        again = pickle.loads(pickle.dumps(metric))
        assert again == metric and again.rows == metric.rows


def test_names_and_objects_each_once_and_none_is_refused() -> None:
    assert metrics_of(["kl", METRICS["kl"], "rewrite"]) == (METRICS["kl"], METRICS["rewrite"])
    assert [one.name for one in metrics_of(DEFAULT_METRICS)] == list(METRICS)[:4]
    with pytest.raises(UserError, match=r"no metric is asked for.*Known: counterfact"):
        metrics_of([])
    with pytest.raises(UserError, match=r"unknown metric 'rewrit'.*Did you mean 'rewrite'"):
        metrics_of(["rewrit"])


def test_every_row_of_ours_belongs_to_a_metric_that_bounds_it() -> None:
    names = {
        name for question in questions(facts(), list(METRICS)) for name in question.row_metrics
    }
    assert names == {name for metric in METRICS.values() for name in metric.rows}
    shares = {name for name in names if score_range(name) == (0, 100)}
    assert names - shares == {
        *("efficacy_magnitude", "paraphrase_magnitude", "neighborhood_magnitude"),
        *("fluency", "kl", "perplexity", "perplexity_before"),
    }
    assert score_range("efficacy_magnitude") == (-100, 100)
    assert score_range("rewrite_at_once") == (0, 100)
    assert score_range("unknown") == (-math.inf, math.inf)
    lower = {name for name in names if lower_is_better(name)}
    # No layer is golden by what an edit should move.
    assert lower == {"kl", "perplexity", "perplexity_before", "locality_contradicting"}
    assert not lower_is_better("unknown")


def test_a_metrics_own_mean_over_kinds(registered: None) -> None:
    rows = [
        {"fact": "a", "metric": "belief", "probe": n, "kind": kind, "score": score}
        for n, (kind, score) in enumerate([("X", 1.0), ("X", 1.0), ("X", 1.0), ("Y", 0.0)])
    ]
    assert fact_scores(rows, "belief") == {"a": 0.75}
    by_kind = Metric("belief", ask, BELIEF.scoring, by_kind=True)
    METRICS.register("belief", by_kind, replace=True)
    assert fact_scores(rows, "belief") == {"a": 0.5}
