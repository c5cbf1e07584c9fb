"""The figures of docs/results/earlier-study.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from earlier_record import (
    DATASETS,
    METHODS,
    MODELS,
    NAMES,
    RANK_ONE,
    SIZES,
    Cell,
    by_size,
    choices,
    mean_of,
    truth_of,
)

from goldenlayers.locating.ranking import clear
from goldenlayers.report.figures import OKABE_ITO, STAR, save, style

COLOURS = dict(zip(DATASETS, ("blue", "vermillion", "bluish green", "reddish purple"), strict=True))


def curves_figure(cells: Sequence[Cell], stem: Path) -> None:
    """Overall by layer with 95 % bands: a row for each model and editor, a panel per data set.

    ROME, R-ROME and EMMET differ by next to nothing when facts are edited one at a time: ROME
    stands for the three, and the greatest distance between them is said.
    """
    from matplotlib.figure import Figure

    shown = [e for e in METHODS if e not in RANK_ONE[1:]]
    rows = [
        (model, method) for model in MODELS for method in shown
        if any(c["model"] == model and c["method"] == method for c in cells)
    ]  # fmt: skip
    of = {(c["model"], c["method"], c["data"]): c for c in cells}
    with style():
        figure = Figure(figsize=(10.4, 1.9 * len(rows) + 0.8), layout="constrained")
        axes = figure.subplots(len(rows), len(DATASETS), squeeze=False, sharey=True)
        for (i, (model, method)), (j, data) in [
            ((i, row), (j, data)) for i, row in enumerate(rows) for j, data in enumerate(DATASETS)
        ]:
            ax = axes[i, j]
            ax.set_title(f"{method}, {model}, {data}", fontsize=7.5)
            ax.tick_params(labelsize=7.5)
            ax.grid(axis="y", linewidth=0.3)
            if (cell := of.get((model, method, data))) is None:
                continue
            truth, colour = truth_of(cell), OKABE_ITO[COLOURS[data]]
            ends, means, golden = truth.intervals(), truth.means(), truth.golden_layer()
            ax.fill_between(truth.layers, ends[:, 0], ends[:, 1], color=colour, alpha=0.2, lw=0)
            ax.plot(truth.layers, means, color=colour, linewidth=1.3)
            wins = truth.wins()
            firm = clear(wins.pop(golden), max(wins.values()))
            look = STAR | {"markersize": 10, "fillstyle": "full" if firm else "none"}
            ax.plot([golden], [means[golden]], **look)
        for ax in axes[:, 0]:
            ax.set_ylabel("Overall", fontsize=8)
        far = max(
            (float(abs(truth_of(of[m, e, d]).means() - truth_of(of[m, "rome", d]).means()).max())
             for m, e, d in of if e in RANK_ONE and (m, "rome", d) in of),
            default=0.0,
        )  # fmt: skip
        figure.supxlabel(
            "edited layer (0 = nearest the input)\nBand: 95 % over the test facts. Star: golden "
            "layer, hollow where the resamples do not agree on it.\nR-ROME and EMMET are at most "
            f"{far:.1f} points away from ROME at any layer, and are not drawn.",
            fontsize=8,
        )
        save(figure, stem, ("svg", "pdf"))


def sizes_figure(cells: Sequence[Cell], stem: Path) -> None:
    """Mean regret and agreement against the number of proxy facts."""
    from matplotlib.figure import Figure

    names = ("orange", "black", "sky blue", "bluish green", "blue", "vermillion", "reddish purple")
    flat = {
        one: mean_of(choices(c)[one]["regret"] for c in cells if one in choices(c))
        for one in ("random layer", "published")
    }
    looks = zip((OKABE_ITO[name] for name in names), "oXsD*^v", strict=True)
    with style():
        figure = Figure(figsize=(7.6, 3.4), layout="constrained")
        left, right = figure.subplots(1, 2)
        for (name, points), (colour, mark) in zip(by_size(cells).items(), looks, strict=False):
            counts = sorted(points)
            look: dict[str, Any] = {
                "color": colour,
                "marker": mark,
                "linewidth": 1.2,
                "markersize": 5,
            }
            left.plot(
                counts,
                [mean_of(r for r, _ in points[n]) for n in counts],
                label=NAMES[name],
                **look,
            )
            # With all facts there is one subset, which agrees with itself.
            some = counts[:-1]
            right.plot(some, [100 * mean_of(a for _, a in points[n]) for n in some], **look)
        for one, dash in zip(flat, ((0, (1, 1.5)), (0, (5, 3))), strict=True):
            left.axhline(
                flat[one], color="#555555", linestyle=dash, linewidth=1.1, label=NAMES[one]
            )
        for ax, label in ((left, "mean regret (points)"), (right, "subsets that agree (%)")):
            ax.set_xscale("log")
            ax.set_xticks(SIZES, [str(n) for n in SIZES])
            ax.minorticks_off()
            ax.set_xlabel("proxy facts")
            ax.set_ylabel(label)
            ax.set_ylim(bottom=0)
            ax.grid(linewidth=0.3)
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
        save(figure, stem, ("svg", "pdf"))
