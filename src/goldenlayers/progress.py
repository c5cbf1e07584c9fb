"""How a long call reports what it has done, and goes on with what an earlier call left."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
