"""Means over facts with their intervals, and the best layer of a table. NumPy only.

Shapes: B facts, L layers. Tables are (B, L), NaN where nothing was scored.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from goldenlayers.evaluation.summary import resampled_means

Floats = NDArray[np.float64]

MIN_COVERAGE = 0.5
"""A layer scored on a smaller share of the facts cannot be golden: its mean is about others."""


@dataclass(frozen=True)
class Interval:
    """A mean over ``n`` facts (or repeats) and its 95 % percentile interval; NaN where unknown."""

    value: float
    low: float
    high: float
    n: int

    def to_json(self) -> dict[str, Any]:
        """Plain values; NaN becomes None."""
        numbers = {"value": self.value, "low": self.low, "high": self.high}
        return {**{name: plain(number) for name, number in numbers.items()}, "n": self.n}


def ends(values: Floats) -> tuple[float, float]:
    """The 2.5 and 97.5 percentiles of a list, without its NaN."""
    low, high = np.nanpercentile(values, [2.5, 97.5]).tolist()
    return low, high


def estimate(values: Floats, resamples: int, seed: int) -> Interval:
    """Mean of one number per fact, NaN left out, with its bootstrap interval over facts."""
    values = values[~np.isnan(values)]
    if not len(values):
        return Interval(math.nan, math.nan, math.nan, 0)
    if len(values) == 1:
        return Interval(float(values[0]), math.nan, math.nan, 1)
    low, high = ends(resampled_means(values, resamples, seed))
    return Interval(float(values.mean()), low, high, len(values))


def nan_mean(table: Floats) -> Floats:
    """Mean over the first axis without NaN; NaN where there is nothing else."""
    known = ~np.isnan(table)
    with np.errstate(invalid="ignore"):
        return np.where(known, table, 0.0).sum(axis=0) / known.sum(axis=0)


def eligible_means(table: Floats) -> Floats:
    """Means by layer, (L,); NaN for layers with too few of the facts that were scored anywhere."""
    known = ~np.isnan(table)
    some = int(known.any(axis=1).sum())
    return np.where(known.sum(axis=0) >= max(1.0, MIN_COVERAGE * some), nan_mean(table), np.nan)


def best_place(table: Floats) -> int | None:
    """Place of the best layer, ties to the shallower; None if there is none."""
    means = eligible_means(table)
    return None if np.isnan(means).all() else int(np.nanargmax(level(means)))


def level(values: Floats) -> Floats:
    """Without the last digits, so that sums in another order do not break ties."""
    return np.round(values, 9)


def row_max(table: Floats) -> Floats:
    """Each fact's best score, (B,); NaN where there is none."""
    known = ~np.isnan(table)
    return np.where(known.any(axis=1), np.where(known, table, -np.inf).max(axis=1), np.nan)


def optimal(table: Floats) -> NDArray[np.bool_]:
    """(B, L): whether a layer is (tied for) the fact's best."""
    table = level(table)
    return table == row_max(table)[:, None]


def plain(value: float) -> float | None:
    """NaN as None, which JSON knows."""
    return None if math.isnan(value) else float(value)


def plain_list(values: Floats) -> list[float | None]:
    """A list for JSON."""
    return [plain(float(value)) for value in values]


def listed(layers: Sequence[int]) -> str:
    """Layers in words, not too many."""
    some = ", ".join(map(str, layers[:8]))
    return some if len(layers) <= 8 else f"{some} and {len(layers) - 8} more"
