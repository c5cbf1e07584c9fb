"""Time to the first edit, nothing cached but the model: text of the package against sampled text.

One run measures, side by side, loading the model, its prefixes, the key statistics of the edited
layer from either text, and the edit itself with the answers before and after. Wall-clock seconds
depend on what else the machine does; the ratio is that of the CPU seconds of this process.

    python benchmarks/first_edit.py --model gemma3-270m --layer 3 --out first_edit.json
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from goldenlayers import models
from goldenlayers.editors import Editing, make_editor
from goldenlayers.facts import Fact
from goldenlayers.report.tables import greedy_answers
from goldenlayers.statistics import key_statistics

TEXTS = ("package", "model")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="gemma3-270m")
    parser.add_argument("--layer", type=int, default=3)
    parser.add_argument("--method", default="rome")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    steps: dict[str, dict[str, float]] = {"import": {"cpu": time.process_time()}}

    def timed(name: str, fn: Callable[[], Any]) -> Any:
        wall, cpu = time.perf_counter(), time.process_time()
        found = fn()
        steps[name] = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
        return found

    model = timed("load", lambda: models.load(options.model))
    fact = Fact("Marie Curie", "Marie Curie was born in", "London")
    moments = {
        text: timed(
            f"statistics of {text}",
            lambda text=text: key_statistics(model, [options.layer], text=text, cache=False),
        )
        for text in TEXTS
    }
    work = Editing(model, make_editor(options.method), options.layer, statistics=moments["package"])
    timed("prefixes", lambda: work.prefixes)
    timed("answers before", lambda: greedy_answers(model, [fact]))
    delta = timed("edit", lambda: work.together([fact]))
    with delta.applied(model):
        timed("answers after", lambda: greedy_answers(model, [fact]))
    rest = sum(step["cpu"] for name, step in steps.items() if "statistics" not in name)
    whole = {text: rest + steps[f"statistics of {text}"]["cpu"] for text in TEXTS}
    result = {
        "benchmark": "first edit",
        "model": options.model,
        "threads": torch.get_num_threads(),
        "tokens": {text: moments[text].n_tokens for text in TEXTS},
        "seconds": steps,
        "cpu_seconds_in_all": whole,
        "model_to_package": whole["model"] / whole["package"],
    }
    text = json.dumps(result, indent=1)
    if options.out is not None:
        options.out.write_text(text + "\n", encoding="utf-8")
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
