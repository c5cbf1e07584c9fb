"""What a person is shown: the one place that makes text safe to show, and that writes it.

Names, answers and errors come from files, models and arguments, and may hold anything: sequences
that move the cursor, line breaks that forge a line, marks that turn the order of reading around.
All that is printed goes through ``say``, ``put`` or a table, and none of them lets such a character
through. While a command runs, its streams hold back what other libraries print, too.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import sys
import traceback
import unicodedata
import warnings
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

LONGEST = 2000  # characters of a line, or of one part of a message
# A message has three such parts at most, which were cut already, and escapes are longer.
_LONGEST_MESSAGE = 30 * LONGEST
_STYLES = re.compile(r"\x1b\[[0-9;]*m")


def shown(value: object, limit: int | None = LONGEST) -> str:
    r"""``value`` as text that is one line, safe to show, and not endless.

    What has no picture of its own (control characters, line breaks, marks of direction, signs
    without width, lone surrogates, unassigned ones) becomes its escape, such as ``\x1b`` or
    ``\u202e``. Of a text longer than ``limit`` the middle is left out. Backslashes stay as they
    are, so a text that went through here once is not changed by going through again.
    """
    text = str(value)
    if limit is not None and len(text) > limit:
        head, tail = limit * 2 // 3, limit // 4
        gone = len(text) - head - tail
        text = f"{text[:head]} … ({gone:,} characters left out) … {text[-tail:]}"
    return text if text.isprintable() else "".join(map(_shown_character, text))


def _shown_character(one: str) -> str:
    # Python counts no space but the plain one as printable; the others do no harm.
    if one.isprintable() or unicodedata.category(one) == "Zs":
        return one
    return one.encode("unicode_escape").decode("ascii")


def _shown_lines(text: str) -> str:
    """As ``shown`` has it, but line breaks and tabs stay."""
    if text.isprintable():
        return text
    return "".join(one if one in "\n\t" else _shown_character(one) for one in text)


def without_styles(text: str) -> str:
    """``text`` without the sequences that set colours and the like."""
    return _STYLES.sub("", text)


def say(*lines: object) -> None:
    """Lines for the person at the terminal: what happens, warnings, errors. Not the results.

    Each argument is one line, whatever it holds.
    """
    _print(sys.stderr, lines, _LONGEST_MESSAGE)


def put(*lines: object, limit: int | None = LONGEST) -> None:
    """Lines of a result, on standard output. Each argument is one line, whatever it holds."""
    _print(sys.stdout, lines, limit)


def width() -> int:
    """Characters of a line of text in this terminal: as many as it has, at most 100."""
    return min(shutil.get_terminal_size().columns, 100)


def console(*, stderr: bool = False) -> Console:
    """A Rich console on standard output or error; what it is given must be ``shown`` before."""
    from rich.console import Console

    return Console(file=unescaped(sys.stderr if stderr else sys.stdout), stderr=stderr)


@contextlib.contextmanager
def progress(what: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar with an estimate, on standard error; silent when that is no terminal."""
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
        disable=not sys.stderr.isatty(),
    )
    with bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def unescaped(stream: Any) -> Any:
    """The stream without what ``showing`` holds back, for colours around text that is safe."""
    return stream.plain if isinstance(stream, _Stream) else stream


def _print(stream: Any, lines: tuple[object, ...], limit: int | None) -> None:
    if stream is None:  # it was closed from the start
        return
    stream = stream if isinstance(stream, _Stream) else _Stream(stream)
    stream.write("".join(f"{shown(line, limit)}\n" for line in lines))
    stream.flush()


class OutputLost(Exception):  # noqa: N818 - the work itself did not fail
    """Standard output could not be written, as on a full disk."""


class _Plain:
    """A stream that takes any text and never fails.

    Where nobody reads any more (head, less), or the disk is full, what still comes goes nowhere:
    that is no reason to stop the work. ``error`` keeps the reason.
    """

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.error: BaseException | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def write(self, text: str) -> int:
        try:
            try:
                self.inner.write(text)
            except UnicodeEncodeError:  # a terminal that knows few characters
                code = self.inner.encoding
                self.inner.write(text.encode(code, "backslashreplace").decode(code))
        except (OSError, ValueError) as error:
            self._to_nowhere(error)
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self.inner.flush()
        except (OSError, ValueError) as error:
            self._to_nowhere(error)

    def _to_nowhere(self, error: BaseException) -> None:
        """Let what is still buffered, and what comes later, vanish: else the exit would complain.

        A closed stream (ValueError) or one that is no file (a notebook's) needs none of that.
        """
        self.error = self.error or error
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.inner.fileno())
            os.close(nowhere)


class _Stream(_Plain):
    """As ``_Plain``, and it lets no control character through but line breaks and tabs.

    ``plain`` is the same without that, for who has made the text safe and adds colours to it.
    """

    def __init__(self, inner: Any) -> None:
        self.plain = _Plain(inner)
        super().__init__(self.plain)

    def write(self, text: str) -> int:
        # Progress bars of other libraries begin their line anew.
        start = len(text) - len(text.lstrip("\r"))
        self.plain.write(text[:start] + _shown_lines(text[start:]))
        return len(text)


@contextlib.contextmanager
def showing() -> Iterator[None]:
    """Within it nothing that is printed, by whomever, does harm, fails, or stops the work.

    Standard output and error take any text and escape what is not to be shown; warnings are one
    line each. Within another such block it does nothing.

    Raises:
        OutputLost: at the end: standard output could not be written, and not because its reader
            went away.
    """
    if isinstance(sys.stdout, _Stream) or isinstance(sys.stderr, _Stream):
        yield
        return
    before = sys.stdout, sys.stderr, warnings.formatwarning
    out, err = (None if one is None else _Stream(one) for one in before[:2])
    now: tuple[Any, Any] = out, err
    sys.stdout, sys.stderr = now
    warnings.formatwarning = _warning
    if sys.excepthook is sys.__excepthook__:  # a defect is shown after the block
        sys.excepthook = _defect
    try:
        yield
    finally:
        for stream in now:
            if stream is not None:
                stream.flush()
        sys.stdout, sys.stderr, warnings.formatwarning = before
    if out is not None and not isinstance(out.plain.error, BrokenPipeError | None):
        raise OutputLost(f"standard output could not be written ({out.plain.error})")


def _warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    line: str | None = None,
) -> str:
    del category, filename, lineno, line
    return f"Warning: {shown(message)}\n"


def _defect(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    text = "".join(traceback.format_exception(kind, error, trace))
    say(*text.rstrip("\n").split("\n"))


class LogFormatter(logging.Formatter):
    """A line of a log is one line, whatever the message holds; a traceback keeps its lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        return shown(super().formatMessage(record), _LONGEST_MESSAGE)

    def formatException(self, ei: Any) -> str:  # noqa: N802 - logging's name
        return _shown_lines(super().formatException(ei))
