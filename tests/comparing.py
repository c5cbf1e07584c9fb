"""Made-up sweeps and run folders, for the tests of comparisons."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from goldenlayers.comparing import Choice, Comparison
from goldenlayers.store import RunFolder

L = 7


def sweep_rows(seed: int = 0, n_facts: int = 30, n_layers: int = L) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    shape = 60 - 4.0 * np.abs(np.arange(n_layers) - 2)
    return [
        {
            "fact": f"t{f}", "layer": layer, "metric": metric, "probe": 0,
            "score": float(np.clip(shape[layer] + rng.normal(0, 15), 0, 100)),
        }
        for f in range(n_facts)
        for layer in range(n_layers)
        for metric in ("rewrite", "locality")
    ]  # fmt: skip


def named(found: Comparison) -> dict[str, Choice]:
    assert len({one.name for one in found.choices}) == len(found.choices)
    return {one.name: one for one in found.choices}


def write_run(place: Path, name: str, command: str, files: dict[str, Any], **record: Any) -> Path:
    """A run folder as the commands write it; ``record`` goes into its config."""
    with RunFolder.create(place / name, {"command": command, **record}) as folder:
        for file, value in files.items():
            if file.endswith(".jsonl"):
                folder.append_rows(file, value)
            else:
                folder.write_json(file, value)
        return folder.finish()
