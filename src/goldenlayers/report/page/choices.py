"""The sections of a choice of a layer, and of choices that a sweep judged."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from goldenlayers.comparing.runs import LocateRun, SweepRun
from goldenlayers.records import entry
from goldenlayers.report.page import charts
from goldenlayers.report.page.answers import about, layers_in_words, title_of
from goldenlayers.report.page.parts import Chart, Section, Table, interval, number
from goldenlayers.report.page.runs import place
from goldenlayers.store import RunFolder
from goldenlayers.truth import noise_floor


def choice_section(folder: RunFolder, one: LocateRun) -> Section:
    """A method's scores by layer, those left out, and the resamples."""
    ranking = one.ranking
    rows = ranking.layers
    layers = [row.layer for row in rows]
    words = [*ranking.warnings, *ranking.notes]
    kept = [row.value for row in rows if row.kept and row.value == row.value]
    low, high = min([0.0, *kept]), max([0.0, *kept])
    room = 0.12 * (high - low or 1.0)
    label, unit = one.how.axis
    top, bottom = high + room, low - room * (low < 0)
    values = charts.plain((row.value for row in rows), 6)
    cut = [v is not None and not bottom <= v <= top for v in values]
    heights = [None if v is None else min(max(v, bottom), top) for v in values]
    ends = [
        charts.plain(
            (math.nan if end is None or c else end for end, c in zip(some, cut, strict=True)), 6
        )
        for some in ([row.low for row in rows], [row.high for row in rows])
    ]
    colours = [
        charts.GOLD if row.layer == ranking.golden_layer
        else charts.SKY if row.kept else charts.PAPER
        for row in rows
    ]  # fmt: skip
    said_of = [
        number(v) + " (left out)" * (not row.kept) for v, row in zip(values, rows, strict=True)
    ]
    bars = charts.bars(
        layers, heights, "score", error_y=charts.errors(heights, *ends), showlegend=False,
        marker={"color": colours, "line": {"color": charts.INK, "width": 0.8}},
        customdata=said_of, hovertemplate="layer %{x}: %{customdata}<extra></extra>",
        text=[number(v) if c else "" for v, c in zip(values, cut, strict=True)],
        textposition="inside", textangle=-90, insidetextanchor="end",
        textfont={"color": charts.QUIET},
    )  # fmt: skip
    best = values[ranking.golden_layer] or 0.0
    name = f"golden layer {ranking.golden_layer}" + (" (not firm)" * (not ranking.firm))
    mark = charts.star(ranking.golden_layer, best + room / 3, name, firm=ranking.firm)
    data, layout = [bars, mark], {"xaxis": charts.layers_axis(layers)}
    layout["yaxis"] = {"range": [bottom, top], "domain": [0.36, 1]}
    if any(row.wins is not None for row in rows):
        wins = [100 * (row.wins or 0.0) for row in rows]
        data.append(charts.bars(
            layers, charts.plain(wins), "wins", yaxis="y2", showlegend=False,
            marker=charts.bar_colours(layers, ranking.golden_layer),
            hovertemplate="layer %{x}: golden with %{y:.0f} %<extra></extra>",
        ))  # fmt: skip
        layout["yaxis2"] = {
            "domain": [0, 0.22], "range": [0, 100], "automargin": True, "nticks": 3,
            "title": {"text": "golden<br>with (%)"}, "zeroline": False,
        }  # fmt: skip
    else:
        layout["yaxis"]["domain"] = [0, 1]
    label = label or f"score of {one.method}"
    said_axis = " ".join(label.split())
    axis = charts.text(label.replace("\n", " ~ "), 200).replace(" ~ ", "<br>")
    axis += f"<br>({unit})" * bool(unit)
    figure = charts.figure(data, "layer (0 = nearest the input)", axis, **layout)
    out = [row.layer for row in rows if not row.kept and row.score is not None]
    said = f"The {said_axis}, by layer. Layer {ranking.golden_layer} is chosen"
    said += (
        f"; {layers_in_words(out).lower()}, white, {'are' if len(out) > 1 else 'is'} left out"
        * bool(out)
    )
    said += (f". Below: how often each layer is the best in {ranking.bootstrap} resamples of the "
             "facts." if "yaxis2" in layout else ".")  # fmt: skip
    if unit == "nats²":
        said += " A loss is measured in nats, a product of two losses' gradients in nats²."
    cells = [
        [row.layer, row.score, interval(row.low, row.high), "kept" if row.kept else "left out",
         row.cosine, None if row.wins is None else f"{100 * row.wins:.0f} %"]
        for row in rows
    ]  # fmt: skip
    columns = ["layer", "score", "95 %", "fences", "cosine", "wins"]
    table = Table("Scores by layer", columns, cells, True)
    chart = Chart("Scores by layer", said, {"": figure}, table, 420)
    return Section(f"Choice: {about(folder, one.label)}", words, [chart], place(folder))


def comparison_section(
    folder: RunFolder, found: Mapping[str, Any], sweeps: Sequence[SweepRun]
) -> Section:
    """Every choice with the points it loses, and the noise floor where the sweep is on the page."""
    where = folder.file("compare.json")
    choices = entry(found, "choices", list[dict[str, Any]], where)
    sweep = entry(found, "sweep", dict[str, Any], where)
    metric = entry(found, "metric", str, where)
    said = [entry(sweep, name, str, where, "") for name in ("model", "data", "method")]
    floor = None
    for one in sweeps:
        same = [one.model, one.data, one.editor] == said
        if same and one.fingerprint == sweep.get("fingerprint") and metric in one.truth.scores:
            floor = noise_floor(one.truth, metric)
    rows = []
    for one in choices:
        name = entry(one, "name", str, where)
        ends = entry(one, "regret_interval", list[float | None], where, [None, None])
        if len(ends) != 2:
            ends = [None, None]
        layer, score, lost, seconds = (
            entry(one, n, kind, where, None)
            for n, kind in (("layer", int), ("score", float), ("regret", float), ("seconds", float))
        )
        rows.append(
            [name, layer, score, lost, *ends, seconds, entry(one, "variant", str, where, "")]
        )
    rows.sort(key=lambda row: (row[0] != "golden layer", row[3] is None, row[3] or 0.0))
    plain = [row for row in rows if row[7] in ("", "tukey")]
    views = {"choices as they were made": _lost(plain, metric, floor)}
    if len(plain) < len(rows):
        views["with their variants"] = _lost(rows, metric, floor)
    words = [f"Judged by the sweep of {' · '.join(filter(None, said))}."]
    words += [f"{text}." for text in entry(found, "warnings", list[str], where, [])]
    words.append(
        f"Noise floor: {number(floor)} points. Less cannot be told from luck." if floor is not None
        else "The noise floor is known where the sweep is given, too."
    )  # fmt: skip
    table = Table(
        "Choices against the truth",
        ["choice", "layer", title_of(metric), "regret", "95 %", "seconds"],
        [[*row[:4], interval(row[4], row[5]), row[6]] for row in rows],
        True,
    )
    text = (
        "What each choice loses against the golden layer (regret), with its 95 % interval over the "
        "facts."
    )
    chart = Chart("Choices against the truth", text, views, table, _height(len(plain)))
    return Section(
        f"Choices judged: {' · '.join(filter(None, said))}", words, [chart], place(folder)
    )


def _height(rows: int) -> int:
    return 130 + 24 * rows


def _lost(rows: Sequence[Sequence[Any]], metric: str, floor: float | None) -> dict[str, Any]:
    """The figure of some choices' regrets."""
    names = [f"{row[0]}" + ("" if row[1] is None else f": {row[1]}") for row in rows]
    lost, low, high = ([row[i] for row in rows] for i in (3, 4, 5))
    gold = next((i for i, row in enumerate(rows) if row[0] == "golden layer"), None)
    axis = f"points of {title_of(metric)} lost"
    more = {"floor": floor, "gold": gold, "height": _height(len(rows))}
    return charts.dots(names, lost, low, high, axis, **more)
