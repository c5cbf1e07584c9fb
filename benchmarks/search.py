"""The value search: what quasi-Newton steps reach, and what Adam's reach, pass by pass.

    python benchmarks/search.py --model gemma3-270m --layers 3 9 --facts 16

Both run on the same facts and prefixes. A pass is one forward and backward pass of all of a fact's
prompts from the edited block on; facts whose loss is below the stop are done, and leave.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import goldenlayers.models as models
from goldenlayers.datasets import load_facts
from goldenlayers.editors import ValueSearch
from goldenlayers.editors.lookup_states import sample_prefixes
from goldenlayers.editors.values import optimise_values

SEARCHES = {
    "adam 25": {"adam": True, "steps": 25},
    "quasi-Newton 8": {"steps": 8},
    "quasi-Newton 20": {"steps": 20},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", default="gemma3-270m")
    parser.add_argument("--data", default="starter")
    parser.add_argument("--layers", type=int, nargs="+", default=[3, 9])
    parser.add_argument("--facts", type=int, default=16)
    parser.add_argument("--prefixes", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()

    model = models.load(args.model)
    facts = load_facts(args.data, limit=args.facts, seed=args.seed)
    prefixes = sample_prefixes(model, args.prefixes, ValueSearch().prefix_tokens, seed=0)
    rows: list[dict[str, Any]] = []
    for layer in args.layers:
        times: dict[str, list[float]] = {name: [] for name in SEARCHES}
        found = {}
        for _ in range(args.repeats):
            for name, how in SEARCHES.items():
                start = time.process_time()
                search = ValueSearch(**how, prefixes=args.prefixes)
                found[name] = optimise_values(model, list(facts), layer, prefixes, search)
                times[name].append(time.process_time() - start)
        for name, values in found.items():
            rows.append(
                {
                    "layer": layer,
                    "search": name,
                    "loss": round(statistics.mean(v.loss for v in values), 3),
                    "worst_loss": round(max(v.loss for v in values), 2),
                    "passes": round(statistics.mean(v.steps + 1 for v in values), 1),
                    "length": round(
                        statistics.mean(float(v.delta.norm() / v.values[0].norm()) for v in values),
                        2,
                    ),
                    "seconds": round(statistics.median(times[name]), 1),
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    if args.out is not None:
        args.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
