"""The rule of the race against planted truths, its cost, and real edits on a tiny model."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from alike import alike
from evaluations import Greedy, quick
from families import tiny
from sweep_helpers import FAST, fast, some_facts

import goldenlayers as gl
from goldenlayers.editors import EDITORS
from goldenlayers.errors import UserError
from goldenlayers.locating import published_layer
from goldenlayers.locating.race import seconds_of
from goldenlayers.locating.ranking import LayerRanking
from goldenlayers.progress import Progress
from goldenlayers.racing import Contest, Worth, decide, drawn, few_layers, race_on, replay, table_of
from goldenlayers.racing.rule import EDITS, FACTS, Raced, margin
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


@pytest.mark.parametrize("n_layers", [1, 2, 3, 4, 12, 18, 30, 80])
@pytest.mark.parametrize("edits", [1, 30, 96])
@pytest.mark.parametrize("n_facts", [1, 5, 60])
def test_no_race_costs_more_than_its_edits(n_layers: int, edits: int, n_facts: int) -> None:
    asked: list[tuple[int, int]] = []
    table = noisy([50.0] * n_layers, n_facts, 30.0)
    home = published_layer(n_layers)
    places = [*few_layers(n_layers, (1 / 3, 2 / 3)), n_layers - 1]
    found = race_on(spy(table, asked), n_facts, n_layers, places, home, edits=edits)
    assert found.edits == len(asked) <= edits
    assert len(set(asked)) == len(asked)  # nothing is edited twice
    racing = sorted({home, *places})
    tried = ~np.isnan(found.table)
    facts = min(n_facts, edits // len(racing))
    if len(racing) > 1 and facts >= min(6, n_facts):
        assert found.edits == facts * len(racing)
        assert np.flatnonzero(tried.any(axis=0)).tolist() == racing
        assert tried[:, racing].all() and len(tried) == facts  # all on the same facts
    else:
        assert len(asked) <= FACTS and found.place == home
        assert np.flatnonzero(tried.any(axis=0)).tolist() == [home]
    assert found.why and found.wins().sum() == pytest.approx(1)


def test_the_layers_that_race() -> None:
    thirds, deep = EDITORS["rome"].race_depths, EDITORS["ft-l"].race_depths
    assert [few_layers(n, thirds) for n in (1, 2, 3, 18, 24, 30, 80)] == [
        [0, 0], [1, 1], [1, 2], [6, 12], [8, 16], [10, 20], [27, 53],
    ]  # fmt: skip
    assert [few_layers(n, deep) for n in (1, 3, 18)] == [[0, 0], [2, 2], [12, 17]]
    assert gl.Race(editor="ft-m").layers(tiny("llama")) == [1, 3]


def test_the_layers_are_tried_in_turn_on_the_same_facts() -> None:
    asked: list[tuple[int, int]] = []
    race_on(spy(noisy([50.0] * 9), asked), 7, 9, (5, 2, 5), 2)
    assert asked[:6] == [(2, 0), (2, 1), (2, 2), (5, 0), (5, 1), (5, 2)]
    assert asked[6:9] == [(2, 3), (2, 4), (2, 5)] and asked[12:] == [(2, 6), (5, 6)]


@pytest.mark.parametrize("n_layers", [18, 30, 80])
def test_the_best_of_the_layers_is_found_where_it_stands_out(n_layers: int) -> None:
    home, places = published_layer(n_layers), few_layers(n_layers, (1 / 3, 2 / 3))
    for seed in range(10):
        best = (home, *places)[seed % 3]
        means = np.full(n_layers, 50.0)
        means[best] += 15
        assert replay(noisy(means, seed=seed), places, home).place == best


def test_where_all_edits_fail_no_more_are_made() -> None:
    asked: list[tuple[int, int]] = []
    table = noisy(np.linspace(60, 20, 12))
    table[:, [0, 2]] = math.nan
    found = race_on(spy(table, asked), 32, 12, (2, 4, 8), 0)
    assert sum(place in (0, 2) for place, _ in asked) == 2 * FACTS
    assert found.place == 4  # the best of those that can be edited
    nowhere = race_on(spy(np.full((32, 12), math.nan), asked := []), 32, 12, (4, 8), 0)
    assert nowhere.place == 0 and len(asked) == 3 * FACTS and not nowhere.tried.any()
    assert nowhere.why == "no edit could be scored" and nowhere.wins()[0] == 1
    # A fact that fails at one layer is left out of that layer's comparison alone.
    table = np.array([[50.0, 60.0, 55.0]] * 24)
    table[5:9, 1] = math.nan
    table[5:9, [0, 2]] = 0
    found = replay(table, (1, 2), 0)
    assert found.place == 1 and found.gain(0).value == 10
    assert (found.scores() - found.scores()[0]).tolist() == [0, 10, 5]
    table[5:18, 1] = math.nan  # scored on less than half of the facts
    assert replay(table, (1, 2), 0).place == 2 and 1 not in replay(table, (1, 2), 0).alike()


def test_the_published_depth_is_left_for_a_clear_lead_alone() -> None:
    assert replay(np.full((24, 30), 50.0), (10, 20), 5).place == 5
    stays = sum(replay(noisy([50.0] * 18, seed=s), (6, 12), 3).place == 3 for s in range(20))
    assert stays >= 14
    lead = np.array([[50.0, 52.5, 52.4]] * 24)
    assert decide(lead, 0) == 1 and decide(lead, 2) == 2 and decide(lead - [0, 1, 1], 0) == 0
    # With a quarter of the facts it takes twice the lead.
    assert decide(lead[:6], 0) == 0 and decide(lead[:6] + np.array([0, 2, 0]), 0) == 1
    assert [round(margin(n), 2) for n in (0, 1, 6, 24, 96)] == [9.8, 9.8, 4.0, 2.0, 2.0]
    assert decide(np.full((3, 2), math.nan), 1) == 1 == decide(np.empty((0, 2)), 1)
    assert decide(np.array([[50.0, 50, 50]]), 2) == 2  # a tie


def test_what_a_race_says() -> None:
    means = np.array([20.0, 30, 40, 70, 50, 45])
    table = noisy(means, 24, 6.0)
    found = replay(table, (3, 4), 1)
    assert found.place == 3 and found.wins()[3] == 1.0 and found.alike() == []
    assert found.tried.tolist() == [False, True, False, True, True, False]
    gap = table[:, 3] - table[:, 1]
    gain = found.gain(1)
    assert gain.value == pytest.approx(gap.mean()) and gain.n == 24
    # The bootstrap's interval is about the normal one.
    assert gain.high - gain.low == pytest.approx(2 * 1.96 * gap.std() / math.sqrt(24), rel=0.15)
    np.testing.assert_allclose(found.scores()[[1, 3, 4]], table[:, [1, 3, 4]].mean(axis=0))
    assert np.isnan(found.scores()[[0, 2, 5]]).all()
    # Not the home's likes either: what is ahead of it, for sure but by less than the margin.
    ahead = replay(noisy([50.0, 51.5], 24, 0.5), (1,), 0)
    assert ahead.place == 0 and ahead.gain(1).high < 0 and ahead.alike() == []
    # A tie is a tie, whoever is named.
    tied = replay(noisy([50.0, 50.0], 24, 5.0), (0, 1), 0)
    assert tied.alike() == [1 - tied.place]
    one = replay(noisy([50.0, 90.0], 1, 5.0), (1,), 0)
    assert one.place == 1 and one.alike() == [0] and math.isnan(one.gain(0).low)


def test_time_that_is_over_and_ctrl_c() -> None:
    table = noisy(np.arange(12.0) * 3)

    def until(n: int, error: BaseException) -> Any:
        asked: list[tuple[int, int]] = []
        score = spy(table, asked)

        def limited(place: int, facts: range) -> list[float]:
            if len(asked) >= n:
                raise error
            return score(place, facts)

        return limited

    def timed(*rounds: int, edits: int = EDITS) -> Raced:
        """With time for so many edits in each round, and none after them."""
        each = iter(rounds)
        score = spy(table, [])
        return race_on(score, 32, 12, (4, 8), 2, edits=edits, left=lambda: next(each, 0))

    over = timed(3)
    assert (over.place, over.edits, over.why) == (2, 3, "the time is over")
    over = timed(9, 9, 9, 9, 9, 3)
    assert over.place == 8 and over.edits == 48 and not over.interrupted
    cut = race_on(until(51, KeyboardInterrupt()), 32, 12, (4, 8), 2)  # in the midst of a round
    assert cut.interrupted and cut.place == over.place and cut.edits == 51
    with pytest.raises(KeyboardInterrupt):
        race_on(until(6, KeyboardInterrupt()), 32, 12, (4, 8), 2)
    small = timed(9, edits=17)
    assert (small.place, small.edits) == (2, 3) and "budget is too small" in small.why


def test_a_race_that_gets_slower_ends_early() -> None:
    table, rooms = noisy(np.arange(12.0) * 5), iter([100] * 5 + [7, 2])
    found = race_on(spy(table, []), 32, 12, (4, 8), 2, left=lambda: next(rooms))
    assert found.why == "the time is over" and found.edits == 5 * 3 * FACTS + 6


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
    assert Worth(by="both").by_fact(rows)["a"] == (75 + (43 + (1.5 + 93) / 2) / 2) / 2
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
    return ranking.to_json() | {"seconds": 0, "peak_memory_bytes": 0, "notes": []}


def test_real_edits_agree_with_a_sweep() -> None:
    model, facts = tiny("llama"), some_facts(5)
    before, rows, notes = model.fingerprint(), list[dict[str, Any]](), list[str]()
    how = gl.Race(editor=fast("ft-m"))
    tell = Progress(on_rows=rows.extend, on_note=notes.append)
    found = gl.locate(model, facts, how, seed=3, progress=tell)
    assert model.fingerprint() == before and found.n_facts == len(rows)
    assert "Racing 2 layers with ft-m: about" in notes[0] and "at most 10 edits" in notes[0]
    order = [fact.id for fact in drawn(facts, 3)]
    assert [one["fact"] for one in rows] == order[: len(rows)] and order[-1] == "f1"
    swept = sweep(model, facts, fast("ft-m"), seed=3).rows
    ids, layers, table = table_of(swept, Worth(by="both"))
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
    apart = gl.locate(model, facts, replace(how, neighbour=0.0), seed=3)
    assert apart.layers != found.layers


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
    twice = [replace(fact, id=f"{fact.id} {i}") for i in range(2) for fact in some_facts(6)]

    def race(budget: str) -> LayerRanking:
        now[0] = 0.0
        how = gl.Race(editor=fast("ft-m"), budget=budget)
        tell = Progress(on_note=notes.append)
        return gl.locate(tiny("llama"), twice, how, progress=tell)

    found = race("3m")
    assert found.evidence is not None and found.evidence.edits == 18 and now[0] == 180
    assert found.evidence.why == "the time is over" and found.n_facts == 9
    assert "about 3 min for at most 18 edits" in notes[0]
    short = race("40s")
    assert short.evidence is not None and short.golden_layer == 1 and short.evidence.edits == FACTS
    assert any("the budget is too small" in warning for warning in short.warnings)


def test_bad_input() -> None:
    model = tiny("llama")
    wrong: tuple[tuple[dict[str, Any], str], ...] = (
        ({"editor": "romulus"}, "romulus"),
        ({"edits": 0}, "number of edits is 0"),
        ({"budget": "soon"}, "budget is 'soon'"),
        ({"subject": -1}, "weight of the subject is -1"),
        ({"steps": 1}, "no option 'steps'"),
    )
    for more, said in wrong:
        with pytest.raises(UserError, match=said):
            gl.locate(model, some_facts(2), "race", **more)
    assert gl.Race(editor=fast("rome"), edits=40, subject=0).label == "race rome edits 40 subject 0"
    assert FAST["steps"] == 3
