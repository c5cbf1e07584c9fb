"""Tables and figures from results that are already there: no model is loaded here.

Here: tables for the terminal, readable without colour and in 80 columns, and those of a study, also
as a page in Markdown.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from goldenlayers.shown import console as standard_console
from goldenlayers.shown import put, shown

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

    from goldenlayers.locating.ranking import LayerRanking


_EIGHTHS = " ▏▎▍▌▋▊▉█"
_LONGEST_CELL = 400  # characters


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Table:
    """A plain table: columns of numbers stand right, all others left; None is shown as a dash.

    A float is shown with four significant digits; format it yourself for another precision.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    rows = [list(row) for row in rows]
    heading = Text(shown(title)) if title else None
    made = Table(title=heading, title_justify="left", box=box.SIMPLE_HEAD)
    for i, name in enumerate(columns):
        values = [row[i] for row in rows if row[i] is not None]
        numbers = bool(values) and all(isinstance(value, int | float) for value in values)
        made.add_column(Text(_cell(name)), justify="right" if numbers else "left", no_wrap=numbers)
    for row in rows:
        # Text, not str: brackets in a prompt or an answer are no markup.
        made.add_row(*(Text(_cell(value)) for value in row))
    return made


def show(renderable: RenderableType, console: Console | None = None) -> None:
    """Print to ``console``, or to standard output."""
    (console or standard_console()).print(renderable)


def ranking_table(
    ranking: LayerRanking, *, ascii_only: bool = False, bar_width: int = 24, cosine: bool = True
) -> Table:
    """A ranking as a table: one line per layer with a bar, the golden layer and the left-out named;
    none for layers that a race did not try.

    The golden layer's star is hollow where the resamples do not agree on it.

    Bars start at zero, to the left for negative scores, and are scaled to the kept layers; the bar
    of an excluded layer that is longer ends in an arrow. ``ascii_only`` is for terminals that
    have no block characters; ``cosine=False`` leaves that column out, to save room.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    rank = {layer: place for place, layer in enumerate(ranking.candidates, start=1)}
    has_cosine = cosine and any(row.cosine is not None for row in ranking.layers)
    has_wins = any(row.wins is not None for row in ranking.layers)
    has_facts = any(row.facts is not None for row in ranking.layers)
    bars = _bars(ranking, bar_width, ascii_only)
    made = Table(
        title=Text(headline(ranking), style="bold"),
        title_justify="left",
        box=box.ASCII if ascii_only else box.SIMPLE_HEAD,
        padding=(0, 1),
        pad_edge=False,
    )
    for name in (
        "layer",
        "score",
        "bar",
        *["cosine"] * has_cosine,
        *["facts"] * has_facts,
        *["wins"] * has_wins,
        "note",
    ):
        bare = name in ("bar", "note")
        made.add_column(
            "" if bare else name,
            justify="left" if bare else "right",
            no_wrap=True,
            overflow="crop",
            width=bar_width + 1 if name == "bar" else None,
        )
    star = ("*" if ascii_only else "★") if ranking.firm else ("?" if ascii_only else "☆")
    for row, bar in zip(ranking.layers, bars, strict=True):
        if row.score is None:  # a race tries few
            continue
        if row.layer == ranking.golden_layer:
            note, look = f"{star} golden", "bold yellow"
        elif not row.kept:
            note, look = "left out", "dim"
        else:
            note, look = f"#{rank[row.layer]}" if row.layer in rank else "", ""
        cells = [str(row.layer), f"{row.score:.3g}", bar]
        if has_cosine:
            cells.append("-" if row.cosine is None else f"{row.cosine:+.3f}")
        if has_facts:
            cells.append(str(row.facts or "-"))
        if has_wins:
            cells.append("-" if row.wins is None else f"{100 * row.wins:.0f} %")
        made.add_row(*(Text(cell) for cell in [*cells, note]), style=look)
    return made


def headline(ranking: LayerRanking) -> str:
    """One line that says what was chosen, by what, and from how much."""
    facts = n_facts(ranking)
    parts = [f"Golden layer {ranking.golden_layer} of {len(ranking.layers)}"]
    if ranking.model:
        parts[0] += f" in {ranking.model}"
    parts.append(ranking.method)
    if ranking.n_facts:
        parts.append(facts + (f" of {ranking.data}" if ranking.data else ""))
    if ranking.seconds is not None:
        parts.append(f"{ranking.seconds:.1f} s")
    return shown(", ".join(parts))


def n_facts(ranking: LayerRanking) -> str:
    """How many facts took part, and of how many if some did not."""
    given = ranking.n_given or ranking.n_facts
    few = f"{ranking.n_facts} of " if given != ranking.n_facts else ""
    return f"{few}{given} fact" + ("" if given == 1 else "s")


def show_ranking(ranking: LayerRanking, console: Console | None = None) -> None:
    """Print a ranking's table and its warnings."""
    from rich.console import Console
    from rich.text import Text

    console = console or standard_console()
    how: dict[str, bool] = {"ascii_only": not (console.encoding or "").lower().startswith("utf")}
    # What is left beside the other columns goes to the bars; if that is too little, no cosine.
    for how["cosine"] in (True, False):
        bare = ranking_table(ranking, bar_width=4, **how)
        bare.title = None
        room = console.width - Console(width=1000).measure(bare).maximum + 4
        if room >= 10:
            break
    console.print(ranking_table(ranking, bar_width=max(4, min(40, room)), **how))
    for warning in ranking.warnings:
        console.print(Text.assemble(("Warning: ", "bold"), shown(warning)))
    for note in ranking.notes:
        console.print(Text(shown(note)))


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return "-" if value != value else f"{value:.4g}"
    return shown(value, _LONGEST_CELL)


def _bars(ranking: LayerRanking, width: int, ascii_only: bool) -> list[str]:
    """One bar per layer, each at most ``width`` + 1 characters (the last for an arrow)."""
    kept = [row.value for row in ranking.layers if row.kept]
    low, high = min(0.0, *kept), max(0.0, *kept)
    if low == high:  # nothing but zeros
        return [""] * len(ranking.layers)
    unit = (high - low) / width
    zero = round(-low / unit)  # characters left of zero
    right, left = (">", "<") if ascii_only else ("▶", "◀")
    full = "#" if ascii_only else "█"
    bars = []
    for row in ranking.layers:
        if row.score is None:
            bars.append("")
            continue
        length = row.score / unit
        over = length > width - zero + 0.5 or length < -zero - 0.5
        if row.score >= 0:
            length = min(length, width - zero)
            bar = " " * zero + _right_bar(length, full, ascii_only) + (right if over else "")
        else:
            # There are no block characters that fill from the right in all fonts: whole ones.
            count = min(round(-length), zero)
            count = max(count, 1) if zero else 0
            bar = " " * (zero - count) + full * count
            if over:
                bar = left + bar[1:] if zero else left
        bars.append(bar)
    return bars


def _right_bar(length: float, full: str, ascii_only: bool) -> str:
    if ascii_only:
        return full * round(length)
    whole, part = divmod(round(length * 8), 8)
    return full * whole + (_EIGHTHS[part] if part else "")


_SHORT = {"overall": "Overall"}
# Title, columns, rows.
_Plain = tuple[str, Sequence[str], Sequence[Sequence[str | None]]]


def show_study(summary: Mapping[str, Any]) -> None:
    """Print the means over cells: editors, what sets them apart, and layer choices."""
    for title, columns, rows in _tables(summary, short=True):
        show(table(title, columns, rows))
    for line in _notes(summary):
        put(line)


def markdown(summary: Mapping[str, Any]) -> str:
    """All tables, those cell by cell, too."""
    parts = ["# A study"]
    for title, columns, rows in _tables(summary, short=False):
        lines = [_line(columns), _line(["---"] * len(columns)), *map(_line, rows)]
        parts += [f"## {_text(title)}", "\n".join(lines)]
    parts += [_text(note) for note in _notes(summary)]
    return "\n\n".join(parts) + "\n"


def _tables(summary: Mapping[str, Any], *, short: bool) -> Iterable[_Plain]:
    metrics = summary["metrics"]
    names = [str(_SHORT.get(m, m)) for m in metrics]
    for title, key, sign in (
        ("Editors: means over the cells", "means", False),
        (f"Points above {summary['editors'][0]}, fact by fact", "means_against_first", True),
    ):
        rows = [
            [one["editor"], one["at"] or "–", str(len(one["cells"]))]
            + [
                _number(one["metrics"].get(m), interval=not short or m == metrics[-1], sign=sign)
                for m in metrics
            ]
            for one in summary[key]
        ]
        if rows:
            yield title, ["editor", "layer", "cells", *names], rows
    choices = summary["choices"]
    if choices["means"]:
        editors = list(choices["noise_floor_by_editor"])
        columns = ["choice", "cells", "regret", "worst", "worst against published", *editors]
        rows = [
            [
                one["choice"],
                str(one["cells"]),
                _number(one["regret"], interval=True),
                _number(one["worst"]),
                _number(one["worst_against_published"], sign=True),
                *(_number(one["by_editor"].get(e)) for e in editors),
            ]
            for one in choices["means"]
        ]
        floors = [_number(choices["noise_floor_by_editor"][e]) for e in editors]
        floor = ["noise floor", None, _number(choices["noise_floor"]), None, None, *floors]
        yield "Layer choices: mean regret over the cells", columns, [floor, *rows]
    if short:
        return
    rows = [
        [one["cell"], one["editor"], one["at"] or "–", str(one["layer"] if one["at"] else "–")]
        + [_number(one["metrics"].get(m), interval=True) for m in metrics]
        for one in summary["rows"]
    ]
    if rows:
        yield "Cell by cell", ["cell", "editor", "at", "layer", *names], rows
    if choices["rows"]:
        known = [one["choice"] for one in choices["means"]]
        rows = [
            [one["cell"], one["editor"], str(one["golden_layer"]), _number(one["noise_floor"])]
            + [_choice(one["choices"].get(name)) for name in known]
            for one in choices["rows"]
        ]
        columns = ["cell", "editor", "golden layer", "noise floor", *known]
        yield "Layer choices cell by cell: layer and regret", columns, rows


def _notes(summary: Mapping[str, Any]) -> Iterable[str]:
    yield (
        "Intervals: 95 %, bootstrap over the test facts. Means over cells are over the cells that "
        "are there; an editor that lacks some is seen by their number."
    )
    if summary["choices"]["means"]:
        yield (
            "Regret: points below the layer that is best on the test facts themselves. Noise "
            "floor: the regret that the truly best layer would show on other facts of this number."
        )
    for run, error in summary.get("failed", {}).items():
        yield f"Failed: {run}: {error}"
    if left := summary.get("left"):
        yield f"Left: {len(left)} runs: {', '.join(left)}"


def _number(value: Any, *, interval: bool = False, sign: bool = False) -> str | None:
    """A figure, or a record of one with its interval."""
    low = high = None
    if isinstance(value, Mapping):
        low, high = value.get("low"), value.get("high")
        value = value.get("value")
    if value is None:
        return None
    form = "{:+.1f}" if sign else "{:.1f}"
    ends = f" ({low:.1f} to {high:.1f})" if interval and low is not None else ""
    return form.format(value + 0.0) + ends


def _choice(one: Any) -> str | None:
    if one is None:
        return None
    layer = "" if one["layer"] is None else f"{one['layer']}: "
    return f"{layer}{_number(one['regret'])}"


def _line(cells: Iterable[Any]) -> str:
    return "| " + " | ".join("–" if one is None else _text(one) for one in cells) + " |"


def _text(value: object) -> str:
    """Text that is no Markdown of its own, whatever a name or an error holds."""
    text = shown(value)
    for mark in ("\\", "|", "*", "_", "`", "<", "["):
        text = text.replace(mark, f"\\{mark}")
    return text if text != "---" else "---"
