"""Aggregation and figures against slow obvious loops."""

from __future__ import annotations

import json
import math
import random
import statistics
from collections import Counter
from typing import Any

import numpy as np
import pytest
from shared_data import DATA, needs_data

from goldenlayers.evaluation.bootstrap import resampled_means, spearman
from goldenlayers.evaluation.scoring import fluency
from goldenlayers.evaluation.summary import (
    COUNTERFACT_METRICS,
    fact_scores,
    overall_by_fact,
    summarise,
)


def row(
    fact: str, metric: str, score: float | None, *, kind: str | None = None, **more: Any
) -> dict[str, Any]:
    made = {"fact": fact, "metric": metric, "probe": 0, "score": score, "evidence": {}, **more}
    return made if kind is None else {**made, "kind": kind}


def random_rows(seed: int, facts: int = 12) -> list[dict[str, Any]]:
    """Uneven numbers of probes and kinds, some unscored, some facts without a metric."""
    rng = random.Random(seed)
    rows = []
    for fact in range(facts):
        for metric in ("rewrite", "rephrase", "locality", "portability", "fluency"):
            for probe in range(rng.randint(0, 4)):
                score = rng.choice([None, math.nan, *(rng.random() for _ in range(6))])
                kind = rng.choice("XYZ") if metric in ("portability", "locality") else None
                rows.append(row(f"f{fact}", metric, score, kind=kind, probe=probe))
    rng.shuffle(rows)
    return rows


def slow_fact_scores(rows: list[dict[str, Any]], metric: str) -> dict[str, float]:
    found = {}
    for fact in {r["fact"] for r in rows if r["metric"] == metric}:
        own = [
            r
            for r in rows
            if r["fact"] == fact
            and r["metric"] == metric
            and r["score"] is not None
            and not math.isnan(r["score"])
        ]
        if metric == "portability":
            kinds = sorted({r["kind"] for r in own})
            parts = [
                statistics.fmean(r["score"] for r in own if r["kind"] == kind) for kind in kinds
            ]
        else:
            parts = [r["score"] for r in own]
        found[fact] = statistics.fmean(parts) if parts else math.nan
    return found


# Aggregation


@pytest.mark.parametrize("seed", range(4))
def test_means_and_errors_against_loops(seed: int):
    rows = random_rows(seed)
    summary = summarise(rows, resamples=200)
    means = []
    for metric in ("rewrite", "rephrase", "locality", "portability", "fluency"):
        slow = slow_fact_scores(rows, metric)
        fast = fact_scores(rows, metric)
        assert fast.keys() == slow.keys()
        assert all(fast[f] == pytest.approx(slow[f], nan_ok=True) for f in slow)
        values = [v for v in slow.values() if not math.isnan(v)]
        one = summary.metrics[metric]
        assert one.mean == pytest.approx(statistics.fmean(values))
        assert one.se == pytest.approx(statistics.stdev(values) / math.sqrt(len(values)))
        assert one.low <= one.mean <= one.high and one.low < one.high
        assert one.facts == len(values)
        own = [r["score"] for r in rows if r["metric"] == metric]
        lost = sum(s is None or math.isnan(s) for s in own)
        assert (one.scored, one.unscored) == (len(own) - lost, lost)
        if metric != "fluency":
            means.append(one.mean)
    assert summary.overall is not None
    assert summary.overall_of == ("rewrite", "rephrase", "locality", "portability")
    assert summary.overall.mean == pytest.approx(statistics.fmean(means))
    assert list(summary.kinds) and set(summary.kinds) == {"locality", "portability"}
    for kind, one in summary.kinds["locality"].items():
        some = [r for r in rows if r["metric"] == "locality" and r["kind"] == kind]
        slow = slow_fact_scores(some, "locality")
        assert one.mean == pytest.approx(
            statistics.fmean(v for v in slow.values() if not math.isnan(v))
        )
        assert one.scored + one.unscored == len(some)


def test_portability_is_a_mean_of_kinds_other_metrics_of_probes():
    scores = [("X", 1.0), ("X", 1.0), ("X", 1.0), ("Y", 0.0)]
    rows = [row("a", m, s, kind=k) for m in ("portability", "locality") for k, s in scores]
    assert fact_scores(rows, "portability") == {"a": 0.5}
    assert fact_scores(rows, "locality") == {"a": 0.75}
    assert fact_scores(rows, "portability", kind="X") == {"a": 1.0}
    # A kind without a scored probe takes no part.
    rows.append(row("a", "portability", None, kind="Z"))
    assert fact_scores(rows, "portability") == {"a": 0.5}


def test_a_fact_with_many_probes_weighs_as_much_as_one_with_few():
    rows = [row("a", "rephrase", 1.0, probe=i) for i in range(9)] + [row("b", "rephrase", 0.0)]
    assert summarise(rows).metrics["rephrase"].mean == 0.5


def test_unscored_rows_are_counted_with_reasons_and_never_zero():
    rows = [
        row("a", "rewrite", 1.0),
        row("b", "rewrite", None, evidence={"reason": "longer than the context"}),
        row("c", "rewrite", math.nan, evidence="longer than the context"),
        row("d", "rewrite", None, reason="no answer"),
        row("e", "rewrite", None, evidence=None),
    ]
    one = summarise(rows).metrics["rewrite"]
    assert one.mean == 1.0 and one.facts == 1 and (one.scored, one.unscored) == (1, 4)
    assert one.reasons == {
        "longer than the context": 2,
        "no answer": 1,
        "no reason given": 1,
    }
    # Negative control: as zeros they would give 0.2.
    assert summarise([{**r, "score": r["score"] or 0.0} for r in rows[:2]]).metrics[
        "rewrite"
    ].mean == pytest.approx(0.5)


def test_no_rows_one_fact_all_unscored_constant():
    nothing = summarise([])
    assert nothing.metrics == {} and nothing.overall is None and nothing.overall_of == ()
    one = summarise([row("a", "rewrite", 0.25)]).metrics["rewrite"]
    assert one.mean == 0.25
    assert math.isnan(one.se) and math.isnan(one.low) and math.isnan(one.high)
    lost = summarise([row(f, "rewrite", None) for f in "ab"])
    assert math.isnan(lost.metrics["rewrite"].mean) and lost.metrics["rewrite"].unscored == 2
    assert lost.overall is not None and math.isnan(lost.overall.mean)
    flat = summarise([row(f, "rewrite", 0.5) for f in "abc"]).metrics["rewrite"]
    assert (flat.mean, flat.se, flat.low, flat.high) == (0.5, 0.0, 0.5, 0.5)


def test_an_unscored_metric_is_left_out_of_overall_and_the_record_says_so():
    rows = [row(f, "rewrite", 1.0) for f in "ab"] + [row(f, "rephrase", None) for f in "ab"]
    summary = summarise(rows)
    assert summary.overall is not None and summary.overall.mean == 1.0
    assert summary.overall_of == ("rewrite",)


def test_overall_takes_fluency_only_when_asked():
    rows = [row(f, m, s) for f in "ab" for m, s in (("rewrite", 1.0), ("fluency", 600.0))]
    assert summarise(rows).overall_of == ("rewrite",)
    asked = summarise(rows, overall=("rewrite", "fluency"))
    assert asked.overall is not None and asked.overall.mean == 300.5
    assert asked.overall_of == ("rewrite", "fluency")


def test_overall_error_and_interval_carry_how_metrics_move_together():
    rng = np.random.default_rng(0)
    a = rng.random(40)
    together = [row(str(i), m, x) for i, x in enumerate(a) for m in ("rewrite", "locality")]
    against = [row(str(i), "rewrite", x) for i, x in enumerate(a)]
    against += [row(str(i), "locality", 1 - x) for i, x in enumerate(a)]
    one, other = summarise(together).overall, summarise(against).overall
    assert one is not None and other is not None
    assert one.se == pytest.approx(np.std(a, ddof=1) / math.sqrt(40))
    assert one.high - one.low == pytest.approx(4 * one.se, rel=0.15)
    assert other.se == pytest.approx(0, abs=1e-12) and other.high - other.low < 1e-12


def test_overall_by_fact():
    rows = [row("a", "rewrite", 1.0), row("a", "rephrase", 0.0), row("b", "rewrite", 0.5)]
    rows += [row("b", "rephrase", None), row("c", "locality", None), row("a", "fluency", 600.0)]
    found = overall_by_fact(rows)
    assert found["a"] == 0.5 and found["b"] == 0.5 and math.isnan(found["c"])
    assert overall_by_fact([]) == {}


def test_counterfact_score_is_the_harmonic_mean_of_the_three_means():
    rng = np.random.default_rng(1)
    table = rng.integers(0, 2, size=(60, 3)).astype(float)
    rows = [
        row(str(i), name, float(table[i, j]))
        for i in range(60)
        for j, name in enumerate(COUNTERFACT_METRICS)
    ]
    score = summarise(rows).counterfact_score
    assert score is not None
    assert score.mean == pytest.approx(statistics.harmonic_mean(table.mean(axis=0).tolist()))
    replicates = [
        statistics.harmonic_mean(table[rng.integers(0, 60, 60)].mean(axis=0).tolist())
        for _ in range(3000)
    ]
    assert score.se == pytest.approx(statistics.stdev(replicates), rel=0.1)
    low, high = np.percentile(replicates, [2.5, 97.5])
    assert score.low == pytest.approx(low, abs=0.02)
    assert score.high == pytest.approx(high, abs=0.02)
    assert summarise(rows[:2]).counterfact_score is None
    zero = [{**r, "score": 0.0} if r["metric"] == "efficacy_success" else r for r in rows]
    none = summarise(zero).counterfact_score
    assert none is not None and none.mean == 0 and math.isnan(none.se)


def test_summary_is_json_without_nan():
    text = json.dumps(summarise(random_rows(2, facts=1)).to_json(), allow_nan=False)
    back = json.loads(text)
    assert {"mean", "se", "low", "high", "scored", "unscored"} <= set(
        next(iter(back["metrics"].values()))
    )
    assert json.loads(json.dumps(summarise([]).to_json()))["overall"] is None


def test_same_seed_same_interval_and_bad_settings():
    rows = random_rows(0)
    assert summarise(rows, seed=3).to_json() == summarise(rows, seed=3).to_json()
    assert summarise(rows, seed=3).to_json() != summarise(rows, seed=4).to_json()
    wide = summarise(rows, level=0.99).metrics["rewrite"]
    narrow = summarise(rows, level=0.5).metrics["rewrite"]
    assert wide.high - wide.low > narrow.high - narrow.low
    for level, resamples in ((1.0, 10), (0.0, 10), (0.9, 0)):
        with pytest.raises(ValueError, match="level"):
            summarise(rows, level=level, resamples=resamples)


def test_resampled_means_against_a_loop_and_coverage():
    values = np.array([[0.1, np.nan], [0.9, 0.3], [0.4, np.nan], [0.5, 0.8]])
    drawn = resampled_means(values, 50, seed=5)
    draws = np.random.default_rng(5).integers(4, size=(50, 4))
    for s in range(50):
        for m in range(2):
            some = [values[i, m] for i in draws[s] if not math.isnan(values[i, m])]
            expected = statistics.fmean(some) if some else math.nan
            assert drawn[s, m] == pytest.approx(expected, nan_ok=True)
    assert np.isnan(drawn[:, 1]).any()  # some resamples hold neither scored fact
    assert resampled_means(values[:, 0], 50, seed=5) == pytest.approx(drawn[:, 0])
    assert np.isnan(resampled_means(np.zeros((0, 2)), 3)).all()
    # Many facts are drawn in blocks: the spread is still the standard error.
    many = np.random.default_rng(0).random(5000)
    spread = resampled_means(many, 500).std()
    assert spread == pytest.approx(many.std() / math.sqrt(5000), rel=0.15)


# Figures


def slow_fluency(words: list[str]) -> float:
    total = 0.0
    for n, weight in ((2, 2 / 3), (3, 4 / 3)):
        grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        for count in Counter(grams).values():
            share = count / len(grams)
            total -= weight * share * math.log2(share) / 2
    return 100 * total


def test_fluency_against_a_loop_and_its_ends():
    rng = random.Random(0)
    words = [rng.choice("abcdef") for _ in range(100)]
    assert fluency(words) == pytest.approx(slow_fluency(words))
    assert fluency([str(i) for i in range(100)]) == pytest.approx(662, abs=0.1)
    assert fluency(list(range(100))) == fluency([str(i) for i in range(100)])
    assert fluency(["a"] * 100) == 0
    assert fluency(["a", "b"] * 50) == pytest.approx(100, abs=0.1)  # one bit either way
    assert fluency("one, two") == pytest.approx(slow_fluency(["one", ",", "two"]))
    for short in ([], ["a"], ["a", "b"], "", "two words"):
        assert math.isnan(fluency(short))


@needs_data
def test_fluency_of_natural_text_lies_near_600():
    path = DATA / "corpora" / "wikipedia_en_2014_heldout.jsonl"
    found = []
    with path.open(encoding="utf-8") as lines:
        for _, line in zip(range(60), lines, strict=False):
            words = json.loads(line)["text"].split()[:100]
            if len(words) == 100:
                found.append(fluency(words))
    assert len(found) > 20
    assert 600 < statistics.median(found) < 662 and min(found) > 500


def slow_spearman(a: list[float], b: list[float]) -> float:
    def ranks(values: list[float]) -> list[float]:
        return [sum(w < v for w in values) + (values.count(v) + 1) / 2 for v in values]

    return statistics.correlation(ranks(a), ranks(b))


def test_spearman_against_a_loop_with_ties():
    rng = random.Random(0)
    for n in (2, 3, 5, 30):
        a = [float(v) for v in rng.sample(range(n), n)]
        b = [float(rng.randint(0, n // 2)) for _ in range(n - 1)] + [float(n)]
        assert spearman(a, b) == pytest.approx(slow_spearman(a, b))
    assert spearman([1, 2, 3], [10, 100, 1000]) == 1
    assert spearman([1, 2, 3], [3, 2, 1]) == -1
    assert spearman([1, 2, math.nan, 3], [1, 2, -9, 3]) == 1
    for undefined in (([], []), ([1], [1]), ([1, 1, 1], [1, 2, 3]), ([1, math.nan], [1, 2])):
        assert math.isnan(spearman(*undefined))
    with pytest.raises(ValueError, match="one length"):
        spearman([1, 2], [1])
