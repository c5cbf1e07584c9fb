"""The truth against slow obvious loops."""

from __future__ import annotations

import json
import math
import random
import statistics
from typing import Any

import numpy as np
import pytest

from goldenlayers.errors import UserError
from goldenlayers.truth import OVERALL, Truth, split_half, to_json, transfer_matrix
from goldenlayers.truth.table import optimal

METRICS = ("rewrite", "rephrase", "locality", "portability", "fluency")


def row(fact: str, layer: int, metric: str, score: float | None, **more: Any) -> dict[str, Any]:
    return {"fact": fact, "layer": layer, "metric": metric, "probe": 0, "score": score, **more}


def random_rows(seed: int, n_facts: int = 12, n_layers: int = 5) -> list[dict[str, Any]]:
    """Uneven probes, kinds, unscored rows and cells; coarse scores, so that layers tie."""
    rng = random.Random(seed)
    rows = []
    for f in range(n_facts):
        for metric in METRICS:
            n_probes = rng.randint(0, 3)
            for layer in range(n_layers):
                dead = rng.random() < 0.1
                for probe in range(n_probes):
                    score = None if dead else rng.choice([0.0, 50.0, 100.0, 100 * (layer == 1)])
                    score = 600.0 if metric == "fluency" and not dead else score
                    kind = {"kind": "XY"[probe % 2]} if metric == "portability" else {}
                    rows.append(row(f"f{f}", layer, metric, score, **kind) | {"probe": probe})
    rng.shuffle(rows)
    return rows


def of_tables(**tables: Any) -> Truth:
    """A truth of one metric, from facts × layers."""
    rows = [
        row(f"f{f}", layer, metric, score)
        for metric, table in tables.items()
        for f, line in enumerate(table)
        for layer, score in enumerate(line)
    ]
    return Truth.from_rows(rows)


def slow_cell(rows: list[dict[str, Any]], fact: str, layer: int, metric: str) -> float:
    mine = [r for r in rows if (r["fact"], r["layer"]) == (fact, layer)]
    if metric == OVERALL:
        parts = [slow_cell(rows, fact, layer, m) for m in METRICS[:4]]
        parts = [p for p in parts if p == p]
        return statistics.fmean(parts) if parts else math.nan
    mine = [r for r in mine if r["metric"] == metric and r["score"] is not None]
    if metric == "portability":
        kinds = sorted({r["kind"] for r in mine})
        parts = [statistics.fmean(r["score"] for r in mine if r["kind"] == k) for k in kinds]
    else:
        parts = [r["score"] for r in mine]
    return statistics.fmean(parts) if parts else math.nan


def slow_mean(column: list[float]) -> float:
    known = [x for x in column if x == x]
    return statistics.fmean(known) if known else math.nan


@pytest.mark.parametrize("seed", range(3))
def test_tables_means_golden_layer_and_oracle(seed: int):
    rows = random_rows(seed)
    truth = Truth.from_rows(rows)
    assert truth.layers == (0, 1, 2, 3, 4) and truth.metrics == (*truth.metrics[:-1], OVERALL)
    for metric in (*METRICS, OVERALL):
        slow = [[slow_cell(rows, f, layer, metric) for layer in range(5)] for f in truth.facts]
        np.testing.assert_allclose(truth.table(metric), slow, rtol=1e-12)
        means = [slow_mean([line[layer] for line in slow]) for layer in range(5)]
        np.testing.assert_allclose(truth.means(metric), means, rtol=1e-12)
        assert truth.scored(metric).tolist() == [
            sum(line[layer] == line[layer] for line in slow) for layer in range(5)
        ]
        assert truth.missing(metric) == sum(x != x for line in slow for x in line)
        best = max(range(5), key=lambda layer: (round(means[layer], 9), -layer))
        assert truth.golden_layer(metric) == best
        assert truth.ranking(metric) == sorted(
            range(5), key=lambda layer: (-round(means[layer], 9), layer)
        )
        tops = [[x for x in line if x == x] for line in slow]
        assert truth.oracle(metric).value == pytest.approx(
            statistics.fmean(max(line) for line in tops if line)
        )
        gaps = [max(t) - line[best] for t, line in zip(tops, slow, strict=True) if line[best] >= 0]
        gap = truth.gap(metric)
        assert gap.value == pytest.approx(statistics.fmean(gaps)) and gap.n == len(gaps)
        optima = [
            tuple(i for i, x in enumerate(line) if t and abs(x - max(t)) < 1e-9)
            for t, line in zip(tops, slow, strict=True)
        ]
        best_of = [tuple(np.flatnonzero(row)) for row in optimal(truth.table(metric))]
        assert best_of == optima
        split, shallow = [0.0] * 5, [0.0] * 5
        for some in optima:
            for layer in some:
                split[layer] += 1 / len(some)
            if some:
                shallow[some[0]] += 1
        np.testing.assert_allclose(truth.histogram(metric), split)
        np.testing.assert_allclose(truth.histogram(metric, split=False), shallow)


def test_fluency_is_no_part_of_overall():
    truth = of_tables(rewrite=[[10, 20]], fluency=[[600, 0]])
    assert truth.table().tolist() == [[10, 20]] and truth.golden_layer() == 1
    assert truth.overall_of == ("rewrite",)


def test_rows_that_are_there_twice_count_once():
    rows = random_rows(1)
    twice = Truth.from_rows([*rows, *(r | {"score": 0.0} for r in rows)])
    np.testing.assert_array_equal(twice.table(), Truth.from_rows(rows).table())


def test_ties_go_to_the_shallower_layer_also_behind_rounding():
    assert of_tables(rewrite=[[1, 5, 5, 2]]).golden_layer() == 1
    # 0.1 + 0.2 + 0.3 and 0.3 + 0.2 + 0.1 differ in the last digit.
    assert of_tables(rewrite=[[0.1, 0.3], [0.2, 0.2], [0.3, 0.1]]).golden_layer() == 0


def test_a_layer_scored_on_few_facts_is_not_golden():
    table = [[50, None, 60]] * 9 + [[50, 100, 60]]
    truth = of_tables(rewrite=table)
    assert truth.golden_layer() == 2 and truth.ranking() == [2, 0]
    assert truth.missing() == 9
    text = " ".join(truth.warnings)
    assert "9 of 30 cells have no score (layers 1)" in text and "cannot be golden" in text
    assert truth.wins() == {0: 0.0, 1: 0.0, 2: 1.0}


def test_intervals_cover_the_mean_and_the_gap():
    """95 % intervals over facts hold the true value in about 95 % of repeated samples."""
    rng = np.random.default_rng(0)
    hits = np.zeros(2)
    n = 200
    for seed in range(n):
        facts = rng.normal(50, 10, 40)
        table = np.stack([facts, facts + rng.exponential(4, 40)], 1)
        scores = {"rewrite": table, OVERALL: table}
        truth = Truth(tuple(map(str, range(40))), (0, 1), scores, seed=seed, resamples=400)
        low, high = truth.intervals()[0]
        hits[0] += low <= 50 <= high
        regret = truth.regret(0)
        hits[1] += regret.low <= 4 <= regret.high
        assert truth.golden_layer() == 1 and truth.gap().value == 0
    assert (hits / n > 0.86).all() and (hits / n < 1).any()


def test_regret_is_paired():
    rng = np.random.default_rng(1)
    facts = rng.normal(50, 30, 50)
    table = np.stack([facts, facts + 1], 1)
    truth = Truth(tuple(map(str, range(50))), (3, 7), {OVERALL: table})
    regret = truth.regret(3)
    assert regret.value == pytest.approx(1) and regret.high - regret.low < 1e-9
    assert truth.regret(7).value == 0
    with pytest.raises(UserError, match=r"layer 5 was not swept.*3, 7"):
        truth.regret(5)


def test_split_half_against_a_loop():
    truth = Truth.from_rows(random_rows(5, n_facts=15))
    found = split_half(truth, repeats=60)
    table = truth.table()
    known = [i for i in range(len(table)) if not np.isnan(table[i]).all()]
    rng = np.random.default_rng(truth.seed)
    regrets, hits = [], 0

    def means(members: list[int]) -> list[float]:
        columns = [[float(table[i, layer]) for i in members] for layer in range(5)]
        some = sum(bool((table[i] >= 0).any()) for i in members)
        return [
            slow_mean(c) if sum(x == x for x in c) >= max(1, some / 2) else math.nan
            for c in columns
        ]

    for _ in range(60):
        order = [known[i] for i in rng.permutation(len(known))]
        a, b = means(order[: len(known) // 2]), means(order[len(known) // 2 :])
        best = max(x for x in a if x == x)
        chosen = next(i for i, x in enumerate(a) if abs(x - best) < 1e-9)
        top = max(x for x in b if x == x)
        regrets.append(top - b[chosen])
        hits += abs(top - b[chosen]) < 1e-9
    assert found.regret.value == pytest.approx(statistics.fmean(regrets))
    assert found.regret.low == pytest.approx(np.percentile(regrets, 2.5))
    assert found.hit == pytest.approx(hits / 60) and found.regret.n == 60
    assert sum(found.chosen.values()) == pytest.approx(1)
    assert (found.n_proxy, found.n_test) == (len(known) // 2, len(known) - len(known) // 2)


def test_a_clear_layer_carries_over_and_noise_does_not():
    rng = np.random.default_rng(2)
    noise = rng.normal(0, 10, (60, 8))
    clear = noise + np.where(np.arange(8) == 3, 40, 0)
    ids = tuple(map(str, range(60)))
    good = split_half(Truth(ids, tuple(range(8)), {OVERALL: clear}))
    bad = split_half(Truth(ids, tuple(range(8)), {OVERALL: noise}))
    assert good.hit == 1 and good.regret.value == 0 and good.chosen == {3: 1}
    assert bad.hit < 0.5 and bad.regret.value > 1
    fewer = split_half(Truth(ids, tuple(range(8)), {OVERALL: noise}), n_proxy=3)
    assert (fewer.n_proxy, fewer.n_test) == (3, 57)


def test_facts_of_one_subject_stay_on_one_side():
    # Two subjects that want different layers: a choice made on one is wrong for the other.
    table = np.array([[1.0, 0.0]] * 10 + [[0.0, 1.0]] * 10)
    truth = Truth(tuple(map(str, range(20))), (0, 1), {OVERALL: table})
    groups = {str(i): i // 10 for i in range(20)}
    assert split_half(truth, groups=groups).regret.value == 1
    assert split_half(truth).regret.value < 1
    with pytest.raises(UserError, match="20 scored facts about 1 subjects"):
        split_half(truth, groups=dict.fromkeys(groups, "one"))
    with pytest.raises(UserError, match="cannot be split into 20 proxy facts"):
        split_half(truth, n_proxy=20)


def test_transfer_between_sweeps():
    a = of_tables(rewrite=[[90, 50, 10], [90, 60, 10]])
    b = of_tables(rewrite=[[20, 80, 70]])
    c = Truth(("x",), (1, 2), {OVERALL: np.array([[5.0, 9.0]])})
    two = transfer_matrix({"a": a, "b": b})
    assert two.golden == (0, 1)
    assert [[one.value for one in line] for line in two.regret] == [[0, 60], [35, 0]]
    three = transfer_matrix({"a": a, "b": b, "c": c})
    assert three.golden == (0, 1, 2)  # each of all its layers; c was not swept at layer 0
    np.testing.assert_equal(
        [[one.value for one in line] for line in three.regret],
        [[0, 60, np.nan], [35, 0, 4], [80, 10, 0]],
    )
    record = json.loads(json.dumps(three.to_json(), allow_nan=False))
    assert record["names"] == ["a", "b", "c"] and record["regret"][0][2]["value"] is None
    with pytest.raises(UserError, match="at least two"):
        transfer_matrix({"a": a})


def test_json_is_strict_and_says_the_figures():
    truth = Truth.from_rows(random_rows(3))
    found = json.loads(json.dumps(to_json(truth), allow_nan=False))
    assert found["golden_layer"] == truth.golden_layer()
    assert found["oracle"]["value"] == truth.oracle().value
    assert found["metrics"]["rewrite"]["mean"] == truth.means("rewrite").tolist()
    assert found["ranking"] == truth.ranking()
    assert sum(found["wins"].values()) == pytest.approx(1)


def test_nothing_scored_and_nothing_there():
    dead = of_tables(rewrite=[[None, None]], kl=[[0.1, 0.2]])
    with pytest.raises(UserError, match="no golden layer by overall"):
        dead.golden_layer()
    with pytest.raises(UserError, match="no golden layer by kl"):
        dead.golden_layer("kl")
    found = json.loads(json.dumps(to_json(dead), allow_nan=False))
    assert found["golden_layer"] is None and found["split_half"] is None
    with pytest.raises(UserError, match="no rows yet"):
        Truth.from_rows([])
    with pytest.raises(UserError, match="name no layer"):
        Truth.from_rows([{"fact": "f", "metric": "rewrite", "probe": 0, "score": 1.0}])
    with pytest.raises(UserError, match="has no 'fluency'"):
        dead.means("fluency")


def test_one_fact_has_no_intervals():
    one = of_tables(rewrite=[[10, 20]])
    assert np.isnan(one.intervals()).all()
    assert math.isnan(one.oracle().low) and one.oracle().value == 20
    assert math.isnan(one.regret(0).low)
