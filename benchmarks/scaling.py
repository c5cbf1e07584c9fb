"""How the work grows: with facts, with their length, with a model's width and depth, with workers.

Random models in Llama's shape, one thing varied at a time. What would be flat if the work only grew
with the floating-point operations stands in the last column: time per fact, per token, per
parameter and token.

    python benchmarks/scaling.py --out scaling.json
    python benchmarks/scaling.py --quick                 # the smallest two of each: does it run?
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers import models as hf

from goldenlayers.datasets import load_facts
from goldenlayers.editors import edit_each
from goldenlayers.facts import Fact
from goldenlayers.locating.lga import lga_rows
from goldenlayers.models import Model
from goldenlayers.statistics import KeyStatistics
from goldenlayers.sweeping import Workers, sweep

# Last on the path: a script may bear a library module's name.
sys.path.append(str(Path(__file__).parent))
from _tokenizer import trained_tokenizer

FACTS = (16, 64, 256, 1024)
TOGETHER = (1, 4, 16, 64, 256)
TOKENS = (8, 32, 128, 512)
# Width and layers: 10, 32, 105, 340 million and a billion parameters.
SIZES = ((256, 10), (512, 9), (768, 14), (1152, 20), (1792, 25))
DEPTHS = (4, 8, 16, 32)
WORKERS = (1, 2)
VALUE: dict[str, Any] = {"steps": 10, "prefixes": 2, "stop_loss": 0.0}


def known() -> list[Fact]:
    return [fact for fact in load_facts("starter") if fact.target_old][:200]


def drawn(width: int, layers: int) -> Model:
    torch.manual_seed(0)
    config = hf.llama.LlamaConfig(
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        vocab_size=4096,
        max_position_embeddings=1024,
    )
    model = AutoModelForCausalLM.from_config(config)
    return Model.wrap(model, trained_tokenizer(known()), f"{width}x{layers}")


def many(facts: Sequence[Fact], n: int) -> list[Fact]:
    """``n`` facts, those of ``facts`` again and again under other names."""
    return [
        Fact(f.subject, f.prompt, f.target, target_old=f.target_old, id=f"{f.id}-{i}")
        for i, f in ((i, facts[i % len(facts)]) for i in range(n))
    ]


def longer(model: Model, fact: Fact, tokens: int) -> Fact:
    """The fact behind neutral text, so that prompt and answer are about ``tokens`` long."""
    text = fact.prompt
    while len(model.encoder.fact(Fact(fact.subject, text, fact.target), fact.target)) < tokens:
        text = "and " + text
    return Fact(fact.subject, text, fact.target, target_old=fact.target_old, id=fact.id)


def seconds(work: Callable[[], object], repeats: int) -> float:
    work()
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def lga(model: Model, facts: Sequence[Fact]) -> Callable[[], int]:
    return lambda: sum(len(rows) for rows in lga_rows(model, facts))


def rome(model: Model, facts: Sequence[Fact]) -> Callable[[], object]:
    middle = len(model.layers) // 2
    none = KeyStatistics.identity({b.index: b.down.in_features for b in model.layers})
    return lambda: edit_each(model, facts, "rome", layer=middle, statistics=none, **VALUE)


def n_tokens(model: Model, facts: Sequence[Fact]) -> int:
    """Tokens that LGA reads: each fact with its old and with its new answer."""
    answers = [(f, a) for f in facts for a in (f.target_old or "", f.target)]
    return sum(len(model.encoder.fact(f, a)) - 1 for f, a in answers)


def measure(quick: bool, repeats: int) -> dict[str, list[dict[str, Any]]]:
    cut = 2 if quick else None
    facts = known()
    small = drawn(*SIZES[0])
    found: dict[str, list[dict[str, Any]]] = {}

    rows = found["LGA by facts"] = []
    for n in FACTS[:cut]:
        took = seconds(lga(small, many(facts, n)), repeats)
        rows.append({"facts": n, "seconds": took, "ms per fact": 1e3 * took / n})

    # What batches larger than these could save: all layers of a sweep in one, for example.
    model = drawn(*SIZES[2])
    rows = found["ROME by facts edited together, 105 million parameters"] = []
    for n in TOGETHER[:cut]:
        took = seconds(rome(model, many(facts, n)), 1)
        rows.append({"facts": n, "seconds": took, "ms per fact": 1e3 * took / n})

    rows = found["LGA by length, 8 facts"] = []
    for n in TOKENS[:cut]:
        some = [longer(small, f, n) for f in facts[:8]]
        took, tokens = seconds(lga(small, some), repeats), n_tokens(small, some)
        rows.append({"tokens": n, "seconds": took, "us per token": 1e6 * took / tokens})

    for name, shapes in (
        ("by size", SIZES),
        ("by depth, width 256", tuple((256, depth) for depth in DEPTHS)),
    ):
        rows = found[f"LGA and ROME {name}, 8 facts"] = []
        for width, layers in shapes[:cut]:
            model, some = drawn(width, layers), facts[:8]
            weights = sum(p.numel() for p in model.hf.parameters()) - 4096 * width
            took, edited = (seconds(work(model, some), 1) for work in (lga, rome))
            per = 1e12 * took / n_tokens(model, some) / weights
            rows.append(
                {
                    "width": width,
                    "layers": layers,
                    "million parameters": round(weights / 1e6, 1),
                    "LGA seconds": took,
                    "ROME seconds": edited,
                    "LGA, ps per token and parameter": per,
                    "ROME, ps per fact and parameter": 1e12 * edited / len(some) / weights,
                }
            )

    rows = found["a sweep of all layers by workers, 48 facts"] = []
    none = KeyStatistics.identity({b.index: b.down.in_features for b in small.layers})
    for n in WORKERS:
        start = time.perf_counter()
        workers = Workers(n, load=partial(drawn, *SIZES[0]))
        sweep(
            small, facts[:48], "rome", statistics=none, workers=workers,
            metrics=["rewrite", "rephrase", "locality"], **VALUE,
        )  # fmt: skip
        rows.append({"workers": n, "seconds": time.perf_counter() - start})
    return found


def report(found: dict[str, list[dict[str, Any]]]) -> None:
    for title, rows in found.items():
        print(f"\n{title}\n| " + " | ".join(rows[0]) + " |\n|" + " --- |" * len(rows[0]))
        for row in rows:
            cells = (f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values())
            print("| " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the smallest two of each")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    load_before = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    found = measure(options.quick, 1 if options.quick else options.repeats)
    report(found)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        result = {
            "benchmark": "scaling",
            "threads": options.threads,
            "cpus": os.cpu_count(),
            "torch": torch.__version__,
            "load_average_before": load_before,
            "tables": found,
        }
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
