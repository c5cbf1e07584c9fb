"""What a page is made of: sections with sentences, charts and tables. All of it is plain text yet:
the page escapes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from goldenlayers.shown import shown

LONGEST = 300  # characters of a cell
MOST_ROWS = 400  # of a table; what is beyond is said


@dataclass(frozen=True)
class Table:
    """Rows of numbers and texts; None is shown as a dash. ``folded``: hidden until it is opened."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    folded: bool = False

    @property
    def cells(self) -> list[list[tuple[str, bool]]]:
        """The rows to show, each cell as its text and whether it is a number."""
        return [[cell(value) for value in row] for row in self.rows[:MOST_ROWS]]

    @property
    def more(self) -> int:
        """How many rows are not shown."""
        return max(0, len(self.rows) - MOST_ROWS)


@dataclass(frozen=True)
class Chart:
    """A chart, and the table behind it.

    Attributes:
        title: above it.
        said: what it shows, in a sentence or two: its caption, and what a screen reader says.
        views: name → figure of Plotly ({"data", "layout"}); of several the reader picks one.
        table: the numbers.
        height: in pixels.
        wide: whether it takes the whole width where others stand side by side.
    """

    title: str
    said: str
    views: Mapping[str, Mapping[str, Any]]
    table: Table
    height: int = 360
    wide: bool = False


@dataclass(frozen=True)
class Section:
    """What is said of one run, or of several."""

    title: str
    words: Sequence[str] = ()
    parts: Sequence[Table | Chart] = ()
    place: str = ""


@dataclass(frozen=True)
class Card:
    """One answer in the first lines: what was asked, the layer, and the three sentences."""

    title: str
    layer: str
    how: str
    sure: str
    cost: str


@dataclass
class Page:
    """All that is on a page.

    Attributes:
        cards: the answers.
        sections: behind them, in order.
        left_out: run → why it, or a part of it, is not on the page.
    """

    cards: list[Card] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)


def cell(value: Any) -> tuple[str, bool]:
    """A value as a table shows it, and whether it is a number."""
    if value is None or (isinstance(value, float) and value != value):
        return "–", False
    if isinstance(value, bool):
        return ("yes" if value else "no"), False
    if isinstance(value, float):
        return number(value), True
    return shown(value, LONGEST), isinstance(value, int)


def number(value: float | None, sign: bool = False) -> str:
    """A number with one decimal, or where that says little with three digits; a dash for none."""
    if value is None or value != value:
        return "–"
    size = abs(value)
    if size >= 1e5 or 0 < size < 0.95:
        text = f"{value:.3g}"
    else:
        text = f"{value:.1f}" if size < 1000 else f"{value:.0f}"
    return f"+{text}" if sign and value > 0 else text


def interval(low: float | None, high: float | None) -> str | None:
    """The ends of an interval; None where there is none."""
    known = low is not None and high is not None and low == low and high == high
    return f"{number(low)} to {number(high)}" if known else None


def listed(layers: Sequence[int], most: int = 8) -> str:
    """Layers in words."""
    some = [str(one) for one in layers[:most]]
    if len(layers) > most:
        return f"{', '.join(some)} and {len(layers) - most} more"
    return " and ".join(filter(None, [", ".join(some[:-1]), *some[-1:]]))
