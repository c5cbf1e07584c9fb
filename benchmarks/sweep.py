"""Our sweep side by side with the one-at-a-time loop, in one run: time, and the same rows.

    python benchmarks/sweep.py --facts 8 --layers 3 --out sweep.json

All have the same key statistics, edit at the same layers and score the same probes:

ours   ``sweep`` in one process: all facts of a layer edited side by side from kept states, every
       probe of all facts scored in shared passes, the untouched model read once. The values are
       searched as in the loop, so the rows are the loop's.
short  the same with the default search of values, which stops when it has settled: other edits,
       whose scores stand beside the loop's.
loop   what the usual tools do, cell by cell: one fact edited through the whole model (its prompts
       in one batch, from the embedding on and with all logits at every step), the weights changed
       in place, each probe read by itself before the edit and after it, the weights restored.

The loop is slow, so it runs on the first ``--loop-facts`` facts; times are per (layer, fact).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from goldenlayers.datasets import load_facts
from goldenlayers.editors import Editing, Rome
from goldenlayers.editors.updates import rome_update
from goldenlayers.editors.values import fact_prompts
from goldenlayers.evaluation.metrics import Question, questions
from goldenlayers.evaluation.scoring import ANSWER, STAY, STAY_NEIGHBOUR, STAY_SUBJECT
from goldenlayers.facts import Fact
from goldenlayers.models import Model, load
from goldenlayers.statistics import key_statistics
from goldenlayers.statistics.moments import Covariance
from goldenlayers.sweeping import sweep
from goldenlayers.tokens import Encoding, pad_ids

STAYING = (STAY, STAY_NEIGHBOUR, STAY_SUBJECT)
Row = dict[str, Any]
Statistics = Mapping[int, Covariance]


def ours(
    model: Model,
    facts: Sequence[Fact],
    layers: Sequence[int],
    rome: Rome,
    statistics: Statistics,
) -> list[Row]:
    found = sweep(model, facts, rome, layers=layers, statistics=statistics)
    return list(found.rows)


def loop(
    model: Model,
    facts: Sequence[Fact],
    layers: Sequence[int],
    rome: Rome,
    statistics: Statistics,
) -> list[Row]:
    """ROME (arXiv 2202.05262) cell by cell."""
    prefixes = Editing(model, rome, 0).prefixes
    rows: list[Row] = []
    for layer in layers:
        down = model.layers[layer].down
        for fact in facts:
            mine = questions([fact])
            before = {
                i: answers(model, question) for i, question in enumerate(mine) if asked(question)
            }
            change = rome_alone(model, fact, layer, prefixes, rome, statistics[layer])
            kept = down.weight.detach().clone()
            try:
                with torch.no_grad():
                    down.weight.add_(down.oriented(change).to(down.weight.dtype))
                for i, question in enumerate(mine):
                    rows.append(row_of(model, fact, layer, question, before.get(i)))
            finally:
                with torch.no_grad():
                    down.weight.copy_(kept)
    return rows


def rome_alone(
    model: Model,
    fact: Fact,
    layer: int,
    prefixes: Sequence[str],
    s: Rome,
    covariance: Covariance,
) -> torch.Tensor:
    """The change of the down projection, (out, in): one fact, whole forwards."""
    texts = fact_prompts(model, fact, prefixes, fact.target)
    n = len(texts)
    texts.append(model.encoder.encode(f"{fact.subject} is a", "", fact.subject))
    batch = OneFact(model, layer, texts)
    with torch.no_grad():
        clean_logits = batch.logits(None)
    keys, values = batch.keys[:n], batch.values[:n]
    clean = values[0]
    norm = clean.norm()
    rate = s.lr if s.lr_absolute else s.lr * float(norm) / len(clean) ** 0.5
    clean_kl = clean_logits[n, texts[n].lookup].log_softmax(-1)
    delta = torch.zeros_like(clean)
    first, second = torch.zeros_like(delta), torch.zeros_like(delta)
    for step in range(s.steps):
        delta.requires_grad_(True)
        with torch.enable_grad():
            logits = batch.logits(delta)
            nll = [
                torch.nn.functional.cross_entropy(
                    logits[b, text.n_prompt - 1 : len(text) - 1],
                    torch.tensor(text.ids[text.n_prompt :]),
                )
                for b, text in enumerate(texts[:n])
            ]
            loss = torch.stack(nll).mean() + s.weight_decay * delta.norm() / norm**2
            if s.kl_factor > 0:
                now = logits[n, texts[n].lookup].log_softmax(-1)
                loss = loss + s.kl_factor * (now.exp() * (now - clean_kl)).sum()
        if float(loss.detach()) < s.stop_loss or step == s.steps - 1:
            break
        (g,) = torch.autograd.grad(loss, delta)
        with torch.no_grad():
            first.lerp_(g, 0.1)
            second.lerp_(g * g, 0.001)
            mean, square = first / (1 - 0.9 ** (step + 1)), second / (1 - 0.999 ** (step + 1))
            delta = delta - rate * mean / (square.sqrt() + 1e-8)
            delta = delta * (s.clamp * norm / delta.norm().clamp_min(1e-30)).clamp_max(1.0)
    update = rome_update(covariance, keys.mean(0), keys[0], clean + delta.detach(), clean)
    return update.left.float() @ update.right.float().T


class OneFact:
    """One fact's texts as one padded batch through the whole model."""

    def __init__(self, model: Model, layer: int, texts: Sequence[Encoding]) -> None:
        self.model, self.module = model, model.layers[layer].down.module
        batch = pad_ids([text.ids for text in texts], model.device)
        self.ids, self.mask = batch.ids, batch.mask
        self.rows = torch.arange(len(texts))
        self.lookup = torch.tensor([text.lookup for text in texts])
        self.keys = self.values = torch.empty(0)

    def logits(self, delta: torch.Tensor | None) -> torch.Tensor:
        """(B, T, V), δ added to the down projection's output at the lookup tokens."""

        def hook(_module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor | None:
            if delta is None:
                self.keys = inputs[0][self.rows, self.lookup].clone()
                self.values = output[self.rows, self.lookup].clone()
                return None
            return output.index_put((self.rows, self.lookup), delta, accumulate=True)

        handle = self.module.register_forward_hook(hook)
        try:
            return self.model.hf(
                input_ids=self.ids, attention_mask=self.mask, use_cache=False
            ).logits
        finally:
            handle.remove()


def asked(question: Question) -> bool:
    return question.reason is None and question.scoring in (ANSWER, *STAYING)


@torch.no_grad()
def answers(model: Model, question: Question) -> tuple[list[int], list[int]]:
    """Arg-max tokens at the answer's positions (the next token where there is none), and answer."""
    text = model.encoder.encode(question.prompt, question.answer or "")
    logits = model.hf(input_ids=torch.tensor([text.ids]), use_cache=False).logits[0]
    start = text.n_prompt - 1
    said = logits[start : -1 if question.answer else None].argmax(-1).tolist()
    return said, list(text.ids[text.n_prompt :])


def row_of(model: Model, fact: Fact, layer: int, question: Question, before: Any) -> Row:
    row: Row = {"fact": fact.id, "layer": layer, "metric": question.metric, "probe": question.probe}
    if before is None:
        return row | {"score": None}
    said, answer = answers(model, question)
    wanted = answer if question.scoring == ANSWER else before[0]
    hits = [a == b for a, b in zip(said, wanted, strict=True)]
    return row | {"score": round(100 * sum(hits) / len(hits), 6)}


def agreement(mine: Sequence[Row], theirs: Sequence[Row]) -> dict[str, Any]:
    """Over the rows of the loop: how many ours has too, with the same score."""

    def table(rows: Sequence[Row]) -> dict[tuple[Any, ...], float | None]:
        return {(r["fact"], r["layer"], r["metric"], r["probe"]): r["score"] for r in rows}

    a, b = table(mine), table(theirs)
    differ = [key for key in b if key not in a or a[key] != b[key]]
    gaps = [abs((a.get(key) or 0) - (b[key] or 0)) for key in differ]
    return {
        "rows": len(b),
        "missing": sum(key not in a for key in b),
        "same": len(b) - len(differ),
        "largest_difference": max(gaps, default=0.0),
        "mean_difference": sum(gaps) / len(b),
    }


def means(rows: Sequence[Row], facts: Sequence[Fact]) -> dict[str, float]:
    """Mean score of each metric over some facts and all layers, in percent."""
    ids = {fact.id for fact in facts}
    found: dict[str, list[float]] = {}
    for row in rows:
        if row["fact"] in ids and row["score"] is not None:
            found.setdefault(row["metric"], []).append(row["score"])
    return {metric: round(sum(some) / len(some), 1) for metric, some in found.items()}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--facts", type=int, default=8, help="starter facts that ours sweeps over")
    parser.add_argument("--loop-facts", type=int, default=2, help="of these, how many for the loop")
    parser.add_argument("--layers", type=int, default=3, help="how many, evenly spread")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's own)")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    for name in ("facts", "loop_facts", "layers", "steps"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be 1 or more")
    return options


def main() -> None:
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    facts = list(load_facts("starter", limit=options.facts))
    model = load(options.model, device="cpu")
    n = len(model.layers)
    layers = sorted({(2 * i + 1) * n // (2 * options.layers) for i in range(options.layers)})
    rome, short = Rome(adam=True, steps=options.steps), Rome()
    statistics = key_statistics(model, layers)
    for layer in layers:  # both need it, once
        _ = statistics[layer].cholesky
    few = facts[: options.loop_facts]
    for run in (ours, loop):  # first calls pay for allocation and kernel choice
        run(model, facts[:1], layers[:1], Rome(adam=True, steps=2), statistics)
    load_before = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    times, rows = {}, {}
    for name, run, mine, editor in (
        ("loop", loop, few, rome),
        ("ours", ours, facts, rome),
        ("short", ours, facts, short),
    ):
        start = time.perf_counter()
        rows[name] = run(model, mine, layers, editor, statistics)
        seconds = time.perf_counter() - start
        cells = len(layers) * len(mine)
        times[name] = {"cells": cells, "seconds": seconds, "seconds_per_cell": seconds / cells}
        print(f"  {name}: {seconds:.1f} s for {cells} cells", file=sys.stderr)
    spent = {name: one["seconds_per_cell"] for name, one in times.items()}
    ratios = {f"loop_over_{name}": spent["loop"] / spent[name] for name in ("ours", "short")}
    result = {
        "benchmark": "sweep",
        "model": model.name,
        "method": "rome",
        "layers": layers,
        "facts": len(facts),
        "loop_facts": len(few),
        "steps": rome.steps,
        "prefixes": rome.prefixes,
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "load_average_before": load_before,
        "times": times,
        "ratios": ratios,
        "means": {name: means(some, few) for name, some in rows.items()},
        "agreement": agreement(rows["ours"], rows["loop"]),
    }
    for name, one in times.items():
        print(f"{name:5} {one['seconds_per_cell']:8.2f} s per (layer, fact)")
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.1f} (wanted 10)")
    print(f"agreement of ours: {result['agreement']}")
    for name, some in result["means"].items():
        print(f"{name:5} {some}")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
