"""Forgetting as a curve: what is left of an edit, by how many edits came after it. NumPy only.

Shapes: B facts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from goldenlayers.evaluation.metrics import fact_scores
from goldenlayers.evaluation.questions import FAILED

AT_ONCE = "rewrite_at_once"
"""The metric of the rows that are scored right after a fact's own edit."""
BINS = 10


def retention(rows: Iterable[Mapping[str, Any]], bins: int = BINS) -> list[dict[str, Any]]:
    """Rewrite by the age of an edit, youngest first, from the rows of a sequence.

    The age of a fact is the number of edits that were made after its own; edits that failed do not
    count. Facts are put in at most ``bins`` bins of consecutive ages, as equally filled as can be.

    Args:
        rows: those of the mode "sequential", with "step".
        bins: how many bins at most.

    Returns:
        One ``{"age": [least, most], "facts", "rewrite", "rewrite_at_once"}`` per bin: how many
        facts, their mean rewrite after the last edit and right after their own. Only facts that
        have both count, so that the two means compare. Empty for rows of another mode.
    """
    rows = list(rows)
    made = {
        row["fact"]: row["step"]
        for row in rows
        if row["metric"] == AT_ONCE and not str(row.get("reason", "")).startswith(FAILED)
    }
    steps = np.sort(np.array(list(made.values()), dtype=np.int64))
    final, at_once = fact_scores(rows, "rewrite"), fact_scores(rows, AT_ONCE)
    points = []
    for fact, step in made.items():
        age = len(steps) - int(np.searchsorted(steps, step, side="right"))
        pair = final.get(fact, math.nan), at_once[fact]
        if not any(map(math.isnan, pair)):
            points.append((age, *pair))
    table = np.array(sorted(points), dtype=np.float64).reshape(-1, 3)  # (B, 3)
    return [
        {
            "age": [int(part[0, 0]), int(part[-1, 0])],
            "facts": len(part),
            "rewrite": float(part[:, 1].mean()),
            "rewrite_at_once": float(part[:, 2].mean()),
        }
        for part in np.array_split(table, min(bins, len(table)) or 1)
        if len(part)
    ]
