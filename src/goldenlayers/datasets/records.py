"""A data file from bytes to records: ordinary files only, not too large, unpacked, decoded; JSON
arrays and JSON lines; and what no record may be.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import os
import stat
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from goldenlayers.errors import DataError, UserError, shortened

_DEPTH = 30  # the public formats nest 6 levels deep at most
_DIGITS = 300

LIMIT = 512 << 20  # bytes; as Python objects the records take several times as much
GZIP = b"\x1f\x8b"
# What people have that is no text, by its first bytes.
_BINARY = {
    b"PK\x03\x04": "a ZIP archive or an Excel workbook",
    b"\xd0\xcf\x11\xe0": "an old Excel workbook",
    b"BZh": "packed with bzip2",
    b"\xfd7zXZ": "packed with xz",
    b"\x28\xb5\x2f\xfd": "packed with zstd",
    b"7z\xbc\xaf": "a 7z archive",
    GZIP: "packed with gzip twice",
    b"SQLite format 3": "an SQLite database",
    b"ARROW1": "an Arrow file",
    b"\x80\x02": "a pickle",
    b"\x80\x03": "a pickle",
    b"\x80\x04": "a pickle",
    b"\x80\x05": "a pickle",
}
_BOMS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def file_bytes(path: Path) -> bytes:
    """The bytes of an ordinary file, whatever its name.

    A pipe or a device is refused before it is read from: it may never end.

    Raises:
        UserError: no ordinary file, or larger than ``LIMIT``.
        OSError: it cannot be read.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    with open(os.open(path, flags), "rb") as file:  # noqa: PTH123 - a descriptor has no path
        mode = os.fstat(file.fileno()).st_mode
        if not stat.S_ISREG(mode):
            what = "a pipe" if stat.S_ISFIFO(mode) else "a device"
            raise UserError(
                f"{shortened(str(path))} is {what}, not a file",
                fix="Write the data to a file first",
            )
        if os.fstat(file.fileno()).st_size > LIMIT:
            raise too_large(str(path))
        return _all_of(file, str(path))


def unpacked(raw: bytes, source: str) -> bytes:
    """``raw``, or what gzip has packed in it; never more than ``LIMIT``.

    Raises:
        UserError: damaged, or too large once unpacked.
    """
    if not raw.startswith(GZIP):
        return raw
    try:
        with gzip.open(io.BytesIO(raw)) as file:
            return _all_of(file, source)
    except EOFError:
        raise UserError(
            f"{source} is cut off: its gzip data does not end", fix="Fetch the file again"
        ) from None
    except (OSError, zlib.error) as error:
        raise UserError(
            f"{source} holds damaged gzip data ({error})", fix="Fetch the file again"
        ) from None


def decoded(raw: bytes, source: str) -> str:
    """The text of a file: UTF-8, or UTF-16 and UTF-32 with their mark, as Excel writes them.

    Raises:
        UserError: it is another kind of file, or its bytes are not such text.
    """
    for begin, what in _BINARY.items():
        if raw.startswith(begin):
            raise UserError(
                f"{source} is {what}, which is not read here",
                expected="JSON, JSON lines, CSV, TSV or parquet (gzip may pack them)",
                fix="Unpack it, or save it as CSV",
            )
    coding = next((name for mark, name in _BOMS.items() if raw.startswith(mark)), "utf-8-sig")
    try:
        return raw.decode(coding)
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        name = "UTF-8" if coding == "utf-8-sig" else coding.upper()
        raise UserError(
            f"{source} is not {name} text: line {line}, byte {error.start}",
            fix="Save it as UTF-8 (in Excel: 'CSV UTF-8')",
        ) from None


def too_large(source: str) -> UserError:
    """What to say of data larger than ``LIMIT``."""
    return UserError(
        f"{shortened(source)} holds more than {LIMIT >> 20} MiB of data",
        expected="data that fits in memory several times over",
        fix="Take a part of it",
    )


class _Stream(Protocol):
    def read(self, size: int, /) -> bytes: ...


def _all_of(file: _Stream, source: str) -> bytes:
    chunks: list[bytes] = []
    size = 0
    while chunk := file.read(1 << 20):
        chunks.append(chunk)
        size += len(chunk)
        if size > LIMIT:
            raise too_large(source)
    return b"".join(chunks)


class Doubled(dict[str, object]):
    """An object in which one key stands twice: JSON does not say which of its values counts."""

    key = ""


@dataclass(frozen=True)
class Table:
    """Records as they stand in their source: (row number from 1, value), and the broken rows.

    ``header``: the source is a table, whose first line names the fields.
    """

    name: str
    source: str
    sha256: str
    rows: tuple[tuple[int, object], ...]
    broken: tuple[DataError, ...] = ()
    header: bool = False

    @property
    def records(self) -> list[object]:
        """The records without their numbers."""
        return [record for _, record in self.rows]


def loads(text: str) -> Any:
    """The JSON value of a text.

    Raises:
        ValueError: no JSON (a ``json.JSONDecodeError`` says where), or nested too deeply.
    """
    try:
        return json.loads(text, object_pairs_hook=_object, parse_int=_number)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    made = dict(pairs)
    if len(made) == len(pairs):
        return made
    twice = Doubled()
    for key, value in pairs:
        if key in twice:
            twice.key = twice.key or key
        twice[key] = value
    return twice


def _number(digits: str) -> int | float:
    # Python refuses to read thousands of digits; such a number is no field of any fact.
    return int(digits) if len(digits) <= _DIGITS else float(digits)


def flaw(record: object) -> DataError | None:
    """What is wrong with a record in itself: a key that stands twice, nesting without end."""
    level = [record]
    for _ in range(_DEPTH):
        inner: list[object] = []
        for value in level:
            if isinstance(value, Doubled):
                return DataError(
                    f"the field '{shortened(value.key)}' stands twice in one object",
                    fix="Keep one of them",
                    reason="a field stands twice",
                )
            if isinstance(value, dict):
                inner += value.values()
            elif isinstance(value, Iterable):
                inner += value
        level = [value for value in inner if isinstance(value, dict | list | tuple)]
        if not level:
            return None
    return DataError(
        f"the row is nested more than {_DEPTH} levels deep", reason="the row is nested too deeply"
    )


def whole(text: str, source: str) -> Any:
    """The one JSON value of a text.

    Raises:
        UserError: broken JSON, with line and column.
    """
    try:
        return loads(text)
    except json.JSONDecodeError as error:
        cut = error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string")
        raise UserError(
            f"{source}: broken JSON at line {error.lineno}, column {error.colno} ({error.msg})"
            + ("; the file seems to be cut off" if cut else ""),
            fix="Fetch the file again" if cut else "Mend it there",
        ) from None
    except ValueError as error:
        raise UserError(f"{source}: JSON that cannot be read: {error}") from None


def lines(text: str, source: str) -> tuple[list[tuple[int, object]], list[DataError]]:
    """JSON lines; a broken line is a row error like any other. Blank lines do not count."""
    rows: list[tuple[int, object]] = []
    broken: list[DataError] = []
    # Not splitlines(): JSON text may hold U+2028 and the like unescaped.
    all_lines = text.split("\n")
    last = max(number for number, line in enumerate(all_lines, 1) if line.strip())
    for number, line in enumerate(all_lines, 1):
        if not line.strip():
            continue
        try:
            rows.append((number, loads(line)))
        except ValueError as error:
            at, why = "", str(error)
            if isinstance(error, json.JSONDecodeError):
                at, why = f" at column {error.colno}", error.msg
            cut = "; the file may be cut off" if number == last and len(all_lines) > 1 else ""
            broken.append(
                DataError(
                    f"broken JSON{at} ({why}){cut}",
                    source=source,
                    row=number,
                    expected="one object per line",
                    reason="broken JSON",
                )
            )
    return rows, broken
