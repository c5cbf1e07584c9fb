"""How far the study's figures move with the loss as published: some layers of some cells again.

    python tools/results/moved.py --model gemma3-270m --data starter
    python tools/results/golden_layers.py

The study's rank-one cells were computed with the KL term the other way round, and EMMET's keys as a
plain mean over prompts. Their test facts are edited again at a few layers, by ROME, R-ROME and
EMMET, and compared by fact and layer with what the cell says. Kept in study/moved.json.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from cells import DATA, ROOT, quick
from render import earlier
from study import STUDY, path_of, truth_of
from study_choices import write
from study_record import RANK_ONE

import goldenlayers.models as models
from goldenlayers.datasets import load_facts
from goldenlayers.statistics import key_statistics
from goldenlayers.sweeping import sweep
from goldenlayers.truth import Truth

PATH = STUDY / "moved.json"


def compared(record: dict[str, Any], fresh: Truth, layers: list[int]) -> dict[str, Any]:
    """Differences of Overall by fact and layer, and how the layers are ranked before and after."""
    old = truth_of(record).table()[:, layers]  # (B, L)
    new = fresh.table()
    by_fact = np.nanmean(new - old, axis=1)
    return {
        "layers": layers,
        "facts": len(by_fact),
        "difference": float(np.mean(by_fact)),
        "se": statistics.stdev(by_fact.tolist()) / math.sqrt(len(by_fact)),
        "absolute": float(np.nanmean(np.abs(new - old))),
        "largest_of_a_layer": float(np.abs(np.nanmean(new - old, axis=0)).max()),
        "before": [round(float(x), 2) for x in np.nanmean(old, axis=0)],
        "after": [round(float(x), 2) for x in np.nanmean(new, axis=0)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Compute the comparisons that are missing.")
    parser.add_argument("--model", default="gemma3-270m")
    parser.add_argument("--data", nargs="+", default=["starter"])
    parser.add_argument("--layers", type=int, default=6, help="how many, evenly spread")
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared" / "data")
    args = parser.parse_args()
    model = models.load(args.model)
    corpus = args.shared / "corpora" / "wikipedia_en_2014_train.jsonl"
    last = len(model.layers) - 1
    layers = sorted({round(x) for x in np.linspace(0, 0.9 * last, args.layers)})
    text = key_statistics(model, layers, text=str(corpus))
    for data in args.data:
        source = DATA[data] if data == "starter" else str(args.shared / DATA[data])
        every = {f.id: f for f in load_facts(source, limit=600, seed=0, skip_invalid=True)}
        values: dict[Any, Any] = {}
        for method in RANK_ONE:
            found = json.loads(PATH.read_text(encoding="utf-8")) if PATH.exists() else {}
            name = f"{args.model} {data} {method}"
            record = json.loads(path_of(args.model, data, method).read_text(encoding="utf-8"))
            if name in found or not earlier(record):
                continue
            swept = sweep(
                model,
                [every[i] for i in record["facts"]],
                quick(method),
                layers=layers,
                statistics=text,
                value_cache=values,
            )
            found[name] = compared(record, Truth.from_rows(swept.rows), layers)
            print(name, round(swept.seconds, 1), found[name], flush=True)
            write(PATH, found)


if __name__ == "__main__":
    main()
