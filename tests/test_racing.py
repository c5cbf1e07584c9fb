"""The rule of the race against planted truths, its cost, and real edits on a tiny model."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from alike import alike
from evaluations import Greedy, quick
from families import tiny
from sweep_helpers import FAST, fast, some_facts

import goldenlayers as gl
from goldenlayers.errors import UserError
from goldenlayers.locating import published_layer
from goldenlayers.locating.race import seconds_of
from goldenlayers.locating.ranking import LayerRanking
from goldenlayers.progress import Progress
from goldenlayers.racing import Contest, Worth, decide, drawn, race_on, replay, rule, table_of
from goldenlayers.racing.rule import FACTS, TimeUp
from goldenlayers.racing.worth import expected_hits
from goldenlayers.sweeping import sweep


def noisy(means: Any, n_facts: int = 32, noise: float = 8.0, seed: int = 0) -> np.ndarray:
    """Scores (N, K) about planted means; facts differ in how hard they are."""
    rng = np.random.default_rng(seed)
    shared = rng.normal(0, 20, (n_facts, 1))
    return np.array(means) + shared + rng.normal(0, noise, (n_facts, len(means)))


def spy(table: np.ndarray, asked: list[tuple[int, int]]) -> Any:
    def score(place: int, facts: range) -> list[float]:
        asked.extend((place, i) for i in facts)
        return table[facts.start : facts.stop, place].tolist()

    return score


def by_definition(
    table: np.ndarray, home: int, prior: float, noise: float
) -> tuple[float, np.ndarray, np.ndarray]:
    """The belief, slowly: the joint normal distribution of all unknowns, conditioned on the scores.

    The unknowns are the layers' worth, the facts' ease and their common level. With the logarithm
    of the scores' likelihood, but for a constant.
    """
    n, k = table.shape
    depth = np.arange(k) / max(1, k - 1)
    covariance = np.zeros((k + n + 1, k + n + 1))
    for i in range(k):
        for j in range(k):
            near = math.exp(-((depth[i] - depth[j]) ** 2) / (2 * rule.REACH**2))
            covariance[i, j] = rule.SPREAD**2 * ((1 - rule.ALONE) * near + rule.ALONE * (i == j))
    covariance[k : k + n, k : k + n] = rule._EASE**2 * np.eye(n)
    covariance[-1, -1] = rule._LEVEL**2
    mean = np.zeros(k + n + 1)
    for i in range(k):
        near = math.exp(-((depth[i] - depth[home]) ** 2) / (2 * rule.REACH**2))
        mean[i] = -prior * (1 - near)
    mean[-1] = np.nanmean(table)
    likely = 0.0
    for i in range(n):  # one score after the other, each updating all unknowns
        for j in range(k):
            if math.isnan(table[i, j]):
                continue
            h = np.zeros(k + n + 1)
            h[[j, k + i, -1]] = 1
            variance = h @ covariance @ h + noise**2
            gain, wrong = covariance @ h / variance, table[i, j] - h @ mean
            likely -= (wrong**2 / variance + math.log(variance)) / 2
            mean = mean + gain * wrong
            covariance = covariance - np.outer(gain, h @ covariance)
    return likely, mean[:k], covariance[:k, :k]


def test_what_is_believed_is_the_conditioned_normal_distribution() -> None:
    for spread in (3.0, 25.0):
        table = noisy([50.0, 60, 55, 40, 30, 35], 6, spread)
        table[1:, 4] = table[2, 0] = table[0, 2] = math.nan
        belief = rule.believe(table, 2, 5.0)
        found = [by_definition(table, 2, 5.0, noise) for noise in rule.NOISES]
        _, mean, covariance = max(found, key=lambda one: one[0])
        np.testing.assert_allclose(belief.mean, mean, rtol=1e-8, atol=1e-8)
        np.testing.assert_allclose(belief.covariance, covariance, rtol=1e-7, atol=1e-7)
    draws = belief.draws(20_000, np.random.default_rng(0))
    np.testing.assert_allclose(draws.mean(axis=0), mean, atol=0.2)
    np.testing.assert_allclose(np.cov(draws.T), covariance, atol=0.05 * covariance.max())
    lead = belief.lead(1, 3)
    gaps = draws[:, 1] - draws[:, 3]
    assert lead.value == pytest.approx(mean[1] - mean[3])
    assert (lead.low, lead.high) == pytest.approx(np.percentile(gaps, [2.5, 97.5]), abs=0.5)
    nothing = rule.believe(np.full((3, 6), math.nan), 2)
    assert nothing.mean.argmax() == 2 and math.isnan(nothing.level)


@pytest.mark.parametrize("n_layers", [1, 2, 3, 4, 12, 18, 30, 80])
@pytest.mark.parametrize("edits", [1, 30, 120])
@pytest.mark.parametrize("n_facts", [1, 5, 60])
def test_no_race_costs_more_than_its_edits(n_layers: int, edits: int, n_facts: int) -> None:
    asked: list[tuple[int, int]] = []
    table = noisy([50.0] * n_layers, n_facts, 30.0)
    home = published_layer(n_layers)
    found = race_on(spy(table, asked), n_facts, n_layers, home, edits=edits, also=n_layers - 1)
    assert found.edits == len(asked) <= edits
    assert len(set(asked)) == len(asked)  # nothing is edited twice
    tried = ~np.isnan(found.table)
    assert tried[0, home] and tried.sum() == found.edits and found.why
    assert tried[0, -1] or edits < 9
    # Facts are taken in their order, without a gap.
    assert (tried.sum(axis=0) == (tried * np.arange(1, len(tried) + 1)[:, None]).max(axis=0)).all()
    if edits == 120 and n_facts == 60 and n_layers >= 12:
        assert tried.any(axis=0).sum() >= 10 and tried.sum(axis=0).max() >= 6
    assert found.wins().sum() == pytest.approx(1)


@pytest.mark.parametrize("n_layers", [18, 30, 80])
def test_the_best_layer_is_found_where_it_stands_out(n_layers: int) -> None:
    hits, home = 0, published_layer(n_layers)
    for seed in range(20):
        best = int(np.random.default_rng(seed).integers(n_layers))
        means = 70 - 40 * np.minimum(1, np.abs(np.arange(n_layers) - best) / (0.3 * n_layers))
        found = replay(noisy(means, seed=seed), home)
        hits += means.max() - means[found.place] <= 8
        assert found.edits <= 100
    assert hits >= 17


def test_a_spike_is_found_where_every_layer_is_tried() -> None:
    means = np.full(10, 50.0)
    means[7] = 75
    assert replay(noisy(means), 2).place == 7


def test_the_first_layers_are_spread_however_few() -> None:
    assert rule._grid(30, (0, 5), 3) == [0, 5, 16]
    assert rule._grid(30, (5, 5), 3) == [5, 10, 20]
    assert rule._grid(18, (8, 3), 3) == [8, 3, 10]
    assert rule._grid(30, (0, 5), 11)[2:] == [1, 4, 9, 12, 16, 19, 22, 26, 29]
    assert rule._grid(4, (1, 0), 11) == [1, 0, 2, 3]
    assert rule._grid(6, (1,), 11, closed=(0, 4)) == [1, 2, 3, 5]


def test_where_all_edits_fail_no_more_are_made() -> None:
    asked: list[tuple[int, int]] = []
    table = noisy(np.linspace(60, 20, 12))
    table[:, [0, 2]] = math.nan
    found = race_on(spy(table, asked), 32, 12, 0)
    assert sum(place in (0, 2) for place, _ in asked) <= 2 * FACTS
    assert found.place in (1, 3, 4)
    asked.clear()
    assert race_on(spy(table, asked), 32, 12, 1, closed=(0, 2)).place in (1, 3, 4)
    assert not any(place in (0, 2) for place, _ in asked)
    nowhere = race_on(spy(np.full((32, 12), math.nan), asked := []), 32, 12, 0)
    assert nowhere.place == 0 and len(asked) <= 12 * FACTS and not nowhere.tried.any()


def test_flat_tables_leave_the_published_depth() -> None:
    assert replay(np.full((32, 30), 50.0), 5).place == 5
    stays = [
        sum(replay(noisy([50.0] * 18, seed=s), 3, prior=p).place == 3 for s in range(20))
        for p in (0.0, 6.0, 20.0)
    ]
    assert stays[0] < stays[1] <= stays[2] and stays[2] >= 10, stays


def test_the_prior_asks_for_a_lead() -> None:
    lead = np.array([[50.0, 50 + gap] for gap in (4.0, -2, 4, -2, 4, -2)])
    assert decide(lead, 0, prior=0.0) == 1
    assert decide(lead, 0) == 0  # one point, on six facts
    assert decide(lead, 1) == 1
    one = np.array([[50.0, 90.0], [50.0, math.nan], [50.0, math.nan]])
    assert decide(one, 0, prior=0.0) == 0  # one lucky fact
    assert decide(np.array([[math.nan, 3.0, 30.0]]), 0) == 2  # the depth that cannot be edited
    assert decide(np.full((3, 2), math.nan), 1) == 1 == decide(np.empty((0, 2)), 1)


def test_what_a_race_says() -> None:
    means = np.array([20.0, 30, 40, 70, 50, 45])
    found = race_on(spy(noisy(means, 60, 2.0), []), 60, 6, 1)
    facts = (~np.isnan(found.table)).sum(axis=0)
    assert found.place == 3 and facts[0] == FACTS
    assert found.why == "the choice is expected to lose less than 0.5 points"
    assert found.edits < 60 and found.wins()[3] > 0.7
    whole = dataclasses.replace(found, table=noisy(means, 32, 2.0))
    assert whole.alike() == [] and whole.wins()[3] == 1.0
    gain = found.gain(1)
    assert gain.low < gain.value < gain.high and 8 < gain.value < 41  # it is drawn back
    scores = found.scores()
    assert scores[3] - scores[1] == pytest.approx(gain.value)
    assert scores.argmax() == 3 and abs(scores[3] - noisy(means, 60, 2.0)[:, 3].mean()) < 15
    # A layer with few facts is compared on these alone: hard facts do not count against it.
    hard = np.array([[80.0, 80.0]] * 3 + [[20.0, math.nan]] * 9)
    level = dataclasses.replace(found, table=hard, home=0, prior=0.0).scores()
    assert abs(level[0] - level[1]) < 2  # their plain means differ by 45 points
    # A tie is a tie, whoever is named.
    tied = dataclasses.replace(found, table=noisy([50.0, 50.0], 20, 5.0), home=0, place=1)
    assert tied.alike() == [0] and tied.wins().sum() == pytest.approx(1.0)


def test_time_that_is_over_and_ctrl_c() -> None:
    table = noisy(np.minimum(np.arange(12.0), 9) * 3)

    def until(n: int, error: BaseException) -> Any:
        asked: list[tuple[int, int]] = []
        score = spy(table, asked)

        def limited(place: int, facts: range) -> list[float]:
            if len(asked) >= n:
                raise error
            return score(place, facts)

        return limited

    over = race_on(until(3, TimeUp()), 32, 12, 2)
    assert (over.place, over.edits, over.why) == (2, 3, "the time is over")
    over = race_on(until(48, TimeUp()), 32, 12, 2)
    assert over.place > 6 and over.edits == 48 and not over.interrupted
    cut = race_on(until(48, KeyboardInterrupt()), 32, 12, 2)
    assert cut.interrupted and cut.place == over.place
    with pytest.raises(KeyboardInterrupt):
        race_on(until(3, KeyboardInterrupt()), 32, 12, 2)
    small = race_on(until(99, TimeUp()), 32, 12, 2, edits=8)
    assert (small.place, small.edits) == (2, FACTS) and "budget is too small" in small.why


def test_a_race_that_gets_slower_ends_early() -> None:
    table, rooms = noisy(np.arange(12.0) * 5), iter([100] * 14 + [2, 0])
    found = race_on(spy(table, []), 32, 12, 2, left=lambda: next(rooms))
    assert found.why == "the time is over" and found.edits == 14 * FACTS + 2


def row(fact: str, metric: str, score: float | None, soft: float, layer: int = 0) -> dict[str, Any]:
    return {
        "fact": fact, "layer": layer, "metric": metric, "probe": 0, "score": score, "soft": soft,
    }  # fmt: skip


def test_what_an_edit_is_worth() -> None:
    rows = [
        row("a", "rewrite", 100.0, 15), row("a", "locality", 50.0, 55),
        row("a", "locality_subject", 0.0, 20), row("a", "locality_neighbour", 100.0, 95),
        row("b", "rewrite", 0.0, 5), row("b", "rephrase", 0.0, 25),
        row("c", "rewrite", None, 1),
    ]  # fmt: skip
    # 15 % of the answer are 43 % of the hits; of a prediction 20 % left 1.5 %, 95 % left 93 %.
    assert Worth().by_fact(rows)["a"] == pytest.approx((43 + (1.5 + 93) / 2) / 2)
    assert Worth(by="hits").by_fact(rows)["a"] == 75
    assert Worth(by="soft").by_fact(rows)["a"] == (15 + (20 + 95) / 2) / 2
    assert Worth(subject=3, neighbour=1).by_fact(rows)["a"] == pytest.approx(
        (43 + (3 * 1.5 + 93) / 4) / 2
    )
    assert Worth(subject=0, neighbour=1).by_fact(rows)["a"] == (43 + 93) / 2
    assert Worth(subject=0, neighbour=0).by_fact(rows)["a"] == 43
    assert Worth().by_fact(rows)["b"] == (3 + 68) / 2 and math.isnan(Worth().by_fact(rows)["c"])
    facts, layers, table = table_of([*rows, row("a", "rewrite", 100.0, 100, layer=4)])
    assert facts == ["a", "b", "c"] and layers == [0, 4]
    np.testing.assert_allclose(table, [[45.125, 100], [35.5, math.nan], [math.nan, math.nan]])
    with pytest.raises(UserError, match="weight of the subject is -1"):
        Worth(subject=-1)


def test_expected_hits_rise_with_the_probability() -> None:
    for metric in ("rewrite", "rephrase", "portability", "locality", "locality_neighbour"):
        found = [expected_hits(metric, soft) for soft in range(101)]
        assert found == sorted(found) and found[0] == 0 and found[-1] == 100
    assert expected_hits("rephrase", 50) > 95 and expected_hits("locality_subject", 50) < 30


def test_times() -> None:
    assert [seconds_of(t) for t in ("90s", "3m", "1.5 h", "2min", 7)] == [90, 180, 5400, 120, 7]
    for wrong in ("3", "m", "-3m", "3 days", "0s", 0, -1, math.nan, "1e3s", None):
        with pytest.raises(UserError, match="budget"):
            seconds_of(wrong)


# --- real edits


def untimed(ranking: LayerRanking) -> dict[str, Any]:
    return ranking.to_json() | {"seconds": 0, "peak_memory_bytes": 0}


def test_real_edits_agree_with_a_sweep() -> None:
    model, facts = tiny("llama"), some_facts(5)
    before, rows, notes = model.fingerprint(), list[dict[str, Any]](), list[str]()
    how = gl.Race(editor=fast("ft-m"))
    tell = Progress(on_rows=rows.extend, on_note=notes.append)
    found = gl.locate(model, facts, how, seed=3, progress=tell)
    assert model.fingerprint() == before and found.n_facts == len(rows)
    assert "Racing the layers with ft-m: about" in notes[0] and "at most 100 edits" in notes[0]
    order = [fact.id for fact in drawn(facts, 3)]
    assert [one["fact"] for one in rows] == order[: len(rows)] and order[-1] == "f1"
    swept = sweep(model, facts, fast("ft-m"), seed=3).rows
    ids, layers, table = table_of(swept)
    for one in rows:
        mine = table[ids.index(one["fact"])]
        for layer in layers:
            if one["phi"][layer] is not None:
                assert one["phi"][layer] == alike(mine[layer])
    evidence = found.evidence
    assert evidence is not None and evidence.editor == "ft-m" and evidence.published == 1
    tried = sum(value is not None for one in rows for value in one["phi"])
    assert evidence.edits == tried
    assert LayerRanking.from_json(found.to_json()) == found
    assert untimed(gl.locate(model, facts, how, seed=3)) == alike(untimed(found))
    hits = gl.locate(model, facts, dataclasses.replace(how, hits=True), seed=3)
    assert hits.layers != found.layers


def test_memory_that_is_tight_changes_nothing_and_too_little_is_told() -> None:
    whole = gl.locate(
        tiny("llama"), some_facts(3), gl.Race(editor=quick("ft-m"), expect="published")
    )
    again = gl.locate(
        tiny("llama"), some_facts(3), gl.Race(editor=Greedy(1, "ft-m"), expect="published")
    )
    assert untimed(again) == alike(untimed(whole))
    with pytest.raises(UserError, match=r"memory ran out on fact 'f\d' at layer \d alone.*--dtype"):
        gl.locate(
            tiny("llama"), some_facts(3), gl.Race(editor=Greedy(0, "ft-m"), expect="published")
        )


def test_a_budget_of_time_bounds_the_edits(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("goldenlayers.racing.time.monotonic", lambda: now[0])
    real = Contest._edited

    def slow(self: Contest, layer: int, places: Any) -> list[float]:
        now[0] += 10.0 * len(places)
        return real(self, layer, places)

    monkeypatch.setattr(Contest, "_edited", slow)
    notes: list[str] = []

    def race(budget: str) -> LayerRanking:
        now[0] = 0.0
        how = gl.Race(editor=fast("ft-m"), budget=budget)
        tell = Progress(on_note=notes.append)
        return gl.locate(tiny("llama"), some_facts(6), how, progress=tell)

    found = race("5m")
    assert found.evidence is not None and found.evidence.edits <= 30 and now[0] <= 300
    assert "about 5 min for at most 30 edits of 6 facts" in notes[0]
    short = race("40s")
    assert short.evidence is not None and short.golden_layer == 1 and short.evidence.edits == FACTS
    assert any("the budget is too small" in warning for warning in short.warnings)


def test_bad_input() -> None:
    model = tiny("llama")
    wrong: tuple[tuple[dict[str, Any], str], ...] = (
        ({"editor": "romulus"}, "romulus"),
        ({"edits": 0}, "number of edits is 0"),
        ({"prior": -1}, "prior is -1"),
        ({"budget": "soon"}, "budget is 'soon'"),
        ({"hits": 1}, "hits is 1"),
        ({"expect": "luck"}, "unknown expect 'luck'"),
        ({"steps": 1}, "no option 'steps'"),
    )
    for more, said in wrong:
        with pytest.raises(UserError, match=said):
            gl.locate(model, some_facts(2), "race", **more)
    assert gl.Race(editor=fast("rome"), prior=0, hits=True).label == "race rome prior 0 hits"
    assert FAST["steps"] == 3
