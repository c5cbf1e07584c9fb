"""Choices judged by synthetic truths, against slow obvious loops."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from comparing import L, named, sweep_rows, write_run
from families import tiny
from sweep_helpers import fast, some_facts

from goldenlayers.cli import main
from goldenlayers.commands.options import from_record, to_record
from goldenlayers.commands.sweeps import CompareConfig
from goldenlayers.comparing import (
    LocateRun,
    SweepRun,
    compare,
    overlap_warnings,
    rules_of,
    size_curve,
)
from goldenlayers.comparing.rules import combined, mean_ranks
from goldenlayers.errors import UserError
from goldenlayers.evaluation.bootstrap import spearman
from goldenlayers.locating import Race, locate, make_method
from goldenlayers.locating.building import RankingBuilder
from goldenlayers.locating.ranking import LayerRanking, LayerScore, tukey_fences
from goldenlayers.store import RunFolder
from goldenlayers.truth import Truth


def lga_rows(seed: int = 0, n: int = 40, prefix: str = "p") -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        old, new = rng.uniform(0.5, 3, L), rng.uniform(0.5, 3, L)
        cosine = np.clip(rng.normal(0.3, 0.3, L) + 0.1 * (np.arange(L) == 2), -1, 1)
        old[6] *= 30  # an outlying layer
        phi = old * new * cosine
        rows.append(
            {"fact": f"{prefix}{i}", "phi": phi.tolist(), "cosine": cosine.tolist()}
            | {"norm_old": old.tolist(), "norm_new": new.tolist()}
        )
    return rows


def built(method: str, rows: list[dict[str, Any]], fence: Any = "tukey") -> LayerRanking:
    options = {"fence": fence} if method == "lga" else {}
    scoring = make_method(method, **options).scoring
    builder = RankingBuilder(method, L, scoring, bootstrap=0, top_k=2)
    return builder.update(rows).result(seconds=2.0)


def judged(truth: Truth, *others: LocateRun, seconds: float | None = None, **more: Any) -> Any:
    return compare(SweepRun("this sweep", truth, seconds=seconds), others, **more)


def lga_run(seed: int = 0, n: int = 40, name: str = "a", **more: Any) -> LocateRun:
    rows = sorted(lga_rows(seed, n), key=lambda row: row["fact"])
    return LocateRun(name, built("lga", rows, more.pop("fence", "tukey")), rows, **more)


def other_run(method: str, seed: int = 0, n: int = 40, name: str = "b", **more: Any) -> LocateRun:
    rng = np.random.default_rng(seed)
    rows = [{"fact": f"p{i}", "phi": rng.normal(0, 1, L).tolist()} for i in range(n)]
    rows.sort(key=lambda row: row["fact"])
    return LocateRun(name, built(method, rows), rows, **more)


@pytest.mark.parametrize("seed", range(3))
def test_each_choice_is_judged_as_a_slow_loop_would(seed: int):
    truth = Truth.from_rows(sweep_rows(seed))
    run, cma = lga_run(seed), other_run("cma", seed)
    found = judged(truth, run, cma, seconds=100.0, repeats=5)
    choices = named(found)
    means = truth.means().tolist()
    golden = max(range(L), key=lambda i: means[i])
    assert found.golden_layer == golden == choices["golden layer"].layer
    assert set(choices) == {
        "golden layer", "oracle", "random layer", "published", "middle",
        "lga mlp sequence tukey", "lga mlp sequence raw", "lga mlp sequence inner",
        "lga mlp sequence cosine",
        "lga mlp sequence normalised", "cma",
    }  # fmt: skip
    scores = {
        "lga mlp sequence tukey": [one.value for one in run.ranking.layers],
        "cma": [one.score for one in cma.ranking.layers],
    }
    for one in choices.values():
        if one.layer is None:
            continue
        assert one.score == pytest.approx(means[one.layer])
        assert one.regret.value == pytest.approx(max(means) - means[one.layer])
        pair = truth.table()[:, [golden, one.layer]]
        rng = np.random.default_rng(9)
        drawn = [np.subtract(*pair[rng.integers(0, 30, 30)].mean(0)) for _ in range(4000)]
        low, high = np.percentile(drawn, [2.5, 97.5])
        assert (one.regret.low, one.regret.high) == pytest.approx((low, high), abs=0.6)
    for name, values in scores.items():
        one = choices[name]
        kept = run.ranking.layers if name.startswith("lga") else cma.ranking.layers
        order = sorted((i for i in range(L) if kept[i].kept), key=lambda i: (-values[i], i))
        assert one.layer == order[0]
        assert one.hit_at == {k: float(golden in order[:k]) for k in (1, 3, 5)}
        assert one.spearman == pytest.approx(spearman(values, means))
        assert (one.seconds, one.speed_up, one.n_proxy) == (2.0, 50.0, 40)
    oracle = truth.table().max(axis=1).mean()
    assert choices["oracle"].score == pytest.approx(oracle) == found.oracle.value
    assert choices["oracle"].regret.value == pytest.approx(means[golden] - oracle)
    assert choices["oracle"].regret.value < 0
    assert choices["oracle"].regret.low <= choices["oracle"].regret.value
    assert choices["random layer"].score == pytest.approx(statistics.fmean(means))
    some = list(itertools.combinations(range(L), 3))
    assert choices["random layer"].hit_at[3] == pytest.approx(
        sum(golden in three for three in some) / len(some)
    )
    assert choices["middle"].layer == 3 and choices["published"].layer == 1


def test_variants_are_what_their_names_say():
    run = lga_run(1)
    rules = {rule.variant: rule for rule in rules_of(run)}
    assert list(rules) == ["tukey", "raw", "inner", "cosine", "normalised"]
    phi = np.array([row["phi"] for row in run.rows])
    total = phi.sum(axis=0)
    low, high = tukey_fences(total)
    assert total[6] > high  # the outlier
    inside = [i for i in range(L) if low <= total[i] <= high]
    assert rules["tukey"].order() == sorted(inside, key=lambda i: -total[i])
    assert rules["tukey"].order()[0] == run.ranking.golden_layer != 6
    assert rules["raw"].order()[0] == 6 == int(total.argmax())
    assert rules["inner"].order() == [i for i in rules["raw"].order() if i != L - 1]
    cosine = [statistics.fmean(row["cosine"][i] for row in run.rows) for i in range(L)]
    np.testing.assert_allclose(rules["cosine"].scores(), cosine)
    norms = [sum(row["norm_old"][i] * row["norm_new"][i] for row in run.rows) for i in range(L)]
    np.testing.assert_allclose(rules["normalised"].scores(), total / norms)
    # A run without a fence has the raw choice for its own, and it is not there twice.
    bare = lga_run(1, fence="none")
    names = [one.name for one in judged(Truth.from_rows(sweep_rows()), bare).choices]
    assert names.index("lga mlp sequence raw") < names.index("lga mlp sequence tukey")
    assert len(set(names)) == len(names)


def test_missing_numbers():
    rows = lga_rows(2)
    rows[0]["phi"][3] = None
    rows[1]["cosine"][2] = None
    for row in rows:
        del row["norm_old"]
    rows.sort(key=lambda row: row["fact"])
    run = LocateRun("a", built("lga", rows), rows)
    rules = {rule.variant: rule for rule in rules_of(run)}
    assert "normalised" not in rules
    assert len(rules["raw"].facts) == 39 and "p0" not in rules["raw"].facts
    known = [row["cosine"][2] for row in rows if row["fact"] not in ("p0", "p1")]
    assert rules["cosine"].scores()[2] == pytest.approx(statistics.fmean(known))
    rows[2]["phi"] = [1.0]
    with pytest.raises(UserError, match="not a list of 7 numbers"):
        rules_of(LocateRun("a", run.ranking, rows))


@pytest.mark.parametrize("variant", ["tukey", "raw"])
def test_a_rule_on_part_of_the_facts_is_locating_with_them(variant: str):
    run = lga_run(3)
    rule = next(rule for rule in rules_of(run) if rule.variant == variant)
    rng = np.random.default_rng(0)
    for n in (1, 2, 5, 20, 40):
        part = rng.choice(40, n, replace=False)
        weights = np.zeros((1, 40))
        weights[0, part] = 1
        rows = [dict(run.rows[i]) for i in part]
        expected = built("lga", rows, "tukey" if variant == "tukey" else "none")
        assert rule.choose(weights)[0] == expected.golden_layer


def test_curves_over_proxy_sizes():
    run, truth = lga_run(4), Truth.from_rows(sweep_rows(4))
    rule = rules_of(run)[0]
    means = truth.means()
    regrets = means.max() - means
    curve = size_curve(rule, regrets, sizes=(10, 20, 40, 300), repeats=60, seed=5)
    assert [(point.n, point.repeats) for point in curve.points] == [(10, 60), (20, 60), (40, 1)]
    for point in curve.points:
        order = np.random.default_rng([5, point.n]).random((point.repeats, 40)).argsort(axis=1)
        chosen = []
        for row in order:
            part = [dict(run.rows[i]) for i in row[: point.n]]
            assert len({one["fact"] for one in part}) == point.n
            chosen.append(built("lga", part).golden_layer)
        lost = [float(regrets[layer]) for layer in chosen]
        assert point.regret == pytest.approx(statistics.fmean(lost))
        assert point.sd == pytest.approx(statistics.pstdev(lost))
        assert point.wins == pytest.approx(statistics.fmean(x == 0 for x in lost))
        assert point.agreement == max(chosen.count(i) for i in range(L)) / point.repeats
        assert chosen.count(point.layer) / point.repeats == point.agreement
        assert point.low <= point.regret <= point.high and point.unjudged == 0
    last = curve.points[-1]
    assert last.layer == run.ranking.golden_layer and last.agreement == 1
    again = size_curve(rule, regrets, sizes=(10, 20, 40, 300), repeats=60, seed=5)
    other = size_curve(rule, regrets, sizes=(10, 20), repeats=60, seed=6)
    assert again == curve and other.points[0] != curve.points[0]


def test_ranks():
    scores = np.array([[3.0, 1, 3, 7, 100]])
    kept = np.array([[True, True, True, True, False]])
    # Best first: 3; then 0 and 2 share places 1 and 2; then 1; what is left out comes last.
    assert mean_ranks(scores, kept).tolist() == [[1.5, 3.0, 1.5, 0.0, 4.0]]
    two = np.array([[True, False, True, True, False]])
    assert mean_ranks(scores, two).tolist() == [[1.5, 3.5, 1.5, 0.0, 3.5]]
    assert mean_ranks(np.array([[0.1 + 0.2, 0.3]]), kept[:, :2]).tolist() == [[0.5, 0.5]]
    assert mean_ranks(np.zeros((1, 3)), kept[:, :3]).tolist() == [[1.0, 1.0, 1.0]]


def test_lga_and_transfer_together():
    truth = Truth.from_rows(sweep_rows(5))
    lga, transfer = lga_run(5), other_run("transfer", 6, n=30)
    found = judged(truth, transfer, lga, repeats=8, sizes=[10])
    one = named(found)["lga+transfer mlp sequence"]

    def ranks(run: LocateRun) -> list[float]:
        keys = [x.value if x.kept else -math.inf for x in run.ranking.layers]
        return [sum(b > a for b in keys) + (sum(b == a for b in keys) - 1) / 2 for a in keys]

    both = [a + b for a, b in zip(ranks(lga), ranks(transfer), strict=True)]
    assert one.layer == min(range(L), key=lambda i: (both[i], i))
    assert one.spearman == pytest.approx(spearman([-x for x in both], truth.means().tolist()))
    assert one.seconds == 4.0 and one.n_proxy == 40 and one.run == "a+b"
    curve = next(c for c in found.proxy_sizes if c.name == one.name)
    assert [point.n for point in curve.points] == [10, 30]  # the facts that both have
    # Runs without a common fact are still combined, as they were run.
    apart = [dict(row) | {"fact": f"x{i:02}"} for i, row in enumerate(lga.rows)]
    strange = LocateRun("c", lga.ranking, apart)
    assert combined(rules_of(strange)[0], rules_of(transfer)[0], "both") is None
    again = judged(truth, strange, transfer, repeats=2)
    assert named(again)["lga+transfer mlp sequence"].layer == one.layer
    assert all(not c.name.startswith("lga+") for c in again.proxy_sizes)


def test_names_tell_runs_apart():
    truth = Truth.from_rows(sweep_rows())
    runs = [
        lga_run(0, name="one"),
        lga_run(1, name="two"),
        lga_run(2, name="three", settings={"scope": "down", "loss": "answer"}),
        other_run("transfer", 3, name="four", settings={"reach": True}),
        other_run("cma", 3, name="same"),
        other_run("cma", 4, name="same"),
        LocateRun("mid", LayerRanking.fixed("middle", L, 3)),
    ]
    names = set(named(judged(truth, *runs, repeats=2, sizes=[5])))
    assert {
        "lga mlp sequence tukey (one)", "lga mlp sequence tukey (two)", "lga down answer tukey",
        "transfer reach", "cma (same) #1", "cma (same) #2", "middle", "published",
        "lga+transfer down answer reach",
    } <= names  # fmt: skip


def test_layers_that_tie_for_the_best_are_all_golden():
    rows = [
        {"fact": f"t{f}", "layer": layer, "metric": "rewrite", "probe": 0, "score": score}
        for f in range(4)
        for layer, score in enumerate([10.0, 50, 50, 20])
    ]
    runs = [LocateRun("x", LayerRanking.fixed("middle", 4, 2))]
    found = named(judged(Truth.from_rows(rows), *runs))
    assert found["golden layer"].layer == 1
    assert found["middle"].layer == 2 and found["middle"].regret.value == 0
    assert found["middle"].hit_at[1] == 1.0 and found["middle"].golden_rank == 1
    assert found["random layer"].hit_at == {1: 0.5, 3: 1.0, 5: 1.0}


def test_a_choice_outside_the_sweep_is_not_judged():
    rows = [row for row in sweep_rows() if row["layer"] not in (3, 5)]
    found = judged(Truth.from_rows(rows), other_run("cma"), repeats=20)
    middle = named(found)["middle"]
    assert middle.layer == 3 and math.isnan(middle.score) and math.isnan(middle.regret.value)
    assert middle.note == "layer 3 was not swept"
    assert middle.to_json()["regret"] is None
    json.dumps(found.to_json(), allow_nan=False)
    assert any(point.unjudged > 0 for point in found.proxy_sizes[0].points)


def test_a_raced_choice():
    ranking = locate(tiny("llama"), some_facts(4), Race(editor=fast("ft-m"), edits=30))
    deep = [LayerScore(i, None, kept=False) for i in range(4, L)]
    ranking = dataclasses.replace(ranking, layers=(*ranking.layers, *deep), seconds=8.0)
    rows = [{"fact": f"p{i}", "phi": [1.0] * L} for i in range(ranking.n_facts)]
    truth = Truth.from_rows(sweep_rows())
    found = judged(truth, LocateRun("r", ranking, rows), seconds=80.0)
    one = named(found)["race clear-rome"]
    assert one.layer == ranking.golden_layer and one.speed_up == 10.0
    assert one.score == pytest.approx(truth.means()[one.layer]) and not found.proxy_sizes
    json.dumps(found.to_json(), allow_nan=False)


def test_proxy_facts_that_are_test_facts():
    truth = Truth.from_rows(sweep_rows())
    rows = lga_rows(prefix="t")
    run = LocateRun("a", built("lga", rows), rows, data_sha256="d1", fingerprint="w1")
    same, other = (
        SweepRun("s", truth, data_sha256=data, fingerprint=weights)
        for data, weights in (("d1", "w1"), ("d2", "w2"))
    )
    with pytest.raises(UserError, match="30 of its 40 proxy facts are facts of the sweep"):
        overlap_warnings([run], same)
    assert "too good" in overlap_warnings([run], same, allow_overlap=True)[0]
    unknown = SweepRun("s", truth, data_sha256="d2")
    assert "in other data" in overlap_warnings([run], unknown)[0]
    clean = LocateRun("b", run.ranking, lga_rows(), data_sha256="d1")
    assert overlap_warnings([clean], same) == []
    with pytest.raises(UserError, match="other weights"):
        overlap_warnings([run], other)
    deep = Truth.from_rows(sweep_rows(n_layers=9))
    with pytest.raises(UserError, match="ranks 7 layers"):
        overlap_warnings([clean], SweepRun("s", deep))


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folders = partial(write_run, tmp_path)
    model = {"name": "tiny", "fingerprint": "w1"}
    data = {"name": "facts", "sha256": "d1", "facts": 30}
    truth = Truth.from_rows(sweep_rows())
    summary = {"method": "rome", "seconds": 120.0, "golden_layer": truth.golden_layer()}
    sweep = folders(
        "sweep", "sweep", {"scores.jsonl": sweep_rows(), "summary.json": summary},
        settings={"seed": 0}, model=model, data=data,
    )  # fmt: skip
    rows = lga_rows()
    files = {"ranking.json": built("lga", rows).to_json(), "per_fact.jsonl": rows}
    settings = {"scope": "mlp", "loss": "answer"}
    lga = folders("lga", "locate", files, model=model, data=data, settings=settings)
    middle = LayerRanking.fixed("middle", L, 3).to_json()
    fixed = folders("mid", "locate", {"ranking.json": middle}, model=model)
    out = tmp_path / "compared"
    command = ["compare", str(sweep), "--with", str(lga), str(fixed), "--repeats", "20"]
    assert main([*command, "--out", str(out)]) == 0
    shown = capsys.readouterr()
    for words in ("rome on tiny", "golden layer", "oracle", "lga answer", "Mean regret with N"):
        assert words in shown.out
    written = json.loads((out / "compare.json").read_text())
    read = [LocateRun.read(RunFolder.open(p)) for p in (lga, fixed)]
    expected = judged(truth, *read, seconds=120.0, repeats=20).to_json()
    assert {k: v for k, v in written.items() if k != "sweep"} == json.loads(json.dumps(expected))
    assert written["sweep"]["data_sha256"] == "d1" and written["sweep"]["run"] == "sweep"
    one = next(c for c in written["choices"] if c["name"] == "lga mlp answer tukey")
    assert {"layer", "score", "regret", "regret_interval", "hit_at", "seconds"} <= one.keys()
    assert one["speed_up"] == 60.0 and one["run"] == "lga" and set(one["hit_at"]) == {"1", "3", "5"}
    # It can be repeated from its folder.
    assert main(["run", str(out), "--out", str(tmp_path / "again")]) == 0
    assert json.loads((tmp_path / "again" / "compare.json").read_text()) == written
    # What is refused.
    capsys.readouterr()
    assert main([*command, "--out", str(out)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main(["compare", str(lga)]) == 2
    assert "is a run of 'locate'" in capsys.readouterr().err
    assert main(["compare", str(sweep), "--with", str(out)]) == 2
    assert "Expected a run of golden locate or golden sweep" in capsys.readouterr().err
    assert main(["compare", str(sweep), "--metric", "fluency"]) == 2
    assert "no 'fluency'" in capsys.readouterr().err
    rows = lga_rows(prefix="t")
    files = {"ranking.json": built("lga", rows).to_json(), "per_fact.jsonl": rows}
    cheat = folders("cheat", "locate", files, model=model, data=data)
    assert main(["compare", str(sweep), "--with", str(cheat)]) == 2
    assert "--allow-overlap" in capsys.readouterr().err
    assert main(["compare", str(sweep), "--with", str(cheat), "--allow-overlap"]) == 0
    assert "too good" in capsys.readouterr().err


def test_the_config_survives_its_record():
    config = CompareConfig(sweep=Path("s"), with_=[Path("a"), Path("b")], out=Path("o"))
    record = json.loads(json.dumps(to_record(config), default=str))
    assert from_record(CompareConfig, record, {"out": Path("o")}) == config
    wrong: list[dict[str, Any]] = [{"repeats": 0}, {"sizes": [10, 0]}]
    for bad in wrong:
        with pytest.raises(UserError):
            CompareConfig(sweep=Path("s"), **bad)
