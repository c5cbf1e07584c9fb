"""What one cell of a sweep costs: floating-point operations, counted, and bytes of its rows.

    python benchmarks/cells.py --data starter --facts 4

Operations are told as token passes, that is divided by twice the model's parameters, so that they
can be carried over to a larger model: see docs/howto/cluster.md. The editor's defaults are used.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from goldenlayers.datasets import load_facts
from goldenlayers.models import load
from goldenlayers.statistics import KeyStatistics
from goldenlayers.sweeping import sweep

# Last on the path: a script may bear a library module's name.
sys.path.append(str(Path(__file__).parent))
from gpu import Products


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", default="starter")
    parser.add_argument("--facts", type=int, default=4)
    parser.add_argument("--method", default="rome")
    options = parser.parse_args()
    model = load(options.model, device="cpu")
    facts = list(load_facts(options.data, limit=options.facts))
    parameters = sum(weight.numel() for weight in model.hf.parameters())
    # What the statistics hold costs nothing here.
    none = KeyStatistics.identity({b.index: b.down.in_features for b in model.layers})
    last = len(model.layers) - 2
    for layer in sorted({1, len(model.layers) // 2, last}):
        with Products() as counter:
            found = sweep(model, facts, options.method, layers=[layer], statistics=none)
        size = sum(len(json.dumps(row)) + 1 for row in found.rows)
        flops = counter.flops / len(facts)
        print(
            f"layer {layer}: {flops / 1e9:.0f} GFLOP a cell, {flops / 2 / parameters:.0f} token "
            f"passes, {len(found.rows) / len(facts):.1f} rows of {size / len(found.rows):.0f} bytes"
        )


if __name__ == "__main__":
    main()
