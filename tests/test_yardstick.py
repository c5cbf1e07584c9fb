"""The straight yardstick: probes that contradict the edit, two localities, gain, harmonic mean."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shared_data import DATA, needs_data

from goldenlayers.cli import main
from goldenlayers.datasets import FactSet, load_facts, write_jsonl
from goldenlayers.errors import DataError
from goldenlayers.evaluation.metrics import questions
from goldenlayers.evaluation.summary import summarise
from goldenlayers.facts import Fact, Probe
from goldenlayers.prompts import mentions
from goldenlayers.truth import Truth, to_json


def fact(*probes: Probe, **changes: Any) -> Fact:
    values = {
        "subject": "Bell",
        "prompt": "What company makes Bell?",
        "target": "Aeroflot",
        "target_old": "Vought",
        "old_aliases": ("Vought Aircraft",),
    }
    return Fact(**{**values, "locality": probes, **changes})


@pytest.mark.parametrize(
    ("probe", "wrong"),
    [
        (Probe("Bell manufacturer", "Vought"), True),
        (Probe("The manufacturer of  BELL is", "vought."), True),
        (Probe("Bell's maker is", "Vought Aircraft"), True),
        (Probe("Bell's maker is", "someone", aliases=("Vought",)), True),
        (Probe("Bell's owner is", "Aeroflot"), True),
        (Probe("The maker of Bell, which is not Aeroflot, is", "Vought", "Forgetfulness"), True),
        (Probe("The maker of the bell, which is not A., is", "Boeing", "Forgetfulness"), True),
        (Probe("Bell's country is", "Norway"), False),
        (Probe("Bell's country is"), False),
        (Probe("The maker of Bellows is", "Vought"), False),  # a part of another word
        (Probe("The maker of Corsair is", "Vought"), False),  # another subject
        (Probe("Aeroflot flies the Bell to", "Oslo"), False),  # named, but not asked for
        (Probe("Bell manufacturer", "Vought", contradicts=False), False),
        (Probe("Bell's country is", "Norway", contradicts=True), True),
    ],
)
def test_what_contradicts_an_edit(probe: Probe, wrong: bool) -> None:
    made = fact(probe)
    assert made.locality[0].contradicts is wrong
    assert made.must_stay == (() if wrong else made.locality)
    assert made.locality == (probe,)  # the mark is no part of what a probe asks


def test_an_old_answer_that_a_model_wrote_marks_nothing() -> None:
    without = fact(Probe("Bell manufacturer", "Vought"), target_old=None, old_aliases=())
    assert not without.locality[0].contradicts
    filled = without.with_old("Vought")
    assert not filled.locality[0].contradicts
    assert not dataclasses.replace(filled, relation="maker").locality[0].contradicts


def test_a_mark_must_be_true_or_false() -> None:
    with pytest.raises(DataError, match="neither true nor false"):
        Probe("Bell manufacturer", contradicts="yes")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("subject", "text", "found"),
    [
        ("Final Fantasy V", "Final Fantasy VII, a product of", False),
        ("Final Fantasy V", "The maker of final  fantasy v is", True),
        ("Malmö", "Malmo lies in", True),
        ("O'Hara", "O\u2019Hara was born in", True),
        ("东京", "我在东京住", True),
        ("Iran", "The Iranian capital is", False),
        ("Iran", "Iranian cities; Iran's capital is", True),
        ("...", "a text", False),
    ],
)
def test_mentions(subject: str, text: str, found: bool) -> None:
    assert mentions(subject, text) is found


def test_marks_are_kept_in_a_file_where_they_differ_from_what_is_found(tmp_path: Path) -> None:
    data = fact(
        Probe("Bell manufacturer", "Vought"),
        Probe("Bell maker", "Vought", contradicts=False),
        Probe("Bell's country is", "Norway", contradicts=True),
    )
    write_jsonl([data], tmp_path / "facts.jsonl")
    lines = json.loads((tmp_path / "facts.jsonl").read_text())["locality"]
    assert [line.get("contradicts") for line in lines] == [None, False, True]
    (again,) = load_facts(tmp_path / "facts.jsonl")
    assert [probe.contradicts for probe in again.locality] == [True, False, True]
    (every,) = load_facts(tmp_path / "facts.jsonl").with_all_probes()
    assert len(every.must_stay) == 3


def test_the_questions_of_locality() -> None:
    data = fact(
        Probe("The maker of Corsair is", "Vought"),
        Probe("Bell manufacturer", "Vought"),
        Probe("Bell's country is", "Norway"),
    )
    asked = questions([data], ["locality"])
    assert [(q.probe, q.row_metrics) for q in asked] == [
        (0, ("locality", "locality_neighbour")),
        (1, ("locality_contradicting",)),
        (2, ("locality", "locality_subject")),
    ]
    (every,) = FactSet((data,)).with_all_probes()
    names = [question.row_metrics for question in questions([every], ["locality"])]
    assert names[1] == ("locality", "locality_subject")
    bent = fact(Probe("Bell manufacturer", "Vought"))
    wrong, none = questions([bent], ["locality"])
    assert wrong.row_metrics == ("locality_contradicting",)
    assert none.metric == "locality" and none.reason is not None and "contradict" in none.reason


def rows_of(scores: np.ndarray, before: np.ndarray, **more: Any) -> list[dict[str, Any]]:
    """Rows of (facts, metrics) tables; NaN is unscored."""
    found = []
    for i, j in np.ndindex(scores.shape):
        row = {"fact": f"f{i}", "metric": ("rewrite", "rephrase", "locality")[j], "probe": 0}
        known = not math.isnan(scores[i, j])
        row |= {"score": scores[i, j] if known else None, **more}
        if known:
            row["before"] = before[i, j]
        found.append(row)
    return found


def test_gain_and_harmonic_mean_by_hand() -> None:
    rng = np.random.default_rng(0)
    scores = rng.uniform(20, 100, (30, 3))
    before = np.concatenate([rng.uniform(0, 30, (30, 2)), np.full((30, 1), 100.0)], 1)
    scores[3, 1] = np.nan
    found = summarise(rows_of(scores, before))
    by_metric = [
        np.nanmean(scores[:, j]) - before[~np.isnan(scores[:, j]), j].mean() for j in range(3)
    ]
    assert found.gain is not None and found.harmonic is not None and found.overall is not None
    assert found.gain.mean == pytest.approx(np.mean(by_metric))
    means = np.nanmean(scores, 0)
    assert found.harmonic.mean == pytest.approx(3 / (1 / means).sum())
    assert found.harmonic_of == ("rewrite", "rephrase", "locality")
    assert found.harmonic.low < found.harmonic.mean < found.harmonic.high
    assert found.gain.low < found.gain.mean < found.gain.high
    # Paired by fact: what the untouched model varies by is not counted twice.
    shifted = summarise(rows_of(scores, scores - 10.0))
    assert shifted.gain is not None and shifted.gain.se == pytest.approx(0, abs=1e-9)
    assert shifted.gain.mean == pytest.approx(10)
    assert json.dumps(found.to_json())


def test_no_edit_gains_nothing_and_has_no_harmonic_mean() -> None:
    before = np.tile([0.0, 0.0, 100.0], (4, 1))
    found = summarise(rows_of(before, before))
    assert found.overall is not None and found.overall.mean == pytest.approx(100 / 3)
    assert found.gain is not None and found.gain.mean == 0
    assert found.harmonic is not None and found.harmonic.mean == 0


def test_rows_that_do_not_say_what_was_before_have_no_gain() -> None:
    rows = rows_of(np.full((3, 3), 50.0), np.full((3, 3), 20.0))
    for row in rows:
        del row["before"]
    assert summarise(rows).gain is None
    truth = Truth.from_rows([row | {"layer": 0} for row in rows])
    assert "gain" not in truth.scores and truth.harmonic().tolist() == pytest.approx([50.0])


def test_a_sweep_has_gain_and_harmonic_mean_by_layer() -> None:
    rng = np.random.default_rng(1)
    before = np.tile([0.0, 10.0, 100.0], (12, 1))
    tables = [rng.uniform(10, 100, (12, 3)) for _ in range(3)]
    rows = [row for n, table in enumerate(tables) for row in rows_of(table, before, layer=n)]
    truth = Truth.from_rows(rows)
    means = np.stack([table.mean(0) for table in tables])
    assert truth.means("gain").tolist() == pytest.approx((means.mean(1) - 110 / 3).tolist())
    assert truth.golden_layer("gain") == truth.golden_layer()
    harmonic, ends = truth.harmonic(), truth.harmonic_intervals()
    assert harmonic.tolist() == pytest.approx((3 / (1 / means).sum(1)).tolist())
    assert (ends[:, 0] < harmonic).all() and (harmonic < ends[:, 1]).all()
    said = to_json(truth)
    assert said["harmonic"]["of"] == ["rewrite", "rephrase", "locality"]
    assert said["metrics"]["gain"]["golden_layer"] == truth.golden_layer()


@needs_data
@pytest.mark.parametrize(
    ("file", "wrong", "by_kind", "facts"),
    [
        # Counted once by hand-written rules of another kind: 374 without the aliases of ZsRE.
        ("KnowEdit/ZsRE/ZsRE-test-all.json", 380, 0, 190),
        ("KnowEdit/wiki_counterfact/train_cf.json", 787, 782, 783),
        ("KnowEdit/wiki_recent/recent_train.json", 304, 298, 298),
        ("counterfact/counterfact_500.json", 13, 0, 4),
    ],
)
def test_counts_of_real_data(file: str, wrong: int, by_kind: int, facts: int) -> None:
    data = load_facts(DATA / file, skip_invalid=True)
    found = [[p for p in fact.locality if p.contradicts] for fact in data]
    assert sum(map(len, found)) == wrong
    assert sum(p.kind == "Forgetfulness" for mine in found for p in mine) == by_kind
    assert sum(map(bool, found)) == facts
    assert f"{wrong} locality probes contradict the edit" in data.summary()


def test_golden_datasets_says_how_many(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = fact(
        Probe("Bell manufacturer", "Vought"),
        Probe("The maker of Corsair is", "Vought"),
        Probe("Bell's country is", "Norway"),
    )
    write_jsonl([data], tmp_path / "facts.jsonl")
    assert main(["datasets", str(tmp_path / "facts.jsonl")]) == 0
    said = capsys.readouterr().out
    assert "1 locality probe contradicts the edit: left out of locality" in said
    assert "about the edited subject 1, about others 1" in said
    assert "contradict" not in load_facts("starter").summary()
