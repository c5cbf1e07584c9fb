"""The tables of a study, on the terminal and as a page in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from goldenlayers.report import show, table
from goldenlayers.shown import put, shown

_SHORT = {"overall": "Overall"}
Table = tuple[str, Sequence[str], Sequence[Sequence[str | None]]]


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


def _tables(summary: Mapping[str, Any], *, short: bool) -> Iterable[Table]:
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
