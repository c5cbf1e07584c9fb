"""The sweep in one process: right cells, resumable, and hard to bring down."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from alike import alike
from families import tiny
from sweep_helpers import FAST, canonical, fast, some_facts

from goldenlayers.editors import Editor, Emmet, Rome, edit, needed_layers
from goldenlayers.errors import UserError
from goldenlayers.evaluation.plan import EvaluationPlan
from goldenlayers.models import Model
from goldenlayers.progress import Progress
from goldenlayers.statistics import key_statistics
from goldenlayers.sweeping import Sweep, Workers, cells, sweep, sweep_together, swept_layers


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny("llama", dtype=torch.float64)


@pytest.fixture(scope="module")
def statistics(model: Model) -> Any:
    return key_statistics(model, tokens=400, cache=False, seed=0)


@pytest.fixture(scope="module")
def whole(model: Model, statistics: Any) -> Any:
    return run(model, statistics)


def run(model: Model, statistics: Any, method: Any = "rome", n: int = 3, **more: Any) -> Any:
    """``sweep`` with quick settings; what ``Progress`` holds may be given as options, too."""
    names = {f.name for f in dataclasses.fields(Progress)}
    progress = Progress(**{"chunk": 2, **{n: more.pop(n) for n in names & more.keys()}})
    chosen = fast(method) if isinstance(method, str) else method
    options = {"statistics": statistics, "layers": [0, 2, 3], **more}
    return sweep(model, some_facts(n), chosen, progress=progress, **options)


@pytest.mark.parametrize("method", ["rome", "emmet", "ft-m"])
def test_rows_are_those_of_one_edit_at_a_time(model, statistics, method):
    found = run(model, statistics, method)
    slow = []
    for layer in (0, 2, 3):
        for fact in some_facts():
            delta = edit(model, fact, fast(method), layer=layer, statistics=statistics, seed=0)
            plan = EvaluationPlan(model, [fact], seed=0)
            plan.baseline()
            with delta.applied(model):
                slow += [{**row, "layer": layer} for row in plan.score_applied()]
    assert canonical(found.rows) == alike(canonical(slow))
    assert len({row["score"] for row in slow}) > 3  # the comparison says something
    assert (found.cells, found.layers, found.facts) == (9, (0, 2, 3), ("f0", "f1", "f2"))
    assert found.seconds_per_cell > 0


def test_editors_that_differ_in_the_solve_share_values(model, statistics, monkeypatch):
    """ROME's values serve EMMET: the same rows, and nothing searched twice."""
    from goldenlayers.editors import values as values_module

    alone = run(model, statistics, "emmet")
    searched: list[int] = []
    honest = values_module.optimise_values

    def counting(model: Model, facts: Any, *more: Any, **options: Any) -> Any:
        searched.append(len(facts))
        return honest(model, facts, *more, **options)

    monkeypatch.setattr(values_module, "optimise_values", counting)
    found: dict[Any, Any] = {}
    run(model, statistics, "rome", value_cache=found)
    assert sum(searched) == 9 == len(found)
    searched.clear()
    together = run(model, statistics, "emmet", value_cache=found)
    assert sum(searched) == 0
    assert canonical(together.rows) == alike(canonical(alone.rows))


def test_evidence_is_left_out_unless_asked_for(model, statistics, whole):
    assert all("evidence" not in row for row in whole.rows)
    assert all(row["reason"] for row in whole.rows if row["score"] is None)
    rich = run(model, statistics, evidence=True)
    assert all("evidence" in row for row in rich.rows)
    assert canonical(rich.rows) == alike(canonical(whole.rows))


@pytest.mark.parametrize("kept", [0, 1, 7, 20, -1])
def test_resume_does_what_is_missing_and_nothing_twice(model, statistics, whole, kept):
    done = list(whole.rows[:kept])
    new: list[Any] = []
    progress: list[tuple[int, int]] = []
    again = run(
        model,
        statistics,
        done=done,
        on_rows=new.extend,
        on_progress=lambda *now: progress.append(now),
    )
    assert canonical(again.rows) == alike(canonical(whole.rows))
    assert canonical(done + new) == alike(canonical(whole.rows))
    assert progress[-1] == (9, 9) and progress[0][0] == 9 - again.cells
    if kept == -1:
        assert len(new) == 1 and again.cells == 1


def test_a_finished_sweep_is_not_run_again(model, whole, monkeypatch):
    monkeypatch.setattr(cells.Runner, "run", lambda *_: pytest.fail("it ran"))
    again = run(model, None, done=[*whole.rows, *whole.rows])  # no statistics are collected
    assert again.rows == whole.rows and again.cells == 0
    assert again.seconds_per_cell != again.seconds_per_cell


def test_foreign_rows_are_not_taken_over(model, statistics, whole):
    alien = [
        {"fact": "f9", "layer": 0, "metric": "rewrite", "probe": 0, "score": 1.0},
        {"fact": "f0", "layer": 1, "metric": "rewrite", "probe": 0, "score": 1.0},
        {"fact": "f0", "layer": 0, "metric": "fluency", "probe": 0, "score": 1.0},
        {"metric": "rewrite"},
    ]
    again = run(model, statistics, done=[*alien, *whole.rows])
    assert canonical(again.rows) == alike(canonical(whole.rows))


@pytest.mark.parametrize("chunk", [1, 3, None])
def test_the_chunk_does_not_matter(model, statistics, whole, chunk):
    assert canonical(run(model, statistics, chunk=chunk).rows) == alike(canonical(whole.rows))


def test_the_untouched_model_is_read_once_per_chunk(model, statistics, monkeypatch):
    plans = []
    make = EvaluationPlan.__init__

    def counting(self: EvaluationPlan, *args: Any, **kwargs: Any) -> None:
        plans.append(1)
        make(self, *args, **kwargs)

    monkeypatch.setattr(EvaluationPlan, "__init__", counting)
    run(model, statistics)
    assert len(plans) == 2  # two chunks, three layers each


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA out of memory. Tried")])
def test_the_batch_is_halved_when_memory_runs_out(model, statistics, whole, monkeypatch, error):
    part, sizes = cells.Runner._part, []

    def tight(self: cells.Runner, places: tuple[int, ...], layer: int) -> Any:
        sizes.append(len(places))
        if len(places) > 1:
            raise error
        return part(self, places, layer)

    monkeypatch.setattr(cells.Runner, "_part", tight)
    assert canonical(run(model, statistics, chunk=3).rows) == alike(canonical(whole.rows))
    assert sizes == [3] + [1] * 9  # for good


def test_memory_that_does_not_suffice_for_one_fact_is_an_error(model, statistics, monkeypatch):
    def never(*_: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(cells.Runner, "_part", never)
    with pytest.raises(UserError, match=r"memory ran out on fact 'f0' at layer 0 alone.*bfloat16"):
        run(model, statistics)


def test_other_errors_are_not_swallowed(model, statistics, monkeypatch):
    def broken(*_: Any) -> Any:
        raise RuntimeError("a defect")

    monkeypatch.setattr(cells.Runner, "_part", broken)
    with pytest.raises(RuntimeError, match="a defect"):
        run(model, statistics)


def failing(fails: Any) -> Editor:
    """An editor that fails for some (fact, layer)."""

    class Failing(Rome):
        def each(self, work: Any, facts: Any) -> Any:
            for fact in facts:
                if fails(fact.id, work.layer):
                    raise UserError(f"no value at layer {work.layer}")
            return super().each(work, facts)

    return Failing(**FAST)


def test_a_failed_edit_leaves_unscored_rows(model, statistics, whole):
    bad = failing(lambda fact, layer: (fact, layer) == ("f1", 2))
    rows = run(model, statistics, bad, chunk=3).rows
    lost = [row for row in rows if (row["fact"], row["layer"]) == ("f1", 2)]
    assert lost and all(row["score"] is None for row in lost)
    assert any("the edit failed: no value at layer 2" in row["reason"] for row in lost)
    rest = [row for row in rows if row not in lost]
    others = [row for row in whole.rows if (row["fact"], row["layer"]) != ("f1", 2)]
    assert canonical(rest) == alike(canonical(others))


def test_a_layer_where_every_edit_fails_does_not_end_the_sweep(model, statistics):
    rows = run(model, statistics, failing(lambda _fact, layer: layer == 2)).rows
    assert {
        row["layer"] for row in rows if row["metric"] == "rewrite" and row["score"] is None
    } == {2}
    assert len([row for row in rows if row["layer"] == 2]) == len(rows) // 3


def test_edits_that_all_fail_from_the_start_end_it_with_nothing_written(model, statistics):
    written: list[Any] = []
    with pytest.raises(UserError, match="no value at layer 0"):
        run(model, statistics, failing(lambda *_: True), on_rows=written.extend)
    assert not written


def test_statistics_are_collected_in_one_pass(model, monkeypatch):
    import goldenlayers.statistics as room

    asked = []

    def fake(model: Model, layers: list[int], **_: Any) -> Any:
        asked.append(layers)
        return key_statistics(model, layers, tokens=300, cache=False)

    monkeypatch.setattr(room, "key_statistics", fake)
    run(model, None, Emmet(**{**FAST, "layers_before": 1, "steps": 1}), n=2)
    assert asked == [[0, 1, 2, 3]]
    assert needed_layers(Rome(), [3, 0]) == [0, 3]
    run(model, None, "ft-m", n=2)
    assert len(asked) == 1


def test_bad_input_is_said(model):
    facts = some_facts(2)
    for wrong, words in [
        ({"method": "rom"}, "unknown editor 'rom'.*rome"),
        ({"facts": []}, "no facts to sweep"),
        ({"facts": [facts[0], facts[0]]}, "two facts have the id 'f0'"),
        ({"layers": []}, "no layers"),
        ({"layers": [0, 9]}, "9"),
        ({"metrics": ["rewrit"]}, "unknown metric"),
        ({"progress": Progress(chunk=0)}, "chunk is 0"),
        ({"workers": 0}, "number of workers is 0"),
        ({"step": 3}, "ft-m has no setting 'step'.*'steps'"),
    ]:
        options: dict[str, Any] = {"facts": facts, "method": "ft-m", "steps": 3, **wrong}
        with pytest.raises(UserError, match=words):
            sweep(model, options.pop("facts"), options.pop("method"), **options)
    with pytest.raises(UserError, match="unknown engine"):
        Workers(1, "dask")  # type: ignore[arg-type]
    assert swept_layers(model, [-1, 0]) == (0, 3)
    assert swept_layers(model, None) == (0, 1, 2, 3)
    assert swept_layers(model, [3, 0, 3]) == (0, 3)


def test_editors_together_share_the_value_search_and_have_their_own_rows(
    model: Model, statistics: Any, monkeypatch: pytest.MonkeyPatch
):
    from goldenlayers.editors import values

    real, searched, kept = values.optimise_values, [], []

    def counted(model: Model, facts: Any, layer: int, *args: Any, **more: Any) -> Any:
        searched.extend((layer, fact.id) for fact in facts)
        return real(model, facts, layer, *args, **more)

    def told(batch: cells.Batch) -> None:
        kept.append((batch.task.chunk, batch.task.layer))

    monkeypatch.setattr(values, "optimise_values", counted)
    editors = {"one": fast("rome"), "two": fast("emmet")}
    reports = {name: Progress(chunk=2, on_batch=told) for name in editors}
    how: dict[str, Any] = {"layers": [0, 2], "metrics": ["kl"]}  # which is no share of hits
    found = sweep_together(
        model, some_facts(), editors, **how, statistics=statistics, progress=reports
    )
    cells_in_all = {(layer, fact.id) for layer in (0, 2) for fact in some_facts()}
    assert len(searched) == 6 and set(searched) == cells_in_all  # once for both
    # Chunk by chunk, layer by layer, each editor in turn: what is shared is soon let go of.
    assert kept == [(c, layer) for c in (0, 1) for layer in (0, 2) for _ in editors]
    for name, editor in editors.items():
        own, both = run(model, statistics, editor, **how, chunk=2), found[name]
        assert isinstance(both, Sweep) and both.settings == own.settings
        assert canonical(both.rows) == alike(canonical(own.rows))
    assert canonical(found["one"].rows) != canonical(found["two"].rows)  # type: ignore[union-attr]
    searched.clear()
    others = {"one": fast("rome"), "two": Emmet(steps=2, prefixes=1, prefix_tokens=4)}
    sweep_together(model, some_facts(), others, layers=[0, 2], statistics=statistics)
    assert len(searched) == 12  # the control: other settings of the search, another search
