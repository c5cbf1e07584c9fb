"""Means over facts, their resamples and standard errors, and rank correlation. NumPy only.

Shapes: B facts, M columns, S bootstrap resamples; NaN is what was not scored.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


def resampled_means(values: ArrayLike, resamples: int = 2000, seed: int = 0) -> Floats:
    """Means over facts of S bootstrap resamples of the facts.

    Args:
        values: (B,) or (B, M), NaN where a fact has no score.
        resamples: S.
        seed: of NumPy's default generator.

    Returns:
        (S,) or (S, M); NaN where no drawn fact has a score.
    """
    table = np.asarray(values, dtype=np.float64)
    flat = table.reshape(len(table), math.prod(table.shape[1:]))
    missing = np.isnan(flat)
    known = np.where(missing, 0.0, flat)
    out = np.full((resamples, flat.shape[1]), np.nan)
    if len(flat):
        generator = np.random.default_rng(seed)
        block = max(1, 1_000_000 // len(flat))  # bounds memory at some tens of MB
        for start in range(0, resamples, block):
            stop = min(start + block, resamples)
            draws = generator.integers(len(flat), size=(stop - start, len(flat)))
            draws += len(flat) * np.arange(stop - start)[:, None]
            size = (stop - start) * len(flat)
            counts = np.bincount(draws.ravel(), minlength=size).reshape(-1, len(flat))
            with np.errstate(invalid="ignore"):
                out[start:stop] = (counts @ known) / (counts @ (~missing).astype(float))
    return out.reshape(resamples, *table.shape[1:])


def nan_mean(values: Floats) -> Floats:
    """Mean over the first axis without NaN; NaN where there is nothing else."""
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(known, values, 0.0).sum(axis=0) / known.sum(axis=0)


def joint_se(values: Floats, means: Floats, slopes: Floats) -> float:
    """Standard error of a figure of several means, by linearisation over facts.

    With one metric, or all metrics scored for all facts and slopes 1/M, it is exactly the standard
    deviation (of the facts' means) over √B. NaN where a slope is not finite (a harmonic mean of 0).
    """
    known = ~np.isnan(values)
    influence = (np.where(known, values - means, 0.0) * slopes / known.sum(axis=0)).sum(axis=1)
    n = int(known.any(axis=1).sum())
    return math.sqrt(n / (n - 1) * float(influence @ influence))


def harmonic_mean(values: Floats) -> Floats:
    """Along the last axis; 0 where a value is 0."""
    with np.errstate(divide="ignore"):
        return values.shape[-1] / (1 / values).sum(axis=-1)


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's rank correlation; ties share their mean rank.

    Pairs with a NaN are left out. NaN when fewer than two pairs remain or one side is constant.

    Raises:
        ValueError: the lengths differ.
    """
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if x.shape != y.shape or x.ndim != 1:
        raise ValueError(f"two lists of one length are needed, got {x.shape} and {y.shape}")
    both = ~(np.isnan(x) | np.isnan(y))
    if both.sum() < 2:
        return math.nan
    x, y = _ranks(x[both]), _ranks(y[both])
    x, y = x - x.mean(), y - y.mean()
    scale = math.sqrt(float(x @ x) * float(y @ y))
    return float(np.clip(x @ y / scale, -1, 1)) if scale > 0 else math.nan


def _ranks(values: Floats) -> Floats:
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[which]
