"""From rows to figures. NumPy only.

Rows are those of ``scoring.ScoreRow``; a score of None or NaN means unscored, and the row says why.
Of a sweep, hand in one layer's rows at a time. Scores are taken in the unit the rows carry and
every figure comes back in it.

Shapes: B facts, M metrics, S bootstrap resamples.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from goldenlayers.errors import UserError, near_matches
from goldenlayers.evaluation.bootstrap import (
    Floats,
    harmonic_mean,
    joint_se,
    nan_mean,
    resampled_means,
)
from goldenlayers.evaluation.metrics import DEFAULT_METRICS, HARMONIC, metric_of
from goldenlayers.evaluation.scoring import FAILED

COUNTERFACT_METRICS = ("efficacy_success", "paraphrase_success", "neighborhood_success")
Of = Literal["score", "before", "soft"]
"""Which number of a row."""
AT_ONCE = "rewrite_at_once"
"""The metric of the rows that are scored right after a fact's own edit in a sequence."""
AGE_BINS = 10


@dataclass(frozen=True)
class Estimate:
    """A mean over facts and how sure it is.

    Attributes:
        mean: NaN when nothing was scored.
        se: standard error over facts; NaN below two facts.
        low: lower end of the percentile bootstrap interval over facts; NaN below two facts. Where
            all facts score the same the interval has no width, which is not certainty.
        high: its upper end.
        facts: facts with at least one scored row.
        scored: rows with a score.
        unscored: rows without one; they never count as 0.
        reasons: how often each reason for an unscored row occurs.
    """

    mean: float
    se: float
    low: float
    high: float
    facts: int
    scored: int
    unscored: int
    reasons: Mapping[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain values; NaN, which JSON does not know, becomes None."""
        values = {**vars(self), "reasons": dict(self.reasons)}
        return {name: None if value != value else value for name, value in values.items()}


@dataclass(frozen=True)
class Summary:
    """What :func:`summarise` found; ``summary["rewrite"]`` is the estimate of a metric.

    Attributes:
        metrics: one estimate per metric, in the order of the rows.
        kinds: for each metric whose rows name kinds, one estimate per kind.
        overall: mean of the means of the metrics named in ``overall_of``; None when none has a row.
        gain: Overall above that of the untouched model on the same rows; None where rows do not say
            what the untouched model scores.
        harmonic: harmonic mean of the metrics named in ``harmonic_of``: as low as its lowest part,
            where Overall rewards an edit that changes nothing; None when none has a row.
        counterfact_score: harmonic mean of CounterFact's three success rates; None when one of
            them has no row.
    """

    metrics: Mapping[str, Estimate]
    kinds: Mapping[str, Mapping[str, Estimate]]
    overall: Estimate | None
    overall_of: tuple[str, ...]
    gain: Estimate | None
    harmonic: Estimate | None
    harmonic_of: tuple[str, ...]
    counterfact_score: Estimate | None

    def __getitem__(self, metric: str) -> Estimate:
        if metric not in self.metrics:
            raise UserError(f"no row is of '{metric}'", fix=near_matches(metric, self.metrics))
        return self.metrics[metric]

    def to_json(self) -> dict[str, Any]:
        """The body of an evaluation's ``summary.json``."""
        return {
            "metrics": {name: one.to_json() for name, one in self.metrics.items()},
            "kinds": {
                name: {kind: one.to_json() for kind, one in kinds.items()}
                for name, kinds in self.kinds.items()
            },
            "overall": self.overall and self.overall.to_json(),
            "overall_of": list(self.overall_of),
            "gain": self.gain and self.gain.to_json(),
            "harmonic": self.harmonic and self.harmonic.to_json(),
            "harmonic_of": list(self.harmonic_of),
            "counterfact_score": self.counterfact_score and self.counterfact_score.to_json(),
        }


def fact_scores(
    rows: Iterable[Mapping[str, Any]],
    metric: str,
    *,
    kind: str | None = None,
    of: Of = "score",
) -> dict[str, float]:
    """Mean score over the probes of each fact, for one metric (and one kind of probe, if given).

    For metrics ``by_kind``, mean over the probes of a kind, then over the kinds. A fact whose rows
    are all unscored is NaN; a fact without a row is absent. Facts in order of the rows.

    ``of`` "before": what the untouched model scores; "soft": the soft scores; where the rows have a
    score and say it.
    """
    owner = metric_of(metric)
    by_kind = owner is not None and owner.by_kind
    probes: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        if row["metric"] != metric or (kind is not None and _kind(row) != kind):
            continue
        kinds = probes.setdefault(row["fact"], {})
        score = _score(row)
        if of != "score" and not math.isnan(score):
            score = float(row.get(of, math.nan))
        if not math.isnan(score):
            kinds.setdefault(_kind(row) if by_kind else "", []).append(score)
    return {
        fact: _mean([_mean(scores) for scores in kinds.values()]) for fact, kinds in probes.items()
    }


def overall_by_fact(
    rows: Sequence[Mapping[str, Any]],
    metrics: Sequence[str] = DEFAULT_METRICS,
    *,
    of: Of = "score",
) -> dict[str, float]:
    """Each fact's own Overall: the mean of those of ``metrics`` that are scored for it."""
    per_metric = [fact_scores(rows, metric, of=of) for metric in metrics]
    facts = dict.fromkeys(fact for scores in per_metric for fact in scores)
    return {
        fact: _mean([s[fact] for s in per_metric if not math.isnan(s.get(fact, math.nan))])
        for fact in facts
    }


def summarise(
    rows: Iterable[Mapping[str, Any]],
    *,
    overall: Sequence[str] = DEFAULT_METRICS,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Summary:
    """Every metric of the rows with its standard error and bootstrap interval.

    The unit of resampling is the fact, and all metrics see the same resamples, so the interval of
    Overall (and of CounterFact's score) carries how the metrics move together.

    Args:
        rows: one per fact and probe.
        overall: metrics whose means are averaged, where present. Fluency is left out by default: it
            lives near 600 and would drown the rest unless its rows were rescaled.
        resamples: S, number of bootstrap resamples.
        level: coverage of the intervals.
        seed: of the resampling.

    Raises:
        ValueError: ``level`` outside (0, 1) or ``resamples`` below 1.
    """
    if not 0 < level < 1 or resamples < 1:
        raise ValueError(f"level {level} must lie in (0, 1), resamples {resamples} above 0")
    rows = list(rows)
    columns: list[Column] = []
    names = list(dict.fromkeys(row["metric"] for row in rows))
    for name in names:
        kinds = dict.fromkeys(_kind(row) for row in rows if row["metric"] == name and _kind(row))
        columns += [(name, None), *((name, kind) for kind in kinds)]
    scores = [fact_scores(rows, name, kind=kind) for name, kind in columns]
    how = _Bootstrap(rows, resamples, seed, 50 * (1 - level))
    table = _Means(how, columns, scores)

    def scored(wanted: Sequence[str]) -> list[str]:
        there = [name for name in dict.fromkeys(wanted) if name in names]
        return [name for name in there if not math.isnan(table.mean(name))] or there

    parts, harmonic_of = scored(overall), scored(HARMONIC)
    gained: list[dict[str, float]] = []
    for name in parts:
        after, before = fact_scores(rows, name), fact_scores(rows, name, of="before")
        gained.append({fact: score - before[fact] for fact, score in after.items()})
    gain = _Means(how, [(name, None) for name in parts], gained).average(parts)
    whole = all(name in names for name in COUNTERFACT_METRICS)
    return Summary(
        metrics={name: table.single((name, None)) for name in names},
        kinds={
            name: kinds
            for name in names
            if (kinds := {k: table.single((n, k)) for n, k in columns if n == name and k})
        },
        overall=table.average(parts),
        overall_of=tuple(parts),
        gain=None if gain is None or math.isnan(gain.mean) else gain,
        harmonic=table.harmonic(harmonic_of),
        harmonic_of=tuple(harmonic_of),
        counterfact_score=table.harmonic(COUNTERFACT_METRICS) if whole else None,
    )


Column = tuple[str, str | None]
"""A metric, and a kind of its probes or None for all."""


@dataclass(frozen=True)
class _Bootstrap:
    """The rows, and how their facts are drawn again; ``tail`` is what an interval leaves out."""

    rows: Sequence[Mapping[str, Any]]
    resamples: int
    seed: int
    tail: float


class _Means:
    """The columns' scores by fact, (B, M), and estimates made of their means."""

    def __init__(
        self, how: _Bootstrap, columns: Sequence[Column], scores: Sequence[Mapping[str, float]]
    ) -> None:
        self.how, self.columns = how, list(columns)
        facts = {fact: i for i, fact in enumerate(dict.fromkeys(row["fact"] for row in how.rows))}
        self.values = np.full((len(facts), len(columns)), np.nan)
        for column, found in enumerate(scores):
            for fact, score in found.items():
                self.values[facts[fact], column] = score
        self.means = nan_mean(self.values)  # (M,)
        self.drawn = resampled_means(self.values, how.resamples, how.seed)  # (S, M)

    def mean(self, metric: str) -> float:
        """Over facts; NaN where nothing is scored."""
        return float(self.means[self.columns.index((metric, None))])

    def single(self, column: Column) -> Estimate:
        """The estimate of one column."""
        return self._estimate([self.columns.index(column)], lambda m: m[..., 0], np.ones(1))

    def average(self, metrics: Sequence[str]) -> Estimate | None:
        """Mean of the metrics' means; None without any."""
        if not metrics:
            return None
        used = [self.columns.index((name, None)) for name in metrics]
        return self._estimate(used, lambda m: m.mean(axis=-1), np.full(len(used), 1 / len(used)))

    def harmonic(self, metrics: Sequence[str]) -> Estimate | None:
        """Harmonic mean of the metrics' means; None without any."""
        if not metrics:
            return None
        used = [self.columns.index((name, None)) for name in metrics]
        h = harmonic_mean(self.means[used])
        with np.errstate(divide="ignore", invalid="ignore"):
            slopes = h**2 / (len(used) * self.means[used] ** 2)
            return self._estimate(used, harmonic_mean, slopes)

    def _estimate(
        self, used: list[int], combine: Callable[[Floats], Floats], slopes: Floats
    ) -> Estimate:
        """One figure made of the means of the ``used`` columns; ``slopes`` are its derivatives."""
        some, tail = self.values[:, used], self.how.tail
        n = int((~np.isnan(some)).any(axis=1).sum())
        value = float(combine(self.means[used]))
        se = low = high = math.nan
        if n > 1 and not math.isnan(value):
            se = joint_se(some, self.means[used], slopes)
            replicates = combine(self.drawn[:, used])
            # A resample in which a metric has no fact says nothing of the combined figure.
            low, high = np.nanpercentile(replicates, [tail, 100 - tail]).tolist()
        own = [row for c in used for row in self.how.rows if _belongs(row, *self.columns[c])]
        reasons = Counter(_reason(row) for row in own if math.isnan(_score(row)))
        lost = reasons.total()
        return Estimate(value, se, low, high, n, len(own) - lost, lost, dict(reasons))


def retention(rows: Iterable[Mapping[str, Any]], bins: int = AGE_BINS) -> list[dict[str, Any]]:
    """Rewrite by the age of an edit, youngest first, from the rows of a sequence.

    The age of a fact is the number of edits that were made after its own; edits that failed do not
    count. Facts are put in at most ``bins`` bins of consecutive ages, as equally filled as can be.

    Args:
        rows: those of the mode "sequential", with "step".
        bins: how many bins at most.

    Returns:
        One ``{"age": [least, most], "facts", "rewrite", "rewrite_at_once"}`` per bin: how many
        facts, their mean rewrite after the last edit and right after their own. Only facts that
        have both count, so that the two means compare. Empty for rows of another mode.
    """
    rows = list(rows)
    made = {
        row["fact"]: row["step"]
        for row in rows
        if row["metric"] == AT_ONCE and not str(row.get("reason", "")).startswith(FAILED)
    }
    steps = np.sort(np.array(list(made.values()), dtype=np.int64))
    final, at_once = fact_scores(rows, "rewrite"), fact_scores(rows, AT_ONCE)
    points = []
    for fact, step in made.items():
        age = len(steps) - int(np.searchsorted(steps, step, side="right"))
        pair = final.get(fact, math.nan), at_once[fact]
        if not any(map(math.isnan, pair)):
            points.append((age, *pair))
    table = np.array(sorted(points), dtype=np.float64).reshape(-1, 3)  # (B, 3)
    return [
        {
            "age": [int(part[0, 0]), int(part[-1, 0])],
            "facts": len(part),
            "rewrite": float(part[:, 1].mean()),
            "rewrite_at_once": float(part[:, 2].mean()),
        }
        for part in np.array_split(table, min(bins, len(table)) or 1)
        if len(part)
    ]


# Rows


def _score(row: Mapping[str, Any]) -> float:
    score = row["score"]
    return math.nan if score is None else float(score)


def _kind(row: Mapping[str, Any]) -> str:
    return row.get("kind") or ""


def _belongs(row: Mapping[str, Any], metric: str, kind: str | None) -> bool:
    return row["metric"] == metric and (kind is None or _kind(row) == kind)


def _reason(row: Mapping[str, Any]) -> str:
    evidence = row.get("evidence")
    inner = evidence.get("reason") if isinstance(evidence, Mapping) else evidence
    return str(row.get("reason") or inner or "no reason given")


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan
