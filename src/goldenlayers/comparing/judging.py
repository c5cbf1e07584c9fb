"""Each choice of a layer judged by a sweep's truth.

Shapes: B test facts, L layers, S resamples.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from goldenlayers.comparing.choices import Choice, Comparison
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
)
from goldenlayers.comparing.runs import LocateRun
from goldenlayers.comparing.sweeps import SweepRun
from goldenlayers.errors import UserError, check_number, check_seed
from goldenlayers.evaluation.summary import resampled_means, spearman
from goldenlayers.locating import published_layer
from goldenlayers.locating.ranking import LayerRanking
from goldenlayers.truth import OVERALL, Interval, TransferMatrix, Truth, transfer_matrix
from goldenlayers.truth.numbers import eligible_means, ends, level

Floats = NDArray[np.float64]

HITS = (1, 3, 5)


def compare(
    truth: Truth,
    runs: Sequence[LocateRun] = (),
    *,
    sweeps: Sequence[SweepRun] = (),
    name: str = "this sweep",
    metric: str = OVERALL,
    sweep_seconds: float | None = None,
    n_layers: int | None = None,
    sizes: Sequence[int] = SIZES,
    repeats: int = REPEATS,
    seed: int = 0,
    warnings: Iterable[str] = (),
) -> Comparison:
    """Judge every run's choice, its variants, and the baselines by the truth.

    The golden layer is that of the test facts themselves, held fixed in the resamples. For each
    pair of an LGA and a transfer run there is also "lga+transfer": the layer with the best mean of
    its ranks under the two (those outside the fences share the last ranks).

    Args:
        truth: scores of the test facts at every layer. Whether the proxy facts are others, and the
            model the same, is for ``overlap_warnings`` to see to.
        runs: finished locate runs.
        sweeps: other sweeps, whose golden layers are choices too (``transfer_warnings`` sees to it
            that they may be).
        name: of the truth's own sweep, beside theirs.
        metric: of the truth, by which to judge.
        sweep_seconds: what the sweep took, for the speed-up.
        n_layers: of the model, for "middle" and "published"; default from the runs, else from the
            deepest swept layer.
        sizes: numbers of proxy facts to try.
        repeats: random subsets per size.
        seed: of the subsets.
        warnings: to hand on.

    Raises:
        UserError: the truth has no golden layer by this metric.
    """
    check_number("repeats", repeats, 1, 10_000)
    check_seed(seed)
    judge = _Judge(truth, metric, sweep_seconds)
    width = n_layers or max([len(run.ranking.layers) for run in runs], default=truth.layers[-1] + 1)
    choices = [judge.golden(), judge.oracle(), judge.random()]
    fixed = {"published": published_layer(width), "middle": width // 2}
    named = {run.method for run in runs}
    for method, layer in fixed.items():
        if method not in named:
            ranking = LayerRanking.fixed(method, width, layer, top_k=width)
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
        if run.verified is not None:
            choices.append(judge.verified(run, run.verified))
    gradients, transfers = ([r for r in runs if r.method == m] for m in ("lga", "transfer"))
    for one, other in product(gradients, transfers):
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
        choices=tuple(_distinct(choices)),
        proxy_sizes=tuple(_told_apart(curves, [rule.run.run for rule in rules])),
        layers=truth.layers,
        means=tuple(truth.means(metric).tolist()),
        metric=metric,
        n_facts=len(truth.facts),
        sweep_seconds=sweep_seconds,
        warnings=(*warnings, *truth.warnings),
        transfer=_transfers(truth, name, sweeps, metric),
    )


def _transfers(
    truth: Truth, name: str, sweeps: Sequence[SweepRun], metric: str
) -> TransferMatrix | None:
    if not sweeps:
        return None
    names = _unique([name, *(one.label for one in sweeps)], [""] * (1 + len(sweeps)))
    truths = [truth, *(one.truth for one in sweeps)]
    return transfer_matrix(dict(zip(names, truths, strict=True)), metric)


class _Judge:
    """Turns choices into :class:`Choice` by one truth and metric."""

    def __init__(self, truth: Truth, metric: str, sweep_seconds: float | None) -> None:
        self.truth, self.metric, self.sweep_seconds = truth, metric, sweep_seconds
        self.golden_layer = truth.golden_layer(metric)
        self.table = truth.table(metric)  # (B, L)
        self.eligible = eligible_means(self.table)  # (L,)
        self.best = float(self.eligible[truth.layers.index(self.golden_layer)])
        top = level(self.eligible)
        self.all_golden = {
            layer for layer, mean in zip(truth.layers, top, strict=True) if mean == np.nanmax(top)
        }

    def golden(self) -> Choice:
        one = self._choice("golden layer", "golden", self.truth.ranking(self.metric))
        return replace(one, spearman=1.0, **self._cost(self.sweep_seconds))

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
        return replace(
            self._choice(f"golden layer of {name}", "sweep", order),
            spearman=self._spearman(scores.tolist()),
            n_proxy=len(sweep.truth.facts),
            run=sweep.run,
            **self._cost(sweep.seconds),
        )

    def as_run(self, run: LocateRun) -> Choice:
        variant = VARIANTS.get(run.fence or "", "")
        scores = [one.score for one in run.ranking.layers]
        name = f"{run.label} {variant}".strip()
        order = [run.ranking.golden_layer]  # what the run says, whatever its scores
        order += [layer for layer in run.order() if layer != order[0]]
        return self._of_run(run, name, variant, order, scores)

    def by_rule(self, rule: Rule) -> Choice:
        one = self._of_run(rule.run, rule.name, rule.variant, rule.order(), rule.scores())
        fences = {variant: fence for fence, variant in VARIANTS.items()}
        return replace(one, fence=fences.get(rule.variant, "none"))

    def verified(self, run: LocateRun, record: Mapping[str, Any]) -> Choice:
        """The choice of ``locate --verify``; its order puts the verified layer first."""
        plain_run = self.as_run(run)
        layer = int(record["layer"])
        order = [layer, *(one for one in run.order() if one != layer)]
        spent: list[float | None] = [run.ranking.seconds, record.get("seconds")]
        seconds = None if None in spent else sum(s for s in spent if s is not None)
        return replace(
            self._choice(f"{plain_run.name} verified", run.method, order),
            **{n: getattr(plain_run, n) for n in ("scope", "loss", "fence", "n_proxy", "run")},
            variant="verified",
            note=f"{record.get('n_edits')} edits with {record.get('method')}",
            **self._cost(seconds),
        )

    def together(self, one: LocateRun, other: LocateRun) -> Choice:
        """LGA and transfer as they were run: the mean of their ranks."""
        total = np.zeros((1, len(one.ranking.layers)))
        for run in (one, other):
            scores = np.array([[layer.score for layer in run.ranking.layers]])
            kept = np.array([[layer.kept for layer in run.ranking.layers]])
            total -= mean_ranks(scores, kept) / 2
        order = np.argsort(-total[0], kind="stable").tolist()
        spent = [run.ranking.seconds for run in (one, other)]
        seconds = None if None in spent else sum(s for s in spent if s is not None)
        label = other.label.removeprefix("transfer")
        choice = self._choice(f"lga+transfer {one.scope} {one.loss}{label}", "lga+transfer", order)
        return replace(
            choice,
            variant="mean of ranks",
            scope=one.scope,
            loss=one.loss,
            fence=one.fence,
            spearman=self._spearman(total[0].tolist()),
            n_proxy=max(one.ranking.n_facts, other.ranking.n_facts),
            run=f"{one.run}+{other.run}",
            **self._cost(seconds),
        )

    def _of_run(
        self, run: LocateRun, name: str, variant: str, order: list[int], scores: list[float]
    ) -> Choice:
        return replace(
            self._choice(name, run.method, order),
            variant=variant,
            spearman=self._spearman(scores),
            n_proxy=run.ranking.n_facts,
            scope=run.scope,
            loss=run.loss,
            fence=run.fence,
            run=run.run,
            **self._cost(run.ranking.seconds),
        )

    def _choice(self, name: str, method: str, order: Sequence[int]) -> Choice:
        """The first layer of an order judged, and where a golden layer stands in it."""
        layer, swept = order[0], self.truth.layers
        score, regret, note = math.nan, Interval(math.nan, math.nan, math.nan, 0), ""
        if layer in swept:
            score = float(self.truth.means(self.metric)[swept.index(layer)])
            regret = self.truth.regret(layer, self.metric)
        else:
            note = f"layer {layer} was not swept"
        places = [i for i, one in enumerate(order, start=1) if one in self.all_golden]
        rank = places[0] if places else None
        hits = {k: float(rank is not None and rank <= k) for k in HITS}
        return Choice(name, method, layer, score, regret, golden_rank=rank, hit_at=hits, note=note)

    def _spearman(self, scores: Sequence[float]) -> float:
        """With the swept layers' means, over the layers that can be golden."""
        return spearman([scores[i] for i in self.truth.layers], self.eligible.tolist())

    def _cost(self, seconds: float | None) -> dict[str, Any]:
        up = self.sweep_seconds / seconds if seconds and self.sweep_seconds else None
        return {"seconds": seconds, "speed_up": up}


def _distinct(choices: Sequence[Choice]) -> list[Choice]:
    """Equal names told apart by their run, and by a number where that does not do."""
    names = _unique([one.name for one in choices], [one.run for one in choices])
    return [replace(one, name=name) for one, name in zip(choices, names, strict=True)]


def _told_apart(curves: Sequence[SizeCurve], runs: Sequence[str]) -> list[SizeCurve]:
    names = _unique([one.name for one in curves], runs)
    return [replace(one, name=name) for one, name in zip(curves, names, strict=True)]


def _unique(names: Sequence[str], runs: Sequence[str]) -> list[str]:
    named = [
        f"{name} ({run})" if names.count(name) > 1 and run else name
        for name, run in zip(names, runs, strict=True)
    ]
    return [
        f"{name} #{named[:i].count(name) + 1}" if named.count(name) > 1 else name
        for i, name in enumerate(named)
    ]
