"""The section of a sweep, and of several side by side.

Shapes: B facts, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from goldenlayers.comparing.runs import SweepRun
from goldenlayers.evaluation.metrics import CONTRADICTING, lower_is_better
from goldenlayers.locating.ranking import clear
from goldenlayers.report.page import charts
from goldenlayers.report.page.answers import ALIKE, about, title_of
from goldenlayers.report.page.parts import Chart, Section, Table, interval, number
from goldenlayers.report.page.runs import place
from goldenlayers.store import RunFolder
from goldenlayers.truth import OVERALL, Truth, noise_floor

MOST_FACTS = 200  # in the heat map
_AXIS = "edited layer (0 = nearest the input)"


def sweep_section(folder: RunFolder, one: SweepRun) -> Section:
    """Scores by layer, what other layers cost, every fact, and where single facts are best."""
    truth, metric = one.truth, one.truth.leading
    of = f"{one.editor or 'An editor'} edited {len(truth.facts)} facts"
    words = [f"{of}, each at each of {len(truth.layers)} layers of the untouched model."]
    heading = f"Sweep: {about(folder, one.editor)}"
    if metric is None:
        return Section(heading, [*words, "No layer could be scored."], [], place(folder))
    golden = truth.golden_layer(metric)
    gap = truth.gap(metric)
    words.append(
        f"The oracle, each fact at its own best layer, is {number(gap.value)} points "
        f"({interval(gap.low, gap.high) or '–'}) above the golden layer. It takes the best of "
        f"{len(truth.layers)} noisy numbers, so part of that is luck."
    )
    words += [f"{warning}." for warning in truth.warnings]
    parts = [_curves(truth, metric), _costs(truth, metric)]
    parts += [_optima(truth, metric, golden), _heat(truth, metric)]
    return Section(heading, words, parts, place(folder))


def _shown_metrics(truth: Truth, first: str) -> list[str]:
    names = [m for m in truth.metrics if truth.scored(m).any() and m != CONTRADICTING]
    return [first, *(m for m in names if m != first)]


def _curves(truth: Truth, metric: str) -> Chart:
    layers = truth.layers
    names = _shown_metrics(truth, metric)
    views, columns, cells = {}, ["layer"], [[layer] for layer in layers]
    means = {m: charts.plain(truth.means(m)) for m in names}
    parts = [m for m in names if m == metric or (metric == OVERALL and m in truth.overall_of)]
    for m in names:
        ends = truth.intervals(m)
        low, high = charts.plain(ends[:, 0]), charts.plain(ends[:, 1])
        columns += [title_of(m), "95 %"]
        for i, row in enumerate(cells):
            row += [means[m][i], interval(low[i], high[i])]
        data = [*charts.band(layers, low, high), charts.curve(layers, means[m], title_of(m))]
        line = math.nan
        if mark := _mark(truth, m):
            data.append(charts.star(y=means[m][layers.index(mark["x"])] or 0.0, **mark))
            line = truth.oracle(m).value
        label = f"{title_of(m)}, mean over facts"
        figure = charts.figure(data, _AXIS, label, xaxis=charts.layers_axis(layers))
        views[title_of(m)] = charts.with_level(figure, line, "oracle")
    if len(parts) > 1:
        lines = [charts.curve(layers, means[m], title_of(m), i) for i, m in enumerate(parts)]
        mark = _mark(truth, metric)
        gold = charts.star(y=means[metric][layers.index(mark["x"])] or 0.0, **mark)
        views["all together"] = charts.figure(
            [*lines, gold], _AXIS, "mean over facts", xaxis=charts.layers_axis(layers)
        )
    golden = truth.golden_layer(metric)
    said = (
        f"{title_of(metric)} by edited layer, with its 95 % band. It is best at layer {golden}, "
        f"the star{_range_said(truth, metric)}."
    )
    return Chart("Scores by layer", said, views, Table("Scores by layer", columns, cells, True))


def _mark(truth: Truth, metric: str) -> dict[str, Any]:
    """The golden layer as a star takes it; {} where a metric has none."""
    if lower_is_better(metric) or not truth.ranking(metric):
        return {}
    best, wins = truth.golden_layer(metric), truth.wins(metric)
    firm = clear(wins.pop(best), max(wins.values(), default=0.0))
    return {"x": best, "name": f"golden layer {best}" + " (not firm)" * (not firm), "firm": firm}


def _range_said(truth: Truth, metric: str) -> str:
    order = truth.ranking(metric)
    means = dict(zip(truth.layers, truth.means(metric).tolist(), strict=True))
    if len(order) < 2:
        return ""
    best, worst = means[order[0]], means[order[-1]]
    return f", with {number(best)}, and worst at layer {order[-1]}, with {number(worst)}"


def _costs(truth: Truth, metric: str) -> Chart:
    layers, golden = truth.layers, truth.golden_layer(metric)
    lost = [truth.regret(layer, metric) for layer in layers]
    values, low, high = (
        charts.plain(getattr(r, name) for r in lost) for name in ("value", "low", "high")
    )
    floor = noise_floor(truth, metric)
    bars = charts.bars(
        layers, values, "points lost", error_y=charts.errors(values, low, high),
        marker=charts.bar_colours(layers, golden),
        hovertemplate="layer %{x} costs %{y:.1f} points<extra></extra>",
    )  # fmt: skip
    mark = charts.star(y=0, **_mark(truth, metric))
    figure = charts.figure(
        [bars, mark], _AXIS, f"points of {title_of(metric)} lost",
        xaxis=charts.layers_axis(layers), showlegend=False,
    )  # fmt: skip
    figure = charts.with_level(figure, floor, "noise<br>floor")
    said = (
        f"What each layer loses against layer {golden}, with 95 % intervals over the facts. An "
        f"interval that reaches 0: the layer {ALIKE}. Noise floor, {number(floor)}: what the "
        "truly best layer would itself lose on other facts of this number."
    )
    rows = [
        [layer, v, interval(a, b)] for layer, v, a, b in zip(layers, values, low, high, strict=True)
    ]
    table = Table("What each layer costs", ["layer", "points lost", "95 %"], rows, True)
    return Chart("What another layer costs", said, {"": figure}, table)


def _heat(truth: Truth, metric: str) -> Chart:
    order = np.argsort(
        -np.nan_to_num(np.nanmean(_known(truth.table(metric)), axis=1)), kind="stable"
    )
    order = order[:MOST_FACTS]
    facts = [truth.facts[i] for i in order]
    golden = truth.golden_layer(metric)
    views = {
        title_of(m): charts.heat(
            truth.layers, facts, truth.table(m)[order], title_of(m), _mark(truth, m)
        )
        for m in _shown_metrics(truth, metric)
    }
    some = (
        f" The {MOST_FACTS} best of {len(truth.facts)} facts."
        if len(truth.facts) > MOST_FACTS
        else ""
    )
    said = (
        f"Every fact (down, best on the whole first) edited at every layer (across): dark is good. "
        f"The star marks layer {golden}.{some}"
    )
    rows = [[f, *charts.plain(truth.table(metric)[i])] for f, i in zip(facts, order, strict=True)]
    columns = ["fact", *(str(layer) for layer in truth.layers)]
    table = Table(f"{title_of(metric)} of every fact at every layer", columns, rows, True)
    return Chart("Layer × fact", said, views, table, min(1500, 170 + 16 * max(8, len(facts))), True)


def _known(table: Any) -> Any:
    """A table without rows that are all NaN, whose mean would be a warning."""
    return np.where(np.isnan(table).all(axis=1, keepdims=True), -1.0, table)


def _optima(truth: Truth, metric: str, golden: int) -> Chart:
    counts = charts.plain(truth.histogram(metric))
    even = sum(c or 0.0 for c in counts) / len(counts)
    bars = charts.bars(
        truth.layers, counts, "facts", marker=charts.bar_colours(truth.layers, golden),
        hovertemplate="%{y:.1f} facts are best at layer %{x}<extra></extra>",
    )  # fmt: skip
    figure = charts.figure(
        [bars], _AXIS, "facts best here", xaxis=charts.layers_axis(truth.layers)
    )  # fmt: skip
    figure = charts.with_level(figure, even, "even<br>share")
    said = (
        f"Where single facts are edited best by {title_of(metric)}. A fact with k best layers "
        "counts 1/k at each of them."
    )
    table = Table("Best layers of single facts", ["layer", "facts"],
                  list(zip(truth.layers, counts, strict=True)), True)  # fmt: skip
    return Chart("Sample-wise optima", said, {"": figure}, table, 260, True)


def sweeps_section(sweeps: Sequence[tuple[RunFolder, SweepRun]]) -> Section | None:
    """Several sweeps side by side."""
    lines, marks, rows = [], [], []
    deep = {one.n_layers for _, one in sweeps}
    share = len(deep) > 1 and None not in deep
    for folder, one in sweeps:
        metric = one.truth.leading
        if metric != OVERALL:
            continue
        depth = max((one.n_layers or 2) - 1, 1) if share else 1
        layers = [layer / depth for layer in one.truth.layers]
        means = charts.plain(one.truth.means())
        golden = one.truth.golden_layer()
        name = about(folder, one.editor)
        line = charts.curve(layers, means, name, len(lines))  # pyright: ignore[reportArgumentType]
        lines.append(line | {"line": line["line"] | {"width": 1.8}})
        at = means[one.truth.layers.index(golden)] or 0.0
        mark: dict[str, Any] = _mark(one.truth, OVERALL) | {"x": golden / depth}
        marks.append(charts.star(y=at, **mark) | {"showlegend": False})
        ends = one.truth.intervals()[one.truth.layers.index(golden)]
        wins = f"{100 * one.truth.wins()[golden]:.0f} %"
        floor, lead = noise_floor(one.truth), one.truth.gap().value
        rows.append([name, golden, at, interval(*ends), wins, floor, lead, len(one.truth.facts)])
    if len(lines) < 2:
        return None
    axis = "depth of the edited layer (0 = input, 1 = output)" if share else _AXIS
    figure = charts.figure([*lines, *marks], axis, "Overall, mean over facts")
    table = Table(
        "Golden layers side by side",
        [
            "sweep",
            "golden layer",
            "Overall",
            "95 %",
            "wins",
            "noise floor",
            "oracle's lead",
            "facts",
        ],
        rows,
    )
    said = "Overall by edited layer of every sweep; a star is a golden layer."
    chart = Chart("Overall by layer", said, {"": figure}, table, 420)
    return Section("The sweeps side by side", [], [chart])
