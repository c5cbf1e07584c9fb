"""What an edit is worth, in one number: the mean of its scores, from hits or from probabilities.

A hit says little: 0 or 100. A probability says more, but not the same: an answer with probability
0.4 is all but always the likeliest, and a prediction of which three quarters are left has changed
in every second case. So a probability counts as the share of hits that is expected of it, which
is read off two curves. They were drawn from sweeps of two models on two data sets and are alike in
these; where answers have several tokens, low probabilities are right more often
(docs/results/golden-layers.md has the shares). What is chosen by expected hits is then judged by
real ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from goldenlayers.errors import UserError, check_number
from goldenlayers.evaluation.bootstrap import Floats
from goldenlayers.evaluation.summary import fact_scores

Row = Mapping[str, Any]
By = Literal["expected", "hits", "both", "soft"]

ANSWERED = ((0, 0), (5, 3), (15, 43), (25, 68), (35, 87), (45, 98), (55, 100), (100, 100))
"""Probability of an answer and how often it is the likeliest, both in percent."""
KEPT = ((0, 0), (40, 3), (55, 28), (65, 40), (75, 53), (85, 73), (95, 93), (100, 100))
"""How much of a prediction is left and how often it is the same, both in percent."""


def expected_hits(metric: str, soft: float) -> float:
    """The share of hits, in percent, that is expected at a soft score of a metric (percent)."""
    curve = KEPT if metric.startswith("locality") else ANSWERED
    return float(np.interp(soft, [x for x, _ in curve], [y for _, y in curve]))


@dataclass(frozen=True, kw_only=True)
class Worth:
    """What a fact's edit is worth, from 0 to 100: the mean of its rewrite, rephrase, locality and
    portability, as far as it has them.

    Locality is the weighted mean of the two sorts of probes, those about the edited subject and
    those about others; equal weights stand for no preference. See docs/evaluation.md.

    Attributes:
        subject: weight of the probes about the edited subject.
        neighbour: weight of the probes about others.
        by: "expected" hits, "hits" as reports count them, the mean of "both", or "soft" scores as
            they are.
    """

    subject: float = 1.0
    neighbour: float = 1.0
    by: By = "expected"

    def __post_init__(self) -> None:
        """Check the weights.

        Raises:
            UserError: a negative weight.
        """
        check_number("the weight of the subject", self.subject, 0, 1e6, whole=False)
        check_number("the weight of the neighbours", self.neighbour, 0, 1e6, whole=False)
        if self.by not in get_args(By):
            raise UserError(f"by is {self.by!r}", expected=", ".join(get_args(By)))

    def by_fact(self, rows: Sequence[Row]) -> dict[str, float]:
        """Each fact's worth, from the rows of its edit at one layer; NaN without any score."""

        def mean(metric: str) -> dict[str, float]:
            if self.by == "hits":
                return fact_scores(rows, metric)
            if self.by == "soft":
                return fact_scores(rows, metric, of="soft")
            mine = [_expected(row) for row in rows if row["metric"] == metric]
            expected = fact_scores(mine, metric, of="soft")
            if self.by == "expected":
                return expected
            return {
                fact: (hits + expected[fact]) / 2
                for fact, hits in fact_scores(rows, metric).items()
            }

        parts = [mean("rewrite"), mean("rephrase"), mean("portability"), {}]
        sorts = [
            (weight, mean(f"locality_{sort}"))
            for sort, weight in (("subject", self.subject), ("neighbour", self.neighbour))
        ]
        facts = dict.fromkeys(row["fact"] for row in rows)
        for fact in facts:
            there = [(w, s[fact]) for w, s in sorts if w and not math.isnan(s.get(fact, math.nan))]
            if there:
                total = math.fsum(weight for weight, _ in there)
                parts[-1][fact] = math.fsum(weight * score for weight, score in there) / total
        found = {}
        for fact in facts:
            own = [part[fact] for part in parts if not math.isnan(part.get(fact, math.nan))]
            found[fact] = math.fsum(own) / len(own) if own else math.nan
        return found


def table_of(
    rows: Iterable[Row], worth: Worth | None = None
) -> tuple[list[str], list[int], Floats]:
    """A sweep's rows as a race sees them: facts, layers (ascending), and the scores (N, K).

    Args:
        rows: of ``scores.jsonl``.
        worth: what an edit is worth; by default by probabilities, with equal weights.
    """
    by_layer: dict[int, list[Row]] = {}
    facts: dict[str, int] = {}
    for row in rows:
        by_layer.setdefault(int(row["layer"]), []).append(row)
        facts.setdefault(row["fact"], len(facts))
    layers = sorted(by_layer)
    table = np.full((len(facts), len(layers)), np.nan)
    for column, layer in enumerate(layers):
        for fact, score in (worth or Worth()).by_fact(by_layer[layer]).items():
            table[facts[fact], column] = score
    return list(facts), layers, table


def _expected(row: Row) -> Row:
    soft = row.get("soft")
    return row if soft is None else {**row, "soft": expected_hits(row["metric"], soft)}
