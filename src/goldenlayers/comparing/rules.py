"""Ways to choose a layer from the rows of a locate run, and how they do with fewer proxy facts.

Everything here is re-ranking: no model is run again.

Shapes: N proxy facts, L layers of the model, S subsets of the facts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from goldenlayers.comparing.runs import LocateRun
from goldenlayers.evaluation.bootstrap import Floats
from goldenlayers.locating.base import Fence
from goldenlayers.locating.ranking import choose, keep
from goldenlayers.truth.table import plain

Bools = NDArray[np.bool_]
Scores = Callable[[Floats], tuple[Floats, Bools]]

SIZES = (10, 20, 50, 100, 200, 300)
"""Numbers of proxy facts that are tried, as far as a run has so many."""

REPEATS = 200

VARIANTS: Mapping[str, str] = {"tukey": "tukey", "none": "raw", "last": "inner"}
"""What a choice by S_L is called after its fence."""


@dataclass(frozen=True, eq=False)
class Rule:
    """One way to choose a layer from per-fact rows.

    Attributes:
        name: of the choice.
        variant: what differs from the run: "tukey", "raw", "cosine", "normalised", ...
        run: where the rows are from.
        facts: ids of the usable facts, sorted.
        score: weights (S, N), how often each fact counts → scores (S, L) and which are kept (S, L).
    """

    name: str
    variant: str
    run: LocateRun
    facts: tuple[str, ...]
    score: Scores

    def choose(self, weights: Floats) -> NDArray[np.intp]:
        """Chosen layer (S,) for weights (S, N); ties go to the shallower layer."""
        return choose(*self.score(weights))

    def order(self) -> list[int]:
        """All kept layers by the rule over all facts, best first."""
        scores, kept = (array[0] for array in self.score(np.ones((1, len(self.facts)))))
        return [int(i) for i in np.argsort(-scores, kind="stable") if kept[i]]

    def scores(self) -> list[float]:
        """Layer scores over all facts, (L,)."""
        return self.score(np.ones((1, len(self.facts))))[0][0].tolist()


def rules_of(run: LocateRun) -> list[Rule]:
    """The rules that a run's rows serve; the run's own comes first.

    A run of a method with fences (LGA) serves S_L within Tukey fences (the paper's; κ of the run, 1
    if it had no fence), without ("raw"), and without the last block ("inner"); the mean over facts
    of the two gradients' cosine ("cosine"); and S_L over the summed products of the gradients'
    norms ("normalised": a mean of the cosines in which facts with large gradients count more). The
    last two have no fence. Facts whose scores are not finite are left out, as when locating; a
    cosine of a vanishing gradient counts as missing.

    Other methods serve the mean of their scores. A run without rows serves none, nor does a race.
    """
    if not run.rows or run.ranking.evidence is not None:  # a race tries few facts everywhere
        return []
    phi = run.array("phi")
    usable = np.flatnonzero(np.isfinite(phi).all(axis=1))
    if not len(usable):
        return []
    phi = phi[usable]
    facts = tuple(run.facts[i] for i in usable)

    def rule(name: str, variant: str, score: Scores) -> Rule:
        return Rule(name, variant, run, facts, score)

    if run.fence is None:
        return [rule(run.label, "", _sums(phi, None, "none", 1.0))]
    kappa = 1.0 if run.ranking.kappa is None else run.ranking.kappa
    own = VARIANTS.get(run.ranking.fence, "raw")
    fences: tuple[Fence, ...] = ("tukey", "none", "last")
    found = [
        rule(f"{run.label} {VARIANTS[fence]}", VARIANTS[fence], _sums(phi, None, fence, kappa))
        for fence in sorted(fences, key=lambda fence: VARIANTS[fence] != own)
    ]
    cosine = run.array("cosine")[usable]
    if not np.isnan(cosine).all():
        known = ~np.isnan(cosine)
        score = _sums(np.where(known, cosine, 0.0), known.astype(float), "none", kappa)
        found.append(rule(f"{run.label} cosine", "cosine", score))
    norms = run.array("norm_old")[usable] * run.array("norm_new")[usable]
    if np.isfinite(norms).all():
        score = _sums(phi, norms, "none", kappa)
        found.append(rule(f"{run.label} normalised", "normalised", score))
    return found


def _sums(values: Floats, over: Floats | None, fence: Fence, kappa: float) -> Scores:
    """Weighted sums of values (N, L), divided by those of ``over`` (N, L) or by the weights."""

    def score(weights: Floats) -> tuple[Floats, Bools]:
        total = weights @ values  # (S, L)
        size = weights.sum(axis=1, keepdims=True) if over is None else weights @ over
        # Where nothing counts (only vanishing gradients) a layer has no merit: 0.
        scores = np.divide(total, size, out=np.zeros_like(total), where=size > 0)
        return scores, keep(scores, fence, kappa)

    return score


def combined(first: Rule, second: Rule, name: str) -> Rule | None:
    """The layer with the best mean of its ranks under two rules; None if they share no two facts.

    Layers outside the fences of a rule share its last ranks; equal scores share their mean rank.
    Both rules see the same facts, those that both runs have.
    """
    shared = sorted(set(first.facts) & set(second.facts))
    if len(shared) < 2:
        return None
    at = [[rule.facts.index(fact) for fact in shared] for rule in (first, second)]

    def score(weights: Floats) -> tuple[Floats, Bools]:
        total = np.zeros((len(weights), len(first.run.ranking.layers)))
        for rule, places in zip((first, second), at, strict=True):
            wide = np.zeros((len(weights), len(rule.facts)))
            wide[:, places] = weights
            total -= mean_ranks(*rule.score(wide)) / 2
        return total, np.ones(total.shape, dtype=np.bool_)

    return Rule(name, "mean of ranks", first.run, tuple(shared), score)


def mean_ranks(scores: Floats, kept: Bools) -> Floats:
    """Ranks (S, L) of scores (S, L), 0 the best; equals share theirs, what is not kept comes last.

    Scores that differ by less than the rounding of a sum are equal.
    """
    size = np.abs(scores).max(axis=1, keepdims=True)
    even = np.round(np.divide(scores, size, out=np.zeros_like(scores), where=size > 0), 12)
    keys = np.where(kept, even, -np.inf)
    better = (keys[:, None, :] > keys[:, :, None]).sum(axis=2)
    equal = (keys[:, None, :] == keys[:, :, None]).sum(axis=2)
    return better + (equal - 1) / 2


@dataclass(frozen=True)
class SizePoint:
    """A rule with ``n`` proxy facts, over random subsets of a run's facts.

    ``regret`` is the mean over the subsets, ``sd`` their standard deviation, ``low`` and ``high``
    hold 95 % of them. ``wins`` is the share of subsets that choose a golden layer, ``layer`` what
    is chosen most often and ``agreement`` how often. ``unjudged`` is the share whose choice was
    not swept; they take no part in the other figures but the last two.
    """

    n: int
    repeats: int
    regret: float
    sd: float
    low: float
    high: float
    wins: float
    layer: int
    agreement: float
    unjudged: float

    def to_json(self) -> dict[str, Any]:
        """Plain values; NaN becomes None."""
        return {
            name: plain(value) if isinstance(value, float) else value
            for name, value in vars(self).items()
        }


@dataclass(frozen=True)
class SizeCurve:
    """How a rule does with more and more proxy facts: what a figure needs.

    The subsets are drawn without replacement from one run's facts: near all of them they are
    almost the same, so the spread there says little. The last point is all facts.
    """

    name: str
    points: tuple[SizePoint, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"name": self.name, "points": [point.to_json() for point in self.points]}


def size_curve(
    rule: Rule,
    regrets: Floats,
    *,
    sizes: Sequence[int] = SIZES,
    repeats: int = REPEATS,
    seed: int = 0,
) -> SizeCurve:
    """Choose with random subsets of the facts, and judge each choice.

    Args:
        rule: how to choose.
        regrets: (L,) of every layer of the model; NaN where it was not swept.
        sizes: numbers of facts; those that the run does not have are left out.
        repeats: S.
        seed: of the subsets. Rules over equally many facts see the same subsets.
    """
    n_facts = len(rule.facts)
    points = []
    for n in sorted({size for size in sizes if 0 < size < n_facts} | {n_facts}):
        count = repeats if n < n_facts else 1
        order = np.random.default_rng([seed, n]).random((count, n_facts)).argsort(axis=1)
        weights = np.zeros((count, n_facts))
        np.put_along_axis(weights, order[:, :n], 1.0, axis=1)
        layers = rule.choose(weights)
        lost = regrets[layers]
        judged = lost[~np.isnan(lost)]
        times = np.bincount(layers, minlength=len(regrets))
        figures = [np.nan] * 5
        if len(judged):
            ends = np.percentile(judged, [2.5, 97.5])
            figures = [judged.mean(), judged.std(), *ends, (judged < 1e-9).mean()]
        point = SizePoint(
            n,
            count,
            *map(float, figures),
            layer=int(times.argmax()),
            agreement=float(times.max() / count),
            unjudged=float(np.isnan(lost).mean()),
        )
        points.append(point)
    return SizeCurve(rule.name, tuple(points))


T = TypeVar("T", bound=Any)


def told_apart(found: Sequence[T], runs: Sequence[str]) -> tuple[T, ...]:
    """Equal names told apart by their run, and by a number where that does not do."""
    names = unique([one.name for one in found], runs)
    return tuple(replace(one, name=name) for one, name in zip(found, names, strict=True))


def unique(names: Sequence[str], runs: Sequence[str]) -> list[str]:
    named = [
        f"{name} ({run})" if names.count(name) > 1 and run else name
        for name, run in zip(names, runs, strict=True)
    ]
    return [
        f"{name} #{named[:i].count(name) + 1}" if named.count(name) > 1 else name
        for i, name in enumerate(named)
    ]
