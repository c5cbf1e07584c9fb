"""The study's cells as the page and the figures read them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from study import DATASETS, METHODS, MODELS, path_of

from goldenlayers.truth import Truth

Cell = dict[str, Any]
RANK_ONE = ("rome", "r-rome", "emmet")
# Choices by their name in compare.json, and what the page calls them.
LGA, KTA = "lga mlp sequence tukey", "transfer"
NOT_LAST = "lga mlp sequence raw, not the last"
NAMES = {
    LGA: "LGA (the paper's: MLP, whole text, fences)",
    "lga mlp sequence raw": "LGA without fences",
    NOT_LAST: "LGA without fences, the last block left out (post hoc)",
    "lga mlp sequence cosine": "LGA, mean cosine",
    "lga mlp sequence normalised": "LGA over the gradients' norms",
    "lga mlp answer tukey": "LGA, answer loss",
    "lga mlp answer raw": "LGA, answer loss, without fences",
    "lga down sequence tukey": "LGA, down projection only",
    "lga attention sequence tukey": "LGA, attention",
    "lga block sequence tukey": "LGA, whole block",
    KTA: "KTA",
    "transfer reach": "KTA with reach",
    "lga+transfer mlp sequence": "LGA and KTA, mean of ranks",
    "cma": "CMA",
    "saliency mlp sequence": "saliency",
    "published": "published depth (1/6)",
    "middle": "middle layer",
    "random layer": "a random layer (expected)",
    f"{LGA} verified": "LGA, five best verified",
    f"{KTA} verified": "KTA, five best verified",
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


def load() -> list[Cell]:
    """The cells that are there, in a fixed order."""
    paths = [path_of(m, d, e) for m in MODELS for d in DATASETS for e in METHODS]
    return [json.loads(p.read_text(encoding="utf-8")) for p in paths if p.exists()]


def truth_of(cell: Cell) -> Truth:
    """Overall by fact and layer."""
    values = np.array([[np.nan if v is None else v for v in row] for row in cell["overall"]])
    return Truth(tuple(cell["facts"]), tuple(range(values.shape[1])), {"overall": values})


def choices(cell: Cell) -> dict[str, dict[str, Any]]:
    """The cell's choices by name, with one that was thought of after the study's first cells."""
    found = {one["name"]: one for one in cell["compare"]["choices"]}
    lga = found["lga mlp sequence raw"]
    scores, means = cell["layer_scores"]["lga"], cell["by_metric"]["overall"]
    order = sorted(range(len(scores) - 1), key=lambda layer: -scores[layer])
    golden = cell["golden_layers"]["overall"]
    found[NOT_LAST] = lga | {
        "name": NOT_LAST,
        "layer": order[0],
        "regret": means[golden] - means[order[0]],
        "hit_at": {k: float(golden in order[: int(k)]) for k in "135"},
    }
    return found


def number(value: float | None, digits: int = 1) -> str:
    return "–" if value is None or value != value else f"{value:.{digits}f}"


def mean_of(values: Iterable[float | None]) -> float:
    known = [v for v in values if v is not None and v == v]
    return statistics.fmean(known) if known else float("nan")


def by_size(cells: Sequence[Cell]) -> dict[str, dict[int, list[tuple[float, float]]]]:
    """Rule → number of facts → (regret, agreement) of each cell that has that many."""
    wanted = (
        LGA,
        "lga mlp answer tukey",
        "lga mlp sequence cosine",
        KTA,
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
