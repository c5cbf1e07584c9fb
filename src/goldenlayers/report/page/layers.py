"""Sections on layers: sweeps, choices, and choices against a sweep; and the answers they give.

Shapes: B facts, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from goldenlayers.comparing.runs import LocateRun, SweepRun
from goldenlayers.evaluation.metrics import CONTRADICTING, lower_is_better
from goldenlayers.locating import published_layer
from goldenlayers.locating.ranking import clear
from goldenlayers.records import entry
from goldenlayers.report.page import charts
from goldenlayers.report.page.parts import Card, Chart, Section, Table, interval, listed, number
from goldenlayers.report.page.runs import named, place
from goldenlayers.store import RunFolder
from goldenlayers.truth import OVERALL, Truth, noise_floor

_ALIKE = "cannot be told from it"
MOST_FACTS = 200
_AXIS = "edited layer (0 = nearest the input)"


def title_of(metric: str) -> str:
    """A metric as it is called in a sentence."""
    return "Overall" if metric == OVERALL else metric.replace("_", " ")


def sweep_card(folder: RunFolder, one: SweepRun) -> Card | None:
    """The golden layer of a sweep, how sure it is, and what another costs."""
    truth, metric = one.truth, one.truth.leading
    if metric is None:
        return None
    golden = truth.golden_layer(metric)
    share = truth.wins(metric)[golden]
    name = title_of(metric)
    mean = truth.means(metric)[truth.layers.index(golden)]
    lost = {layer: truth.regret(layer, metric) for layer in truth.layers}
    alike = [
        layer for layer, r in lost.items() if layer != golden and r.low == r.low and r.low <= 0
    ]
    sure = f"It is the best layer in {100 * share:.0f} % of resamples of the {len(truth.facts)} facts."
    if alike:
        sure += f" {_layers(alike)} {_ALIKE}."
    rest = {layer: r for layer, r in lost.items() if r.value == r.value and layer != golden}
    costs = []
    usual = None if one.n_layers is None else published_layer(one.n_layers)
    if usual in rest:
        costs.append(f"layer {usual}, the published depth, {_points(lost[usual].value)}")
    if rest:
        random = sum(r.value for r in rest.values()) / (len(rest) + 1)
        worst = max(rest, key=lambda layer: rest[layer].value)
        costs.append(f"a layer drawn at random {_points(random)}")
        costs.append(f"the worst, layer {worst}, {_points(rest[worst].value)}")
    cost = f"Of {name}, " + ", ".join(costs) + "." if costs else "Only this layer was swept."
    return Card(
        _about(folder, one.editor),
        f"Layer {golden}" + (f" of {one.n_layers}" if one.n_layers else ""),
        f"Every fact was edited at each of {len(truth.layers)} layers with {one.editor or '?'}: "
        f"{name} {number(float(mean))} here.",
        sure,
        cost,
    )


def _points(value: float) -> str:
    return f"costs {number(abs(value))} points" if value > -0.05 else (
        f"gains {number(abs(value))} points"
    )  # fmt: skip


def _layers(layers: Sequence[int]) -> str:
    return f"Layer{'s' * (len(layers) > 1)} {listed(layers)}"


def _about(folder: RunFolder, how: str) -> str:
    """Model, facts, and by what: what tells an answer from the next."""
    parts = [named(folder, "model"), named(folder, "data"), how]
    return " · ".join(part for part in parts if part) or folder.path.name


def choice_card(folder: RunFolder, one: LocateRun) -> Card:
    """The layer that a method chose, how sure it is, and what it cannot say."""
    ranking = one.ranking
    wins = ranking.layers[ranking.golden_layer].wins
    if wins is None:
        sure = "The method looks at no resamples: it cannot say."
    else:
        others = [
            row.layer for row in sorted(ranking.layers, key=lambda row: -(row.wins or 0))
            if (row.wins or 0) >= 0.05 and row.layer != ranking.golden_layer
        ]  # fmt: skip
        sure = f"It wins {100 * wins:.0f} % of resamples of {ranking.n_facts} facts"
        sure += f"; {_layers(others).lower()} win{'s' * (len(others) == 1)} some, too." if others else "."
        sure += "" if ranking.firm else " That is not firm: take it as a guess."
    known = ranking.evidence
    if known is not None and known.gain[0] is not None and ranking.golden_layer != known.published:
        cost = (
            f"The published depth, layer {known.published}, is {number(known.gain[0])} points "
            f"behind ({interval(*known.gain[1:]) or 'interval unknown'})."
        )
    elif known is not None:
        cost = "No layer that was tried was clearly ahead of the published depth."
    else:
        cost = "Not measured: no edit was made. A sweep or a race with your editor tells."
    return Card(
        _about(folder, one.label),
        f"Layer {ranking.golden_layer} of {len(ranking.layers)}",
        f"Chosen by {one.label} on {ranking.n_facts} facts.",
        sure,
        cost,
    )


# --- a sweep


def sweep_section(folder: RunFolder, one: SweepRun) -> Section:
    """Scores by layer, what other layers cost, every fact, and where single facts are best."""
    truth, metric = one.truth, one.truth.leading
    of = f"{one.editor or 'An editor'} edited {len(truth.facts)} facts"
    words = [f"{of}, each at each of {len(truth.layers)} layers of the untouched model."]
    heading = f"Sweep: {_about(folder, one.editor)}"
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
    parts = [_curves(truth, metric), _costs(truth, metric), _heat(truth, metric)]
    parts.append(_optima(truth, metric, golden))
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
        layout: dict[str, Any] = {"xaxis": charts.layers_axis(layers)}
        if not lower_is_better(m) and _has_golden(truth, m):
            best = truth.golden_layer(m)
            wins = truth.wins(m)
            firm = clear(wins.pop(best), max(wins.values(), default=0.0))
            at = means[m][layers.index(best)]
            name = f"golden layer {best}" + (" (not firm)" * (not firm))
            data.append(charts.star(best, at or 0.0, name, firm=firm))
            layout["shapes"] = [charts.level(truth.oracle(m).value, "oracle")]
        label = f"{title_of(m)}, mean over facts"
        views[title_of(m)] = charts.figure(data, _AXIS, label, **layout)
    if len(parts) > 1:
        lines = [charts.curve(layers, means[m], title_of(m), i) for i, m in enumerate(parts)]
        best = truth.golden_layer(metric)
        mark = charts.star(best, means[metric][layers.index(best)] or 0.0, f"golden layer {best}")
        views["all together"] = charts.figure(
            [*lines, mark], _AXIS, "mean over facts", xaxis=charts.layers_axis(layers)
        )
    golden = truth.golden_layer(metric)
    said = (
        f"{title_of(metric)} by edited layer, with its 95 % band. It is best at layer {golden}, "
        f"the star{_range_said(truth, metric)}."
    )
    return Chart("Scores by layer", said, views, Table("Scores by layer", columns, cells, True))


def _has_golden(truth: Truth, metric: str) -> bool:
    return bool(truth.ranking(metric))


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
    mark = charts.star(golden, 0, f"golden layer {golden}") | {"showlegend": False}
    shapes = [charts.level(floor, "noise floor")] if math.isfinite(floor) else []
    figure = charts.figure(
        [bars, mark], _AXIS, f"points of {title_of(metric)} lost", shapes=shapes,
        xaxis=charts.layers_axis(layers), showlegend=False,
    )  # fmt: skip
    said = (
        f"What each layer loses against layer {golden}, with 95 % intervals over the facts. An "
        f"interval that reaches 0: the layer {_ALIKE}. Noise floor, {number(floor)}: what the "
        "truly best layer would itself lose on other facts of this number."
    )
    rows = [[layer, v, interval(a, b)] for layer, v, a, b in zip(layers, values, low, high, strict=True)]
    table = Table("What each layer costs", ["layer", "points lost", "95 %"], rows, True)
    return Chart("What another layer costs", said, {"": figure}, table)


def _heat(truth: Truth, metric: str) -> Chart:
    order = np.argsort(-np.nan_to_num(np.nanmean(_known(truth.table(metric)), axis=1)), kind="stable")
    order = order[:MOST_FACTS]
    facts = [truth.facts[i] for i in order]
    golden = truth.golden_layer(metric)
    views = {
        title_of(m): charts.heat(
            truth.layers, facts, truth.table(m)[order], title_of(m),
            truth.golden_layer(m) if not lower_is_better(m) and _has_golden(truth, m) else None,
        )
        for m in _shown_metrics(truth, metric)
    }  # fmt: skip
    some = f" The {MOST_FACTS} best of {len(truth.facts)} facts." if len(truth.facts) > MOST_FACTS else ""
    said = (
        f"Every fact (down, best on the whole first) edited at every layer (across): dark is good. "
        f"The star marks layer {golden}.{some}"
    )
    rows = [[f, *charts.plain(truth.table(metric)[i])] for f, i in zip(facts, order, strict=True)]
    columns = ["fact", *(str(layer) for layer in truth.layers)]
    table = Table(f"{title_of(metric)} of every fact at every layer", columns, rows, True)
    return Chart("Layer × fact", said, views, table, min(1500, 170 + 16 * max(8, len(facts))))


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
        [bars], _AXIS, "facts with their best layer here",
        shapes=[charts.level(even, "if all were alike")], xaxis=charts.layers_axis(truth.layers),
    )  # fmt: skip
    said = (
        f"Where single facts are edited best by {title_of(metric)}. A fact with k best layers "
        "counts 1/k at each of them."
    )
    table = Table("Best layers of single facts", ["layer", "facts"],
                  list(zip(truth.layers, counts, strict=True)), True)  # fmt: skip
    return Chart("Sample-wise optima", said, {"": figure}, table, 280)


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
        name = _about(folder, one.editor)
        line = charts.curve(layers, means, name, len(lines))  # pyright: ignore[reportArgumentType]
        lines.append(line | {"line": line["line"] | {"width": 1.8}})
        at = means[one.truth.layers.index(golden)] or 0.0
        marks.append(charts.star(golden / depth, at, name) | {"showlegend": False})
        best = one.truth.regret(golden)
        oracle = one.truth.gap()
        rows.append([name, golden, at, interval(*one.truth.intervals()[one.truth.layers.index(golden)]),
                     f"{100 * one.truth.wins()[golden]:.0f} %", noise_floor(one.truth),
                     oracle.value, best.n])  # fmt: skip
    if len(lines) < 2:
        return None
    axis = "depth of the edited layer (0 = input, 1 = output)" if share else _AXIS
    figure = charts.figure([*lines, *marks], axis, "Overall, mean over facts")
    table = Table(
        "Golden layers side by side",
        ["sweep", "golden layer", "Overall", "95 %", "wins", "noise floor", "oracle's lead", "facts"],
        rows,
    )
    said = "Overall by edited layer of every sweep; a star is a golden layer."
    chart = Chart("Overall by layer", said, {"": figure}, table, 420)
    return Section("The sweeps side by side", [], [chart])


# --- a choice


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
    values = charts.plain((row.value for row in rows), 6)
    ends = [charts.plain((getattr(row, n) or math.nan for row in rows), 6) for n in ("low", "high")]
    colours = [
        charts.GOLD if row.layer == ranking.golden_layer else charts.SKY if row.kept else charts.PAPER
        for row in rows
    ]
    bars = charts.bars(
        layers, values, "score", error_y=charts.errors(values, *ends),
        marker={"color": colours, "line": {"color": charts.INK, "width": 0.6},
                "pattern": {"shape": ["" if row.kept else "/" for row in rows],
                            "fgcolor": charts.QUIET}},
        text=["" if row.kept else "left out by the fences" for row in rows], textposition="none",
        hovertemplate="layer %{x}: %{y:.4g}<br>%{text}<extra></extra>", showlegend=False,
    )  # fmt: skip
    best = values[ranking.golden_layer] or 0.0
    name = f"golden layer {ranking.golden_layer}" + (" (not firm)" * (not ranking.firm))
    mark = charts.star(ranking.golden_layer, best + room / 3, name, firm=ranking.firm)
    data, layout = [bars, mark], {"xaxis": charts.layers_axis(layers)}
    layout["yaxis"] = {"range": [low - room * (low < 0), high + room], "domain": [0.34, 1]}
    if any(row.wins is not None for row in rows):
        wins = [100 * (row.wins or 0.0) for row in rows]
        data.append(charts.bars(
            layers, charts.plain(wins), "wins", yaxis="y2", showlegend=False,
            marker=charts.bar_colours(layers, ranking.golden_layer),
            hovertemplate="layer %{x} wins %{y:.0f} % of the resamples<extra></extra>",
        ))  # fmt: skip
        layout["yaxis2"] = {"domain": [0, 0.22], "range": [0, 100], "automargin": True,
                            "title": {"text": "wins, %"}, "zeroline": False, "nticks": 3}  # fmt: skip
    else:
        layout["yaxis"]["domain"] = [0, 1]
    said_axis = " ".join((label or f"score of {one.method}").split())
    axis = said_axis + (f" ({unit})" if unit else "")
    figure = charts.figure(data, "layer (0 = nearest the input)", axis, **layout)
    out = [row.layer for row in rows if not row.kept and row.score is not None]
    said = f"The {said_axis}, by layer. Layer {ranking.golden_layer} is chosen"
    said += f"; {_layers(out).lower()}, hatched, {'are' if len(out) > 1 else 'is'} left out" * bool(out)
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
    return Section(f"Choice: {_about(folder, one.label)}", words, [chart], place(folder))


# --- choices against a sweep


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
        rows.append([name, layer, score, lost, *ends, seconds])
    rows.sort(key=lambda row: (row[0] != "golden layer", row[3] is None, row[3] or 0.0))
    names = [f"{row[0]}" + ("" if row[1] is None else f": {row[1]}") for row in rows]
    lost, low, high = ([row[i] for row in rows] for i in (3, 4, 5))
    gold = next((i for i, row in enumerate(rows) if row[0] == "golden layer"), None)
    axis = f"points of {title_of(metric)} lost (left is better)"
    figure = charts.dots(names, lost, low, high, axis, floor=floor, gold=gold)
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
    text = "What each choice loses against the golden layer (regret), with its 95 % interval over the facts."
    chart = Chart("Choices against the truth", text, {"": figure}, table, 130 + 26 * len(rows))
    return Section(f"Choices judged: {' · '.join(filter(None, said))}", words, [chart], place(folder))
