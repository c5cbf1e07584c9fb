"""The study's cells as the page and the figures read them.

They were computed before ``golden study`` was there; the next study's are its run folders.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from render import RESULTS

from goldenlayers.evaluation.bootstrap import resampled_means, spearman
from goldenlayers.truth import Truth

STUDY = RESULTS / "cells" / "earlier"
MODELS = ("gemma3-270m", "smollm2-135m")
DATASETS = ("starter", "counterfact_500", "ZsRE-test-all", "wiki_counterfact")
METHODS = ("rome", "r-rome", "emmet", "ft-m")
PROXY, TRACED = 100, 8
SIZES = (5, 10, 20, 50, 100, 200, 300)
# Races: of layers at least two apart, the published depth among them; on four times as many facts.
SPREAD, LONG = ", spread", ", spread, 32 facts"

Cell = dict[str, Any]
RANK_ONE = ("rome", "r-rome", "emmet")
# Choices by their name in compare.json, and what the page calls them.
LGA, KTA = "lga mlp sequence tukey", "transfer"
NOT_LAST = "lga mlp sequence inner"
NAMES = {
    LGA: "LGA (the paper's: MLP, whole text, fences)",
    "lga mlp sequence raw": "LGA without fences",
    NOT_LAST: "LGA without fences, the last block left out",
    "lga mlp sequence cosine": "LGA, mean cosine",
    "lga mlp sequence normalised": "LGA over the gradients' norms",
    "lga mlp answer tukey": "LGA, answer loss",
    "lga mlp answer raw": "LGA, answer loss, without fences",
    "lga down sequence tukey": "LGA, down projection only",
    "lga attention sequence tukey": "LGA, attention",
    "lga block sequence tukey": "LGA, whole block",
    KTA: "KTA",
    "transfer reach": "KTA with reach",
    "transfer align": "KTA with reach and alignment",
    "lga+transfer mlp sequence": "LGA and KTA, mean of ranks",
    "cma": "CMA",
    "saliency mlp sequence": "saliency",
    "published": "published depth (1/6)",
    "middle": "middle layer",
    "random layer": "a random layer (expected)",
    f"{LGA} verified": "LGA, five best verified",
    f"{KTA} verified": "KTA, five best verified",
    f"{KTA} verified{SPREAD}": "KTA's best two apart and the published depth, five verified",
    f"{KTA} verified{LONG}": "the same on 32 facts in place of 8 (ROME)",
}
MAIN = (
    LGA,
    KTA,
    f"{LGA} verified",
    f"{KTA} verified",
    "cma",
    "saliency mlp sequence",
    "published",
    "middle",
    "random layer",
)

BY_BLOCK = (
    LGA,
    NOT_LAST,
    KTA,
    "transfer reach",
    "transfer align",
    "cma",
    "published",
    "random layer",
    f"{LGA} verified",
    f"{KTA} verified",
    f"{KTA} verified{SPREAD}",
    f"{KTA} verified{LONG}",
)


def load() -> list[Cell]:
    """The cells that are there, in a fixed order."""
    paths = [STUDY / f"{m}-{d}-{e}.json" for m in MODELS for d in DATASETS for e in METHODS]
    return [json.loads(p.read_text(encoding="utf-8")) for p in paths if p.exists()]


def truth_of(record: Cell) -> Truth:
    """Overall by fact and layer, from a cell's record."""
    values = np.array([[np.nan if v is None else v for v in row] for row in record["overall"]])
    return Truth(tuple(record["facts"]), tuple(range(values.shape[1])), {"overall": values})


def choices(cell: Cell) -> dict[str, dict[str, Any]]:
    """The cell's choices by name."""
    return {one["name"]: one for one in cell["compare"]["choices"]}


def agreement(cell: Cell, repeats: int = 200) -> tuple[float, float]:
    """How well the test facts know the layers' order, and what a perfect choice could reach.

    The first is the rank correlation of the layers' means over random halves of the test facts.
    The second is the square root of that, stepped up to all facts by Spearman and Brown's formula
    2r/(1+r): about the rank correlation to be expected of the true order with the measured one.
    """
    table = truth_of(cell).table()
    generator = np.random.default_rng(0)
    found = []
    for _ in range(repeats):
        order = generator.permutation(len(table))
        one, other = (table[part].mean(0) for part in np.array_split(order, 2))
        found.append(spearman(one.tolist(), other.tolist()))
    half = mean_of(found)
    return half, math.sqrt(max(0.0, 2 * half / (1 + half)))


def by_chance(cell: Cell, repeats: int = 2000) -> float:
    """The regret that the best layer itself would show, on other test facts of the same number.

    Bootstrap over the test facts, their means taken for the truth.
    """
    truth = truth_of(cell)
    drawn = resampled_means(truth.table(), repeats, 0)  # (S, L)
    best = truth.layers.index(truth.golden_layer())
    return float((drawn.max(axis=1) - drawn[:, best]).mean())


def number(value: float | None, digits: int = 1) -> str:
    return "–" if value is None or value != value else f"{value:.{digits}f}"


def mean_of(values: Iterable[float | None]) -> float:
    known = [v for v in values if v is not None and v == v]
    return statistics.fmean(known) if known else float("nan")


def by_size(cells: Sequence[Cell]) -> dict[str, dict[int, list[tuple[float, float]]]]:
    """Rule → number of facts → (regret, agreement) of each cell that has that many."""
    wanted = (
        LGA,
        NOT_LAST,
        "lga mlp answer tukey",
        KTA,
        "transfer align",
        "lga+transfer mlp sequence",
        "saliency mlp sequence",
    )
    found: dict[str, dict[int, list[tuple[float, float]]]] = {}
    for name in wanted:
        for c in cells:
            for curve in c["compare"]["proxy_sizes"]:
                if curve["name"] == name:
                    for point in curve["points"]:
                        where = found.setdefault(name, {}).setdefault(point["n"], [])
                        where.append((point["regret"], point["agreement"]))
    return found
