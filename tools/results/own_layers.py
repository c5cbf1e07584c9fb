"""The sweeps that are kept, as tables, and a layer for each fact, chosen by half of its probes.

Shapes: B facts, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from kept import Cell, Row, unpack

from goldenlayers.evaluation.bootstrap import Floats
from goldenlayers.locating import published_layer
from goldenlayers.racing import Worth, table_of
from goldenlayers.racing.worth import expected_hits
from goldenlayers.truth import Truth

# How much of a fact's own evidence counts beside that of the others; half was named beforehand.
SHARES = (1.0, 0.5, 0.25)
NAMED_SHARE = 0.5
Figures = tuple[float, float, float]
"""A value and the ends of its interval."""


@dataclass(frozen=True, eq=False)
class Swept:
    """An editor in a cell: ``hard`` (B, L), by hits, judges; ``soft`` (B, L), by expected ones, and
    ``both`` (B, L), by the mean of the two, choose.
    """

    cell: Cell
    editor: str
    rows: list[Row]
    truth: Truth
    hard: Floats
    soft: Floats
    both: Floats

    @property
    def layers(self) -> list[int]:
        """The swept layers."""
        return list(self.truth.layers)

    @property
    def facts(self) -> list[str]:
        """The facts that were edited."""
        return list(self.truth.facts)

    @property
    def about(self) -> str:
        """The model and the data set: editors of one cell share their facts."""
        return f"{self.cell['model']}/{self.cell['data']}"

    @property
    def published(self) -> int:
        """Place of the published depth."""
        return self.nearest(published_layer(self.cell["n_layers"]))

    def nearest(self, layer: int) -> int:
        """Place of the swept layer that is nearest to one."""
        return min(range(len(self.layers)), key=lambda i: abs(self.layers[i] - layer))


def swept(cells: Sequence[Cell]) -> Iterator[Swept]:
    """The sweeps of some cells; their facts in one order."""
    for cell in cells:
        for editor, rows in unpack(cell):
            if rows[0]["layer"] < 0:
                continue
            truth = Truth.from_rows(rows)
            facts, _, soft = table_of(rows)
            order = [facts.index(fact) for fact in truth.facts]
            _, _, both = table_of(rows, Worth(by="both"))
            yield Swept(cell, editor, rows, truth, truth.table(), soft[order], both[order])


def halves(one: Swept, seed: int = 0) -> tuple[Floats, Floats] | None:
    """Every metric's probes of every fact in two halves: (chooser's soft, judge's hard), (B, L)
    each, over rewrite, rephrase and locality. None where facts have too few probes.

    Rewrite has one probe, the prompt itself, on both sides: it is what the edit is made by.
    """
    rng = np.random.default_rng(seed)
    probes: dict[tuple[str, str], dict[int, dict[int, tuple[float, float]]]] = {}
    for row in one.rows:
        if row["metric"] in ("rewrite", "rephrase", "locality") and row["score"] is not None:
            own = probes.setdefault((row["fact"], row["metric"]), {}).setdefault(row["probe"], {})
            soft = row.get("soft", math.nan)
            own[row["layer"]] = row["score"], expected_hits(row["metric"], soft)
    shape = (3, len(one.facts), len(one.layers))
    parts = np.full((2, *shape), np.nan)  # soft A, hard B × metric × fact × layer
    for m, metric in enumerate(("rewrite", "rephrase", "locality")):
        for b, fact in enumerate(one.facts):
            own = list(probes.get((fact, metric), {}).values())
            if metric != "rewrite" and len(own) < 2:
                continue
            order = rng.permutation(len(own)).tolist()
            half = len(own) // 2 if metric != "rewrite" else 0
            sides = (order[:half], order[half:]) if half else (order, order)
            for side, value in enumerate((1, 0)):
                for k, layer in enumerate(one.layers):
                    some = [own[i][layer][value] for i in sides[side] if layer in own[i]]
                    parts[side, m, b, k] = float(np.mean(some)) if some else np.nan
    enough = ~np.isnan(parts[1]).any(axis=(0, 2))
    if enough.sum() < 12:
        return None
    soft, judged = parts[:, :, enough].mean(axis=1)
    return soft, judged


def per_fact(one: Swept, repeats: int = 20) -> dict[str, Any] | None:
    """Choosing a layer for each fact by half of its probes, judged by the other half."""
    gains: dict[float, list[Floats]] = {share: [] for share in SHARES}
    gaps: list[Floats] = []
    for seed in range(repeats):
        found = halves(one, seed)
        if found is None:
            return None
        soft, judged = found
        n = len(soft)
        others = (soft.sum(0) - soft) / (n - 1)  # (B, L) means of the others
        fixed = others.argmax(1)
        rows = np.arange(n)
        for share in SHARES:
            own = (share * soft + (1 - share) * others).argmax(1)
            gains[share].append(judged[rows, own] - judged[rows, fixed])
        gaps.append(judged.max(1) - judged[rows, fixed])
    return {
        "about": one.about,
        "gains": {str(s): np.mean(g, axis=0).tolist() for s, g in gains.items()},
        "gap": np.mean(gaps, axis=0).tolist(),
    }


def drawn(groups: Sequence[tuple[str, Sequence[float]]], seed: int = 0) -> Figures:
    """Mean over groups of the mean over facts, with its 95 % bootstrap interval over facts.

    Groups are named by the facts that they are of, and groups of the same facts are drawn alike:
    editors err on the same facts.
    """
    rng = np.random.default_rng(seed)
    arrays = [(name, np.array(values)) for name, values in groups]
    of = {(name, len(a)): np.zeros(0, dtype=int) for name, a in arrays}
    means = []
    for _ in range(2000):
        for name, n in of:
            of[name, n] = rng.integers(n, size=n)
        means.append(float(np.mean([a[of[name, len(a)]].mean() for name, a in arrays])))
    low, high = np.percentile(means, [2.5, 97.5]).tolist()
    return float(np.mean([a.mean() for _, a in arrays])), low, high
