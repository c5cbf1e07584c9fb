"""Time to the first edit, nothing cached but the model: text of the package against sampled text.

One run calls `golden edit`, with its check, once for each text, with a cache that holds the model
and no key statistics. The clock depends on what else the machine does, so the load average stands
beside it; the processor seconds (user and system, of the call's threads) depend on it far less.

    python benchmarks/first_edit.py --model gemma3-270m --layer 3 --out first_edit.json
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from goldenlayers import models
from goldenlayers.models.cache import models_root

TEXTS = ("package", "model")
FACT = ("--subject", "Marie Curie", "--prompt", "{} was born in", "--target", "London")


def timed(options: argparse.Namespace, text: str) -> dict[str, Any]:
    """One call from a shell's point of view."""
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "models").symlink_to(models_root(), target_is_directory=True)
        call = [sys.executable, "-m", "goldenlayers.cli", "edit", options.model, *FACT]
        call += ["--layer", str(options.layer), "--method", options.method]
        call += ["--statistics", text, "--cache-dir", place, "--json", "--quiet"]
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        load = os.getloadavg()[0]
        said = subprocess.run(call, capture_output=True, text=True, check=False)
        wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if said.returncode:
        sys.exit(said.stderr)
    user, system = after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime
    return {
        "processor_seconds": round(user + system, 1),
        "wall_seconds": round(wall, 1),
        "load_average": [round(one, 1) for one in (load, os.getloadavg()[0])],
        "took": json.loads(said.stdout)["took"] == 1,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="gemma3-270m")
    parser.add_argument("--layer", type=int, default=3)
    parser.add_argument("--method", default="clear-rome")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    models.locate(options.model)  # fetched before the clock runs
    calls = {text: timed(options, text) for text in TEXTS}
    seconds = {text: call["processor_seconds"] for text, call in calls.items()}
    result = {
        "benchmark": "first edit",
        "model": options.model,
        "method": options.method,
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "processors": os.cpu_count(),
        "calls": calls,
        "model_to_package": round(seconds["model"] / seconds["package"], 2),
    }
    text = json.dumps(result, indent=1)
    if options.out is not None:
        options.out.write_text(text + "\n", encoding="utf-8")
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
