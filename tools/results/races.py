"""How many edits does a verified choice need? Races replayed on what the study's sweeps measured.

    python tools/results/races.py

A sweep has every layer's score of every test fact, so a race among layers can be played as often as
one likes without an edit: its facts are drawn from the test facts, with replacement, and its choice
is judged by all of them. Facts to race on and facts to judge by are the same here, which
flatters the race; the study's own races use proxy facts. Kept in docs/results/study/races.json.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from study import STUDY, VERIFY, truth_of
from study_choices import write
from study_record import RANK_ONE, Cell, load

from goldenlayers.locating import published_layer
from goldenlayers.locating.ranking import LayerRanking, LayerScore
from goldenlayers.racing import best_layers, race

PATH = STUDY / "races.json"
FACTS = (8, 16, 32)
REPEATS = 20


def by_transfer(cell: Cell, spacing: int) -> list[int]:
    """The best layers of key transfer."""
    scores = cell["layer_scores"]["transfer"]
    rows = tuple(LayerScore(i, score) for i, score in enumerate(scores))
    best = int(np.argmax(scores))
    return best_layers(LayerRanking("transfer", best, (best,), rows, 0), VERIFY, spacing=spacing)


def with_published(cell: Cell) -> list[int]:
    """Those two apart, the published depth in place of the last."""
    published = published_layer(len(cell["layer_scores"]["transfer"]))
    return list(dict.fromkeys([published, *by_transfer(cell, 2)]))[:VERIFY]


def even(cell: Cell) -> list[int]:
    """Layers spread evenly over the depth, without looking at anything."""
    last = len(cell["layer_scores"]["transfer"]) - 1
    return sorted({round(x) for x in np.linspace(0, 0.9 * last, VERIFY)})


KINDS: dict[str, Callable[[Cell], list[int]]] = {
    "KTA's five best": lambda cell: by_transfer(cell, 1),
    "KTA's five best two apart": lambda cell: by_transfer(cell, 2),
    "KTA's best two apart and the published depth": with_published,
    "five layers evenly spread": even,
}


def played(cell: Cell, layers: list[int], n: int) -> tuple[float, float]:
    """Mean regret and mean number of edits of races with n facts."""
    table = truth_of(cell).table()
    means = np.nanmean(table, axis=0)
    generator = np.random.default_rng(0)
    choices = []
    for _ in range(REPEATS):
        facts = table[generator.integers(0, len(table), n)]  # (n, L)
        choices.append(race(layers, n, partial(_scores, facts)))
    regrets = [float(means.max() - means[one.layer]) for one in choices]
    return statistics.fmean(regrets), statistics.fmean(one.n_edits for one in choices)


def _scores(facts: NDArray[np.float64], layer: int, places: Sequence[int]) -> list[float]:
    return facts[list(places), layer].tolist()


def main() -> None:
    # Editors that share their values score alike: ROME speaks for them.
    cells = [c for c in load() if c["method"] not in RANK_ONE[1:]]
    found: list[dict[str, Any]] = []
    for name, candidates in KINDS.items():
        for n in FACTS:
            results = [(c["method"], *played(c, candidates(c), n)) for c in cells]
            found.append(
                {
                    "candidates": name,
                    "facts": n,
                    "cells": len(cells),
                    "edits": statistics.fmean(edits for _, _, edits in results),
                    "regret": {
                        method: statistics.fmean(r for m, r, _ in results if m == method)
                        for method in ("rome", "ft-m")
                    },
                    "worst": {
                        method: max(r for m, r, _ in results if m == method)
                        for method in ("rome", "ft-m")
                    },
                }
            )
            print(found[-1], flush=True)
    write(PATH, found)


if __name__ == "__main__":
    main()
