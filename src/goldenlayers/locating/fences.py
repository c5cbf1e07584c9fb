"""Which layers may be chosen (by the paper's Tukey fences, all but the last block, or all), and
whether the scores make a choice at all.

Shapes: N facts, L layers, R rows of scores (resamples of the facts, say).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from goldenlayers.errors import UserError
from goldenlayers.locating.base import Fence

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


def refuse_alike(scores: Array, kept: NDArray[np.bool_]) -> None:
    """Refuse scores (L,) of which none is better than another.

    Raises:
        UserError: all kept layers, at least two, have the same score but for rounding.
    """
    some = scores[kept]
    if len(some) < 2 or np.ptp(some) > 1e-12 * np.abs(some).max():
        return
    which = f"all {len(some)} layers" + (" within the fences" if len(some) < len(scores) else "")
    raise UserError(
        f"no layer stands out: {which} have the score {float(some[0]):.3g}",
        expected="scores that differ",
        fix="Weights that are zero or damaged do that, answers that the model is certain of, and "
        "numbers too small for float16. Load the model anew in float32, or use other facts",
    )


def left_out(n_scored: int, dropped: Mapping[str, int]) -> Iterable[str]:
    """A sentence if only some of the facts that were given came to be scored."""
    if dropped:
        given = n_scored + sum(dropped.values())
        why = "; ".join(f"{reason}: {count}" for reason, count in dropped.items())
        yield f"Only {n_scored} of the {given} facts could be used. Left out: {why}."


def ties(scores: Array, kept: NDArray[np.bool_], phi: Array) -> Iterable[str]:
    """Sentences if layers share the best score, or if facts tell no layer from another."""
    best = np.flatnonzero(kept & (scores == scores[kept].max()))
    if len(best) > 1:
        names = " and ".join(map(str, best[:5])) + (" and others" if len(best) > 5 else "")
        yield f"Layers {names} share the best score; the one nearest the input is named."
    mute = int((np.ptp(phi, axis=1) == 0).sum()) if len(scores) > 1 else 0
    if mute:
        yield (
            f"{counted(mute, 'fact')} of {len(phi)} score all layers alike and say nothing about "
            "the choice."
        )


def counted(n: int, noun: str) -> str:
    """The number with its noun, in the singular or the plural."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"
