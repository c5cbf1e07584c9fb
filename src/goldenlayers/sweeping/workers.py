"""Many workers: who gets which batch, what happens when one dies, and processes as workers.

A worker loads the model once, is handed one batch after another and sends rows back. It writes
nothing: the caller alone does, so nothing is doubled however a worker ends.
"""

from __future__ import annotations

import contextlib
import copy
import signal
import traceback
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from goldenlayers.errors import UserError
from goldenlayers.shown import showing
from goldenlayers.sweeping.cells import Batch, Job, Runner, Task

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from goldenlayers.models import Model

TRIES = 3  # workers that may die on one batch, or before their first one
_STOP_SECONDS = 2.0


@dataclass(frozen=True)
class Start:
    """What a worker begins with: how to load the model, which weights these must be, the work."""

    load: Callable[[], Model]
    fingerprint: str
    job: Job


@dataclass(frozen=True)
class Message:
    """What a worker says: "ready", "batch", "user" (an error) or "defect" (a traceback)."""

    kind: str
    value: Any = None


@dataclass(eq=False)
class Seat:
    """A worker as the caller sees it: what it works on, which chunk it knows, the engine's part."""

    number: int
    handle: Any
    ready: bool = False
    task: Task | None = None
    chunk: int | None = None


class Engine(Protocol):
    """Where workers live."""

    workers: int

    def open(self, start: Start, number: int) -> Any:
        """Start a worker; what is returned stands for it."""
        ...

    def send(self, handle: Any, task: Task) -> None:
        """Hand a task to a worker that waits for one; one that has died is noticed by ``wait``."""
        ...

    def wait(self, handles: Sequence[Any]) -> list[tuple[Any, Message | str]]:
        """Wait until workers speak or die: their messages, or how they died in words."""
        ...

    def close(self, handles: Sequence[Any]) -> None:
        """End all workers, whatever they are doing."""
        ...


class Worker:
    """One worker's side, whatever the engine: nothing it does raises, all is said in messages."""

    def __init__(self) -> None:
        self._runner: Runner | None = None

    def begin(self, start: Start, threads: int | None = None) -> Message:
        """Load the model and check that it is the caller's."""

        def run() -> Message:
            import torch

            if threads is not None:
                torch.set_num_threads(threads)
            model = start.load()
            if model.fingerprint() != start.fingerprint:
                raise UserError(
                    f"a worker loaded other weights as '{model.name}' than the sweep began with",
                    expected=f"fingerprint {start.fingerprint[:12]}",
                    fix="Make sure that all workers see the same files",
                )
            self._runner = Runner(model, start.job)
            return Message("ready")

        return said_of(run)

    def work(self, task: Task) -> Message:
        """Work off one task."""
        runner = self._runner
        assert runner is not None
        return said_of(lambda: Message("batch", runner.run(task)))


def run_tasks(
    tasks: Sequence[Task],
    start: Start,
    engine: Engine,
    take: Callable[[Batch], None],
    note: Callable[[str], None] | None = None,
) -> None:
    """Have all tasks worked off, handing each batch to ``take`` here, in the calling process.

    The batch of a worker that dies is given to another one, and the worker is replaced; ``note`` is
    told so.

    Raises:
        UserError: what a worker reports; a batch that ``TRIES`` workers died on; ``TRIES`` workers
            that died one after the other before they had loaded the model.
        RuntimeError: a defect in a worker, with its traceback.
    """
    queue = Queue(tasks)
    tries: dict[Task, int] = {}
    stillborn = 0
    seats: list[Seat] = []
    try:
        # Never more workers than batches.
        for number in range(min(engine.workers, len(tasks))):
            seats.append(Seat(number, engine.open(start, number)))
        left = len(tasks)
        while left:
            for handle, said in engine.wait([seat.handle for seat in seats]):
                seat = next(seat for seat in seats if seat.handle is handle)
                if isinstance(said, str):
                    at = "it had no batch"
                    if seat.task is not None:
                        at = f"{_name(start.job, seat.task)} is done again"
                        tries[seat.task] = tries.get(seat.task, 0) + 1
                        _give_up(
                            tries[seat.task], f"working on {_name(start.job, seat.task)}", said
                        )
                        queue.put_back(seat.task)
                    elif not seat.ready:
                        stillborn += 1
                        _give_up(stillborn, "loading the model", said)
                    if note is not None:
                        note(f"A worker {said}; {at}, and another worker starts in its place")
                    fresh = engine.open(start, seat.number)
                    seats[seats.index(seat)] = Seat(seat.number, fresh)
                    continue
                if said.kind == "user":
                    raise said.value
                if said.kind == "defect":
                    raise RuntimeError(f"a sweep worker failed:\n{said.value}")
                if said.kind == "batch":
                    left -= 1
                    take(said.value)
                seat.ready, seat.task, stillborn = True, None, 0
            for seat in seats:
                if seat.ready and seat.task is None:
                    taken = {other.chunk for other in seats if other is not seat and other.task}
                    seat.task = queue.next(seat.chunk, taken)
                    if seat.task is not None:
                        seat.chunk = seat.task.chunk
                        engine.send(seat.handle, seat.task)
    finally:
        engine.close([seat.handle for seat in seats])


class Queue:
    """Tasks by chunk: a worker keeps to the chunk whose untouched model it has read already."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self._chunks: dict[int, deque[Task]] = {}
        for task in tasks:
            self._chunks.setdefault(task.chunk, deque()).append(task)

    def next(self, own: int | None, taken: set[int | None]) -> Task | None:
        """The next task for a worker on chunk ``own``, where others are on the chunks ``taken``."""
        open_chunks = [chunk for chunk, tasks in self._chunks.items() if tasks]
        if not open_chunks:
            return None
        free = [chunk for chunk in open_chunks if chunk not in taken]
        if own not in open_chunks:
            own = free[0] if free else max(open_chunks, key=lambda c: len(self._chunks[c]))
        assert own is not None
        return self._chunks[own].popleft()

    def put_back(self, task: Task) -> None:
        """Take back a task that was not worked off."""
        self._chunks[task.chunk].appendleft(task)


# --- processes of this machine --------------------------------------------------------------------


@dataclass(eq=False)
class _Process:
    process: Any
    pipe: Connection


class LocalEngine:
    """Processes of this machine, started afresh (spawn), that share its threads."""

    def __init__(self, workers: int) -> None:
        self.workers = workers

    def open(self, start: Start, number: int) -> _Process:
        """Start a process."""
        import multiprocessing

        import torch

        context = multiprocessing.get_context("spawn")
        mine, theirs = context.Pipe()
        threads = max(1, torch.get_num_threads() // self.workers)
        process = context.Process(
            target=_process_main,
            args=(theirs, shared_out(start, self.workers), threads, number),
            name=f"golden-sweep-{number}",
            daemon=True,
        )
        process.start()
        theirs.close()  # so that the end of the process is the end of the pipe
        return _Process(process, mine)

    def send(self, handle: _Process, task: Task) -> None:
        """Hand a task over."""
        with contextlib.suppress(OSError):
            handle.pipe.send(task)

    def wait(self, handles: Sequence[_Process]) -> list[tuple[_Process, Message | str]]:
        """Messages and deaths."""
        from multiprocessing.connection import wait

        by_pipe = {handle.pipe: handle for handle in handles}
        found: list[tuple[_Process, Message | str]] = []
        for pipe in wait(list(by_pipe)):
            handle = by_pipe[pipe]  # type: ignore[index]  # only pipes were waited for
            try:
                found.append((handle, handle.pipe.recv()))
            except (EOFError, OSError):
                handle.process.join(_STOP_SECONDS)
                found.append((handle, _how(handle.process.exitcode)))
                handle.pipe.close()
        return found

    def close(self, handles: Sequence[_Process]) -> None:
        """End all processes."""
        for handle in handles:
            handle.pipe.close()
            handle.process.terminate()
        for handle in handles:
            handle.process.join(_STOP_SECONDS)
            if handle.process.is_alive():
                handle.process.kill()
                handle.process.join()


def shared_out(start: Start, workers: int) -> Start:
    """``start`` with key statistics without their factors, kept to a share of the memory."""
    from goldenlayers.statistics import KeyStatistics

    statistics = start.job.statistics
    if not isinstance(statistics, KeyStatistics):
        return start
    light = copy.copy(statistics)
    light._kept = OrderedDict()
    light.keep_bytes = statistics.keep_bytes // workers
    return replace(start, job=replace(start.job, statistics=light))


def loader_of(model: Model, *, numbered: bool = True) -> Callable[[], Model]:
    """How a worker loads ``model`` again: by its name, in its dtype and form, on its device.

    ``numbered``: on the very GPU; False where a worker counts those that it was given from 0.
    """
    from goldenlayers.models import load
    from goldenlayers.models.offload import is_spread

    dtype: Any = str(model.dtype).removeprefix("torch.")
    there = str(model.device) if numbered else model.device.type
    device = "auto" if is_spread(model.hf) else there
    return partial(load, model.name, dtype=dtype, device=device, chat=model.chat)


def _process_main(pipe: Connection, start: Start, threads: int, number: int) -> None:
    # Ctrl-C reaches the whole group; the caller ends its workers itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    worker = Worker()
    # The caller is gone: nobody wants the rest.
    with contextlib.suppress(EOFError, OSError), showing():
        said = worker.begin(start, threads)
        while True:
            pipe.send(said)
            said = worker.work(pipe.recv())


# --- messages -------------------------------------------------------------------------------------


def said_of(run: Callable[[], Message]) -> Message:
    try:
        return run()
    except UserError as error:
        return Message("user", error)
    except Exception:
        return Message("defect", traceback.format_exc())


def _give_up(count: int, what: str, how: str) -> None:
    if count >= TRIES:
        raise UserError(
            f"{count} workers died {what}; the last one {how}",
            fix="If memory ran out: fewer --workers, a smaller --chunk, or --dtype bfloat16. "
            "What is finished is kept",
        )


def _name(job: Job, task: Task) -> str:
    first = job.facts[task.places[0]].id
    more = f" and {len(task.places) - 1} more facts" if len(task.places) > 1 else ""
    return f"fact '{first}'{more} at layer {task.layer}"


def _how(code: int | None) -> str:
    if code is None:
        return "closed its connection"
    if code >= 0:
        return f"ended with status {code}"
    with contextlib.suppress(ValueError):
        name = signal.Signals(-code).name
        return f"was killed by {name}" + (
            " (which the system also sends when memory runs out)" if name == "SIGKILL" else ""
        )
    return f"was killed by signal {-code}"
