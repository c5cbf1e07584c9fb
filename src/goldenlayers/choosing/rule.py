"""Which try of an edit each fact keeps: a pure rule on a table of scores.

A fact's own probes are few, so its scores are noisy. What a try gains over the usual one is
therefore drawn towards what it gains on the other facts, and the usual try stays unless another is
better by more than a margin.

Shapes: N facts, K tries.
"""

from __future__ import annotations

import numpy as np

from goldenlayers.evaluation.bootstrap import Floats

OWN = 0.5
"""Weight of a fact's own evidence; the rest is that of all facts."""
PRIOR = 1.0
"""Facts on which no try gains anything, added to the others: one fact alone is no proof."""
MARGIN = 2.0
"""Points of 100 by which a try must beat the usual one."""


def choose(
    scores: Floats, usual: int, *, own: float = OWN, prior: float = PRIOR, margin: float = MARGIN
) -> list[int]:
    """The try that each fact keeps.

    Args:
        scores: (N, K) in points of 100; NaN where an edit failed or nothing could be asked.
        usual: the column of the try that stays unless another is better.
        own: weight of a fact's own gains, from 0 (all facts keep the same, but for failures) to 1.
        prior: facts without any gain that are added to the mean over facts.
        margin: least gain.

    Returns:
        For each fact a column. Where the usual try has no score, the best one that has; where none
        has, the usual one.
    """
    table = np.asarray(scores, dtype=np.float64)
    gains = table - table[:, [usual]]
    known = ~np.isnan(gains)
    pooled = np.where(known, gains, 0.0).sum(axis=0) / (known.sum(axis=0) + max(prior, 1e-9))
    drawn = own * gains + (1 - own) * pooled
    found = []
    for row, raw in zip(drawn, table, strict=True):
        if np.isnan(raw[usual]):
            found.append(usual if np.isnan(raw).all() else int(np.nanargmax(raw)))
            continue
        best = int(np.nanargmax(row))
        found.append(best if row[best] > margin else usual)
    return found
