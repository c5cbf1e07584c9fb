"""The figures of docs/results/golden-layers.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from study_record import DATASETS, METHODS, MODELS, NAMES, SIZES, Cell, by_size, mean_of

from goldenlayers.report.figures import OKABE_ITO, save, style

COLOURS = dict(zip(DATASETS, ("blue", "vermillion", "bluish green", "reddish purple"), strict=True))


def curves_figure(cells: Sequence[Cell], stem: Path) -> None:
    """Overall by layer of every cell: models down, editors across, a line per data set."""
    from matplotlib.figure import Figure

    models = [m for m in MODELS if any(c["model"] == m for c in cells)]
    methods = [e for e in METHODS if any(c["method"] == e for c in cells)]
    with style():
        figure = Figure(
            figsize=(2.6 * len(methods) + 1, 2.5 * len(models) + 0.6), layout="constrained"
        )
        axes = figure.subplots(len(models), len(methods), squeeze=False, sharey="row")
        for (i, model), (j, method) in [
            ((i, m), (j, e)) for i, m in enumerate(models) for j, e in enumerate(methods)
        ]:
            ax = axes[i, j]
            for c in cells:
                if c["model"] != model or c["method"] != method:
                    continue
                means = c["by_metric"]["overall"]
                colour = OKABE_ITO[COLOURS[c["data"]]]
                ax.plot(range(len(means)), means, color=colour, linewidth=1.2, label=c["data"])
                golden = c["golden_layers"]["overall"]
                ax.plot(
                    [golden],
                    [means[golden]],
                    marker="*",
                    color=colour,
                    markersize=9,
                    markeredgecolor="black",
                    markeredgewidth=0.5,
                )
            ax.set_title(f"{method}, {model}", fontsize=8)
            ax.grid(axis="y", linewidth=0.3)
            if j == 0:
                ax.set_ylabel("Overall")
            if i == len(models) - 1:
                ax.set_xlabel("edited layer")
        lines: dict[str, Any] = {}
        for ax in axes.flat:
            for line, label in zip(*ax.get_legend_handles_labels(), strict=True):
                lines.setdefault(label, line)
        figure.legend(
            lines.values(), lines.keys(), loc="outside lower center", ncols=4, frameon=False
        )
        save(figure, stem, ("svg",))


def sizes_figure(cells: Sequence[Cell], stem: Path) -> None:
    """Mean regret and agreement against the number of proxy facts."""
    from matplotlib.figure import Figure

    names = ("orange", "black", "sky blue", "bluish green", "blue", "vermillion", "reddish purple")
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
        for ax, label in ((left, "mean regret (points)"), (right, "subsets that agree (%)")):
            ax.set_xscale("log")
            ax.set_xticks(SIZES, [str(n) for n in SIZES])
            ax.minorticks_off()
            ax.set_xlabel("proxy facts")
            ax.set_ylabel(label)
            ax.set_ylim(bottom=0)
            ax.grid(linewidth=0.3)
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
        save(figure, stem, ("svg",))
