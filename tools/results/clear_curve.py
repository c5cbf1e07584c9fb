"""What can be had at all: rephrase against locality for every editor and weight, from the rows kept
in `cells/curve` (`golden study studies/curve.yaml`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from kept import Cell, load, unpack
from render import CELLS, table

from goldenlayers.evaluation.bootstrap import harmonic_mean
from goldenlayers.report.figures import OKABE_ITO, save, style
from goldenlayers.truth import Truth

KEPT = CELLS / "curve"
# Editors whose points belong together, and in which order; the words say what changes along them.
FAMILIES = {
    "clear-rome, λ 0.1 to 100": [f"clear-{w}" for w in ("0.1", "0.3", "1", "3", "10", "100")],
    "clear-rome, 8 to 512 names": [f"clear-10-of-{n}" for n in (8, 32, 512)],
    "memit, λ 0.01 to 1": [f"memit-{w}" for w in ("0.01", "0.1", "0.3", "1")],
    "memit clear of names": ["memit-0.1-clear", "memit-0.3-clear"],
    "alphaedit, null space 0.03 to 0.6": [f"alphaedit-{w}" for w in ("0.03", "0.1", "0.3", "0.6")],
    "alphaedit clear of names": ["alphaedit-0.3-clear"],
    "rome": ["rome"],
    "emmet": ["emmet"],
    "ft-m": ["ft-m"],
}
METRICS = ("rewrite", "rephrase", "locality", "portability", "overall")
_COLOURS = ("vermillion", "orange", "blue", "sky blue", "bluish green", "bluish green", "black")
_MARKS = "osv^DdX*P"


def figures(cell: Cell) -> dict[str, dict[str, float]]:
    """Means by editor and metric, with the harmonic mean."""
    found = {}
    for editor, rows in unpack(cell):
        truth = Truth.from_rows(rows)
        means = {m: float(truth.means(m)[0]) for m in METRICS if m in truth.scores}
        parts = np.array([means.get(m, math.nan) for m in METRICS[:3]])
        found[editor] = means | {"harmonic": float(harmonic_mean(parts))}
    return found


def draw(cells: Sequence[Cell], stem: Path) -> None:
    """A panel per cell, a line per family."""
    from matplotlib.figure import Figure

    with style():
        figure = Figure(figsize=(max(8.0, 4.2 * len(cells)), 4.6), layout="constrained")
        axes = figure.subplots(1, len(cells), squeeze=False)[0]
        for ax, cell in zip(axes, cells, strict=True):
            found = figures(cell)
            for (name, members), mark in zip(FAMILIES.items(), _MARKS, strict=True):
                points = [found[m] for m in members if m in found]
                place = list(FAMILIES).index(name)
                ax.plot(
                    [p["locality"] for p in points],
                    [p["rephrase"] for p in points],
                    color=OKABE_ITO[_COLOURS[min(place, len(_COLOURS) - 1)]],
                    marker=mark,
                    markersize=6,
                    linewidth=1,
                    label=name,
                )
            ax.set_title(f"{cell['model']}, {cell['data']}", fontsize=9)
            ax.set_xlabel("locality: answers that stayed, %")
            ax.grid(linewidth=0.3)
        axes[0].set_ylabel("rephrase: answers that follow, %")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
        save(figure, stem, ("svg", "pdf"))


def section(stem: Path, *, write: bool) -> Iterable[str]:
    """The part of the page, nothing while no such cell is there."""
    cells = load(KEPT)
    if not cells:
        return
    if write:
        draw(cells, stem)
    yield "## What can be had at all"
    yield (
        "`golden study studies/curve.yaml`: 24 facts at one sixth of the depth, every editor over "
        "a range of its own trade-off: clear-rome's weight λ (128 names) and number of names (λ "
        "10), memit's λ in MLP widths, the share of the text's key energy that alphaedit may write "
        "on. Up and to the right is better."
    )
    yield f"![Rephrase against locality for every editor and weight]({stem.name}.svg)"
    head = ["editor", *(f"{c['model']}, {c['data']}" for c in cells)]
    found = [figures(cell) for cell in cells]
    rows = []
    for member in (m for members in FAMILIES.values() for m in members):
        if any(member in one for one in found):
            rows.append([member, *(_said(one.get(member)) for one in found)])
    yield "Rephrase / locality / portability; harmonic mean of rewrite, rephrase and locality:"
    yield table(head, rows)


def _said(one: dict[str, float] | None) -> str:
    if one is None:
        return "–"
    parts = [f"{one[m]:.0f}" if m in one and one[m] == one[m] else "–" for m in METRICS[1:4]]
    return f"{' / '.join(parts)}; {one['harmonic']:.1f}"
