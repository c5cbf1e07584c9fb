"""docs/results/clear-rome.md and probes.md from the kept rows of `studies/editors.yaml`.

python tools/results/clear_rome.py            # write
python tools/results/clear_rome.py --check    # exit 1 if a page is out of date
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from clear_curve import section
from kept import load, unpack
from render import CELLS, RESULTS, table, written

from goldenlayers.evaluation.bootstrap import Floats, harmonic_mean, nan_mean, resampled_means
from goldenlayers.truth import Truth

EDITORS = ("rome", "clear-rome", "r-rome", "memit", "emmet", "alphaedit", "in-context")
WEIGHTS = EDITORS[:-1]
DEPTHS = ("1/6", "1/3", "1/2")
METRICS = ("rewrite", "rephrase", "locality", "portability", "overall")
KEPT = CELLS / "clear"
LARGER = CELLS / "larger"  # of a model for which one depth and fewer facts have to do
EVERY_LAYER = CELLS / "contradicting"  # ROME at all layers, on data with contradicting probes
LOCALITIES = ("locality_subject", "locality_neighbour", "locality_contradicting")
RESAMPLES = 2000
BENT = "locality with all probes"


class Cell:
    """A model on a data set: every editor's scores by fact, (B,), at each depth."""

    def __init__(self, kept: dict[str, Any]) -> None:
        self.kept = kept
        self.model, self.data = kept["model"], kept["data"]
        self.name = f"{self.model}, {self.data}"
        self.truths: dict[str, Truth] = {}
        for editor, rows in unpack(kept):
            every = [dict(row, metric=BENT) for row in rows if counts_as_published(row)]
            self.truths[editor] = Truth.from_rows([*rows, *every])

    @property
    def layers(self) -> tuple[int, ...]:
        return next(t.layers for name, t in self.truths.items() if name in WEIGHTS)

    def has(self, editor: str) -> bool:
        return editor in self.truths

    @functools.cache  # noqa: B019 - a script's cells live as long as it does
    def scores(self, editor: str, depth: int, metric: str) -> Floats:
        """(B,), facts in one order for all editors; NaN where a fact has no such probe."""
        truth = self.truths[editor]
        order = sorted(self.truths["rome"].facts)
        if metric not in truth.scores:
            return np.full(len(order), np.nan)
        column = depth if len(truth.layers) > 1 else 0
        found = dict(zip(truth.facts, truth.table(metric)[:, column], strict=True))
        return np.array([found.get(fact, math.nan) for fact in order])


def counts_as_published(row: dict[str, Any]) -> bool:
    """Whether a row is of a probe that published locality counts: all of them."""
    return row["metric"] in ("locality", "locality_contradicting")


Figure = Callable[[Cell], Floats]
"""(B, M): scores of a cell's facts in M columns, whose means a figure is made of."""


def over_cells(
    cells: Sequence[Cell], figure: Figure, combine: Callable[[Floats], Floats]
) -> tuple[float, float, float, int]:
    """Mean over cells of ``combine`` of the columns' means, its 95 % interval (the facts of each
    cell drawn anew, the cells held fixed), and of how many cells: where it is known.
    """
    values, drawn = [], []
    for cell in cells:
        columns = figure(cell)
        value = float(combine(nan_mean(columns)))
        if not math.isnan(value):
            values.append(value)
            drawn.append(combine(resampled_means(columns, RESAMPLES, 0)))
    if not values:
        return math.nan, math.nan, math.nan, 0
    low, high = np.nanpercentile(np.mean(drawn, axis=0), [2.5, 97.5]).tolist()
    return float(np.mean(values)), low, high, len(values)


def mean_of(cells: Sequence[Cell], editor: str, depth: int, metric: str) -> tuple[Any, ...]:
    cells = [cell for cell in cells if cell.has(editor)]
    if metric == "harmonic":
        parts = ("rewrite", "rephrase", "locality")

        def columns(cell: Cell) -> Floats:
            return np.stack([cell.scores(editor, depth, part) for part in parts], axis=1)

        return over_cells(cells, columns, known_harmonic)
    return over_cells(
        cells, lambda cell: cell.scores(editor, depth, metric)[:, None], lambda m: m[..., 0]
    )


def known_harmonic(means: Floats) -> Floats:
    """Harmonic mean of the columns that have any score."""
    known = ~np.isnan(means).reshape(-1, means.shape[-1]).all(0)
    return harmonic_mean(means[..., known])


def difference(
    cells: Sequence[Cell], one: str, other: str, depth: int, metric: str
) -> tuple[float, float, float, int]:
    """One editor against another, fact by fact."""
    cells = [cell for cell in cells if cell.has(one) and cell.has(other)]

    def gap(cell: Cell) -> Floats:
        return (cell.scores(one, depth, metric) - cell.scores(other, depth, metric))[:, None]

    return over_cells(cells, gap, lambda m: m[..., 0])


def shown(found: tuple[float, float, float, int], *, sign: bool = False) -> str:
    value, low, high, _ = found
    if math.isnan(value):
        return "–"
    style = "+.1f" if sign else ".1f"
    return f"{value:{style}} ({low:{style[:-2] + '0f'}} to {high:{style[:-2] + '0f'}})".replace(
        " to ", "–" if not sign else " to "
    )


def summary_tables(cells: Sequence[Cell], depths: Sequence[str] = DEPTHS) -> Iterable[str]:
    head = ["editor", *METRICS[:3], *LOCALITIES[:2], *METRICS[3:], "gain", "harmonic"]
    for depth, word in enumerate(depths):
        rows = [
            [editor, *(shown(mean_of(cells, editor, depth, metric)) for metric in head[1:])]
            for editor in EDITORS
            if any(cell.has(editor) for cell in cells)
        ]
        yield f"### At {word} of the depth"
        yield table(head, rows)


def against(cells: Sequence[Cell], depths: Sequence[str] = DEPTHS) -> Iterable[str]:
    """clear-rome against each other editor, over all cells."""
    rows = []
    for other in EDITORS:
        if other == "clear-rome" or not any(cell.has(other) for cell in cells):
            continue
        for depth, word in enumerate(depths):
            found = [difference(cells, "clear-rome", other, depth, m) for m in METRICS]
            rows.append([other, word, *(shown(one, sign=True) for one in found)])
    yield table(["against", "depth", *METRICS], rows)


def wanted(cells: Sequence[Cell]) -> Iterable[str]:
    """What was wanted of the editor beforehand, and what was measured."""
    rows = []
    for depth, word in enumerate(DEPTHS):
        locality = mean_of(cells, "clear-rome", depth, "locality")
        rephrase = difference(cells, "clear-rome", "rome", depth, "rephrase")
        low = [c for c in cells if np.nanmean(c.scores("rome", depth, "locality")) < 85]
        spilling = difference(low, "clear-rome", "rome", depth, "overall")
        others = {
            editor: difference(cells, "clear-rome", editor, depth, "overall")
            for editor in WEIGHTS
            if editor != "clear-rome"
        }
        nearest = min(others, key=lambda editor: others[editor][0])
        below = [
            f"{cell.name} ({editor} {shown(found, sign=True)})"
            for cell in cells
            for editor in others
            if (found := difference([cell], "clear-rome", editor, depth, "overall"))[2] < 0
        ]
        rows.append(
            [
                word,
                shown(locality),
                shown(rephrase, sign=True),
                f"{shown(spilling, sign=True)}, {spilling[3]} cells",
                f"{shown(others[nearest], sign=True)} above {nearest}",
                "; ".join(below) or "none",
            ]
        )
    head = [
        "depth",
        "locality (wanted: at least 88)",
        "rephrase against ROME (at most 1 below)",
        "Overall against ROME where its locality is below 85 (at least 5 above)",
        "Overall against the best other weight editor, mean over cells (above)",
        "cells where Overall is below a weight editor's by more than the noise (none)",
    ]
    yield table(head, rows)


def by_cell(cells: Sequence[Cell]) -> Iterable[str]:
    for cell in cells:
        facts = len(cell.truths["rome"].facts)
        where = ", ".join(
            f"{word} = layer {layer}" for word, layer in zip(DEPTHS, cell.layers, strict=False)
        )
        yield f"### {cell.name}\n\n{facts} facts; {where}."
        head = ["depth", "editor", *METRICS[:3], *LOCALITIES[:2], *METRICS[3:], "gain", "harmonic"]
        rows = []
        for depth, word in enumerate(DEPTHS[: len(cell.layers)]):
            for editor in EDITORS:
                if not cell.has(editor) or (editor == "in-context" and depth):
                    continue
                figures = [shown(mean_of([cell], editor, depth, metric)) for metric in head[2:]]
                rows.append(["any" if editor == "in-context" else word, editor, *figures])
        yield table(head, rows)


def missing(cells: Sequence[Cell]) -> list[str]:
    models = ("gemma3-270m", "smollm2-135m", "qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b")
    data = ("starter", "counterfact_500", "ZsRE-test-all", "wiki_counterfact")
    there = {(cell.model, cell.data) for cell in [*cells, *map(Cell, load(LARGER))]}
    return [f"{m} × {d}" for m in models for d in data if (m, d) not in there]


def opened(cells: Sequence[Cell]) -> list[str]:
    left = missing(cells)
    return ["Still open: " + ", ".join(left) + "."] if left else []


def larger(cells: Sequence[Cell]) -> Iterable[str]:
    """What a larger model says, at one depth."""
    if not cells:
        return
    models = " and ".join(sorted({cell.model for cell in cells}))
    facts = " or ".join(map(str, sorted({len(cell.truths["rome"].facts) for cell in cells})))
    yield f"## A larger model: {models}"
    yield (
        f"{len(cells)} cells of {facts} facts each, at one sixth of the depth, with quasi-Newton "
        "steps (`steps 10 prefixes 2`); `studies/larger.yaml`. They stand by themselves: no figure "
        "above has them in."
    )
    yield from summary_tables(cells, DEPTHS[:1])
    yield from against(cells, DEPTHS[:1])
    yield from by_cell(cells)


def clear_page(cells: Sequence[Cell], *, write: bool) -> str:
    counts = sorted({len(cell.truths["rome"].facts) for cell in cells})
    facts = " or ".join(map(str, counts))
    head = (KEPT / "reading.md").read_text(encoding="utf-8").rstrip()
    parts = [
        head.replace("{CELLS}", str(len(cells))).replace("{FACTS}", facts),
        *opened(cells),
        "## What was wanted, and what was measured",
        *wanted(cells),
        "## All editors, mean over the cells",
        *summary_tables(cells),
        "## clear-rome against each, fact by fact",
        *against(cells),
        *section(RESULTS / "clear-curve", write=write),
        *larger([Cell(kept) for kept in load(LARGER)]),
        "## Cell by cell",
        *by_cell(cells),
    ]
    return "\n\n".join(parts) + "\n"


def probes_page(cells: Sequence[Cell], *, write: bool) -> str:
    head = (KEPT / "probes.md").read_text(encoding="utf-8").rstrip()
    parts = [head]
    rows = []
    for cell in cells:
        for editor in ("rome", "alphaedit"):
            for depth, word in enumerate(DEPTHS):
                bent = cell.scores(editor, depth, "locality_contradicting")
                if np.isnan(bent).all():
                    continue
                straight, every = (
                    mean_of([cell], editor, depth, metric) for metric in ("locality", BENT)
                )
                rows.append(
                    [
                        cell.name,
                        editor,
                        word,
                        f"{int((~np.isnan(bent)).sum())} of {len(bent)}",
                        shown(straight),
                        shown(mean_of([cell], editor, depth, "locality_contradicting")),
                        shown(every),
                        f"{every[0] - straight[0]:+.1f}",
                    ]
                )
    columns = ["cell", "editor", "depth", "facts with such probes", "locality"]
    columns += ["of contradicting probes", "locality as published", "moves by"]
    parts += [table(columns, rows), "## Two localities"]
    rows = []
    for cell in cells:
        for editor in ("rome", "clear-rome", "alphaedit"):
            for metric in LOCALITIES[:2]:
                found = [mean_of([cell], editor, depth, metric) for depth in range(len(DEPTHS))]
                if not math.isnan(found[0][0]):
                    rows.append([cell.name, editor, metric, *map(shown, found)])
    parts.append(table(["cell", "editor", "metric", *DEPTHS], rows))
    parts += ["## Do such probes move the golden layer?", *moved_layers(load(EVERY_LAYER))]
    return "\n\n".join([*parts, *opened(cells)]) + "\n"


def moved_layers(kept: Sequence[dict[str, Any]]) -> Iterable[str]:
    """The golden layer by the straight yardstick and with all probes, and what the second costs."""
    rows = []
    for cell in kept:
        for editor, scores in unpack(cell):
            straight = Truth.from_rows(scores)
            bent = Truth.from_rows(
                [dict(r, metric="locality") if counts_as_published(r) else r for r in scores]
            )
            hit = np.isfinite(straight.table("locality_contradicting")).any(1).sum()
            for metric in ("overall", "locality"):
                golden, other = (truth.golden_layer(metric) for truth in (straight, bent))
                lost = straight.regret(other, metric)
                rows.append(
                    [
                        f"{cell['model']}, {cell['data']}",
                        editor,
                        f"{hit} of {len(straight.facts)}",
                        "Overall" if metric == "overall" else metric,
                        f"{golden} ({straight.wins(metric).get(golden, 0):.0%})",
                        f"{other} ({bent.wins(metric).get(other, 0):.0%})",
                        f"{lost.value:.1f} ({lost.low:.0f}–{lost.high:.0f})",
                    ]
                )
    same = sum(row[4].split()[0] == row[5].split()[0] for row in rows if row[3] == "Overall")
    cells = sum(row[3] == "Overall" for row in rows)
    yield (
        f"In {same} of {cells} cell{'s' * (cells != 1)} that are there the golden layer by Overall "
        "is the same either way. By locality alone it is a layer where edits do little: not a "
        "figure to choose by. "
        "ROME at all layers (24 facts a cell, quasi-Newton, `steps 10 prefixes 2`; kept in "
        "`cells/contradicting`). In brackets: in how many of 2,000 resamples of the facts that "
        "layer is the best. The last column: what the layer that all probes choose loses by the "
        "straight yardstick."
    )
    columns = ["cell", "editor", "facts with such probes", "by", "golden layer"]
    yield table([*columns, "with all probes", "loses"], rows)


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the pages on clear-rome and on probes.")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    cells = [Cell(kept) for kept in load(KEPT)]
    pages = {
        RESULTS / f"{name}.md": page(cells, write=not args.check)
        for name, page in (("clear-rome", clear_page), ("probes", probes_page))
    }
    return written(pages, "clear_rome.py", check=args.check)


if __name__ == "__main__":
    sys.exit(main())
