"""What a person is shown: the one place that makes text safe to show, and that writes it.

Names, answers and errors come from files, models and arguments, and may hold anything: sequences
that move the cursor, line breaks that forge a line, marks that turn the order of reading around.
All that is printed goes through ``say``, ``warn``, ``put`` or a table, and none of them lets such a
character through. While a command runs, its streams hold back what other libraries print, too.

What is said goes to the logger ``goldenlayers``: a command shows it, in Python it is silent until
``logging`` is set up. What a command finds it hands over by ``result``, for ``--json``.
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
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

LONGEST = 2000  # characters of a line, or of one part of a message
# A message has three such parts at most, which were cut already, and escapes are longer.
_LONGEST_MESSAGE = 30 * LONGEST
_STYLES = re.compile(r"\x1b\[[0-9;]*m")
_LOG = logging.getLogger("goldenlayers")
_LOG.addHandler(logging.NullHandler())


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
    """Lines on what happens. Each argument is one line, whatever it holds."""
    for line in lines:
        _LOG.info("%s", shown(line, _LONGEST_MESSAGE))


def warn(text: object) -> None:
    """A line on what may be amiss, though the work goes on."""
    _LOG.warning("%s", shown(text, _LONGEST_MESSAGE))


def complain(text: object) -> None:
    """The line that says why the command ends."""
    _LOG.error("%s", shown(text, _LONGEST_MESSAGE))


def result(**found: Any) -> None:
    """Hand over what the command has found, in plain values, by the names that docs/json.md has."""
    if _calls:
        _calls[-1].found |= found


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


def on_terminal() -> bool:
    """Whether standard error is a terminal, where lines can be drawn anew."""
    return sys.stderr is not None and sys.stderr.isatty()


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


@dataclass
class Call:
    """One call of a command: how it is told, and what it has found.

    Attributes:
        json: standard output is for :meth:`write` alone; what is put there goes to standard error.
        quiet: only results and errors are shown.
        found: what ``result`` was given.
        warnings: what was warned of.
    """

    json: bool = False
    quiet: bool = False
    found: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    out: _Stream | None = None
    err: _Stream | None = None

    def write(self, text: str) -> None:
        """Put the one line on standard output that ``json`` leaves to it."""
        _print(self.out, (text,), None)


_calls: list[Call] = []


class _Handler(logging.Handler):
    """Shows what is said during a call, and keeps its warnings."""

    def __init__(self, call: Call) -> None:
        super().__init__(logging.INFO)
        self.call = call

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.levelno >= logging.ERROR:
            _print(self.call.err, (f"golden: {text}",), None)
        elif record.levelno >= logging.WARNING:
            self.call.warnings.append(text)
            _print(sys.stderr, (f"Warning: {text}",), None)
        else:
            _print(sys.stderr, (text,), None)


@contextlib.contextmanager
def showing(*, json: bool = False, quiet: bool = False) -> Iterator[Call]:
    """Within it nothing that is printed, by whomever, does harm, fails, or stops the work.

    Standard output and error take any text and escape what is not to be shown; warnings are one
    line each, and what is said is shown. Within another such block it does nothing.

    Raises:
        OutputLost: at the end: standard output could not be written, and not because its reader
            went away.
    """
    if _calls:
        yield _calls[-1]
        return
    before = sys.stdout, sys.stderr, warnings.formatwarning, _LOG.level
    out, err = (None if one is None else _Stream(one) for one in before[:2])
    call = Call(json, quiet, out=out, err=err)
    handler = _Handler(call)
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere:
        said: Any = _Stream(nowhere) if quiet else err
        printed: Any = said if json else out
        sys.stdout, sys.stderr, warnings.formatwarning = printed, said, _warning
        if sys.excepthook is sys.__excepthook__:  # a defect is shown after the block
            sys.excepthook = _defect
        _LOG.addHandler(handler)
        _LOG.setLevel(logging.INFO)
        _calls.append(call)
        try:
            yield call
        finally:
            _calls.clear()
            _LOG.removeHandler(handler)
            for stream in (out, err):
                if stream is not None:
                    stream.flush()
            sys.stdout, sys.stderr, warnings.formatwarning = before[:3]
            _LOG.setLevel(before[3])
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
    if _calls:
        _calls[-1].warnings.append(shown(message))
    return f"Warning: {shown(message)}\n"


def _defect(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    text = "".join(traceback.format_exception(kind, error, trace))
    _print(sys.stderr, tuple(text.rstrip("\n").split("\n")), _LONGEST_MESSAGE)


class LogFormatter(logging.Formatter):
    """A line of a log is one line, whatever the message holds; a traceback keeps its lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        return shown(super().formatMessage(record), _LONGEST_MESSAGE)

    def formatException(self, ei: Any) -> str:  # noqa: N802 - logging's name
        return _shown_lines(super().formatException(ei))
