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
from goldenlayers.report.figures import OKABE_ITO, note_beside, save, style, tick_step, title
from goldenlayers.shown import shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from goldenlayers.locating.grid import TracingGrid
    from goldenlayers.truth import Truth


OVERALL = "overall"  # as in truth, whose import would load torch
# Told apart by colour, marker and dash; Overall is the thick black one.
_LOOKS: dict[str, dict[str, Any]] = {
    OVERALL: {"color": "black", "marker": "o", "linewidth": 2.2},
    "rewrite": {"color": OKABE_ITO["vermillion"], "marker": "^", "linestyle": (0, (6, 2))},
    "rephrase": {"color": OKABE_ITO["orange"], "marker": "s", "linestyle": (0, (3, 1.5))},
    "locality": {"color": OKABE_ITO["blue"], "marker": "v", "linestyle": (0, (5, 1, 1, 1))},
    "portability": {"color": OKABE_ITO["bluish green"], "marker": "D", "linestyle": (0, (1, 1.2))},
}
_GREY = "#555555"


def sweep_figure(
    truth: Truth,
    path_stem: str | os.PathLike[str],
    *,
    heading: str = "",
    metric: str = OVERALL,
    formats: Sequence[str] = ("svg", "png"),
) -> list[Path]:
    """Draw the mean score by layer of each metric with its 95 % band, and the histogram of optima.

    ``metric`` is what the golden layer, the oracle and the optima are of. Those that Overall is
    made of are drawn beside it; another metric is drawn alone, as it may have another scale.

    The golden layer bears a star and a line through both panels; the dashed line is the oracle,
    each fact at its own best layer. A fact with k best layers counts 1/k at each of them.

    Raises:
        UserError: an unknown format, or nothing was scored.
    """
    from matplotlib.figure import Figure

    golden = truth.golden_layer(metric)
    with style():
        width = min(11.0, max(6.4, 2.6 + 0.2 * len(truth.layers)))
        figure = Figure(figsize=(width, 5.6), layout="constrained")
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        _draw_scores(top, truth, golden, metric)
        _draw_optima(bottom, truth, golden, metric)
        by = "" if metric == OVERALL else f" by {metric}"
        said = f"Golden layer {golden}{by}" + (f" · {heading}" if heading else "")
        top.set_title(title(figure, said), loc="left", fontsize=10)
        bottom.set_xlabel("edited layer (0 = nearest the input)")
        low, high = truth.layers[0], truth.layers[-1]
        step = tick_step(high - low + 1)
        bottom.set_xticks([layer for layer in truth.layers if (layer - low) % step == 0])
        bottom.set_xticks(truth.layers, minor=True)
        bottom.set_xlim(low - 0.8, high + 0.8)
        return save(figure, path_stem, formats)


def _draw_scores(axes: Axes, truth: Truth, golden: int, metric: str) -> None:
    looks = _LOOKS if metric == OVERALL else {metric: _LOOKS[OVERALL]}
    shown = [name for name in truth.metrics if name in looks and truth.scored(name).any()]
    for name in sorted(shown, key=list(looks).index, reverse=True):
        look = {"linewidth": 1.3, "markersize": 3.5, **looks[name]}
        means, ends = truth.means(name), truth.intervals(name)
        label = "Overall" if name == OVERALL else name
        axes.plot(truth.layers, means, label=label, zorder=3, **look)
        axes.fill_between(
            truth.layers, ends[:, 0], ends[:, 1], color=look["color"], alpha=0.13, linewidth=0
        )
    oracle = truth.oracle(metric)
    axes.axhline(oracle.value, color="black", linewidth=1.0, linestyle=(0, (5, 3)), zorder=2)
    note_beside(axes, oracle.value, f"oracle {oracle.value:.1f}", "black")
    score = truth.means(metric)[truth.layers.index(golden)]
    wins = truth.wins(metric)
    firm = clear(wins.pop(golden), max(wins.values(), default=0.0))  # else the star is not full
    axes.plot(
        [golden],
        [score],
        linestyle="none",
        marker="*",
        markersize=15,
        fillstyle="full" if firm else "none",
        color=OKABE_ITO["yellow"],
        markeredgecolor="black",
        label=f"golden layer {golden}: {score:.1f}" + " (not firm)" * (not firm),
        zorder=5,
    )
    if metric == OVERALL:
        axes.set_ylim(-2, 102)
    scale = "0-100, " if metric == OVERALL else ""
    axes.set_ylabel(f"mean score after the edit\n({scale}band: 95 %)")
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(
        handles[::-1],
        labels[::-1],
        loc="upper left",
        # On a scale of its own the oracle's label may stand at the top, and be longer.
        bbox_to_anchor=(1.1 if metric == OVERALL else 1.18, 1.0),
        frameon=False,
        fontsize=8,
    )


def _draw_optima(axes: Axes, truth: Truth, golden: int, metric: str) -> None:
    shares = truth.histogram(metric)
    colors = [
        OKABE_ITO["yellow"] if layer == golden else OKABE_ITO["sky blue"] for layer in truth.layers
    ]
    axes.bar(truth.layers, shares, 0.72, color=colors, edgecolor="black", linewidth=0.5)
    even = shares.sum() / len(truth.layers)
    axes.axhline(even, color=_GREY, linestyle=(0, (1, 2)), linewidth=0.9)
    note_beside(axes, even, "if all were alike")
    axes.set_ylabel("facts with their\nbest layer here")


_KINDS = {"mlp": "MLP output", "attention": "attention output", "block": "block output"}
_MISSING = "#DDDDDD"
_LONGEST = 24  # characters of a token's label


def tracing_figure(
    grid: TracingGrid, path_stem: str | os.PathLike[str], formats: Sequence[str] = ("svg", "png")
) -> list[Path]:
    """Draw the indirect effect by token (rows, read downwards) and layer (columns).

    White is no effect, on the way to blue the answer comes back, to vermillion it is pushed
    further away; equal depths of both colours are equal sizes. Subject tokens are bold; a star
    marks the best layer of the lookup token. Roles that no prompt has are grey and crossed out.
    Returns the paths written.

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
        ends = [OKABE_ITO["vermillion"], "white", OKABE_ITO["blue"]]
        colours = LinearSegmentedColormap.from_list("effect", ends)
        largest = float(np.abs(np.nan_to_num(grid.effect)).max(initial=0.0)) or 1.0
        image = axes.imshow(
            np.ma.masked_invalid(grid.effect),
            cmap=colours,
            vmin=-largest,
            vmax=largest,
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
    look = {"markersize": 9, "color": OKABE_ITO["yellow"], "markeredgecolor": "black"}
    axes.plot([best], [grid.lookup], marker="*", markeredgewidth=0.7, **look)
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
