"""Workers: the same rows however many there are and however they end."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from alike import alike
from families import tiny
from sweep_helpers import FAST, DiesOnce, Ours, canonical, load_other, load_tiny, some_facts

from goldenlayers.editors import EDITORS, Rome
from goldenlayers.errors import UserError
from goldenlayers.evaluation.metrics import metrics_of
from goldenlayers.models import Model
from goldenlayers.progress import Progress
from goldenlayers.statistics import key_statistics
from goldenlayers.sweeping import Workers, sweep
from goldenlayers.sweeping.cells import Batch, Job, Task
from goldenlayers.sweeping.workers import (
    TRIES,
    Message,
    Queue,
    Start,
    Worker,
    loader_of,
    run_tasks,
    shared_out,
)

JOB = Job(tuple(some_facts()), Rome(**FAST), metrics_of(["rewrite"]))
START = Start(load_tiny, "", JOB)


def tasks(chunks: int = 2, layers: int = 3) -> list[Task]:
    return [Task(c, (c,), layer) for c in range(chunks) for layer in range(layers)]


class Scripted:
    """An engine in this process: ``dies(number, nth task of that worker, task)`` says who dies."""

    def __init__(self, workers: int, dies: Any = lambda *_: False, stillborn: int = 0) -> None:
        self.workers, self.dies, self.stillborn = workers, dies, stillborn
        self.opened = 0
        self.log: list[tuple[int, Task]] = []
        self.closed: list[Any] | None = None

    def open(self, start: Start, number: int) -> dict[str, Any]:
        self.opened += 1
        said: Message | str = Message("ready")
        if self.opened <= self.stillborn:
            said = "was killed"
        return {"number": number, "said": said, "count": 0}

    def send(self, handle: dict[str, Any], task: Task) -> None:
        handle["count"] += 1
        self.log.append((handle["number"], task))
        dead = self.dies(handle["number"], handle["count"], task)
        handle["said"] = "was killed" if dead else Message("batch", Batch(task))

    def wait(self, handles: Sequence[dict[str, Any]]) -> list[tuple[Any, Message | str]]:
        speaking = [handle for handle in handles if handle["said"] is not None]
        assert speaking, "waiting for nobody"
        handle = speaking[0]
        said, handle["said"] = handle["said"], None
        return [(handle, said)]

    def close(self, handles: Sequence[Any]) -> None:
        self.closed = list(handles)


def test_every_task_is_worked_off_once():
    for workers in (1, 2, 5, 9):
        engine, done = Scripted(workers), []
        run_tasks(tasks(), START, engine, lambda batch, done=done: done.append(batch.task))
        assert sorted(done, key=str) == sorted(tasks(), key=str)
        assert engine.opened == min(workers, 6) and engine.closed is not None
        assert len(engine.closed) == engine.opened


def test_the_batch_of_a_dying_worker_goes_to_another():
    engine, done = Scripted(2, lambda number, nth, _: number == 0 and nth == 2), []
    run_tasks(tasks(), START, engine, lambda batch: done.append(batch.task))
    assert sorted(done, key=str) == sorted(tasks(), key=str)
    assert engine.opened > 2


def test_a_batch_that_kills_every_worker_is_named():
    engine, done = Scripted(2, lambda _n, _c, task: task == Task(1, (1,), 2)), []
    with pytest.raises(
        UserError, match=r"3 workers died.*fact 'f1' at layer 2.*was killed.*--work"
    ):
        run_tasks(tasks(), START, engine, lambda batch: done.append(batch.task))
    assert len(done) == 5
    assert sum(task == Task(1, (1,), 2) for _, task in engine.log) == TRIES
    assert engine.closed is not None


def test_workers_that_die_while_loading():
    with pytest.raises(UserError, match="3 workers died loading the model"):
        run_tasks(tasks(), START, Scripted(2, stillborn=99), lambda _: None)
    done = []
    run_tasks(tasks(), START, Scripted(2, stillborn=2), done.append)
    assert len(done) == 6


def test_errors_of_a_worker_and_of_the_caller_end_all_workers():
    class Saying(Scripted):
        def __init__(self, message: Message) -> None:
            super().__init__(2)
            self.message = message

        def send(self, handle: dict[str, Any], task: Task) -> None:
            handle["said"] = self.message

    engine = Saying(Message("user", UserError("the disk is gone", fix="Find it")))
    with pytest.raises(UserError, match=r"disk is gone\. Find it\."):
        run_tasks(tasks(), START, engine, lambda _: None)
    assert engine.closed is not None
    with pytest.raises(RuntimeError, match="Traceback of it"):
        run_tasks(tasks(), START, Saying(Message("defect", "Traceback of it")), lambda _: None)

    def full(_batch: Batch) -> None:
        raise UserError("the disk is full")

    engine = Scripted(2)
    with pytest.raises(UserError, match="disk is full"):
        run_tasks(tasks(), START, engine, full)
    assert engine.closed is not None


def test_workers_keep_to_their_chunk_and_help_out_at_the_end():
    queue = Queue(tasks(chunks=2, layers=3))
    assert queue.next(None, set()) == Task(0, (0,), 0)
    assert queue.next(None, {0}) == Task(1, (1,), 0)
    assert queue.next(1, {0}) == Task(1, (1,), 1)
    assert queue.next(1, {0}) == Task(1, (1,), 2)
    helped = queue.next(1, {0})
    assert helped is not None and helped == Task(0, (0,), 1)
    queue.put_back(helped)
    assert [queue.next(0, {1}), queue.next(0, {1}), queue.next(0, {1})] == [
        Task(0, (0,), 1),
        Task(0, (0,), 2),
        None,
    ]


def test_a_worker_checks_its_weights_and_says_its_errors():
    right = load_tiny().fingerprint()
    assert Worker().begin(Start(load_tiny, right, JOB), 1).kind == "ready"
    said = Worker().begin(Start(load_other, right, JOB), 1)
    assert said.kind == "user" and "other weights" in str(said.value)

    def broken() -> Model:
        raise ZeroDivisionError

    said = Worker().begin(Start(broken, right, JOB))
    assert said.kind == "defect" and "ZeroDivisionError" in said.value


def test_what_travels_carries_no_factors():
    model = tiny("llama")
    statistics = key_statistics(model, [0, 1], tokens=300, cache=False)
    assert statistics[0].cholesky is not None
    light = shared_out(Start(load_tiny, "", Job((), Rome(), (), 0, False, statistics)), 2)
    sent: Any = light.job.statistics
    assert not sent._kept and statistics._kept
    assert sent.keep_bytes == statistics.keep_bytes // 2
    assert (sent[1].moment == statistics[1].moment).all()


def test_workers_load_by_name():
    load: Any = loader_of(tiny("llama"))
    assert load.args == ("tiny-llama",)
    assert load.keywords == {"dtype": "float32", "device": "cpu", "chat": False}


def test_workers_that_die_while_loading_are_counted_in_a_row():
    class Unlucky(Scripted):
        """Every second worker dies while it loads, every other one on its second task."""

        def open(self, start: Start, number: int) -> dict[str, Any]:
            handle = super().open(start, number)
            return handle | {"said": "was killed"} if self.opened % 2 else handle

    done: list[Batch] = []
    engine = Unlucky(1, lambda _n, nth, _task: nth == 2)
    run_tasks(tasks(), START, engine, done.append)
    assert len(done) == 6 and engine.opened > 2 * TRIES


@pytest.fixture(scope="module")
def alone() -> Any:
    model = load_tiny()
    statistics = key_statistics(model, tokens=300, cache=False)
    found = sweep(
        model, some_facts(), "rome", **FAST, statistics=statistics, progress=Progress(chunk=1)
    )
    return model, statistics, canonical(found.rows)


@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
def test_rows_are_the_same_with_two_workers_and_one_of_them_killed(alone: Any, tmp_path: Path):
    model, statistics, rows = alone
    new: list[Any] = []
    notes: list[str] = []
    killed = tmp_path / "killed"
    found = sweep(
        model,
        some_facts(),
        "rome",
        **FAST,
        statistics=statistics,
        workers=Workers(2, load=DiesOnce(killed)),
        progress=Progress(chunk=1, on_rows=new.extend, on_note=notes.append),
    )
    assert killed.exists()
    assert canonical(found.rows) == alike(rows)
    assert canonical(new) == alike(rows)
    assert found.cells == 12
    assert re.search(r"A worker was killed by SIGKILL.* at layer \d is done again", notes[-1])


def test_an_editor_registered_after_import_serves_two_workers(alone: Any):
    model, statistics, rows = alone
    how: dict[str, Any] = {"statistics": statistics, "progress": Progress(chunk=1), **FAST}
    how["workers"] = Workers(2, load=load_tiny)
    EDITORS.register("ours", Ours)
    try:
        found = sweep(model, some_facts(), "ours", **how)
    finally:
        EDITORS.unregister("ours")
    assert found.method == "ours" and canonical(found.rows) == alike(rows)

    class Local(Rome):
        pass

    with pytest.raises(UserError, match="cannot be sent to workers"):
        sweep(model, some_facts(), Local(**FAST), statistics=statistics, workers=how["workers"])
