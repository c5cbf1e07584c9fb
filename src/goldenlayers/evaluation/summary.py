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
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from goldenlayers.errors import UserError, near_matches
from goldenlayers.evaluation.metrics import DEFAULT_METRICS, metric_of
from goldenlayers.evaluation.scoring import FAILED

Floats = NDArray[np.float64]

COUNTERFACT_METRICS = ("efficacy_success", "paraphrase_success", "neighborhood_success")
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
        counterfact_score: harmonic mean of CounterFact's three success rates; None when one of
            them has no row.
    """

    metrics: Mapping[str, Estimate]
    kinds: Mapping[str, Mapping[str, Estimate]]
    overall: Estimate | None
    overall_of: tuple[str, ...]
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
            "counterfact_score": self.counterfact_score and self.counterfact_score.to_json(),
        }


def fact_scores(
    rows: Iterable[Mapping[str, Any]], metric: str, *, kind: str | None = None
) -> dict[str, float]:
    """Mean score over the probes of each fact, for one metric (and one kind of probe, if given).

    For metrics ``by_kind``, mean over the probes of a kind, then over the kinds. A fact whose rows
    are all unscored is NaN; a fact without a row is absent. Facts in order of the rows.
    """
    owner = metric_of(metric)
    by_kind = owner is not None and owner.by_kind
    probes: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        if row["metric"] != metric or (kind is not None and _kind(row) != kind):
            continue
        kinds = probes.setdefault(row["fact"], {})
        score = _score(row)
        if not math.isnan(score):
            kinds.setdefault(_kind(row) if by_kind else "", []).append(score)
    return {
        fact: _mean([_mean(scores) for scores in kinds.values()]) for fact, kinds in probes.items()
    }


def overall_by_fact(
    rows: Sequence[Mapping[str, Any]], metrics: Sequence[str] = DEFAULT_METRICS
) -> dict[str, float]:
    """Each fact's own Overall: the mean of those of ``metrics`` that are scored for it."""
    per_metric = [fact_scores(rows, metric) for metric in metrics]
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
    columns: list[tuple[str, str | None]] = []
    names = list(dict.fromkeys(row["metric"] for row in rows))
    for name in names:
        kinds = dict.fromkeys(_kind(row) for row in rows if row["metric"] == name and _kind(row))
        columns += [(name, None), *((name, kind) for kind in kinds)]
    facts = {fact: i for i, fact in enumerate(dict.fromkeys(row["fact"] for row in rows))}
    values = np.full((len(facts), len(columns)), np.nan)  # (B, M)
    for column, (name, kind) in enumerate(columns):
        for fact, score in fact_scores(rows, name, kind=kind).items():
            values[facts[fact], column] = score
    means = _nan_mean(values)  # (M,)
    drawn = resampled_means(values, resamples, seed)  # (S, M)
    tail = 50 * (1 - level)

    def estimate(used: list[int], combine: Callable[[Floats], Floats], slopes: Floats) -> Estimate:
        """One figure made of the means of the ``used`` columns; ``slopes`` are its derivatives."""
        some = values[:, used]
        n = int((~np.isnan(some)).any(axis=1).sum())
        value = float(combine(means[used]))
        se = low = high = math.nan
        if n > 1 and not math.isnan(value):
            se = _joint_se(some, means[used], slopes)
            replicates = combine(drawn[:, used])
            # A resample in which a metric has no fact says nothing of the combined figure.
            low, high = np.nanpercentile(replicates, [tail, 100 - tail]).tolist()
        own = [row for c in used for row in rows if _belongs(row, *columns[c])]
        reasons = Counter(_reason(row) for row in own if math.isnan(_score(row)))
        lost = reasons.total()
        return Estimate(value, se, low, high, n, len(own) - lost, lost, dict(reasons))

    single = {
        column: estimate([i], lambda m: m[..., 0], np.ones(1)) for i, column in enumerate(columns)
    }
    where = {name: i for i, (name, kind) in enumerate(columns) if kind is None}
    present = [name for name in dict.fromkeys(overall) if name in where]
    present = [name for name in present if not math.isnan(means[where[name]])] or present
    total = score = None
    if present:
        used = [where[name] for name in present]
        total = estimate(used, lambda m: m.mean(axis=-1), np.full(len(used), 1 / len(used)))
    if all(name in where for name in COUNTERFACT_METRICS):
        used = [where[name] for name in COUNTERFACT_METRICS]
        h = _harmonic(means[used])
        with np.errstate(divide="ignore", invalid="ignore"):
            score = estimate(used, _harmonic, h**2 / (len(used) * means[used] ** 2))
    kinds_of = {
        name: {kind: single[n, kind] for n, kind in columns if n == name and kind is not None}
        for name in names
    }
    return Summary(
        metrics={name: single[name, None] for name in names},
        kinds={name: kinds for name, kinds in kinds_of.items() if kinds},
        overall=total,
        overall_of=tuple(present),
        counterfact_score=score,
    )


def resampled_means(values: ArrayLike, resamples: int = 2000, seed: int = 0) -> Floats:
    """Means over facts of S bootstrap resamples of the facts.

    Args:
        values: (B,) or (B, M), NaN where a fact has no score.
        resamples: S.
        seed: of NumPy's default generator.

    Returns:
        (S,) or (S, M); NaN where no drawn fact has a score.
    """
    table = np.asarray(values, dtype=np.float64)
    flat = table.reshape(len(table), math.prod(table.shape[1:]))
    missing = np.isnan(flat)
    known = np.where(missing, 0.0, flat)
    out = np.full((resamples, flat.shape[1]), np.nan)
    if len(flat):
        generator = np.random.default_rng(seed)
        block = max(1, 1_000_000 // len(flat))  # bounds memory at some tens of MB
        for start in range(0, resamples, block):
            stop = min(start + block, resamples)
            draws = generator.integers(len(flat), size=(stop - start, len(flat)))
            draws += len(flat) * np.arange(stop - start)[:, None]
            size = (stop - start) * len(flat)
            counts = np.bincount(draws.ravel(), minlength=size).reshape(-1, len(flat))
            with np.errstate(invalid="ignore"):
                out[start:stop] = (counts @ known) / (counts @ (~missing).astype(float))
    return out.reshape(resamples, *table.shape[1:])


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


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's rank correlation; ties share their mean rank.

    Pairs with a NaN are left out. NaN when fewer than two pairs remain or one side is constant.

    Raises:
        ValueError: the lengths differ.
    """
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if x.shape != y.shape or x.ndim != 1:
        raise ValueError(f"two lists of one length are needed, got {x.shape} and {y.shape}")
    both = ~(np.isnan(x) | np.isnan(y))
    if both.sum() < 2:
        return math.nan
    x, y = _ranks(x[both]), _ranks(y[both])
    x, y = x - x.mean(), y - y.mean()
    scale = math.sqrt(float(x @ x) * float(y @ y))
    return float(np.clip(x @ y / scale, -1, 1)) if scale > 0 else math.nan


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


# Numbers


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def _nan_mean(values: Floats) -> Floats:
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(known, values, 0.0).sum(axis=0) / known.sum(axis=0)


def _joint_se(values: Floats, means: Floats, slopes: Floats) -> float:
    """Standard error of a figure of several means, by linearisation over facts.

    With one metric, or all metrics scored for all facts and slopes 1/M, it is exactly the standard
    deviation (of the facts' means) over √B. NaN where a slope is not finite (a harmonic mean of 0).
    """
    known = ~np.isnan(values)
    influence = (np.where(known, values - means, 0.0) * slopes / known.sum(axis=0)).sum(axis=1)
    n = int(known.any(axis=1).sum())
    return math.sqrt(n / (n - 1) * float(influence @ influence))


def _harmonic(values: Floats) -> Floats:
    """Along the last axis."""
    with np.errstate(divide="ignore"):
        return values.shape[-1] / (1 / values).sum(axis=-1)


def _ranks(values: Floats) -> Floats:
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[which]
