"""The figure of a sweep: score by layer and metric, and where single facts have their optimum."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from goldenlayers.locating.ranking import clear
from goldenlayers.report.figures import OKABE_ITO, note_beside, save, style, tick_step
from goldenlayers.report.figures import title as wrapped
from goldenlayers.truth import OVERALL

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from goldenlayers.truth import Truth

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
    title: str = "",
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
        heading = f"Golden layer {golden}{by}" + (f" · {title}" if title else "")
        top.set_title(wrapped(figure, heading), loc="left", fontsize=10)
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
