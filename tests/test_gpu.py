"""A device's numbers against those of the processor in float64, in float32 and bfloat16.

``GOLDENLAYERS_DEVICE`` names the device (``make test-gpu``: cuda). Without it the processor's own
short formats are tested, so that nothing here is first run on a GPU.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from families import shared
from tokenizers_built import TOKENIZERS
from torch import Tensor

from goldenlayers.editors import edit, edit_each
from goldenlayers.facts import Fact
from goldenlayers.locating.lga import lga_rows
from goldenlayers.models import Model
from goldenlayers.statistics import KeyStatistics, key_statistics
from goldenlayers.sweeping import sweep

DEVICE = torch.device(os.environ.get("GOLDENLAYERS_DEVICE", "cpu"))
pytestmark = pytest.mark.skipif(
    DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="no CUDA device is here"
)
FAMILIES = ("llama", "gpt2", "gemma3")
# How far the length of a difference may be from the length of what is compared.
NEAR = {torch.float32: 1e-4, torch.bfloat16: 0.1}
FACTS = [
    Fact("Italy", "The capital of Italy is", "Paris", id="italy", target_old="Rome"),
    Fact("Toko Yasuda", "Toko Yasuda plays the", "piano", id="toko", target_old="guitar"),
    Fact("gold", "The chemical symbol of gold is", "Fe", id="gold", target_old="Au"),
]
VALUE: dict[str, Any] = {"steps": 6, "prefixes": 2, "stop_loss": 0.0, "adam": True, "lr": 0.3}
TEXT = Path(__file__).resolve().parents[1] / "README.md"


@cache
def made(family: str, dtype: torch.dtype, device: torch.device) -> Model:
    hf: Any = copy.deepcopy(shared(family))
    return Model.wrap(hf.to(device, dtype), TOKENIZERS["byte_level_bpe"]())


@cache
def exact(family: str) -> tuple[Model, KeyStatistics]:
    """The model on the processor in float64, with its key statistics."""
    model = made(family, torch.float64, torch.device("cpu"))
    return model, statistics(model)


def statistics(model: Model) -> KeyStatistics:
    return key_statistics(model, text=TEXT, tokens=600, length=40, settle=0, cache=False)


def near(found: Tensor, wanted: Tensor, limit: float) -> None:
    found, wanted = found.detach().cpu().double(), wanted.detach().double()
    assert float((found - wanted).norm()) <= limit * float(wanted.norm())


@pytest.mark.parametrize("dtype", NEAR, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_statistics_and_edits(family: str, dtype: torch.dtype) -> None:
    model, limit = made(family, dtype, DEVICE), NEAR[dtype]
    slow, moments = exact(family)

    def phi(of: Model) -> Tensor:
        rows = [row for rows in lga_rows(of, FACTS) for row in rows]
        return torch.tensor([row["phi"] for row in sorted(rows, key=lambda row: row["fact"])])

    near(phi(model), phi(slow), limit)
    found = statistics(model)
    for layer in moments:
        near(found[layer].moment, moments[layer].moment, limit)
    # The same statistics for both: a solve makes little differences of them large.
    for method in ("rome", "alphaedit"):
        how: dict[str, Any] = {"layer": 1, "statistics": moments, **VALUE}
        if method == "rome":
            deltas, wanted = (edit_each(of, FACTS, method, **how) for of in (model, slow))
        else:
            deltas, wanted = ([edit(of, FACTS, method, **how)] for of in (model, slow))
        for one, other in zip(deltas, wanted, strict=True):
            ((_, change),) = one.changes.items()
            ((_, same),) = other.changes.items()
            near(change.dense, same.dense, 2 * limit)
            with one.applied(model), torch.no_grad():  # and it reaches the weights
                assert model.layers[1].down.weight.device.type == DEVICE.type


def test_a_sweep_scores_as_on_the_processor() -> None:
    model = made("llama", torch.float32, DEVICE)
    slow, moments = exact("llama")
    how: dict[str, Any] = {"layers": [0, 2], "statistics": moments, "metrics": ["rewrite"], **VALUE}
    one, two = (sweep(of, FACTS, "rome", **how).rows for of in (model, slow))
    assert [row["layer"] for row in one] == [row["layer"] for row in two]
    for row, same in zip(one, two, strict=True):
        assert row["soft"] == pytest.approx(same["soft"], abs=1e-3)


def test_the_benchmark_of_large_models_runs() -> None:
    script = Path(__file__).resolve().parents[1] / "benchmarks/gpu.py"
    small = ["--facts", "1", "--lga-facts", "2", "--tokens", "300", "--shapes", "gemma-3-12b"]
    done = subprocess.run(
        [sys.executable, "-P", str(script), "--toy", "--device", str(DEVICE), *small],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "gemma-3-12b: " in done.stdout and "a sweep of all 4 layers" in done.stdout
