"""One delta of many facts: without those that cannot be edited, before and after a kill."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from alike import alike
from evaluations import LAYER, Choosy, Killed, facts, quick, run
from families import tiny

from goldenlayers.delta import WeightDelta
from goldenlayers.editors import AlphaEdit, Editing
from goldenlayers.errors import UserError
from goldenlayers.evaluation import evaluate
from goldenlayers.models import Model
from goldenlayers.progress import Progress
from goldenlayers.statistics import KeyStatistics


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny("llama", "sentencepiece_bpe")


@pytest.fixture(scope="module")
def statistics(model: Model) -> KeyStatistics:
    return KeyStatistics.identity({LAYER: model.layers[LAYER].down.in_features})


def test_facts_that_cannot_be_edited_are_left_out(
    model: Model, statistics: KeyStatistics, tmp_path: Path
) -> None:
    found = run(model, statistics, Choosy({"italy"}, "memit"), mode="batch", work=tmp_path)
    lost = [r for r in found.rows if r["fact"] == "italy"]
    assert {r["score"] for r in lost} == {None}
    assert "the edit failed: the subject's key is abnormal" in {r["reason"] for r in lost}
    rest = [f for f in facts() if f.id != "italy"]
    delta = WeightDelta.load(tmp_path)
    assert [entry["id"] for entry in delta.facts] == [f.id for f in rest]
    alone = evaluate(model, rest, method=delta)
    assert tuple(r for r in found.rows if r["fact"] != "italy") == alike(alone.rows)


def test_a_killed_run_knows_which_facts_were_left_out(
    model: Model, statistics: KeyStatistics, tmp_path: Path
) -> None:
    chosen = Choosy({"japan"}, "memit")
    how = {"method": chosen, "mode": "batch", "work": tmp_path, "chunk": 1}
    kept: list[dict[str, Any]] = []

    def take(rows: list[dict[str, Any]]) -> None:
        kept.extend(rows)
        raise Killed

    with pytest.raises(Killed):
        run(model, statistics, on_rows=take, **how)
    assert {r["fact"] for r in kept} == {"france"}
    chosen.calls.clear()
    found = run(model, statistics, done=kept, **how)
    assert chosen.calls == [1]  # why Japan is not in the delta is found out, nothing more
    assert {r["fact"] for r in found.rows if r["score"] is None and r["metric"] == "rewrite"} == {
        "japan"
    }
    chosen.calls.clear()
    assert run(model, statistics, done=found.rows, **how).rows == found.rows
    assert chosen.calls == []  # the rows tell it


def test_the_facts_at_fault_are_found_by_halving(model: Model, statistics: KeyStatistics) -> None:
    chosen = Choosy({"italy"}, "memit")
    delta, failed = Editing(model, chosen, LAYER, statistics=statistics).together_safely(facts())
    assert chosen.calls == [4, 2, 1, 1, 2, 3]
    assert failed.keys() == {"italy"} and len(delta.facts) == 3


def test_what_cannot_be_edited_at_all_is_an_error(model: Model, statistics: KeyStatistics) -> None:
    def edit(chosen: Any) -> Any:
        return Editing(model, chosen, LAYER, statistics=statistics).together_safely(facts())

    with pytest.raises(UserError, match="abnormal"):
        edit(Choosy({f.id for f in facts()}, "memit"))

    class Unsociable(Choosy):
        def _look(self, facts: Any) -> None:
            if len(facts) > 1:
                raise UserError("these two do not go together")

    with pytest.raises(UserError, match="do not go together"):
        edit(Unsociable(set(), "memit"))
    rome = Choosy(set(), "rome")  # one fact at a time: there is nothing to find out
    with pytest.raises(UserError, match="one fact at a time"):
        edit(rome)
    assert rome.calls == []


def test_tries_leave_no_keys_to_keep_clear_of(model: Model, statistics: KeyStatistics) -> None:
    alphaedit = AlphaEdit(steps=2, prefixes=0, null_space=1.5, null_space_absolute=True)

    def keys(chosen: Any, some: Any) -> Any:
        work = Editing(model, chosen, LAYER, statistics=statistics)
        work.together_safely(some)
        return work.previous_keys[LAYER]

    rest = [f for f in facts() if f.id != "italy"]
    found = keys(Choosy({"italy"}, alphaedit), facts())
    assert found.shape[1] == 3
    # Not to the bit: the tries made Italy's fact beside the others, and other batches.
    wanted = keys(alphaedit, rest)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(found[:, 0], wanted[:, 1], rtol=1e-2)


def test_a_fact_that_stands_twice_is_edited_once_and_scored_twice(
    model: Model, statistics: KeyStatistics, tmp_path: Path
) -> None:
    again = [dataclasses.replace(f, id=f"{f.id} again") for f in facts()[:2]]
    doubled = [*facts(), *again]
    refused = {facts()[1].id}
    how: dict[str, Any] = {"statistics": statistics, "layer": LAYER, "mode": "batch"}
    how |= {"method": Choosy(refused, "memit"), "progress": Progress(work=tmp_path)}
    found = evaluate(model, doubled, **how)
    once = [f.id for f in facts() if f.id not in refused]
    assert [entry["id"] for entry in WeightDelta.load(tmp_path).facts] == once

    def scores(name: str) -> list[Any]:
        return [(r["metric"], r.get("reason")) for r in found.rows if r["fact"] == name]

    for first, later in zip(facts(), again, strict=False):
        assert scores(first.id) == scores(later.id) and scores(first.id)
    # The same after a kill, when the delta is there already.
    rest = evaluate(model, doubled, **how)
    assert rest.rows == alike(found.rows)


@pytest.mark.parametrize("mode", ["batch", "sequential"])
def test_contradictions_are_refused_before_the_work(
    model: Model, statistics: KeyStatistics, mode: Any
) -> None:
    against = [*facts(), dataclasses.replace(facts()[0], id="against", target="Oslo")]
    how: dict[str, Any] = {"statistics": statistics, "layer": LAYER}
    with pytest.raises(UserError, match="'against' contradicts"):
        evaluate(model, against, quick("memit"), mode=mode, **how)
    found = evaluate(model, against[-1:] + against[:1], quick("rome"), **how)
    assert {r["fact"] for r in found.rows} == {"against", facts()[0].id}
