"""Facts per second in single mode: batched, against the one-by-one loop, in one run.

The loop does what editing tools do: run each probe of a fact alone with full logits, add the fact's
delta to the weights, run each probe again, put the weights back. Both give the same rows: every
score, and what was predicted before and after.

    python benchmarks/evaluate.py --model smollm2-135m --data starter --facts 20 --out bench.json
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from goldenlayers.datasets import load_facts
from goldenlayers.delta import LowRank, WeightDelta
from goldenlayers.evaluation.plan import EvaluationPlan
from goldenlayers.facts import Fact
from goldenlayers.models import Model, load


def random_deltas(model: Model, count: int, layer: int, seed: int = 0) -> list[WeightDelta]:
    """Rank-one changes, a tenth as long as the matrix."""
    generator = torch.Generator().manual_seed(seed)
    down = model.layers[layer].down
    deltas = []
    for _ in range(count):
        change = LowRank(
            torch.randn(down.out_features, 1, generator=generator),
            torch.randn(down.in_features, 1, generator=generator),
        )
        change = change.scaled(0.1 * float(down.weight.float().norm()) / change.norm())
        deltas.append(WeightDelta({down.parameter_name: change}))
    return deltas


def predictions(model: Model, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """Arg-max tokens along the answer and the answer's tokens, by whole logits of one text."""
    encoding = model.encoder.encode(prompt, answer)
    ids = torch.tensor([encoding.ids], device=model.device)
    logits = model.hf(input_ids=ids, use_cache=False).logits[0]
    return logits[encoding.n_prompt - 1 : -1].argmax(-1).tolist(), list(encoding.answer_ids)


def share(left: Sequence[int], right: Sequence[int]) -> float:
    return 100 * sum(a == b for a, b in zip(left, right, strict=True)) / len(right)


@torch.no_grad()
def one_by_one(
    model: Model, facts: Sequence[Fact], deltas: Sequence[WeightDelta]
) -> list[tuple[str, str, float]]:
    """(fact, metric, score) of every probe, one forward pass each."""
    rows = []
    for fact, delta in zip(facts, deltas, strict=True):
        asked = [("rewrite", fact.prompt, fact.target)]
        asked += [("rephrase", prompt, fact.target) for prompt in fact.rephrasings]
        asked += [("locality", p.prompt, p.answer) for p in fact.locality if p.answer]
        asked += [("portability", p.prompt, p.answer) for p in fact.portability if p.answer]
        before = [predictions(model, prompt, answer)[0] for _, prompt, answer in asked]
        ((name, change),) = delta.changes.items()
        weight = model.hf.get_parameter(name)
        kept = weight.data.clone()
        dense = change.dense
        weight.data += dense if dense.shape == weight.shape else dense.T
        for (metric, prompt, answer), old in zip(asked, before, strict=True):
            new, wanted = predictions(model, prompt, answer)
            rows.append((fact.id, metric, share(new, old if metric == "locality" else wanted)))
        weight.data = kept
    return rows


def alike(fast: Sequence[dict[str, Any]], slow: Sequence[tuple[str, str, float]]) -> float:
    """The share of equal scores; the sorts of locality by themselves are not compared."""
    metrics = {metric for _, metric, _ in slow}
    scored = sorted(
        (row["fact"], row["metric"], round(row["score"], 4))
        for row in fast
        if row["score"] is not None and row["metric"] in metrics
    )
    same = sorted((fact, metric, round(score, 4)) for fact, metric, score in slow)
    return sum(a == b for a, b in zip(same, scored, strict=True)) / len(same)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", default="starter")
    parser.add_argument("--facts", type=int, default=20)
    parser.add_argument("--layer", type=int, default=None, help="default: half depth")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    model = load(options.model, device=options.device)
    facts = list(load_facts(options.data, limit=options.facts))
    layer = len(model.layers) // 2 if options.layer is None else options.layer
    deltas = random_deltas(model, len(facts), layer)
    one_by_one(model, facts[:1], deltas[:1])
    EvaluationPlan(model, facts[:1]).score(deltas[:1])

    def sync() -> float:
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    times: dict[str, list[float]] = {"one_by_one": [], "first_layer": [], "next_layer": []}
    slow: list[tuple[str, str, float]] = []
    fast: list[dict[str, Any]] = []
    for _ in range(options.rounds):
        start = sync()
        slow = one_by_one(model, facts, deltas)
        times["one_by_one"].append(sync() - start)
        start = sync()
        plan = EvaluationPlan(model, facts)
        fast = plan.score(deltas)
        times["first_layer"].append(sync() - start)
        start = sync()
        plan.score(deltas)
        times["next_layer"].append(sync() - start)
    best = {name: min(values) for name, values in times.items()}
    result = {
        "model": model.name,
        "data": options.data,
        "facts": len(facts),
        "probes": len(slow),
        "layer": layer,
        "device": str(model.device),
        "threads": torch.get_num_threads(),
        "seconds": {name: round(value, 3) for name, value in best.items()},
        "facts_per_second": {n: round(len(facts) / value, 3) for n, value in best.items()},
        # The first scoring reads the untouched model too; a sweep does that once for all layers.
        "ratio_first": round(best["one_by_one"] / best["first_layer"], 2),
        "ratio_next": round(best["one_by_one"] / best["next_layer"], 2),
        "same_scores": alike(fast, slow),
    }
    print(json.dumps(result, indent=1))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
