"""LGA side by side with what it replaces, in one run: time, agreement, peak memory.

    python benchmarks/lga.py --facts 64 --repeats 3 --out lga.json

Variants, each on the same facts (old and new text of each):

ours          ``lga_rows``: one forward, one backward to the activations, Gram products.
materialised  the obvious version: one fact at a time, weight gradients of both texts, dot products.
              Slow, so it runs on the first ``--materialised-facts`` facts of those that ours runs
              on, and is compared per fact.
floor_plain   ours' batches through the model's own forward and loss, backward to the activations.
floor_lean    the same with this package's loss (logits in chunks, each distinct row once), without
              hooks on the matrices: what ours would cost if factors and products were free.

Times are medians over repeats; the order of the variants rotates from one repeat to the next.
Memory is measured per variant in a process of its own: the most resident memory while it works on
its largest batch, above that of the loaded and once used model, as a share of the weights.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from goldenlayers.datasets import load_facts
from goldenlayers.facts import Fact
from goldenlayers.hooks import final_hidden, graph_from_embedding, token_nll
from goldenlayers.locating.lga import lga_rows, tokens_at_once
from goldenlayers.models import Model, load
from goldenlayers.tokens import Encoding, length_batches, pad_ids

VARIANTS = ("ours", "materialised", "floor_plain", "floor_lean")
Phi = dict[str, list[float]]  # fact id → one number per layer


def pairs_of(model: Model, facts: Sequence[Fact]) -> list[tuple[Encoding, Encoding]]:
    """Old and new text of every fact."""
    return [
        (model.encoder.fact(f, f.target_old or ""), model.encoder.fact(f, f.target)) for f in facts
    ]


def batches_of(model: Model, facts: Sequence[Fact], batch_size: int) -> list[list[Encoding]]:
    """The batches that ``lga_rows`` makes: similar lengths, old and new text side by side."""
    pairs = pairs_of(model, facts)
    lengths = [max(len(old), len(new)) for old, new in pairs]
    return [
        [text for i in members for text in pairs[i]]
        for members in length_batches(lengths, batch_size, tokens_at_once(model) // 2)
    ]


def ours(model: Model, facts: Sequence[Fact], batch_size: int) -> Phi:
    return {
        row["fact"]: row["phi"]
        for rows in lga_rows(model, facts, batch_size=batch_size)
        for row in rows
    }


def materialised(model: Model, facts: Sequence[Fact], batch_size: int) -> Phi:
    """Weight gradients in full, one text after the other; the batch size plays no part."""
    weights = [[m.weight for m in block.mlp_matrices] for block in model.layers.blocks]
    flat = [weight for layer in weights for weight in layer]
    for weight in flat:
        weight.requires_grad_(True)
    result: Phi = {}
    try:
        for fact, pair in zip(facts, pairs_of(model, facts), strict=True):
            gradients: list[list[Tensor]] = []
            for text in pair:
                ids = torch.tensor([text.ids], device=model.device)
                loss = model.hf(input_ids=ids, labels=ids, use_cache=False).loss
                gradients.append(list(torch.autograd.grad(loss, flat)))
            products = iter(float((old * new).sum()) for old, new in zip(*gradients, strict=True))
            result[fact.id] = [sum(next(products) for _ in layer) for layer in weights]
    finally:
        for weight in flat:
            weight.requires_grad_(False)
    return result


def floor_plain(model: Model, facts: Sequence[Fact], batch_size: int) -> Phi:
    for texts in batches_of(model, facts, batch_size):
        batch = pad_ids([t.ids for t in texts], model.device)
        labels = batch.ids.masked_fill(~batch.mask, -100)
        with torch.enable_grad(), graph_from_embedding(model):
            model.hf(input_ids=batch.ids, labels=labels, use_cache=False).loss.backward()
    return {}


def floor_lean(model: Model, facts: Sequence[Fact], batch_size: int) -> Phi:
    for texts in batches_of(model, facts, batch_size):
        batch = pad_ids([t.ids for t in texts], model.device)
        cells = [(b, t) for b, text in enumerate(texts) for t in range(len(text) - 1)]
        seen: dict[tuple[int, ...], int] = {}
        # Texts of one fact share the rows up to where they part.
        twins = [
            seen.setdefault((b // 2, *texts[b].ids[: t + 2]), i) for i, (b, t) in enumerate(cells)
        ]
        rows, columns = (torch.tensor(part) for part in zip(*cells, strict=True))
        counts = torch.tensor([len(text) - 1 for text in texts])
        with torch.enable_grad(), graph_from_embedding(model):
            hidden = final_hidden(model, batch.ids)
            nll = token_nll(
                model.layers,
                hidden[rows, columns],
                batch.ids[rows, columns + 1],
                torch.tensor(twins),
            )
            (nll / counts[rows]).sum().backward()
    return {}


RUN: dict[str, Callable[[Model, Sequence[Fact], int], Phi]] = {
    "ours": ours,
    "materialised": materialised,
    "floor_plain": floor_plain,
    "floor_lean": floor_lean,
}


def measure_times(
    model: Model, facts: Sequence[Fact], few: int, batch_size: int, repeats: int
) -> tuple[dict[str, Any], dict[str, Phi]]:
    """Seconds of every variant and repeat, and what the variants computed."""
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    cpu: dict[str, list[float]] = {name: [] for name in VARIANTS}
    results: dict[str, Phi] = {}
    used = {name: facts[:few] if name == "materialised" else facts for name in VARIANTS}
    for name in VARIANTS:  # first calls pay for allocation and kernel choice
        RUN[name](model, facts[:2], batch_size)
    for repeat in range(repeats):
        shift = repeat % len(VARIANTS)
        for name in VARIANTS[shift:] + VARIANTS[:shift]:
            gc.collect()
            start, start_cpu = time.perf_counter(), time.process_time()
            results[name] = RUN[name](model, used[name], batch_size)
            cpu[name].append(time.process_time() - start_cpu)
            seconds[name].append(time.perf_counter() - start)
            print(f"  {repeat + 1}/{repeats} {name}: {seconds[name][-1]:.2f} s", file=sys.stderr)
    rows = {
        name: {
            "facts": len(used[name]),
            "seconds": median(times),
            "seconds_per_fact": median(times) / len(used[name]),
            "cpu_seconds_per_fact": median(cpu[name]) / len(used[name]),
            "all_seconds": times,
        }
        for name, times in seconds.items()
    }
    return rows, results


def median(values: Sequence[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).quantile(0.5))


def agreement(mine: Phi, theirs: Phi) -> dict[str, float]:
    """How far the two computations differ over the facts and layers that both have."""
    a = torch.tensor([mine[fact] for fact in theirs], dtype=torch.float64)  # (B, L)
    b = torch.tensor(list(theirs.values()), dtype=torch.float64)
    difference = (a - b).abs()
    return {
        "facts": len(theirs),
        "max_relative_error": float((difference / b.abs()).max()),
        "max_error_over_largest_layer": float((difference / b.abs().amax(1, keepdim=True)).max()),
    }


def ratios(times: dict[str, Any], unit: str) -> dict[str, float]:
    """The figures that are asked for; processor seconds hardly feel other work on the machine."""
    per_fact = {name: row[unit] for name, row in times.items()}
    return {
        "materialised_over_ours": per_fact["materialised"] / per_fact["ours"],
        "ours_over_floor_plain": per_fact["ours"] / per_fact["floor_plain"],
        "ours_over_floor_lean": per_fact["ours"] / per_fact["floor_lean"],
    }


def weight_bytes(model: Model) -> int:
    return sum(p.numel() * p.element_size() for p in model.hf.parameters())


class PeakRSS:
    """Most resident memory of the process within the block, in bytes, sampled every millisecond."""

    def __enter__(self) -> PeakRSS:
        import psutil

        self._process = psutil.Process()
        self._stop = threading.Event()
        self.peak = self._process.memory_info().rss
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.001):
            self.peak = max(self.peak, self._process.memory_info().rss)

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def measure_memory_here(
    model: Model, facts: Sequence[Fact], variant: str, n: int
) -> dict[str, Any]:
    """Peak above the loaded model of ``variant`` on one batch of ``n`` facts, the longest ones."""
    import psutil

    pairs = pairs_of(model, facts)
    lengths = [max(len(old), len(new)) for old, new in pairs]
    batches = length_batches(lengths, n, tokens_at_once(model) // 2)
    longest = [facts[i] for i in next(batches)]
    n = len(longest)
    tokens = sum(len(text) for text in batches_of(model, longest, n)[0])
    # Touch every weight (they may be mapped from disk) and start the thread pools.
    RUN["floor_plain"](model, longest[:1], 1)
    for parameter in model.hf.parameters():
        parameter.sum()
    gc.collect()
    trim()
    base = psutil.Process().memory_info().rss
    with PeakRSS() as rss:
        RUN[variant](model, longest, n)
    share = (rss.peak - base) / weight_bytes(model)
    return {"facts": n, "tokens": tokens, "bytes": rss.peak - base, "share_of_weights": share}


def trim() -> None:
    """Give freed memory back to the system, where the C library can."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):
        return


def measure_memory(options: argparse.Namespace) -> dict[str, Any]:
    """Each variant in a fresh process; ``half`` has as many sequences as the batch has facts."""
    result: dict[str, Any] = {}
    for name in VARIANTS:
        sizes = {"batch": options.batch_size, "half": max(1, options.batch_size // 2)}
        sizes = {"one": 1} if name == "materialised" else sizes
        result[name] = {}
        for label, n in sizes.items():
            command = [sys.executable, "-P", __file__, "--memory-of", name, "--batch-size", str(n)]
            command += ["--model", options.model, "--facts", str(options.facts)]
            command += ["--threads", str(options.threads)] if options.threads else []
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            result[name][label] = json.loads(done.stdout)
    return result


def report(result: dict[str, Any]) -> None:
    times = result["times"]
    print(f"{'variant':14}{'ms per fact':>12}{'cpu ms':>9}  peak memory (share of weights)")
    for name in VARIANTS:
        memory = result["memory"].get(name, {})
        shares = ", ".join(
            f"{m['share_of_weights']:.0%} ({m['facts']} facts)" for m in memory.values()
        )
        wall, cpu = (1000 * times[name][f"{kind}seconds_per_fact"] for kind in ("", "cpu_"))
        print(f"{name:14}{wall:12.1f}{cpu:9.1f}  {shares}")
    for kind, found in (("wall clock", result["ratios"]), ("processor", result["cpu_ratios"])):
        print(
            f"{kind}: ours is {found['materialised_over_ours']:.2f}x faster than materialised "
            f"(wanted 6), {found['ours_over_floor_plain']:.2f}x floor_plain (wanted at most 1.05), "
            f"{found['ours_over_floor_lean']:.2f}x floor_lean"
        )
    print(f"agreement: {result['agreement']}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--facts", type=int, default=64, help="starter facts to time")
    parser.add_argument("--materialised-facts", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=16, help="most facts per batch")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's own)")
    parser.add_argument("--no-memory", action="store_true", help="leave out the memory runs")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--memory-of", choices=VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    for name in ("facts", "materialised_facts", "batch_size", "repeats"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be 1 or more")
    return options


def main() -> None:
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    facts = list(load_facts("starter"))[: options.facts]
    model = load(options.model)
    if options.memory_of:
        found = measure_memory_here(model, facts, options.memory_of, options.batch_size)
        print(json.dumps(found))
        return
    few = min(options.materialised_facts, len(facts))
    load_before = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    times, results = measure_times(model, facts, few, options.batch_size, options.repeats)
    result = {
        "benchmark": "lga",
        "model": model.name,
        "weights_bytes": weight_bytes(model),
        "batch_size": options.batch_size,
        "repeats": options.repeats,
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "load_average_before": load_before,
        "times": times,
        "ratios": ratios(times, "seconds_per_fact"),
        "cpu_ratios": ratios(times, "cpu_seconds_per_fact"),
        "agreement": agreement(results["ours"], results["materialised"]),
        "memory": {} if options.no_memory else measure_memory(options),
    }
    report(result)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
