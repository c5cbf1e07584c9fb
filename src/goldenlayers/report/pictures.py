"""The pictures of a sweep (scores by layer and metric, where single facts have their optimum) and
of causal tracing (which token's state at which layer brings the answer back).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from goldenlayers.errors import shortened
from goldenlayers.locating.ranking import clear
from goldenlayers.report.figures import (
    FORMATS,
    GOLD,
    OKABE_ITO,
    STAR,
    note_beside,
    save,
    style,
    tick_step,
    title,
)
from goldenlayers.shown import shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from goldenlayers.locating.grid import TracingGrid
    from goldenlayers.truth import Truth


OVERALL = "overall"  # as in truth, whose import would load torch
# The parts of Overall, each with a panel of its own.
_COLOURS = {
    "rewrite": OKABE_ITO["vermillion"],
    "rephrase": OKABE_ITO["orange"],
    "locality": OKABE_ITO["blue"],
    "portability": OKABE_ITO["bluish green"],
}
_GREY = "#555555"


def sweep_figure(
    truth: Truth,
    path_stem: str | os.PathLike[str],
    *,
    heading: str = "",
    metric: str = OVERALL,
    formats: Sequence[str] = FORMATS,
) -> list[Path]:
    """Draw the mean score by layer with its 95 % band, and the histogram of optima.

    ``metric`` is what the golden layer, the oracle and the optima are of. What Overall is made of
    stands between the two, each part in a panel of its own.

    The golden layer bears a star, and a dotted line in the panels of the parts; the dashed line is
    the oracle, each fact at its own best layer. A fact with k best layers counts 1/k at each of
    them.

    Raises:
        UserError: an unknown format, or nothing was scored.
    """
    from matplotlib.figure import Figure

    golden = truth.golden_layer(metric)
    parts = [
        name for name in _COLOURS
        if metric == OVERALL and name in truth.metrics and truth.scored(name).any()
    ]  # fmt: skip
    with style():
        width = min(11.0, max(6.8, 2.6 + 0.2 * len(truth.layers)))
        ratios = [3, *[1.5] * bool(parts), 1.1]
        figure = Figure(figsize=(width, 1.55 * sum(ratios)), layout="constrained")
        grid = figure.add_gridspec(len(ratios), 1, height_ratios=ratios)
        top = figure.add_subplot(grid[0])
        bottom = figure.add_subplot(grid[-1], sharex=top)
        _draw_scores(top, truth, golden, metric)
        if parts:
            row = grid[1].subgridspec(1, len(parts), wspace=0.05)
            for i, name in enumerate(parts):
                _draw_part(figure.add_subplot(row[i]), truth, golden, name, first=i == 0)
        _draw_optima(bottom, truth, golden, metric)
        by = "" if metric == OVERALL else f" by {metric}"
        said = f"Golden layer {golden}{by}" + (f" · {heading}" if heading else "")
        top.set_title(title(figure, said), loc="left", fontsize=10)
        bottom.set_xlabel("edited layer (0 = nearest the input)")
        low, high = truth.layers[0], truth.layers[-1]
        step = tick_step(high - low + 1)
        for axes in (top, bottom):
            axes.set_xticks([layer for layer in truth.layers if (layer - low) % step == 0])
            axes.set_xticks(truth.layers, minor=True)
            axes.set_xlim(low - 0.8, high + 0.8)
        return save(figure, path_stem, formats)


def _line(axes: Axes, truth: Truth, metric: str, color: str, **look: Any) -> None:
    """Means by layer with their 95 % band."""
    ends = truth.intervals(metric)
    axes.plot(truth.layers, truth.means(metric), color=color, zorder=3, **look)
    axes.fill_between(truth.layers, ends[:, 0], ends[:, 1], color=color, alpha=0.18, linewidth=0)


def _draw_scores(axes: Axes, truth: Truth, golden: int, metric: str) -> None:
    name = "Overall" if metric == OVERALL else metric
    _line(axes, truth, metric, "black", marker="o", linewidth=1.8, markersize=4, label=name)
    oracle = truth.oracle(metric)
    axes.axhline(oracle.value, color=_GREY, linewidth=1.0, linestyle=(0, (5, 3)), zorder=2)
    note_beside(axes, oracle.value, f"oracle\n{oracle.value:.1f}", "black")
    score = truth.means(metric)[truth.layers.index(golden)]
    wins = truth.wins(metric)
    share = wins.pop(golden)
    firm = clear(share, max(wins.values(), default=0.0))  # else the star is not full
    said = f"golden layer {golden}: {score:.1f}, the best in {100 * share:.0f} % of the resamples"
    look: dict[str, Any] = STAR | {"fillstyle": "full" if firm else "none"}
    axes.plot([golden], [score], label=said + " (not firm)" * (not firm), **look)
    axes.set_ylabel(f"{name}, mean over facts\n(0 to 100; band: 95 %)" if metric == OVERALL
                    else f"{name}, mean over facts\n(band: 95 %)")  # fmt: skip
    axes.legend(loc="best", frameon=False, fontsize=8)


def _draw_part(axes: Axes, truth: Truth, golden: int, metric: str, *, first: bool) -> None:
    """One metric that Overall is made of, small."""
    _line(axes, truth, metric, _COLOURS[metric], linewidth=1.4)
    axes.axvline(golden, color=_GREY, linestyle=(0, (1, 2)), linewidth=0.9)
    axes.set_title(metric, fontsize=8.5, pad=3)
    axes.set_ylim(-3, 103)
    axes.set_yticks([0, 50, 100])
    if not first:
        axes.tick_params(labelleft=False)
    axes.tick_params(labelsize=7.5)
    axes.locator_params(axis="x", nbins=5, integer=True)


def _draw_optima(axes: Axes, truth: Truth, golden: int, metric: str) -> None:
    shares = truth.histogram(metric)
    colors = [GOLD if layer == golden else OKABE_ITO["sky blue"] for layer in truth.layers]
    axes.bar(truth.layers, shares, 0.72, color=colors, edgecolor="black", linewidth=0.5)
    even = shares.sum() / len(truth.layers)
    axes.axhline(even, color=_GREY, linestyle=(0, (1, 2)), linewidth=0.9)
    note_beside(axes, even, "even\nshare")
    axes.set_ylabel("facts with their\nbest layer here")


_KINDS = {"mlp": "MLP output", "attention": "attention output", "block": "block output"}
_EFFECTS = [
    "#4A1A00",
    OKABE_ITO["vermillion"],
    "#FBD5B5",
    "white",
    "#BFE0F5",
    OKABE_ITO["blue"],
    "#001B33",
]
_MISSING = "#DDDDDD"
_LONGEST = 24  # characters of a token's label


def tracing_figure(
    grid: TracingGrid, path_stem: str | os.PathLike[str], formats: Sequence[str] = FORMATS
) -> list[Path]:
    """Draw the indirect effect by token (rows, read downwards) and layer (columns).

    White is no effect, by way of blue to nearly black the answer comes back, by way of vermillion
    to brown it is pushed further away; both scales are alike, and end where the effects end.
    Subject tokens are bold; a star marks the best layer of the lookup token. Roles
    that no prompt has are grey and crossed out. Returns the paths written.

    Raises:
        UserError: an unknown format.
    """
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    n_tokens, n_layers = grid.effect.shape
    with style():
        flat = [shown(" ".join(token.split()) or token) for token in grid.tokens]
        labels = [shortened(text, _LONGEST) for text in flat]
        width = 2.6 + 0.065 * max(len(label) for label in labels) + 0.2 * n_layers
        size = (min(11.0, max(5.4, width)), min(14.0, 1.7 + 0.21 * max(n_tokens, 4)))
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        axes.set_facecolor(_MISSING)
        known = np.nan_to_num(grid.effect)
        low, high = min(0.0, float(known.min(initial=0.0))), max(0.0, float(known.max(initial=0.0)))
        largest = max(-low, high) or 1.0
        whole = LinearSegmentedColormap.from_list("effect", _EFFECTS)
        # The part of the colours that occurs: white stays at zero.
        begin, end = ((x / largest + 1) / 2 for x in (low, high if high > low else largest))
        colours = LinearSegmentedColormap.from_list("part", whole(np.linspace(begin, end, 256)))
        image = axes.imshow(
            np.ma.masked_invalid(grid.effect),
            cmap=colours,
            vmin=low,
            vmax=high if high > low else largest,
            aspect="auto",
            interpolation="nearest",
        )
        for row in np.flatnonzero(np.isnan(grid.effect).all(axis=1)):
            axes.axhline(int(row), color="#555555", linewidth=0.8)
        axes.set_yticks(range(n_tokens), labels)
        for row, label in enumerate(axes.get_yticklabels()):
            if grid.subject[0] <= row < grid.subject[1]:
                label.set_fontweight("bold")
        starred = _mark_best(axes, grid)
        axes.set_xticks(range(0, n_layers, tick_step(n_layers)))
        key = "bold: the subject's tokens" + ("; star: its last token's best layer" * starred)
        axes.set_xlabel(f"{_restored(grid)}\n({key})")
        axes.set_title(_title(figure, grid), loc="left", fontsize=10)
        axes.spines[:].set(visible=True, linewidth=0.5)
        bar = figure.colorbar(image, ax=axes, aspect=14, pad=0.02)
        bar.outline.set_linewidth(0.5)  # pyright: ignore[reportCallIssue]
        bar.set_label("indirect effect\n(probability of the answer)")
        return save(figure, path_stem, formats)


def _mark_best(axes: Axes, grid: TracingGrid) -> bool:
    """Put a star on the lookup token's best layer, unless all are alike."""
    row = grid.effect[grid.lookup]
    if np.isnan(row).all() or not np.nanmax(row) > np.nanmin(row):
        return False
    best = int(np.nanargmax(row))
    smaller: dict[str, Any] = STAR | {"markersize": 9}
    axes.plot([best], [grid.lookup], **smaller)
    return True


def _restored(grid: TracingGrid) -> str:
    what = _KINDS.get(grid.kind, grid.kind)
    if grid.window > 1:
        return f"middle of the {grid.window} layers whose {what} is restored"
    return f"layer whose {what} is restored (0 = nearest the input)"


def _title(figure: Figure, grid: TracingGrid) -> str:
    name = f" in {grid.model}" if grid.model else ""
    facts = f"mean of {grid.n_facts} facts" if grid.n_facts > 1 else f"answer '{grid.answer}'"
    change = f"p = {grid.clean:.3g} clean, {grid.corrupted:.3g} with noise on the subject"
    return title(figure, f"Causal tracing{name}: {facts}", change)
