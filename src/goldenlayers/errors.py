"""The errors a user can cause, each said in one message that tells how to mend it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Any

from goldenlayers.shown import shown


class UserError(Exception):
    """Something the user gave is wrong; the command line shows it without a traceback and exits 2.

    The message is one line that is safe to show, whatever the names in it hold; ``found`` and the
    others are as they were given.

    Args:
        found: what was found, and where (file, row, field).
        expected: what was expected instead, if that adds anything.
        fix: what the user can do about it.
    """

    def __init__(self, found: str, *, expected: str = "", fix: str = "") -> None:
        self.found = found
        self.expected = expected
        self.fix = fix
        parts = [_sentence(found)]
        if expected:
            parts.append(_sentence(f"Expected {expected}"))
        if fix:
            parts.append(_sentence(fix))
        super().__init__(" ".join(parts))


def _sentence(text: str) -> str:
    """``text`` with one full stop, unless it ends as a question or an ellipsis."""
    text = shown(text.rstrip())
    return text if text.endswith(("?", "!", "…", "...")) else text.rstrip(".") + "."


class DataError(UserError):
    """A row of a data file is wrong.

    Args:
        problem: what is wrong with this row.
        field: the field at fault, e.g. ``target_new`` or ``locality[2].prompt``.
        expected, fix: as for UserError.
        reason: the kind of problem in words that are the same for every row that has it
            (reports group by it); the problem itself when not given.

    :meth:`at` adds ``source``, the file (or hub data set) it stands in, and ``row``: line number
    for JSON lines and tables (where a row begins), record number for a JSON array or parquet;
    both count from 1.
    """

    source: str = ""
    row: int | None = None

    def __init__(
        self, problem: str, *, field: str = "", expected: str = "", fix: str = "", reason: str = ""
    ) -> None:
        self.problem, self.reason, self.field = problem, reason or problem, field
        row = f"row {self.row}" if self.row is not None else ""
        parts = (self.source, row, f"field '{field}'" if field else "")
        place = ", ".join(part for part in parts if part)
        super().__init__(f"{place}: {problem}" if place else problem, expected=expected, fix=fix)

    def at(
        self, *, source: str = "", row: int | None = None, field: str = "", fix: str = ""
    ) -> DataError:
        """The same error, now with the place where it was found; what is not given stays."""
        placed = DataError.__new__(DataError)
        placed.source, placed.row = source or self.source, self.row if row is None else row
        placed.__init__(
            self.problem,
            field=field or self.field,
            expected=self.expected,
            fix=fix or self.fix,
            reason=self.reason,
        )
        return placed


LARGEST_SEED = 2**63 - 1  # what every generator of random numbers takes


def check_number(
    name: str, value: object, low: float, high: float, *, whole: bool = True, above: bool = False
) -> None:
    """Refuse what is no number from ``low`` to ``high``; numpy's numbers count as numbers.

    ``name`` says in the message what the number is. Both ends are allowed, but ``low`` is not where
    the number must be ``above`` it.

    Raises:
        UserError: text, NaN, infinity, a number out of the range ...
    """
    kind = "a whole number" if whole else "a number"
    if whole:
        number = hasattr(value, "__index__") and not isinstance(value, bool)
    else:
        number = hasattr(value, "__float__") and not isinstance(value, bool | str)
    if not number:
        raise UserError(f"{name} is {value!r}", expected=kind)
    found: Any = value
    if not (found > low if above else found >= low):  # NaN is refused, too
        expected = f"{kind} above {low:g}" if above else f"{low:,} or more"
        raise UserError(f"{name} is {value}", expected=expected)
    if found > high:
        raise UserError(f"{name} is {value}", expected=f"{high:,} or less")


def read_value(text: str, kind: type, what: str) -> float | int | bool | str:
    """The number, or true or false, that a text writes; for any other kind the text itself.

    Raises:
        UserError: it writes none; ``what`` says in the message what was to be read.
    """
    if kind not in (bool, int, float):
        return text
    try:
        return {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
    except (ValueError, KeyError):
        kinds = {bool: "true or false", int: "a whole number"}
        raise UserError(f"{what} is '{text}'", expected=kinds.get(kind, "a number")) from None


def check_seed(seed: object) -> None:
    """Refuse a seed that not every generator of random numbers takes.

    Raises:
        UserError: no whole number from 0 to 2^63 - 1.
    """
    check_number("the seed", seed, 0, LARGEST_SEED)


def near_matches(name: str, known: Iterable[str]) -> str:
    """A sentence that names the known words closest to ``name``, or lists them all if few."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return "Did you mean " + " or ".join(f"'{word}'" for word in close) + "?"
    return "Known: " + ", ".join(known) if known else ""


def listed(layers: Sequence[int]) -> str:
    """Layers in words, not too many."""
    some = ", ".join(map(str, layers[:8]))
    return some if len(layers) <= 8 else f"{some} and {len(layers) - 8} more"


def shortened(text: str, limit: int = 80) -> str:
    """``text`` as a message can hold it: at most ``limit`` characters, none of them half of one."""
    text = text if len(text) <= limit else text[: limit - 1] + "…"
    return re.sub("[\ud800-\udfff]", "\ufffd", text)
