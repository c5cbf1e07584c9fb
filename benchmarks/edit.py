"""ROME edits in a batch against the loop that existing tools run: same steps, same results.

The loop is the obvious one: a fact at a time, every step a forward and backward of the whole model
over all positions with logits for all of them, as in the released ROME code and EasyEdit. Ours runs
the same optimisation from the edited block and the lookup token on, many facts together.

    python benchmarks/edit.py --model smollm2-135m --facts 32 --loop-facts 2 --out edit.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import goldenlayers.models as models
from goldenlayers.datasets import load_facts
from goldenlayers.editors import ValueSearch
from goldenlayers.editors.values import fact_prompts, optimise_values
from goldenlayers.facts import Fact
from goldenlayers.hooks import override
from goldenlayers.locating.known import known_facts
from goldenlayers.models import Model
from goldenlayers.tokens import pad_ids


def loop_value(
    model: Model, fact: Fact, layer: int, prefixes: Sequence[str], s: ValueSearch
) -> torch.Tensor:
    """δ of one fact, whole model and full logits each step. Written to be read, not to be fast."""
    prompts = fact_prompts(model, fact, prefixes, fact.target)
    kl_prompt = model.encoder.encode(f"{fact.subject} is a", "", fact.subject)
    encodings = [*prompts, kl_prompt]
    lookups = torch.tensor([e.lookup for e in encodings])
    rows = torch.arange(len(encodings))
    ids = pad_ids([e.ids for e in encodings], model.device).ids
    down = model.layers[layer].down.module
    seen: dict[str, torch.Tensor] = {}

    def look(y: torch.Tensor) -> torch.Tensor:
        seen["v"] = y.detach()[rows, lookups]
        return y

    with torch.no_grad(), override(down, look):
        clean = model.hf(input_ids=ids, use_cache=False).logits
    v0 = seen["v"][0]
    kl_clean = clean[-1, lookups[-1]].log_softmax(-1)
    delta = torch.zeros_like(v0, requires_grad=True)
    rate = s.lr * float(v0.norm()) / len(v0) ** 0.5
    adam = torch.optim.Adam([delta], lr=rate)

    def add(y: torch.Tensor) -> torch.Tensor:
        y = y.clone()
        y[rows, lookups] += delta
        return y

    for step in range(s.steps):
        with override(down, add):
            logits = model.hf(input_ids=ids, use_cache=False).logits
        log_probs = logits.log_softmax(-1)
        nll = torch.stack(
            [
                -log_probs[r, torch.arange(e.n_prompt - 1, len(e) - 1)][
                    torch.arange(len(e) - e.n_prompt), torch.tensor(e.answer_ids)
                ].mean()
                for r, e in enumerate(prompts)
            ]
        ).mean()
        now = log_probs[-1, lookups[-1]]
        kl = (now.exp() * (now - kl_clean)).sum()
        loss = nll + s.kl_factor * kl + s.weight_decay * delta.norm() / v0.norm() ** 2
        if float(loss.detach()) < s.stop_loss or step == s.steps - 1:
            break
        adam.zero_grad()
        loss.backward()
        adam.step()
        with torch.no_grad():
            delta *= min(1.0, float(s.clamp * v0.norm() / delta.norm().clamp_min(1e-30)))
    return delta.detach()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--layer", type=int, default=None, help="default: the middle")
    parser.add_argument("--facts", type=int, default=32)
    parser.add_argument("--loop-facts", type=int, default=2)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--prefixes", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()

    model = models.load(args.model)
    layer = len(model.layers) // 2 if args.layer is None else args.layer
    facts = known_facts(model, load_facts("starter", limit=4 * args.facts))[: args.facts]
    # stop_loss 0: everyone takes all steps, so that the same work is compared.
    settings = ValueSearch(adam=True, steps=args.steps, prefixes=args.prefixes, stop_loss=0.0)
    from goldenlayers.editors.lookup_states import sample_prefixes

    prefixes = sample_prefixes(model, args.prefixes, settings.prefix_tokens, seed=0)
    looped = facts[: args.loop_facts]
    ours_s: list[float] = []
    loop_s: list[float] = []
    gaps: list[float] = []
    for _ in range(args.repeats):
        start = time.perf_counter()
        expected = [loop_value(model, fact, layer, prefixes, settings) for fact in looped]
        loop_s.append((time.perf_counter() - start) / len(looped))
        start = time.perf_counter()
        values = optimise_values(model, facts, layer, prefixes, settings)
        ours_s.append((time.perf_counter() - start) / len(facts))
        gaps += [
            float((v.delta - e).norm() / e.norm()) for v, e in zip(values, expected, strict=False)
        ]
    ours, loop = statistics.median(ours_s), statistics.median(loop_s)
    result: dict[str, Any] = {
        "model": args.model,
        "layer": layer,
        "steps": args.steps,
        "prefixes": len(prefixes),
        "facts": len(facts),
        "loop_facts": len(looped),
        "threads": torch.get_num_threads(),
        "ours_seconds_per_fact": round(ours, 3),
        "loop_seconds_per_fact": round(loop, 3),
        "ratio": round(loop / ours, 2),
        "largest_relative_gap_of_delta": max(gaps),
    }
    print(json.dumps(result, indent=2))
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
