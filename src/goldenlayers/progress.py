"""Long calls: how they report what is done and go on with what an earlier call left, and what they
do where memory runs out: smaller batches, or words for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from goldenlayers.errors import UserError
from goldenlayers.shown import console, on_terminal, say, shown

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What ``evaluate``, ``sweep`` and ``locate`` share; everything may be left out.

    Attributes:
        done: rows of an earlier, interrupted call with the same arguments: not made again.
        work: a folder where edits of many facts are kept, and found again after a kill.
        chunk: facts per step of work; None leaves it to the call. What is finished is reported
            after each step.
        on_rows: called with the new rows of each step, never with one twice.
        on_batch: called with each finished step of a sweep, after its rows.
        on_progress: called with (done, in all).
        on_dropped: called with the error of each fact that is left out.
        on_note: called with a sentence on what begins, and how long it may take.
    """

    done: Iterable[Row] = ()
    work: Path | None = None
    chunk: int | None = None
    on_rows: Callable[[list[Row]], None] | None = None
    on_batch: Callable[[Any], None] | None = None
    on_progress: Callable[[int, int], None] | None = None
    on_dropped: Callable[[Any], None] | None = None
    on_note: Callable[[str], None] | None = None

    @classmethod
    def told(
        cls,
        unit: str = "",
        tell: Callable[[str], object] = print,
        *,
        every: float = 10.0,
        **more: Any,
    ) -> Progress:
        """One that tells how far the call is and how long the rest takes, in a line now and then.

            gl.edit(model, facts, layer=4, progress=gl.Progress.told("facts"))

        Args:
            unit: what is counted.
            tell: what the lines are given to, such as ``logging.getLogger("mine").info``.
            every: seconds between two lines.
            more: further fields.
        """
        more = {"on_note": tell} | more
        return cls(on_progress=Pace("", unit, tell, every=every), **more)

    def rows(self, rows: list[Row]) -> None:
        """Report new rows, if there are any and somebody listens."""
        if rows and self.on_rows is not None:
            self.on_rows(rows)

    def tell(self, done: int, total: int) -> None:
        """Report how far the call has come."""
        if self.on_progress is not None:
            self.on_progress(done, total)


@contextmanager
def progress(
    what: str, unit: str, *, estimate: bool = True
) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on standard error; where that is no terminal, a line now and then.

    Once it is known, it is said how long it will take, unless it is soon over, or not ``estimate``.
    """
    pace = Pace(f"{what}: ", unit, estimate=estimate)
    if not on_terminal():
        yield pace
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    bar = Progress(
        TextColumn(shown(what), markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console(stderr=True),
        transient=True,
        redirect_stdout=False,  # it may lead elsewhere: into a file, or a pipe
    )
    pace.every = float("inf")
    with bar:
        task = bar.add_task(what, total=None)

        def tell(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)
            pace(done, total)

        yield tell


class Pace:
    """Lines on how far a long call is: called with (done, total), a line now and then.

    Args:
        before: what each line begins with.
        unit: what is counted.
        tell: what the lines are given to.
        every: seconds between two lines.
        estimate: say how long it takes, once some of it is done, where it is a minute or more.
    """

    def __init__(
        self,
        before: str = "",
        unit: str = "",
        tell: Callable[[str], object] = say,
        *,
        every: float = 30.0,
        estimate: bool = True,
    ) -> None:
        self.before, self.unit, self.tell, self.every = before, f" {unit}".rstrip(), tell, every
        self._told = self._start = time.monotonic()
        self._base: int | None = None
        self._estimate = estimate

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self._base is None:  # what an earlier call has done tells nothing of the pace
            self._base, self._start = done, now
        new, spent = done - self._base, now - self._start
        if new <= 0 or done >= total:
            return
        left = spent / new * (total - done)
        if self._estimate and (spent >= _LONG or (new >= _FEW and spent >= _SHORT)):
            self._estimate = False
            if left >= WORTH_SAYING:
                self.tell(
                    f"{self.before}about {in_words(spent + left)} on this machine for "
                    f"{total - self._base:,}{self.unit} (by the first {new:,})"
                )
                self._told = now
        if now - self._told >= self.every:
            self._told = now
            self.tell(
                f"{self.before}{done:,} of {total:,}{self.unit}, {in_words(spent)} so far, about "
                f"{in_words(left)} left"
            )


# An estimate rests on so many of what is counted, as the first takes longer than the others, and on
# so many seconds; or on so many that whoever waits must be told something.
_FEW, _SHORT, _LONG = 3, 1.0, 30.0
WORTH_SAYING = 60.0  # seconds: what takes less needs no estimate


def in_words(seconds: float) -> str:
    """A length of time, roughly."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


T = TypeVar("T")

SMALLER = "Use a smaller --dtype such as bfloat16, or drop the longest facts"


class OutOfMemory(UserError, MemoryError):  # noqa: N818
    """Memory ran out and no smaller batch is left to try.

    It is a ``MemoryError`` too, so that a caller who can do with less at once may still go on.
    """


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out (CUDA, MPS, or the CPU allocator)."""
    import torch

    text = str(error).lower()
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError)
        and any(words in text for words in ("out of memory", "can't allocate", "not enough memory"))
    )


def in_smaller_batches(
    batches: Iterable[Sequence[int]],
    run: Callable[[list[int]], T],
    what: Callable[[int], str],
    *,
    for_good: bool = False,
) -> Iterator[tuple[list[int], T]]:
    """Run each batch; yield its members with the result, in parts where memory does not suffice.

    A part that runs out of memory is halved and tried again. ``what`` names a member to the user.

    Args:
        batches: members, by number.
        run: what is done with some of them. It must leave nothing behind when it fails.
        what: a member in words.
        for_good: keep later batches as small. Else each begins whole: they are of shorter texts.

    Raises:
        OutOfMemory: memory runs out on one member alone.
    """
    most: int | None = None
    for batch in batches:
        todo, size = list(batch), most or len(batch)
        while todo:
            members = todo[:size]
            found: tuple[T] | None = None
            try:
                found = (run(members),)
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
                if len(members) == 1:
                    if isinstance(error, OutOfMemory):
                        raise
                    raise OutOfMemory(
                        f"memory ran out on {what(members[0])} alone", fix=SMALLER
                    ) from error
            if found is None:  # only here, with the exception gone, are its tensors free
                size = max(1, len(members) // 2)
                most = size if for_good else None
                import torch

                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                continue
            todo = todo[len(members) :]
            yield members, found[0]


@contextmanager
def memory_errors(found: str, fix: str = SMALLER) -> Iterator[None]:
    """Within it, memory that runs out becomes a ``UserError``.

    Raises:
        OutOfMemory: with ``found`` and ``fix``, or as it was raised inside.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, OutOfMemory) or not out_of_memory(error):
            raise
        raise OutOfMemory(found, fix=fix) from error
