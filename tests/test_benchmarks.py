"""The slow references of the benchmarks do what is timed against them."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import INNER, tiny

from goldenlayers.datasets import load_facts
from goldenlayers.editors import Rome, ValueSearch
from goldenlayers.editors.lookup_states import sample_prefixes
from goldenlayers.editors.values import optimise_values
from goldenlayers.evaluation.plan import EvaluationPlan
from goldenlayers.facts import Probe
from goldenlayers.statistics import KeyStatistics

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
FACTS = [
    replace(fact, locality=(Probe("The capital of Chile is", "Santiago"), *fact.locality[:2]))
    for fact in load_facts("starter", limit=3)
]


def script(name: str) -> Any:
    """A benchmark as a module, which bears no library's name."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_loop_of_edits_finds_the_values_of_the_batch() -> None:
    model = tiny("llama", dtype=torch.float64)
    settings = ValueSearch(adam=True, steps=4, prefixes=2, stop_loss=0.0, kl_factor=1.0)
    prefixes = sample_prefixes(model, 2, settings.prefix_tokens, seed=0)
    found = optimise_values(model, FACTS, 1, prefixes, settings)
    for fact, value in zip(FACTS, found, strict=True):
        alone = script("edit").loop_value(model, fact, 1, prefixes, settings)
        assert float(alone.norm()) > 0
        torch.testing.assert_close(value.delta, alone, rtol=1e-3, atol=1e-5)


def test_the_loop_of_a_sweep_has_its_rows() -> None:
    model, sweep = tiny("llama"), script("sweep")
    rome = Rome(adam=True, steps=4, prefixes=2)
    given = model, FACTS, [1, 2], rome, KeyStatistics.identity(dict.fromkeys(range(4), INNER))
    found = sweep.agreement(sweep.ours(*given), sweep.loop(*given))
    assert found["missing"] == 0 and found["rows"] == found["same"]
    assert set(sweep.means(sweep.loop(*given), FACTS)) >= {"rewrite", "rephrase", "locality"}


def test_one_by_one_is_what_an_evaluation_scores() -> None:
    model, evaluate = tiny("llama"), script("evaluate")
    deltas = evaluate.random_deltas(model, len(FACTS), 1)
    slow = evaluate.one_by_one(model, FACTS, deltas)
    fast = evaluate.alike(EvaluationPlan(model, FACTS).score(deltas), slow)
    assert {metric for _, metric, _ in slow} >= {"rewrite", "rephrase", "locality"}
    assert fast == 1.0
    wrong = [(fact, metric, score + 1) for fact, metric, score in slow]
    assert evaluate.alike(EvaluationPlan(model, FACTS).score(deltas), wrong) == pytest.approx(0)
