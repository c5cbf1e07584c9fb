"""The truth a layer choice is judged by, from the rows of a sweep; no model is needed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from goldenlayers.errors import UserError
from goldenlayers.evaluation.metrics import lower_is_better
from goldenlayers.truth.generalisation import Transfer, TransferMatrix, split_half, transfer_matrix
from goldenlayers.truth.table import OVERALL, Interval, Truth, best_place, plain_list

__all__ = [
    "OVERALL",
    "Interval",
    "Transfer",
    "TransferMatrix",
    "Truth",
    "split_half",
    "to_json",
    "transfer_matrix",
]


def to_json(truth: Truth, *, groups: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The figures of a sweep's ``summary.json``."""
    metrics = {name: _metric(truth, name) for name in truth.metrics}
    golden = metrics[OVERALL]["golden_layer"]
    split = None
    if golden is not None and len(truth.facts) > 1:
        try:
            split = split_half(truth, groups=groups).to_json()
        except UserError:  # all facts about one subject
            split = None
    return {
        "layers": list(truth.layers),
        "n_facts": len(truth.facts),
        "golden_layer": golden,
        "golden_layers": {name: one["golden_layer"] for name, one in metrics.items()},
        "oracle": metrics[OVERALL]["oracle"],
        "gap": metrics[OVERALL]["gap"],
        "ranking": truth.ranking(),
        "wins": {str(layer): share for layer, share in truth.wins().items() if share}
        if golden is not None
        else {},
        "sample_optima": {
            "split": plain_list(truth.histogram()),
            "shallowest": plain_list(truth.histogram(split=False)),
        },
        "split_half": split,
        "overall_of": list(truth.overall_of),
        "metrics": metrics,
        "harmonic": _harmonic(truth),
        "warnings": list(truth.warnings),
    }


def _harmonic(truth: Truth) -> dict[str, Any]:
    means, ends = truth.harmonic(), truth.harmonic_intervals()
    return {
        "of": list(truth.harmonic_of),
        "mean": plain_list(means),
        "low": plain_list(ends[:, 0]),
        "high": plain_list(ends[:, 1]),
    }


def _metric(truth: Truth, name: str) -> dict[str, Any]:
    ends = truth.intervals(name)
    golden = oracle = gap = None
    if not lower_is_better(name) and best_place(truth.table(name)) is not None:
        golden = truth.golden_layer(name)
        oracle, gap = truth.oracle(name).to_json(), truth.gap(name).to_json()
    return {
        "mean": plain_list(truth.means(name)),
        "low": plain_list(ends[:, 0]),
        "high": plain_list(ends[:, 1]),
        "facts": truth.scored(name).tolist(),
        "golden_layer": golden,
        "oracle": oracle,
        "gap": gap,
    }
