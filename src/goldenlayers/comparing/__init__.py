"""Layer choices against the truth of a sweep: score, regret, hits, rank correlation and cost.

Shapes: B test facts, L layers, S resamples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import numpy as np

from goldenlayers.comparing.rules import (
    REPEATS,
    SIZES,
    VARIANTS,
    Rule,
    SizeCurve,
    combined,
    mean_ranks,
    rules_of,
    size_curve,
    told_apart,
    unique,
)
from goldenlayers.comparing.runs import LocateRun, SweepRun, overlap_warnings, transfer_warnings
from goldenlayers.errors import UserError, check_number, check_seed
from goldenlayers.evaluation.bootstrap import resampled_means, spearman
from goldenlayers.locating.methods import Fixed
from goldenlayers.locating.ranking import LayerRanking
from goldenlayers.truth import OVERALL, Interval, TransferMatrix, noise_floor, transfer_matrix
from goldenlayers.truth.table import GAIN, eligible_means, ends, level, plain

__all__ = [
    "SIZES",
    "Choice",
    "Comparison",
    "LocateRun",
    "Rule",
    "SizeCurve",
    "SweepRun",
    "compare",
    "overlap_warnings",
    "rules_of",
    "size_curve",
    "transfer_warnings",
]


HITS = (1, 3, 5)
SCHEMA = 1


@dataclass(frozen=True)
class Choice:
    """One choice and how it does on the test facts; NaN and None where something is unknown.

    Attributes:
        name: tells the choice apart from all others.
        method: "lga", "transfer", "golden", "oracle", "random", ...
        variant: "tukey", "raw", "cosine", ... ; "" for methods without variants.
        layer: the chosen one; None for the oracle and the expected random layer.
        score: mean score there, in the unit of the sweep's rows.
        gain, harmonic: Overall above the untouched model's there, and the harmonic mean there.
        regret: golden layer's score minus this one's, over ``regret.n`` facts, with its 95 %
            bootstrap interval over test facts.
        golden_rank: place of the golden layer (of the best of them, if layers tie) in the choice's
            own order, from 1; None if it is not in it.
        hit_at: k → 1.0 if a golden layer is among the first k, else 0.0; a probability for random.
        spearman: rank correlation of the choice's layer scores with the truth's layer means.
        seconds: what the choice cost (key statistics not counted, neither here nor in the sweep).
        speed_up: the sweep's seconds over these.
        n_proxy: facts it looked at.
        run: folder of the run it came from.
    """

    name: str
    method: str
    layer: int | None
    score: float
    regret: Interval
    variant: str = ""
    golden_rank: int | None = None
    hit_at: Mapping[int, float] = field(default_factory=dict)
    spearman: float = math.nan
    gain: float = math.nan
    harmonic: float = math.nan
    seconds: float | None = None
    speed_up: float | None = None
    n_proxy: int = 0
    scope: str | None = None
    loss: str | None = None
    fence: str | None = None
    run: str = ""
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """The choice's entry in ``compare.json``; NaN becomes None."""
        names = ("score", "spearman", "gain", "harmonic")
        numbers = {name: plain(getattr(self, name)) for name in names}
        return (
            vars(self)
            | numbers
            | {
                "regret": plain(self.regret.value),
                "regret_interval": [plain(self.regret.low), plain(self.regret.high)],
                "hit_at": {str(k): value for k, value in self.hit_at.items()},
            }
        )


@dataclass(frozen=True)
class Comparison:
    """All choices, the yardsticks first, and how the rules do with fewer proxy facts.

    ``noise_floor`` is the regret that the truly best layer would show on as many other facts;
    ``transfer`` has the golden layer of every sweep judged on every other, this one first; None
    where no other sweep was given.
    """

    golden_layer: int
    golden_score: float
    oracle: Interval
    choices: tuple[Choice, ...]
    proxy_sizes: tuple[SizeCurve, ...]
    layers: tuple[int, ...]
    means: tuple[float, ...]
    metric: str
    n_facts: int
    sweep_seconds: float | None
    noise_floor: float
    warnings: tuple[str, ...] = ()
    transfer: TransferMatrix | None = None

    def to_json(self) -> dict[str, Any]:
        """The value of ``compare.json``."""
        return {"schema": SCHEMA, **vars(self)} | {
            "golden_score": plain(self.golden_score),
            "noise_floor": plain(self.noise_floor),
            "oracle": self.oracle.to_json(),
            "layers": list(self.layers),
            "means": [plain(value) for value in self.means],
            "choices": [choice.to_json() for choice in self.choices],
            "proxy_sizes": [curve.to_json() for curve in self.proxy_sizes],
            "transfer": self.transfer.to_json() if self.transfer else None,
            "warnings": list(self.warnings),
        }


def compare(
    sweep: SweepRun,
    others: Sequence[LocateRun | SweepRun] = (),
    *,
    metric: str = OVERALL,
    sizes: Sequence[int] = SIZES,
    repeats: int = REPEATS,
    seed: int = 0,
) -> Comparison:
    """Judge every run's choice, its variants, and the baselines by the truth.

    The golden layer is that of the test facts themselves, held fixed in the resamples. For each
    pair of an LGA and a transfer run there is also "lga+transfer": the layer with the best mean of
    its ranks under the two (those outside the fences share the last ranks).

    Args:
        sweep: its truth, scores of the test facts at every layer, judges. Whether the proxy facts
            are others, and the model the same, is for ``overlap_warnings`` to see to.
        others: finished locate runs, and other sweeps, whose golden layers are choices too
            (``transfer_warnings`` sees to it that they may be).
        metric: of the truth, by which to judge.
        sizes: numbers of proxy facts to try.
        repeats: random subsets per size.
        seed: of the subsets.

    Raises:
        UserError: the truth has no golden layer by this metric.
    """
    check_number("repeats", repeats, 1, 10_000)
    check_seed(seed)
    truth, judge = sweep.truth, _Judge(sweep, metric)
    runs = [one for one in others if isinstance(one, LocateRun)]
    sweeps = [one for one in others if isinstance(one, SweepRun)]
    # A run ranks all layers of its model, the sweep may have been of some.
    deepest = sweep.n_layers or truth.layers[-1] + 1
    width = max([len(run.ranking.layers) for run in runs], default=deepest)
    choices = [judge.golden(), judge.oracle(), judge.random()]
    named = {run.method for run in runs}
    for fixed in (Fixed("published"), Fixed("middle")):
        layer = fixed.fixed_layer(width)
        if fixed.name not in named and layer is not None:
            ranking = LayerRanking.fixed(fixed.name, width, layer, top_k=width)
            choices.append(judge.as_run(LocateRun("", ranking)))
    folders = [one.run for one in sweeps]
    for one in sweeps:
        choices.append(judge.of_sweep(one, one.run if folders.count(one.run) == 1 else one.label))
    rules: list[Rule] = []
    for run in runs:
        own = rules_of(run)
        rules += own
        choices.append(judge.as_run(run))
        choices += [judge.by_rule(rule) for rule in own[1:]]
    for one, other in product(runs, runs):
        if other.method not in one.how.joined_with:
            continue
        choices.append(judge.together(one, other))
        pair = [next(iter(rules_of(run)), None) for run in (one, other)]
        if pair[0] and pair[1] and (both := combined(pair[0], pair[1], choices[-1].name)):
            rules.append(both)
    regrets = np.full(width, np.nan)
    regrets[list(truth.layers)] = judge.best - judge.eligible
    curves = [size_curve(rule, regrets, sizes=sizes, repeats=repeats, seed=seed) for rule in rules]
    return Comparison(
        golden_layer=judge.golden_layer,
        golden_score=judge.best,
        oracle=truth.oracle(metric),
        choices=told_apart(choices, [one.run for one in choices]),
        proxy_sizes=told_apart(curves, [rule.run.run for rule in rules]),
        layers=truth.layers,
        means=tuple(truth.means(metric).tolist()),
        metric=metric,
        n_facts=len(truth.facts),
        sweep_seconds=sweep.seconds,
        noise_floor=noise_floor(truth, metric),
        warnings=truth.warnings,
        transfer=_transfers([sweep, *sweeps], metric) if sweeps else None,
    )


def _transfers(sweeps: Sequence[SweepRun], metric: str) -> TransferMatrix:
    names = unique([one.label for one in sweeps], [""] * len(sweeps))
    truths = [one.truth for one in sweeps]
    return transfer_matrix(dict(zip(names, truths, strict=True)), metric)


class _Judge:
    """Turns choices into :class:`Choice` by one truth and metric."""

    def __init__(self, sweep: SweepRun, metric: str) -> None:
        truth = sweep.truth
        self.truth, self.metric, self.sweep_seconds = truth, metric, sweep.seconds
        self.golden_layer = truth.golden_layer(metric)
        self.table = truth.table(metric)  # (B, L)
        self.eligible = eligible_means(self.table)  # (L,)
        self.best = float(self.eligible[truth.layers.index(self.golden_layer)])
        top = level(self.eligible)
        self.all_golden = {
            layer for layer, mean in zip(truth.layers, top, strict=True) if mean == np.nanmax(top)
        }

    def golden(self) -> Choice:
        order = self.truth.ranking(self.metric)
        one = self._choice("golden layer", "golden", order, seconds=self.sweep_seconds)
        return replace(one, spearman=1.0)

    def oracle(self) -> Choice:
        score, gap = self.truth.oracle(self.metric), self.truth.gap(self.metric)
        regret = Interval(0.0 - gap.value, 0.0 - gap.high, 0.0 - gap.low, gap.n)  # no -0.0
        note = "each fact at its own best layer"
        cost = self._cost(self.sweep_seconds)
        return Choice("oracle", "oracle", None, score.value, regret, note=note, **cost)

    def random(self) -> Choice:
        """The expected score of a layer drawn at random from those that can be golden."""
        able = ~np.isnan(self.eligible)
        mean = float(self.eligible[able].mean())
        low = high = math.nan
        if len(self.table) > 1:
            drawn = resampled_means(self.table, self.truth.resamples, self.truth.seed)[:, able]
            best = self.truth.layers.index(self.golden_layer)
            column = int(able[:best].sum())
            low, high = ends(drawn[:, column] - drawn.mean(axis=1))
        n, good = int(able.sum()), len(self.all_golden)
        hits = {k: 1 - math.comb(n - good, k) / math.comb(n, k) if k < n else 1.0 for k in HITS}
        regret = Interval(self.best - mean, low, high, len(self.table))
        note = "expected over the layers"
        return Choice("random layer", "random", None, mean, regret, hit_at=hits, note=note)

    def of_sweep(self, sweep: SweepRun, name: str) -> Choice:
        """Another sweep's golden layer, on these facts and with this editor."""
        order = sweep.truth.ranking(self.metric)
        if not order:
            raise UserError(f"sweep '{sweep.run}' has no golden layer by {self.metric}")
        scores = np.full(1 + max(*sweep.truth.layers, *self.truth.layers), np.nan)
        scores[list(sweep.truth.layers)] = eligible_means(sweep.truth.table(self.metric))
        return self._choice(
            f"golden layer of {name}",
            "sweep",
            order,
            scores.tolist(),
            sweep.seconds,
            n_proxy=len(sweep.truth.facts),
            run=sweep.run,
        )

    def as_run(self, run: LocateRun) -> Choice:
        variant = VARIANTS.get(run.fence or "", "")
        scores = [one.value for one in run.ranking.layers]
        name = f"{run.label} {variant}".strip()
        order = [run.ranking.golden_layer]  # what the run says, whatever its scores
        order += [layer for layer in run.order() if layer != order[0]]
        seconds = run.ranking.seconds
        return self._choice(
            name, run.method, order, scores, seconds, variant=variant, **_origin(run)
        )

    def by_rule(self, rule: Rule) -> Choice:
        fences = {variant: fence for fence, variant in VARIANTS.items()}
        seconds = rule.run.ranking.seconds
        more = _origin(rule.run) | {"fence": fences.get(rule.variant, "none")}
        return self._choice(
            rule.name, rule.run.method, rule.order(), rule.scores(), seconds,
            variant=rule.variant, **more,
        )  # fmt: skip

    def together(self, one: LocateRun, other: LocateRun) -> Choice:
        """Two runs (LGA and transfer, say) as they were made: the mean of their ranks."""
        total = np.zeros((1, len(one.ranking.layers)))
        for run in (one, other):
            scores = np.array([[layer.value for layer in run.ranking.layers]])
            kept = np.array([[layer.kept for layer in run.ranking.layers]])
            total -= mean_ranks(scores, kept) / 2
        method = f"{one.method}+{other.method}"
        label = one.label.removeprefix(one.method) + other.label.removeprefix(other.method)
        n_proxy = max(one.ranking.n_facts, other.ranking.n_facts)
        more = _origin(one) | {"n_proxy": n_proxy, "run": f"{one.run}+{other.run}"}
        return self._choice(
            method + label,
            method,
            np.argsort(-total[0], kind="stable").tolist(),
            total[0].tolist(),
            _added(one.ranking.seconds, other.ranking.seconds),
            variant="mean of ranks",
            **more,
        )

    def _choice(
        self,
        name: str,
        method: str,
        order: Sequence[int],
        scores: Sequence[float] | None = None,
        seconds: float | None = None,
        **more: Any,
    ) -> Choice:
        """The first layer of an order judged, and where a golden layer stands in it.

        ``scores`` of all layers are compared with the swept layers' means, over the layers that can
        be golden.
        """
        layer, swept = order[0], self.truth.layers
        score, regret = math.nan, Interval(math.nan, math.nan, math.nan, 0)
        if layer in swept:
            place = swept.index(layer)
            score = float(self.truth.means(self.metric)[place])
            more["harmonic"] = float(self.truth.harmonic()[place])
            if GAIN in self.truth.scores:
                more["gain"] = float(self.truth.means(GAIN)[place])
            regret = self.truth.regret(layer, self.metric)
        else:
            more = {"note": f"layer {layer} was not swept"} | more
        if scores is not None:
            more["spearman"] = spearman([scores[i] for i in swept], self.eligible.tolist())
        places = [i for i, one in enumerate(order, start=1) if one in self.all_golden]
        rank = places[0] if places else None
        hits = {k: float(rank is not None and rank <= k) for k in HITS}
        more |= self._cost(seconds)
        return Choice(name, method, layer, score, regret, golden_rank=rank, hit_at=hits, **more)

    def _cost(self, seconds: float | None) -> dict[str, Any]:
        up = self.sweep_seconds / seconds if seconds and self.sweep_seconds else None
        return {"seconds": seconds, "speed_up": up}


def _origin(run: LocateRun) -> dict[str, Any]:
    named = {name: getattr(run.how, name, None) for name in ("scope", "loss")}
    return named | {"fence": run.fence, "run": run.run, "n_proxy": run.ranking.n_facts}


def _added(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one + other
