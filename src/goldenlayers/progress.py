"""Long calls: how they report what is done and go on with what an earlier call left, and what they
do where memory runs out: smaller batches, or words for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from goldenlayers.errors import UserError

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

    def rows(self, rows: list[Row]) -> None:
        """Report new rows, if there are any and somebody listens."""
        if rows and self.on_rows is not None:
            self.on_rows(rows)

    def tell(self, done: int, total: int) -> None:
        """Report how far the call has come."""
        if self.on_progress is not None:
            self.on_progress(done, total)


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
