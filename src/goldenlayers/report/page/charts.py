"""Figures of Plotly as plain values, in the colours and with the marks of the printed figures.

Colours are names such as "var(--ink)", which the page looks up in its style: it has a light and a
dark one. Texts from runs are escaped here, as Plotly takes a little HTML.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

from goldenlayers.errors import shortened
from goldenlayers.shown import shown

Numbers = Sequence[float | None]
INK, QUIET, PAPER = "var(--ink)", "var(--quiet)", "var(--paper)"
BLUE, SKY, RED, GREEN, ORANGE, PURPLE = (
    f"var(--{name})" for name in ("blue", "sky", "red", "green", "orange", "purple")
)
GOLD = "var(--gold)"
LINES = (INK, BLUE, RED, GREEN, ORANGE, PURPLE, SKY)
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
MARKS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross")
# White, sky blue, blue, nearly black: told apart by lightness alone.
SCALE = [[0, "#F7FBFF"], [0.35, "#9ECAE1"], [0.7, "#2171B5"], [1, "#06224F"]]


def text(value: object, limit: int = 60) -> str:
    """A text of a run as a chart may show it."""
    return html.escape(shortened(shown(value), limit), quote=False)


def plain(values: Any, digits: int = 3) -> list[float | None]:
    """Numbers for JSON, rounded; what is no number is None."""
    return [
        None if v is None or not math.isfinite(float(v)) else round(float(v), digits)
        for v in values
    ]


def figure(data: list[dict[str, Any]], x: str, y: str, **layout: Any) -> dict[str, Any]:
    """A figure with the words of its axes; further keys are of Plotly's layout."""
    whole: dict[str, Any] = {
        "xaxis": {"title": {"text": x}, "zeroline": False} | layout.pop("xaxis", {}),
        "yaxis": {"title": {"text": y}, "zeroline": False, "automargin": True}
        | layout.pop("yaxis", {}),
        "showlegend": len([one for one in data if one.get("showlegend", True)]) > 1,
        **layout,
    }
    return {"data": data, "layout": whole}


def layers_axis(layers: Sequence[int]) -> dict[str, Any]:
    """The axis of layers: whole numbers, those that were tried where they are few."""
    low, high = min(layers), max(layers)
    axis = {"range": [low - 0.7, high + 0.7], "showgrid": False, "tickangle": 0}
    if len(layers) <= 16 and len(layers) < high - low + 1:
        return axis | {"tickvals": list(layers)}
    step = next(s for s in (1, 2, 5, 10, 20, 50, 10**6) if (high - low) / s <= 18)
    return axis | {"dtick": step, "tick0": 0}


def errors(values: Numbers, low: Numbers, high: Numbers) -> dict[str, Any]:
    """Ends of intervals as Plotly has them: distances up and down."""
    if all(one is None for one in low):
        return {"visible": False}
    ups = [None if v is None or h is None else h - v for v, h in zip(values, high, strict=True)]
    downs = [None if v is None or a is None else v - a for v, a in zip(values, low, strict=True)]
    return {
        "type": "data", "symmetric": False, "array": ups, "arrayminus": downs,
        "color": INK, "thickness": 1, "width": 2,
    }  # fmt: skip


def star(x: float, y: float, name: str, *, firm: bool = True) -> dict[str, Any]:
    """The golden layer's mark: a star, hollow where the resamples do not agree on it."""
    return {
        "type": "scatter", "mode": "markers", "x": [x], "y": [y], "name": name,
        "marker": {
            "symbol": "star" if firm else "star-open", "size": 16,
            "color": GOLD if firm else INK, "line": {"color": INK, "width": 1.2},
        },
        "hoverinfo": "skip", "cliponaxis": False,
    }  # fmt: skip


def curve(layers: Sequence[int], values: Numbers, name: str, place: int = 0) -> dict[str, Any]:
    """A line over layers; ``place`` decides on colour, dash and mark."""
    return {
        "type": "scatter", "mode": "lines+markers", "x": list(layers), "y": list(values),
        "name": text(name),
        "line": {"color": LINES[place % len(LINES)], "dash": DASHES[place % len(DASHES)],
                 "width": 2.5 if place == 0 else 1.5},
        "marker": {"symbol": MARKS[place % len(MARKS)], "size": 6},
        "hovertemplate": "layer %{x}: %{y:.1f}<extra>%{fullData.name}</extra>",
    }  # fmt: skip


def band(layers: Sequence[int], low: Numbers, high: Numbers) -> list[dict[str, Any]]:
    """The band of a curve's 95 % intervals, as two lines; [] where it is not known everywhere."""
    if any(v is None for v in (*low, *high)):
        return []
    edge = {
        "type": "scatter", "mode": "lines", "x": list(layers), "line": {"width": 0},
        "hoverinfo": "skip", "showlegend": False,
    }  # fmt: skip
    shade = {"fill": "tonexty", "fillcolor": "rgba(128,128,128,0.25)"}
    return [edge | {"y": list(low)}, edge | {"y": list(high)} | shade]


def with_level(made: dict[str, Any], value: float, name: str) -> dict[str, Any]:
    """The figure with a dashed line across, whose name stands beside it at the right."""
    if not math.isfinite(value):
        return made
    line = {"color": QUIET, "width": 1.2, "dash": "dash"}
    shape = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": value, "y1": value}
    word = {
        "text": name, "xref": "paper", "x": 1.0, "xanchor": "left", "y": value, "showarrow": False,
        "font": {"color": QUIET, "size": 11}, "align": "left",
    }  # fmt: skip
    layout = made["layout"]
    layout["shapes"] = [*layout.get("shapes", []), shape | {"line": line}]
    layout["annotations"] = [*layout.get("annotations", []), word]
    layout["margin"] = {"l": 10, "r": 52, "t": 24, "b": 10}
    return made


def bars(layers: Sequence[int], values: Numbers, name: str, **more: Any) -> dict[str, Any]:
    """Bars by layer."""
    return {
        "type": "bar", "x": list(layers), "y": list(values), "name": name, "width": 0.8,
        "marker": {"color": SKY, "line": {"color": INK, "width": 0.6}},
    } | more  # fmt: skip


def bar_colours(layers: Sequence[int], golden: int) -> dict[str, Any]:
    """Bars of which the golden layer's is gold."""
    return {
        "color": [GOLD if layer == golden else SKY for layer in layers],
        "line": {"color": INK, "width": 0.6},
    }


def heat(
    layers: Sequence[int], facts: Sequence[str], table: Any, name: str, mark: Mapping[str, Any]
) -> dict[str, Any]:
    """Facts down, layers across, a score in every cell; ``table`` is (B, L). ``mark``: the golden
    layer as :func:`star` takes it; {} for none.
    """
    values = [plain(row, 1) for row in table]
    known = [v for row in values for v in row if v is not None]
    share = not known or (min(known) >= 0 and max(known) <= 100)
    low, high = (0, 100) if share else (min(known), max(known))
    places = list(range(len(layers)))  # each as wide as the next, whichever were swept
    numbers = [[str(layer) for layer in layers]] * len(facts)
    data = {
        "type": "heatmap", "x": places, "y": list(range(len(facts))), "z": values,
        "text": [[text(fact)] * len(layers) for fact in facts], "customdata": numbers,
        "zmin": low, "zmax": high, "colorscale": SCALE, "hoverongaps": False, "xgap": 1, "ygap": 1,
        "hovertemplate": "%{text}<br>layer %{customdata}: %{z:.1f}<extra></extra>",
        "colorbar": {"thickness": 12, "title": {"text": text(name), "side": "right"}},
    }  # fmt: skip
    marks = []
    if mark:
        place = list(layers).index(mark["x"])
        marks = [star(place, -0.9, mark["name"], firm=mark["firm"]) | {"showlegend": False}]
    every = next(s for s in (1, 2, 5, 10, 20, 50, 10**6) if len(layers) / s <= 18)
    across = {
        "range": [-0.6, len(layers) - 0.4], "showgrid": False, "tickangle": 0,
        "tickvals": places[::every], "ticktext": [str(layer) for layer in layers][::every],
    }  # fmt: skip
    names = [text(fact, 34) for fact in facts]
    axis = {
        "range": [len(facts) - 0.4, -1.6], "showgrid": False, "tickfont": {"size": 10},
        "tickvals": list(range(len(facts))), "ticktext": names,
    }  # fmt: skip
    return figure(
        [data, *marks], "edited layer (0 = nearest the input)", "", yaxis=axis,
        xaxis=across, meta={"narrow": {"yaxis.showticklabels": False}},
    )  # fmt: skip


def dots(
    names: Sequence[str], values: Numbers, low: Numbers, high: Numbers, x: str, **more: Any
) -> dict[str, Any]:
    """Names down, a dot with its interval for each; ``floor`` draws a line, ``gold`` is a star."""
    floor, gold = more.pop("floor", None), more.pop("gold", None)
    places = list(range(len(names)))
    symbols = ["star" if i == gold else "circle" for i in places]
    data = {
        "type": "scatter", "mode": "markers", "x": list(values), "y": places,
        "error_x": errors(values, low, high), "text": [text(one) for one in names],
        "marker": {
            "opacity": 1, "symbol": symbols, "size": [15 if i == gold else 9 for i in places],
            "color": [GOLD if i == gold else BLUE for i in places],
            "line": {"color": INK, "width": 1},
        },
        "hovertemplate": "%{text}: %{x:.1f}<extra></extra>", "showlegend": False,
    }  # fmt: skip
    shapes = []
    if floor is not None:
        shapes.append({
            "type": "line", "yref": "paper", "y0": 0, "y1": 1, "x0": floor, "x1": floor,
            "line": {"color": QUIET, "width": 1, "dash": "dash"},
            "label": {"text": "noise floor", "textposition": "start", "textangle": 0,
                      "xanchor": "left", "font": {"color": QUIET, "size": 11}},
        })  # fmt: skip
    axis = {
        "range": [len(names) - 0.4, -0.6], "tickvals": places, "showgrid": False,
        "ticktext": [text(one, 30) for one in names],
    }  # fmt: skip
    return figure([data], x, "", yaxis=axis, shapes=shapes, **more)


def moves(names: Sequence[str], before: Numbers, after: Numbers, x: str) -> dict[str, Any]:
    """Names down; a hollow dot before, a full one after, and a line between them."""
    places = list(range(len(names)))
    between = [
        {"type": "line", "x0": a, "x1": b, "y0": i, "y1": i,
         "line": {"color": QUIET, "width": 1.5}, "layer": "below"}
        for i, (a, b) in enumerate(zip(before, after, strict=True))
        if a is not None and b is not None
    ]  # fmt: skip
    labels = [text(one) for one in names]
    look: Mapping[str, Any] = {"type": "scatter", "mode": "markers", "y": places, "text": labels}
    hover = "%{text}<br>%{fullData.name}: %{x:.3f}<extra></extra>"
    data = [
        {**look, "x": list(values), "name": name, "hovertemplate": hover,
         "marker": {"symbol": symbol, "size": 9, "color": BLUE, "line": {"color": BLUE}}}
        for values, name, symbol in (
            (before, "before the edit", "circle-open"), (after, "after it", "circle"))
    ]  # fmt: skip
    axis = {
        "range": [len(names) - 0.4, -0.6], "tickvals": places, "showgrid": False,
        "ticktext": [text(one, 34) for one in names], "tickfont": {"size": 10},
    }  # fmt: skip
    wide = {"range": [-0.03, 1.03]}
    return figure(data, x, "", yaxis=axis, xaxis=wide, shapes=between)
