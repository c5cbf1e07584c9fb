"""Which mean of a fact's keys edits better: the bare prompt one half, or every prompt alike?

    python tools/results/key_mean.py --model smollm2-135m --layer 3
    python tools/results/render.py

The same facts are edited both ways, each on the untouched model and all together; the values that
are written are the same, so only the key differs. The facts are none of those of the other result
pages. Kept in docs/results/cells/keys, with the scores of every fact.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from cells import CELLS, DATA, ROOT, Bench
from earlier_record import STUDY

from goldenlayers.datasets import load_facts
from goldenlayers.evaluation import evaluate
from goldenlayers.evaluation.summary import fact_scores
from goldenlayers.facts import Fact

METRICS = ("rewrite", "rephrase", "locality")
EDITORS = (
    ("memit", "single"),
    ("emmet", "single"),
    ("alphaedit", "single"),
    ("memit", "batch"),
    ("emmet", "batch"),
    ("alphaedit", "batch"),
)


def alike(n_prompts: int) -> torch.Tensor:
    """Every prompt's key weighs the same, (P,)."""
    return torch.full((n_prompts,), 1 / n_prompts, dtype=torch.float64)


def unused(bench: Bench, data: str, count: int) -> list[Fact]:
    """Facts that no other page's tables are made of, of subjects of their own."""
    shown = bench.facts(data, 100 if data == "starter" else 20)
    kept = {f.subject for f in shown[: 100 if data == "starter" else 20]}
    study = STUDY / f"{bench.model.name}-{data}-rome.json"
    tested = set(json.loads(study.read_text(encoding="utf-8"))["facts"])
    if data == "starter":
        pool = bench._facts[data][: bench.n_known[data]]
    else:
        pool = list(load_facts(str(bench.shared / DATA[data]), seed=1, skip_invalid=True))
    found: list[Fact] = []
    for fact in reversed(pool):
        if fact.subject not in kept and fact.id not in tested:
            kept.add(fact.subject)
            found.append(fact)
    return found[:count]


def scores(bench: Bench, facts: list[Fact], method: str, mode: str, layer: int) -> dict[str, Any]:
    """Every fact's score by metric."""
    found = evaluate(
        bench.model,
        facts,
        method,
        layer=layer,
        mode=mode,  # type: ignore[arg-type]
        metrics=METRICS,
        statistics=bench.statistics(layer, "wikipedia"),
        value_cache=bench.value_cache,
    )
    return {m: fact_scores(found.rows, m) for m in METRICS}


def compared(half: dict[str, float], same: dict[str, float]) -> dict[str, float]:
    """Means of both ways, and the mean difference by fact with its standard error."""
    gaps = [half[f] - same[f] for f in half]
    return {
        "half": statistics.fmean(half.values()),
        "alike": statistics.fmean(same.values()),
        "difference": statistics.fmean(gaps),
        "se": statistics.stdev(gaps) / math.sqrt(len(gaps)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Compute the comparisons that are missing.")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--layer", type=int, required=True)
    parser.add_argument("--data", nargs="+", default=["starter", "counterfact_500"])
    parser.add_argument("--facts", type=int, default=30)
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared" / "data")
    args = parser.parse_args()
    bench = Bench(args.model, args.shared)
    for data in args.data:
        facts: list[Fact] = []
        for method, mode in EDITORS:
            path = CELLS / "keys" / f"{args.model}-{data}-{method}-{mode}.json"
            if path.exists():
                continue
            facts = facts or unused(bench, data, args.facts)
            start = time.perf_counter()
            half = scores(bench, facts, method, mode, args.layer)
            with patch("goldenlayers.editors.locate_then_edit.key_weights", alike):
                same = scores(bench, facts, method, mode, args.layer)
            record = {
                "model": args.model,
                "data": data,
                "method": method,
                "mode": mode,
                "layer": args.layer,
                "facts": [f.id for f in facts],
                "seconds": round(time.perf_counter() - start, 1),
                "metrics": {m: compared(half[m], same[m]) for m in METRICS},
                "half": half,
                "alike": same,
            }
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            print(path.name, record["seconds"], record["metrics"], flush=True)


if __name__ == "__main__":
    main()
