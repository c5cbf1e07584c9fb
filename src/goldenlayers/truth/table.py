"""Scores of every fact at every layer, and what follows from them for layers and single facts:
means over facts with their intervals, and the best layer of a table.

Scores are in the unit of the rows (0 to 100 for shares). What was not scored is NaN, and counted.

Shapes: B facts, L layers, S resamples. Tables are (B, L).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from goldenlayers.errors import UserError, listed
from goldenlayers.evaluation.bootstrap import Floats, harmonic_mean, nan_mean, resampled_means
from goldenlayers.evaluation.metrics import DEFAULT_METRICS, HARMONIC, lower_is_better
from goldenlayers.evaluation.summary import fact_scores, overall_by_fact

MIN_COVERAGE = 0.5
"""A layer scored on a smaller share of the facts cannot be golden: its mean is about others."""


@dataclass(frozen=True)
class Interval:
    """A mean over ``n`` facts (or repeats) and its 95 % percentile interval; NaN where unknown."""

    value: float
    low: float
    high: float
    n: int

    def to_json(self) -> dict[str, Any]:
        """Plain values; NaN becomes None."""
        numbers = {"value": self.value, "low": self.low, "high": self.high}
        return {**{name: plain(number) for name, number in numbers.items()}, "n": self.n}


def ends(values: Floats) -> tuple[float, float]:
    """The 2.5 and 97.5 percentiles of a list, without its NaN."""
    low, high = np.nanpercentile(values, [2.5, 97.5]).tolist()
    return low, high


def percentiles(drawn: Floats) -> Floats:
    """The 2.5 and 97.5 percentiles of every column of (S, L), as (L, 2); NaN of an empty column."""
    empty = np.isnan(drawn).all(0)
    found = np.nanpercentile(np.where(empty, -1.0, drawn), [2.5, 97.5], 0)
    found[:, empty] = np.nan
    return found.T


def estimate(values: Floats, resamples: int, seed: int) -> Interval:
    """Mean of one number per fact, NaN left out, with its bootstrap interval over facts."""
    values = values[~np.isnan(values)]
    if not len(values):
        return Interval(math.nan, math.nan, math.nan, 0)
    if len(values) == 1:
        return Interval(float(values[0]), math.nan, math.nan, 1)
    low, high = ends(resampled_means(values, resamples, seed))
    return Interval(float(values.mean()), low, high, len(values))


def eligible_means(table: Floats) -> Floats:
    """Means by layer, (L,); NaN for layers with too few of the facts that were scored anywhere."""
    known = ~np.isnan(table)
    some = int(known.any(axis=1).sum())
    return np.where(known.sum(axis=0) >= max(1.0, MIN_COVERAGE * some), nan_mean(table), np.nan)


def best_place(table: Floats) -> int | None:
    """Place of the best layer, ties to the shallower; None if there is none."""
    means = eligible_means(table)
    return None if np.isnan(means).all() else int(np.nanargmax(level(means)))


def level(values: Floats) -> Floats:
    """Without the last digits, so that sums in another order do not break ties."""
    return np.round(values, 9)


def row_max(table: Floats) -> Floats:
    """Each fact's best score, (B,); NaN where there is none."""
    known = ~np.isnan(table)
    return np.where(known.any(axis=1), np.where(known, table, -np.inf).max(axis=1), np.nan)


def optimal(table: Floats) -> NDArray[np.bool_]:
    """(B, L): whether a layer is (tied for) the fact's best."""
    table = level(table)
    return table == row_max(table)[:, None]


def plain(value: float) -> float | None:
    """NaN as None, which JSON knows."""
    return None if math.isnan(value) else float(value)


def plain_list(values: Floats) -> list[float | None]:
    """A list for JSON."""
    return [plain(float(value)) for value in values]


def nearest(layers: Iterable[int], layer: int) -> int:
    """The one of some layers that is nearest to a layer, the earlier of two."""
    return min(layers, key=lambda one: (abs(one - layer), one))


OVERALL, GAIN = "overall", "gain"


@dataclass(frozen=True, eq=False)
class Truth:
    """Scores of every fact at every layer, and what follows from them.

    Attributes:
        facts: their ids.
        layers: the swept layers, ascending.
        scores: metric → (B, L) mean score over the fact's probes; "overall" is each fact's mean
            over the metrics of ``overall_of`` that were scored for it, and "gain" how far that is
            above the untouched model's (absent where the rows do not say the latter).
        overall_of: metrics of Overall that occur.
        seed, resamples: of the bootstrap over facts.
    """

    facts: tuple[str, ...]
    layers: tuple[int, ...]
    scores: Mapping[str, Floats]
    overall_of: tuple[str, ...] = ()
    seed: int = 0
    resamples: int = 2000

    @classmethod
    def from_rows(
        cls,
        rows: Iterable[Mapping[str, Any]],
        *,
        seed: int = 0,
    ) -> Truth:
        """Gather a sweep's rows.

        Args:
            rows: {"fact", "layer", "metric", "probe", "kind"?, "score"}; of rows that are there
                twice the first counts.
            seed: of the bootstrap.

        Raises:
            UserError: no rows, or rows without a layer.
        """
        by_layer: dict[int, list[Mapping[str, Any]]] = {}
        facts: dict[str, int] = {}
        metrics: dict[str, None] = {}
        seen: set[tuple[Any, ...]] = set()
        for row in rows:
            layer = row.get("layer")
            if layer is None:
                raise UserError("the rows name no layer", expected="the rows of a sweep")
            key = (row["fact"], layer, row["metric"], row["probe"])
            if key in seen:
                continue
            seen.add(key)
            by_layer.setdefault(int(layer), []).append(row)
            facts.setdefault(row["fact"], len(facts))
            metrics.setdefault(row["metric"])
        if not facts:
            raise UserError("the sweep has no rows yet", fix="Run it again to go on with it")
        layers = tuple(sorted(by_layer))
        names = [*metrics, OVERALL, GAIN]
        scores = {name: np.full((len(facts), len(layers)), np.nan) for name in names}
        for column, layer in enumerate(layers):
            found = {name: fact_scores(by_layer[layer], name) for name in metrics}
            found[OVERALL] = overall_by_fact(by_layer[layer], DEFAULT_METRICS)
            before = overall_by_fact(by_layer[layer], DEFAULT_METRICS, of="before")
            found[GAIN] = {fact: one - before[fact] for fact, one in found[OVERALL].items()}
            for name, values in found.items():
                for fact, score in values.items():
                    scores[name][facts[fact], column] = score
        if np.isnan(scores[GAIN]).all():
            del scores[GAIN]
        present = tuple(name for name in DEFAULT_METRICS if name in metrics)
        return cls(tuple(facts), layers, scores, present, seed)

    def nearest(self, layer: int) -> int:
        """The swept layer nearest to one, the earlier of two."""
        return nearest(self.layers, layer)

    @property
    def metrics(self) -> tuple[str, ...]:
        """All metrics, then Overall and gain."""
        return tuple(self.scores)

    @property
    def leading(self) -> str | None:
        """The metric to go by: Overall, or where none of it was asked for, the first that has a
        golden layer; None if none has.
        """
        for name in (OVERALL, *self.scores):
            if not lower_is_better(name) and best_place(self.scores[name]) is not None:
                return name
        return None

    # --- layers -----------------------------------------------------------------------------------

    def means(self, metric: str = OVERALL) -> Floats:
        """Mean score by layer, (L,), over the facts scored there; NaN where none is."""
        return nan_mean(self.table(metric))

    def scored(self, metric: str = OVERALL) -> NDArray[np.int64]:
        """Facts scored by layer, (L,)."""
        return (~np.isnan(self.table(metric))).sum(axis=0)

    def missing(self, metric: str = OVERALL) -> int:
        """Cells (fact × layer) without a score."""
        return int(np.isnan(self.table(metric)).sum())

    def intervals(self, metric: str = OVERALL) -> Floats:
        """95 % bootstrap interval over facts of the mean by layer, (L, 2); NaN below two facts."""
        table = self.table(metric)
        if len(table) < 2:
            return np.full((len(self.layers), 2), np.nan)
        ends = percentiles(resampled_means(table, self.resamples, self.seed))
        ends[self.scored(metric) < 2] = np.nan
        return ends

    @property
    def harmonic_of(self) -> tuple[str, ...]:
        """What the harmonic mean is made of: those of its metrics that were scored."""
        return tuple(name for name in HARMONIC if name in self.scores and self.scored(name).any())

    def harmonic(self) -> Floats:
        """By layer the harmonic mean of the means of ``harmonic_of``, (L,): it is low where one of
        them is, as of no edit at all.
        """
        return harmonic_mean(nan_mean(self._parts()))

    def harmonic_intervals(self) -> Floats:
        """95 % bootstrap interval over facts of the harmonic mean by layer, (L, 2)."""
        return percentiles(harmonic_mean(resampled_means(self._parts(), self.resamples, self.seed)))

    def _parts(self) -> Floats:
        """The tables of ``harmonic_of``, (B, L, M); a column of NaN where there is none."""
        nothing = np.full((len(self.facts), len(self.layers)), np.nan)
        return np.stack([self.table(name) for name in self.harmonic_of] or [nothing], axis=-1)

    def golden_layer(self, metric: str = OVERALL) -> int:
        """The layer with the best mean; ties go to the shallower one.

        Raises:
            UserError: nothing was scored.
        """
        place = None if lower_is_better(metric) else best_place(self.table(metric))
        if place is None:
            raise UserError(f"there is no golden layer by {metric}: nothing to rank was scored")
        return self.layers[place]

    def ranking(self, metric: str = OVERALL) -> list[int]:
        """Layers by mean score, best first; those that cannot be golden are left out."""
        means = level(eligible_means(self.table(metric)))
        some = [i for i in range(len(means)) if not math.isnan(means[i])]
        return [self.layers[i] for i in sorted(some, key=lambda i: (-means[i], i))]

    def wins(self, metric: str = OVERALL) -> dict[int, float]:
        """Layer → share of the bootstrap resamples of the facts in which it is golden."""
        table = self.table(metric)
        drawn = resampled_means(table, self.resamples, self.seed)
        drawn[:, np.isnan(eligible_means(table))] = np.nan
        drawn = drawn[~np.isnan(drawn).all(1)]
        counts = np.bincount(np.nanargmax(level(drawn), 1), minlength=len(self.layers))
        shares = counts / max(1, len(drawn))
        return dict(zip(self.layers, shares.tolist(), strict=True))

    # --- single facts -----------------------------------------------------------------------------

    def histogram(self, metric: str = OVERALL, *, split: bool = True) -> Floats:
        """How many facts have their optimum at each layer, (L,).

        Many facts have several best layers: with ``split`` each of k counts 1/k; otherwise the
        shallowest counts 1.
        """
        best = optimal(self.table(metric))
        some = best.any(axis=1)
        if split:
            return (best[some] / best[some].sum(axis=1, keepdims=True)).sum(axis=0)
        return np.bincount(best[some].argmax(axis=1), minlength=len(self.layers)).astype(float)

    def oracle(self, metric: str = OVERALL) -> Interval:
        """Mean of each fact's own best score: what no fixed layer can beat.

        It is the best of L noisy numbers, so with many layers it is high even where depth does
        not matter.
        """
        return self._estimate(row_max(self.table(metric)))

    def gap(self, metric: str = OVERALL) -> Interval:
        """Oracle minus golden layer, fact by fact, over the facts scored at the golden layer."""
        table = self.table(metric)
        golden = self.layers.index(self.golden_layer(metric))
        return self._estimate(row_max(table) - table[:, golden])

    def regret(self, layer: int, metric: str = OVERALL) -> Interval:
        """Golden layer's mean minus ``layer``'s, with its interval over facts (paired).

        The golden layer is the one of all facts, held fixed in the resamples.

        Raises:
            UserError: the layer was not swept.
        """
        if layer not in self.layers:
            raise UserError(
                f"layer {layer} was not swept",
                expected="one of " + ", ".join(map(str, self.layers)),
            )
        pair = self.table(metric)[
            :, [self.layers.index(self.golden_layer(metric)), self.layers.index(layer)]
        ]
        golden, chosen = nan_mean(pair)
        both = int((~np.isnan(pair)).all(axis=1).sum())
        low = high = math.nan
        if both > 1:
            drawn = resampled_means(pair, self.resamples, self.seed)
            low, high = ends(drawn[:, 0] - drawn[:, 1])
        return Interval(float(golden - chosen), low, high, both)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What to know before leaning on these figures."""
        found = []
        metric = self.leading or next((m for m in self.scores if self.scored(m).any()), OVERALL)
        counts, n = self.scored(metric), len(self.facts)
        thin = [layer for layer, c in zip(self.layers, counts, strict=True) if c < n]
        if thin:
            cells = self.missing(metric)
            found.append(
                f"{cells} of {n * len(self.layers)} cells have no score (layers "
                f"{listed(thin)}): the layers' means are over different facts"
            )
        barred = [self.layers[i] for i in np.flatnonzero(counts < MIN_COVERAGE * n)]
        if barred and len(barred) < len(self.layers):
            found.append(
                f"layers {listed(barred)} are scored on less than half of the facts and cannot be "
                "golden"
            )
        if n < 30:
            found.append(f"{n} facts are few: see the intervals")
        return tuple(found)

    def table(self, metric: str = OVERALL) -> Floats:
        """(B, L) of a metric.

        Raises:
            UserError: the sweep did not score it.
        """
        if metric not in self.scores:
            raise UserError(f"the sweep has no '{metric}'", expected=", ".join(self.scores))
        return self.scores[metric]

    def _estimate(self, values: Floats) -> Interval:
        return estimate(values, self.resamples, self.seed)
