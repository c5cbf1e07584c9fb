"""The truth a layer choice is judged by, from the rows of a sweep; no model is needed.

Also: does a layer that was chosen on some facts serve others? Split halves, data sets, editors.

Shapes: B facts, L layers, R repeats.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from goldenlayers.errors import UserError
from goldenlayers.evaluation.bootstrap import resampled_means
from goldenlayers.evaluation.metrics import lower_is_better
from goldenlayers.truth.table import (
    OVERALL,
    Interval,
    Truth,
    best_place,
    eligible_means,
    ends,
    level,
    plain,
    plain_list,
)

__all__ = [
    "OVERALL",
    "Interval",
    "Transfer",
    "TransferMatrix",
    "Truth",
    "noise_floor",
    "split_half",
    "to_json",
    "transfer_matrix",
]


def noise_floor(truth: Truth, metric: str = OVERALL) -> float:
    """The regret that the truly best layer would itself show, on other test facts of this number.

    Bootstrap over the test facts, whose means are taken for the truth.
    """
    table = truth.table(metric)
    able = ~np.isnan(eligible_means(table))
    drawn = resampled_means(table, truth.resamples, truth.seed)  # (S, L)
    best = truth.layers.index(truth.golden_layer(metric))
    drawn = drawn[~np.isnan(drawn[:, best])]
    return float((np.nanmax(drawn[:, able], axis=1) - drawn[:, best]).mean())


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


@dataclass(frozen=True)
class Transfer:
    """How a layer chosen on some facts does on others (repeated split-half).

    Attributes:
        regret: test score of the test facts' own golden layer minus that of the chosen layer;
            mean over the repeats, and the interval that holds 95 % of them.
        hit: share of the repeats in which the chosen layer was (tied for) the best on the test
            facts.
        score: mean test score of the chosen layer.
        chosen: layer → share of the repeats in which it was chosen.
        n_proxy: facts in a proxy half.
        n_test: facts in a test half.
    """

    regret: Interval
    hit: float
    score: float
    chosen: Mapping[int, float]
    n_proxy: int
    n_test: int

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "regret": self.regret.to_json(),
            "hit": plain(self.hit),
            "score": plain(self.score),
            "chosen": {str(layer): share for layer, share in self.chosen.items()},
            "n_proxy": self.n_proxy,
            "n_test": self.n_test,
        }


@dataclass(frozen=True)
class TransferMatrix:
    """Golden layers of several sweeps, each judged on every other.

    ``regret[i][j]`` is what sweep j loses, against its own golden layer, by the golden layer of
    sweep i; NaN if sweep j does not have that layer.
    """

    names: tuple[str, ...]
    golden: tuple[int, ...]
    regret: tuple[tuple[Interval, ...], ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "names": list(self.names),
            "golden_layers": list(self.golden),
            "regret": [[one.to_json() for one in row] for row in self.regret],
        }


def split_half(
    truth: Truth,
    metric: str = OVERALL,
    *,
    repeats: int = 200,
    n_proxy: int | None = None,
    groups: Mapping[str, Any] | None = None,
) -> Transfer:
    """Choose the layer on a random part of the facts, judge it on the rest; R times.

    Args:
        truth: a sweep's scores.
        metric: what is compared.
        repeats: R.
        n_proxy: facts to choose with; default half.
        groups: fact id → its subject: facts of one subject stay on one side. A group is never
            cut, so the parts may be a little larger or smaller.

    Raises:
        UserError: fewer than two facts (or groups), or ``n_proxy`` that leaves no test fact;
            too few scores.
    """
    table = truth.table(metric)
    of = [groups.get(fact, fact) if groups else fact for fact in truth.facts]
    members: dict[Any, list[int]] = {}
    for i, name in enumerate(of):
        if not np.isnan(table[i]).all():
            members.setdefault(name, []).append(i)
    parts = list(members.values())
    usable = sum(map(len, parts))
    wanted = usable // 2 if n_proxy is None else n_proxy
    if len(parts) < 2 or not 1 <= wanted < usable:
        raise UserError(
            f"{usable} scored facts about {len(parts)} subjects cannot be split into "
            f"{wanted} proxy facts and a rest",
            expected="at least two subjects, and a proxy part smaller than the whole",
        )
    generator = np.random.default_rng(truth.seed)
    regrets, scores, hits = [], [], 0
    counts = dict.fromkeys(truth.layers, 0)
    sizes = []
    for _ in range(repeats):
        order = [parts[i] for i in generator.permutation(len(parts))]
        proxy = order.pop(0)
        while len(order) > 1 and len(proxy) < wanted:
            proxy = proxy + order.pop(0)
        test = [i for part in order for i in part]
        place, means = best_place(table[proxy]), eligible_means(table[test])
        if place is None or math.isnan(means[place]):
            continue
        sizes.append((len(proxy), len(test)))
        regrets.append(float(np.nanmax(means) - means[place]))
        scores.append(float(means[place]))
        hits += place in np.flatnonzero(level(means) == np.nanmax(level(means)))
        counts[truth.layers[place]] += 1
    n = len(regrets)
    if not n:
        raise UserError(
            "no layer is scored on enough facts of both halves", fix="Sweep over more facts"
        )
    n_chosen_on, n_test = np.mean(sizes, axis=0).round().astype(int).tolist()
    low, high = ends(np.array(regrets))
    return Transfer(
        Interval(float(np.mean(regrets)), low, high, n),
        hits / n,
        float(np.mean(scores)),
        {layer: count / n for layer, count in counts.items() if count},
        n_chosen_on,
        n_test,
    )


def transfer_matrix(truths: Mapping[str, Truth], metric: str = OVERALL) -> TransferMatrix:
    """Does a golden layer carry from one sweep to the next? Data sets, or editors, of one model.

    Each sweep has the golden layer of all its layers; where another sweep lacks that layer, there
    is no regret (NaN).

    Raises:
        UserError: fewer than two sweeps, or one without a golden layer.
    """
    if len(truths) < 2:
        raise UserError("a transfer needs at least two sweeps")
    golden = [truth.golden_layer(metric) for truth in truths.values()]
    unknown = Interval(math.nan, math.nan, math.nan, 0)
    return TransferMatrix(
        tuple(truths),
        tuple(golden),
        tuple(
            tuple(
                truth.regret(layer, metric) if layer in truth.layers else unknown
                for truth in truths.values()
            )
            for layer in golden
        ),
    )
