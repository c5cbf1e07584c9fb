"""Records from the text of a file: JSON arrays, JSON lines, tables; and what no record may be."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from goldenlayers.errors import DataError, UserError, shortened

_DEPTH = 30  # the public formats nest 6 levels deep at most
_DIGITS = 300


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
