"""Whether scores make a choice at all, and what the reader must know of the facts behind them.

Shapes: N facts, L layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from goldenlayers.errors import UserError

Array = NDArray[np.float64]


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
