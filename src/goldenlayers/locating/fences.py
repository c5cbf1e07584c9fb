"""Which layers may be chosen: the paper's Tukey fences, all but the last block, or all.

Shapes: L layers, R rows of scores (resamples of the facts, say).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from goldenlayers.locating.methods import Fence

Array = NDArray[np.float64]


def tukey_fences(scores: Array, kappa: float = 1.0) -> tuple[float, float]:
    """q1 - kappa (q3 - q1) and q3 + kappa (q3 - q1) of scores (L,), quartiles by interpolation.

    Source: Datta, Liu, Chhabra (arXiv 2602.20207), section 5.1; ``numpy.quantile``, "linear".
    """
    low, high = _fences(np.asarray(scores, dtype=np.float64)[None], kappa)
    return float(low[0]), float(high[0])


def _fences(scores: Array, kappa: float) -> tuple[Array, Array]:
    """Fences (R,), (R,) of each row of scores (R, L)."""
    q1, q3 = np.quantile(scores, [0.25, 0.75], axis=1, method="linear")
    return q1 - kappa * (q3 - q1), q3 + kappa * (q3 - q1)


def keep(scores: Array, fence: Fence | None, kappa: float) -> NDArray[np.bool_]:
    """Which scores (R, L) lie within their row's fences, the bounds included; "last" leaves out the
    last layer.

    With kappa < 1/2 and two layers nothing may be left; such a row is kept whole.
    """
    if fence != "tukey":
        kept = np.ones(scores.shape, dtype=np.bool_)
        kept[:, -1] = fence != "last" or scores.shape[1] == 1
        return kept
    low, high = _fences(scores, kappa)
    kept = (scores >= low[:, None]) & (scores <= high[:, None])
    return kept | ~kept.any(axis=1, keepdims=True)


def choose(scores: Array, kept: NDArray[np.bool_]) -> NDArray[np.intp]:
    """The best kept layer (R,) of each row (R, L); of ties the first, the shallower."""
    return np.where(kept, scores, -np.inf).argmax(axis=1)


def shares(scores: Array, kept: NDArray[np.bool_]) -> Array:
    """How many of the rows (R, L) each layer (L,) wins; layers that share the best of a row share
    the win.
    """
    scores = np.where(kept, scores, -np.inf)
    best = scores == scores.max(axis=1, keepdims=True)
    return (best / best.sum(axis=1, keepdims=True)).sum(axis=0)
