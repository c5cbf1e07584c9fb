"""The race against planted truths, its cost, and real edits on a tiny model."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from alike import alike
from evaluations import Greedy, quick
from families import tiny
from sweep_helpers import FAST, some_facts

from goldenlayers.cli import main
from goldenlayers.commands.locate import LocateConfig
from goldenlayers.errors import UserError
from goldenlayers.evaluation.summary import overall_by_fact
from goldenlayers.locating import published_layer
from goldenlayers.locating.ranking import LayerRanking, LayerScore
from goldenlayers.racing import VerifiedChoice, best_layers, race, verify, with_neighbours
from goldenlayers.racing.race import difference, t_quantile
from goldenlayers.store import RunFolder
from goldenlayers.sweeping import sweep


class Planted:
    """Scores from a table (facts × layers); remembers what it was asked."""

    def __init__(self, table: Any) -> None:
        self.table = np.asarray(table, dtype=float)
        self.asked: list[tuple[int, int]] = []

    def __call__(self, layer: int, places: Sequence[int]) -> list[float]:
        self.asked += [(layer, place) for place in places]
        return [float(self.table[place, layer]) for place in places]


def noisy(means: Sequence[float], n_facts: int, noise: float, seed: int = 0) -> Planted:
    rng = np.random.default_rng(seed)
    shared = rng.normal(0, 20, (n_facts, 1))  # facts differ in how hard they are
    return Planted(np.array(means) + shared + rng.normal(0, noise, (n_facts, len(means))))


def untimed(choice: VerifiedChoice) -> dict[str, Any]:
    return json.loads(json.dumps(choice.to_json() | {"seconds": 0}, allow_nan=False))


@pytest.mark.parametrize("best", range(6))
def test_the_known_best_is_found_and_stays_found(best: int):
    means = [50.0] * 6
    means[best] = 62.0
    planted = noisy(means, 12, noise=3.0, seed=best)
    choice = race(range(6), 12, planted)
    assert choice.layer == best and choice.evidence[0].layer == best
    again = race([5, 4, 3, 2, 1, 0, 0], 12, noisy(means, 12, 3.0, best))
    assert untimed(again) == untimed(choice)  # neither order nor repeats of candidates matter


def test_halving_drops_the_worse_half_and_costs_what_it_says():
    # No layer is better beyond doubt: facts disagree.
    table = np.tile([[10.0, 40, 20, 50, 30]], (8, 1))
    table += np.array([[60, 0, 0, 0, 0], [0, 60, 0, 0, 0], [0, 0, 60, 0, 0]] * 3)[:8, :]
    planted = Planted(table)
    told: list[tuple[int, int]] = []
    choice = race(range(5), 8, planted, on_progress=lambda *now: told.append(now))
    # Stages end at facts 3, 6 and 8: 5 layers, then 3, then 2.
    assert choice.n_edits == 5 * 3 + 3 * 3 + 2 * 2 == len(planted.asked)
    assert len(set(planted.asked)) == len(planted.asked)  # nothing is edited twice
    assert told[-1] == (28, 28) and choice.rounds == 3
    assert choice.stopped_because == "the facts ran out"
    after_3 = table[:3].mean(axis=0)
    gone = sorted(range(5), key=lambda i: after_3[i])[:2]
    assert {one.layer for one in choice.evidence if one.dropped_in == 1} == set(gone)
    by_layer = {one.layer: one for one in choice.evidence}
    assert sorted(one.n_facts for one in choice.evidence) == [3, 3, 6, 8, 8]
    for layer, one in by_layer.items():
        assert one.mean.value == pytest.approx(table[: one.n_facts, layer].mean())
        gaps = table[: one.n_facts, choice.layer] - table[: one.n_facts, layer]
        assert one.behind.value == pytest.approx(gaps.mean())
    last = [one for one in choice.evidence if one.dropped_in is None]
    assert [one.layer for one in last] == sorted(
        (one.layer for one in last), key=lambda i: -table[:, i].mean()
    )
    assert "cannot be told from the chosen one" in choice.warnings[0]


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 8, 11])
@pytest.mark.parametrize("n", [1, 2, 8, 30])
def test_cost_is_bounded(k: int, n: int):
    planted = noisy([50.0] * k, n, noise=30.0)
    choice = race(range(k), n, planted)
    assert choice.n_edits == len(planted.asked) <= (k * n if k > 1 else 0)
    assert len(set(planted.asked)) == len(planted.asked)
    assert {one.layer for one in choice.evidence} == set(range(k))
    if k >= 5 and n >= 8:
        assert choice.n_edits < 0.75 * k * n


def test_ties_go_to_the_shallower_layer():
    table = np.tile([[30.0, 70, 70, 70, 70]], (8, 1))
    assert race([4, 3, 2, 1, 0], 8, Planted(table)).layer == 1
    # 0.1 + 0.2 + 0.3 is more than 0.3 + 0.2 + 0.1 in the last digit only.
    assert race([0, 1], 3, Planted([[0.3, 0.1], [0.2, 0.2], [0.1, 0.3]])).layer == 0


def test_it_stops_early_when_one_is_better_beyond_doubt():
    clear = noisy([50, 90, 50, 50], 40, noise=5.0)
    choice = race(range(4), 40, clear)
    assert choice.layer == 1 and choice.stopped_because == "layer 1 is better beyond doubt"
    # Two rounds of four: five facts are the least.
    assert choice.rounds == 2 and choice.n_edits == 32 and not choice.warnings
    assert all(one.behind.low > 0 for one in choice.evidence[1:])
    # The same difference behind great noise is not beyond doubt.
    doubtful = race(range(4), 40, noisy([50, 52, 50, 50], 40, noise=40.0))
    assert doubtful.stopped_because == "the facts ran out"


def test_chance_rarely_passes_for_certainty():
    """Layers that do not differ: the race ends by certainty about as seldom as it claims."""
    certain = sum(
        "beyond doubt" in race(range(4), 12, noisy([50.0] * 4, 12, 20.0, seed)).stopped_because
        for seed in range(300)
    )
    assert certain <= 30


def test_layers_that_cannot_be_edited_do_not_win():
    table = np.full((8, 3), 40.0)
    table[:, 2] = math.nan
    table[:, 1] = [100.0] + [math.nan] * 7  # one lucky score
    choice = race(range(3), 8, Planted(table))
    assert choice.layer == 0
    assert json.loads(json.dumps(choice.to_json(), allow_nan=False))["layer"] == 0
    with pytest.raises(UserError, match="no edit could be scored"):
        race(range(3), 4, Planted(np.full((4, 3), math.nan)))
    with pytest.raises(UserError, match="no layers to verify"):
        race([], 4, Planted(table))


def test_one_candidate_costs_nothing():
    planted = Planted([[1.0]])
    choice = race([0], 1, planted)
    assert (choice.layer, choice.n_edits, choice.rounds) == (0, 0, 0) and not planted.asked
    assert choice.stopped_because == "there is only one candidate"


def test_quantiles_of_student_against_integration():
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


def test_paired_difference():
    a, b = np.array([1.0, 4, math.nan, 7]), np.array([0.0, 1, 5, 2])
    found = difference(a, b)
    gaps = np.array([1.0, 3, 5])
    reach = 4.302653 * gaps.std(ddof=1) / math.sqrt(3)
    assert found.n == 3 and found.value == 3
    assert (found.low, found.high) == pytest.approx((3 - reach, 3 + reach), rel=1e-6)
    assert math.isnan(difference(a[:1], b[:1]).low)


def ranking(scores: Sequence[float], out: Sequence[int] = (), golden: int | None = None):
    layers = tuple(LayerScore(i, s, kept=i not in out) for i, s in enumerate(scores))
    best = max((one for one in layers if one.kept), key=lambda one: (one.score, -one.layer)).layer
    golden = best if golden is None else golden
    return LayerRanking("lga", golden, (golden,), layers, n_facts=9)


def test_candidates():
    some = ranking([1, 9, 3, 3, 8, 0], out=[1])
    assert best_layers(some, 3) == [4, 2, 3]
    assert best_layers(some, 99) == [4, 2, 3, 0, 5]
    assert best_layers(LayerRanking.fixed("middle", 6, 3, top_k=1), 3) == [3, 2, 4]
    # By score: 4, 3, 2, 0 (layer 1 is outside the fences).
    deep = ranking([5, 9, 7, 8, 9.5, 6, 4, 3], out=[1])
    assert best_layers(deep, 3, spacing=1) == [4, 3, 2]
    assert best_layers(deep, 3, spacing=2) == [4, 2, 0]
    assert best_layers(deep, 4, spacing=2) == [4, 2, 0, 6]
    assert best_layers(deep, 3, spacing=4) == [4, 0, 3]  # too few so far apart: the best others
    assert sorted(best_layers(deep, 99, spacing=3)) == [0, 2, 3, 4, 5, 6, 7]
    assert with_neighbours([4, 0, 5], 6) == [4, 0, 5, 3, 1]


def test_settings_are_checked():
    assert LocateConfig(model="m", verify=1, neighbours=True).verify == 1
    assert LocateConfig(model="m", verify=1, also=["published"]).also == ["published"]
    assert LocateConfig(model="m", method="transfer", align=True).align
    wrong: list[dict[str, Any]] = [
        {"verify": 1}, {"verify": 0}, {"neighbours": True}, {"verify_facts": 0}, {"spacing": 0},
        {"spacing": 2}, {"also": ["3"]},
    ]  # fmt: skip
    for bad in wrong:
        with pytest.raises(UserError):
            LocateConfig(model="m", **bad)
    unused: list[dict[str, Any]] = [{"reach": True}, {"align": True, "method": "cma"}]
    for bad in unused:
        with pytest.raises(UserError, match=f"{next(iter(bad))} is for the method transfer"):
            LocateConfig(model="m", **bad)


def test_real_edits_agree_with_a_sweep():
    model, facts = tiny("llama"), some_facts(5)
    before = model.fingerprint()
    found = verify(model, facts, [2, 0, 1], "ft-m", n_facts=4, steps=3, seed=3)
    assert model.fingerprint() == before and found.method == "ft-m" and len(found.facts) == 4
    used = [fact for fact in facts if fact.id in found.facts]
    rows = sweep(model, used, "ft-m", layers=[0, 1, 2], steps=3, seed=3).rows
    for one in found.evidence:
        mine = overall_by_fact([row for row in rows if row["layer"] == one.layer])
        tried = [mine[fact] for fact in found.facts[: one.n_facts]]
        assert one.mean.value == pytest.approx(np.mean(tried)) and one.n_facts in (2, 4)
    # Facts without portability probes are the last resort.
    assert "f1" not in found.facts
    again = verify(model, facts, [0, 1, 2], "ft-m", n_facts=4, steps=3, seed=3)
    assert untimed(again) == alike(untimed(found))


def test_memory_that_is_tight_changes_nothing_and_too_little_is_told():
    how: dict[str, Any] = {"n_facts": 3}
    whole = verify(tiny("llama"), some_facts(3), [0, 1], quick("ft-m"), **how)
    again = verify(tiny("llama"), some_facts(3), [0, 1], Greedy(1, "ft-m"), **how)
    assert untimed(again) == alike(untimed(whole))
    with pytest.raises(UserError, match=r"memory ran out on fact 'f\d' at layer 0 alone.*--dtype"):
        verify(tiny("llama"), some_facts(3), [0, 1], Greedy(0, "ft-m"), **how)


def test_it_collects_its_statistics_once_and_reports_what_facts_lack(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    import dataclasses

    import goldenlayers.statistics as statistics

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    real, asked = statistics.key_statistics, []

    def counted(model: Any, layers: Any = None, **more: Any) -> Any:
        asked.append(list(layers))
        return real(model, layers, **more, tokens=200)

    monkeypatch.setattr(statistics, "key_statistics", counted)
    bare = [dataclasses.replace(f, locality=(), portability=()) for f in some_facts(2)]
    found = verify(tiny("llama"), bare, [3, 1], **FAST, n_facts=2)
    assert asked == [[1, 3]] and found.n_edits == 4
    assert "2 of the 2 facts have no locality probes" in found.warnings


@pytest.mark.parametrize(
    ("facts", "candidates", "more", "said"),
    [
        (0, [0, 1], {}, "no facts to verify"),
        (2, [], {}, "no layers"),
        (2, [0, 99], {}, "99"),
        (2, [0, 1], {"method": "romulus"}, "romulus"),
        (2, [0, 1], {"n_facts": 0}, "number of facts is 0"),
        (2, [0, 1], {"metrics": ["rewrites"]}, "rewrites"),
    ],
)
def test_bad_input(facts: int, candidates: list[int], more: dict[str, Any], said: str):
    with pytest.raises(UserError, match=said):
        verify(tiny("llama"), some_facts(facts), candidates, statistics={}, **more)


def located_with(place: Path, *more: str) -> list[str]:
    """Put a model and facts into the folder; the command that locates there, with its --out."""
    model = tiny("llama")
    model.hf.save_pretrained(place / "model")
    model.tokenizer.save_pretrained(place / "model")
    rows = [
        {
            "id": f.id, "subject": f.subject, "prompt": f.prompt, "target_new": f.target,
            "target_old": f.target_old, "rephrasings": list(f.rephrasings),
        }
        for f in some_facts(4)
    ]  # fmt: skip
    (place / "facts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        *("locate", str(place / "model"), str(place / "facts.jsonl")),
        *("--cache-dir", str(place / "cache"), "--out", str(place / "run")),
        *more,
    ]


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    more = ("--verify", "2", "--verify-facts", "2", "--verify-method", "ft-m", "--neighbours")
    command = located_with(tmp_path, *more)
    assert main(command) == 0
    shown = capsys.readouterr().out
    verified = json.loads((tmp_path / "run" / "verified.json").read_text())
    ranked = json.loads((tmp_path / "run" / "ranking.json").read_text())
    assert ranked["method"] == "lga" and ranked["golden_layer"] == ranked["candidates"][0]
    wanted = with_neighbours(best_layers(LayerRanking.from_json(ranked), 2), 4)
    assert {one["layer"] for one in verified["evidence"]} == set(wanted)
    assert "Verified with ft-m on proxy facts" in shown and "no locality probes" in shown
    assert shown.strip().splitlines()[-1].startswith(f"Golden layer {verified['layer']}, verified")
    assert main([*command, "--overwrite", "--verify-method", "romulus"]) == 2
    # Other layers may stand in the race, the one that everybody uses among them.
    alone = ("--verify", "1", "--verify-facts", "2", "--verify-method", "ft-m", "--overwrite")
    assert main([*located_with(tmp_path, *alone), "--also", "published", "3"]) == 0
    verified = json.loads((tmp_path / "run" / "verified.json").read_text())
    best = ranked["golden_layer"]
    assert {one["layer"] for one in verified["evidence"]} == {best, published_layer(4), 3}
    for also, said in (("4", "layer 4"), ("soon", "--also is 'soon'")):
        capsys.readouterr()
        assert main([*located_with(tmp_path, *alone), "--also", also]) == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("error", [UserError("no edit could be scored"), KeyboardInterrupt()])
def test_a_stopped_race_leaves_the_ranking(
    tmp_path: Path,
    error: BaseException,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    command = located_with(tmp_path, "--verify", "2", "--verify-method", "ft-m")

    def stopped(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("goldenlayers.racing.verify", stopped)
    assert main(command) == (130 if isinstance(error, KeyboardInterrupt) else 2)
    shown = capsys.readouterr()
    run = RunFolder.open(tmp_path / "run")  # finished
    assert run.json("ranking.json")["n_facts"] == 4 == len(run.rows("per_fact.jsonl"))
    assert not run.file("verified.json").exists() and run.file("ranking.svg").exists()
    assert "Golden layer" in shown.out
    assert "stopped after the ranking" in run.file("log.txt").read_text("utf-8")
    assert "Warning: the choice is not verified" in shown.err and str(run.path) in shown.err
    # A defect is none of this: nothing that looks whole.
    monkeypatch.setattr("goldenlayers.racing.verify", None)
    with pytest.raises(TypeError):
        main([*command, "--overwrite", "--out", str(tmp_path / "defect")])
    assert not (tmp_path / "defect").exists()
