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
from goldenlayers.racing import Contest, Worth, decide, drawn, race_on, replay, table_of
from goldenlayers.racing.rule import FACTS, TimeUp, difference, t_quantile
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


@pytest.mark.parametrize("n_layers", [1, 2, 3, 4, 12, 18, 30, 80])
@pytest.mark.parametrize("edits", [1, 30, 120])
@pytest.mark.parametrize("n_facts", [1, 5, 60])
def test_no_race_costs_more_than_its_edits(n_layers: int, edits: int, n_facts: int) -> None:
    asked: list[tuple[int, int]] = []
    table = noisy([50.0] * n_layers, n_facts, 30.0)
    home = published_layer(n_layers)
    found = race_on(spy(table, asked), n_facts, n_layers, home, edits=edits)
    assert found.edits == len(asked) <= edits
    assert len(set(asked)) == len(asked)  # nothing is edited twice
    # The published depth has every fact that any layer has.
    tried = ~np.isnan(found.table)
    assert tried[:, home].all() and tried.sum() == found.edits
    if edits == 120 and n_facts == 60 and n_layers >= 12:
        assert tried.any(axis=0).sum() >= n_layers / 6 and tried.sum(axis=0).max() >= 9


@pytest.mark.parametrize("n_layers", [18, 30, 80])
def test_the_best_layer_is_found_where_it_stands_out(n_layers: int) -> None:
    hits, home = 0, published_layer(n_layers)
    for seed in range(20):
        best = int(np.random.default_rng(seed).integers(n_layers))
        means = 70 - 40 * np.minimum(1, np.abs(np.arange(n_layers) - best) / (0.3 * n_layers))
        layer, edits = replay(noisy(means, seed=seed), range(n_layers), home)
        hits += means.max() - means[layer] <= 8
        assert edits <= 120
    assert hits >= 17


def test_a_spike_is_found_where_every_layer_is_tried() -> None:
    means = np.full(12, 50.0)
    means[9] = 75
    assert replay(noisy(means), range(12), 2)[0] == 9


def test_flat_tables_leave_the_published_depth() -> None:
    assert replay(np.full((32, 30), 50.0), range(30), 5)[0] == 5
    stays = [
        sum(replay(noisy([50.0] * 18, seed=s), range(18), 3, prior=p)[0] == 3 for s in range(60))
        for p in (0.0, 1.0, 2.0)
    ]
    assert stays[0] < stays[1] < stays[2] and stays[2] >= 40


def test_the_prior_asks_for_a_lead() -> None:
    lead = np.array([[50.0, 50 + gap] for gap in (4.0, -2, 4, -2, 4, -2)])
    assert decide(lead, 0, prior=0.0) == 1
    assert decide(lead, 0, prior=1.0) == 0  # 1 ± 1.34
    assert decide(lead, 1, prior=0.0) == 1
    one = np.array([[50.0, 90.0], [50.0, math.nan], [50.0, math.nan]])
    assert decide(one, 0, prior=0.0) == 0  # one lucky fact
    assert decide(np.array([[math.nan, 3.0, 4.0]]), 0) == 2  # the depth that cannot be edited
    assert decide(np.full((3, 2), math.nan), 1) == 1 == decide(np.empty((0, 2)), 1)


def test_halving_and_what_it_says() -> None:
    asked: list[tuple[int, int]] = []
    means = np.array([20.0, 30, 40, 70, 50, 45])
    found = race_on(spy(noisy(means, 60, 2.0), asked), 60, 6, 1)
    facts = (~np.isnan(found.table)).sum(axis=0)
    assert (
        found.place == 3
        and facts[0] == FACTS
        and found.why == ("the two that were left differ beyond doubt")
    )
    assert found.edits < 60 and found.alike() == [] and found.wins()[3] == 1.0
    gain = found.gain()
    assert gain.low < 40 < gain.high or gain.value == pytest.approx(40, abs=3)
    scores = found.scores()
    assert scores[3] - scores[1] == pytest.approx(gain.value)
    # A layer with few facts is compared on these alone: hard facts do not count against it.
    hard = np.array([[80.0, 90.0], [80.0, 90.0], [20.0, math.nan], [20.0, math.nan]])
    assert dataclasses.replace(found, table=hard, home=0).scores().tolist() == [50.0, 60.0]
    # A tie is a tie, whoever is named.
    tied = dataclasses.replace(found, table=noisy([50.0, 50.0], 20, 5.0), home=0, place=1)
    assert tied.alike() == [0] and tied.wins().sum() == pytest.approx(1.0)


def test_time_that_is_over_and_ctrl_c() -> None:
    table = noisy(np.arange(12.0) * 5)

    def until(n: int, error: BaseException) -> Any:
        asked: list[tuple[int, int]] = []
        score = spy(table, asked)

        def limited(place: int, facts: range) -> list[float]:
            if len(asked) >= n:
                raise error
            return score(place, facts)

        return limited

    over = race_on(until(3, TimeUp()), 32, 12, 2)
    assert (over.place, over.rounds, over.edits, over.why) == (2, 0, 3, "the time is over")
    over = race_on(until(60, TimeUp()), 32, 12, 2)
    assert over.place > 7 and over.rounds >= 1 and not over.interrupted
    cut = race_on(until(60, KeyboardInterrupt()), 32, 12, 2)
    assert cut.interrupted and cut.place == over.place
    with pytest.raises(KeyboardInterrupt):
        race_on(until(3, KeyboardInterrupt()), 32, 12, 2)
    small = race_on(until(99, TimeUp()), 32, 12, 2, edits=20)
    assert (small.place, small.edits) == (2, FACTS) and "budget is too small" in small.why


def test_a_race_that_gets_slower_ends_with_a_whole_round() -> None:
    table, rooms = noisy(np.arange(12.0) * 5), iter([100, 30, 4, 0])
    asked: list[tuple[int, int]] = []
    found = race_on(spy(table, asked), 32, 12, 2, left=lambda: next(rooms))
    facts = (~np.isnan(found.table)).sum(axis=0)
    assert found.rounds == 3 and found.why == "the edits are used up" and found.edits < 75
    assert facts.max() == facts[2] == len(found.table) < 9


def test_a_sweep_of_some_layers_is_replayed_from_the_nearest() -> None:
    table = np.full((8, 5), 50.0)
    table[:, 3] = 90
    assert replay(table, [0, 4, 8, 12, 16], 5)[0] == 12
    assert replay(np.full((8, 5), 50.0), [0, 4, 8, 12, 16], 5)[0] == 4


def row(fact: str, metric: str, score: float | None, soft: float, layer: int = 0) -> dict[str, Any]:
    return {
        "fact": fact, "layer": layer, "metric": metric, "probe": 0, "score": score, "soft": soft,
    }  # fmt: skip


def test_what_an_edit_is_worth() -> None:
    rows = [
        row("a", "rewrite", 100.0, 60), row("a", "locality", 50.0, 55),
        row("a", "locality_subject", 0.0, 20), row("a", "locality_neighbour", 100.0, 90),
        row("b", "rewrite", 0.0, 10), row("b", "rephrase", 0.0, 30),
        row("c", "rewrite", None, 1),
    ]  # fmt: skip
    assert Worth().by_fact(rows)["a"] == (60 + 55) / 2
    assert Worth(hits=True).by_fact(rows)["a"] == 75
    assert Worth(subject=3, neighbour=1).by_fact(rows)["a"] == (60 + (3 * 20 + 90) / 4) / 2
    assert Worth(subject=0, neighbour=1).by_fact(rows)["a"] == 75
    assert Worth(subject=0, neighbour=0).by_fact(rows)["a"] == 60
    assert Worth().by_fact(rows)["b"] == 20 and math.isnan(Worth().by_fact(rows)["c"])
    facts, layers, table = table_of([*rows, row("a", "rewrite", 100.0, 90, layer=4)])
    assert facts == ["a", "b", "c"] and layers == [0, 4]
    np.testing.assert_array_equal(table, [[57.5, 90], [20, math.nan], [math.nan, math.nan]])
    with pytest.raises(UserError, match="weight of the subject is -1"):
        Worth(subject=-1)


def test_times() -> None:
    assert [seconds_of(t) for t in ("90s", "3m", "1.5 h", "2min", 7)] == [90, 180, 5400, 120, 7]
    for wrong in ("3", "m", "-3m", "3 days", "0s", 0, -1, math.nan, "1e3s", None):
        with pytest.raises(UserError, match="budget"):
            seconds_of(wrong)


def test_quantiles_of_student_against_integration() -> None:
    for freedom in (1, 2, 3, 4, 5, 7, 11, 30, 200):
        x = np.linspace(0, 400, 2_000_001)
        scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2))
        density = (
            scale / math.sqrt(freedom * math.pi) * (1 + x**2 / freedom) ** (-(freedom + 1) / 2)
        )
        cumulated = 0.5 + np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)]) * (
            x[1] - x[0]
        )
        for p in (0.9, 0.975, 0.995):
            exact = float(np.interp(p, cumulated, x))
            slack = 0.04 if freedom == 3 else 0.012
            assert t_quantile(p, freedom) == pytest.approx(exact, rel=slack), (freedom, p)


def test_paired_difference() -> None:
    a, b = np.array([1.0, 4, math.nan, 7]), np.array([0.0, 1, 5, 2])
    found = difference(a, b)
    gaps = np.array([1.0, 3, 5])
    reach = 4.302653 * gaps.std(ddof=1) / math.sqrt(3)
    assert found.n == 3 and found.value == 3
    assert (found.low, found.high) == pytest.approx((3 - reach, 3 + reach), rel=1e-6)
    assert math.isnan(difference(a[:1], b[:1]).low)


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
    assert "Racing the layers with ft-m: about" in notes[0] and "at most 120 edits" in notes[0]
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
    whole = gl.locate(tiny("llama"), some_facts(3), gl.Race(editor=quick("ft-m")))
    again = gl.locate(tiny("llama"), some_facts(3), gl.Race(editor=Greedy(1, "ft-m")))
    assert untimed(again) == alike(untimed(whole))
    with pytest.raises(UserError, match=r"memory ran out on fact 'f\d' at layer \d alone.*--dtype"):
        gl.locate(tiny("llama"), some_facts(3), gl.Race(editor=Greedy(0, "ft-m")))


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
        ({"steps": 1}, "no option 'steps'"),
    )
    for more, said in wrong:
        with pytest.raises(UserError, match=said):
            gl.locate(model, some_facts(2), "race", **more)
    assert gl.Race(editor=fast("rome"), prior=0, hits=True).label == "race rome prior 0 hits"
    assert FAST["steps"] == 3
