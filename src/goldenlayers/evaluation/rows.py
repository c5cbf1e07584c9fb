"""Which rows an evaluation has, and what is wrong with a row that was read back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from goldenlayers.errors import UserError
from goldenlayers.evaluation.metrics import Metric, metric_of, questions
from goldenlayers.evaluation.scoring import SHARE, Range, ScoreRow
from goldenlayers.evaluation.summary import AT_ONCE
from goldenlayers.facts import Fact
from goldenlayers.records import short

Key = tuple[str, Any]  # metric and probe

_MOST = 1_000_000  # layers of a model, or facts of a sequence


def score_range(metric: str) -> Range:
    """Lowest and highest score of a row; one whose metric is not known here has no bounds."""
    owner = metric_of(metric)
    found = owner.rows.get(metric) if owner is not None else None
    return found or (SHARE if metric == AT_ONCE else (-math.inf, math.inf))


def problem(row: ScoreRow) -> str:
    """What is wrong with a row, whatever run it is of; "" if nothing is."""
    fact, metric, probe, score = (row.get(n) for n in ("fact", "metric", "probe", "score"))
    if not isinstance(fact, str):
        return f"'fact' is {short(fact)}, not an id"
    if not isinstance(metric, str):
        return f"'metric' is {short(metric)}, not a name"
    if probe is not None and type(probe) is not int:
        return f"'probe' is {short(probe)}, not a number"
    if "score" not in row:
        return "there is no 'score'"
    if score is not None:
        low, high = score_range(metric)
        if type(score) not in (int, float) or not low <= score <= high or math.isinf(score):
            bounds = f" of {low:g} to {high:g}" if high == 100 else ""
            return f"'score' is {short(score)}, no score{bounds} of '{metric}'"
    for name in ("before", "soft"):
        if name in row:
            low, high = score_range(metric)
            was = row[name]
            if type(was) not in (int, float) or not low <= was <= high or math.isinf(was):
                return f"'{name}' is {short(was)}, no score of '{metric}'"
    for name, kind in (("kind", str), ("reason", str), ("evidence", dict)):
        if name in row and not isinstance(row[name], kind):
            return f"'{name}' is {short(row[name])}"
    for name in ("layer", "step"):
        if name in row and not (type(row[name]) is int and 0 <= row[name] < _MOST):
            return f"'{name}' is {short(row[name])}, no number of a {name}"
    return ""


class Expected:
    """The rows that an evaluation of some facts has, and no others.

    Args:
        facts: the judged facts.
        metrics: metrics, or their names in ``METRICS``.
        others: see :func:`goldenlayers.evaluation.metrics.questions`.
        seed: see there.
        layers: of a sweep: each row is there once per layer.
        step: of a sequence of edits: how many facts are edited at a time. Each fact then also has a
            row that is scored right after its own edit.
    """

    def __init__(
        self,
        facts: Sequence[Fact],
        metrics: Sequence[str | Metric],
        *,
        others: Sequence[Fact] | None = None,
        seed: int = 0,
        layers: Sequence[int] | None = None,
        step: int = 0,
    ) -> None:
        self.layers = None if layers is None else frozenset(layers)
        self.step = step
        self.place = {fact.id: i for i, fact in enumerate(facts)}
        self.keys: list[dict[Key, str]] = [{} for _ in facts]
        for question in questions(facts, metrics, others=others, seed=seed):
            for metric in question.row_metrics:
                self.keys[question.fact][metric, question.probe] = question.kind
        if step:
            for keys in self.keys:
                keys[AT_ONCE, 0] = ""

    def problem(self, row: ScoreRow) -> str:
        """What is wrong with a row of this evaluation; "" if nothing is."""
        if wrong := problem(row):
            return wrong
        place = self.place.get(row["fact"])
        if place is None:
            return f"there is no fact {short(row['fact'])} in this run"
        kind = self.keys[place].get((row["metric"], row["probe"]))
        if kind is None:
            return (
                f"fact {short(row['fact'])} has no probe {row['probe']} of {short(row['metric'])}"
            )
        if row.get("kind", "") != kind:
            return f"'kind' is {short(row.get('kind'))}, and the probe's is '{kind}'"
        if ("layer" in row) != (self.layers is not None):
            return "it names a layer" if "layer" in row else "it names no layer"
        if self.layers is not None and row["layer"] not in self.layers:
            return f"layer {row['layer']} is not among those of this run"
        step = place // self.step if self.step else None
        if row.get("step") != step:
            return f"'step' is {short(row.get('step'))}"
        return ""


def key_of(row: ScoreRow) -> tuple[Any, ...]:
    """What tells the rows of a run apart."""
    return row["fact"], row.get("layer"), row["metric"], row["probe"]


def each_once(problem: Callable[[ScoreRow], str]) -> Callable[[ScoreRow], str]:
    """``problem``, and of rows that come one after another also whether one was there before."""
    seen: set[tuple[Any, ...]] = set()

    def check(row: ScoreRow) -> str:
        if wrong := problem(row):
            return wrong
        key = key_of(row)
        if key in seen:
            return "it is there twice"
        seen.add(key)
        return ""

    return check


def refuse_wrong(
    rows: Iterable[ScoreRow], problem: Callable[[ScoreRow], str], where: str | Path
) -> None:
    """Refuse the rows of a finished run if one of them cannot be right.

    Raises:
        UserError: the first such row, by its number.
    """
    for number, row in enumerate(rows, start=1):
        if wrong := problem(row):
            raise UserError(
                f"{where}, row {number}: {wrong}",
                expected="the rows as the run wrote them",
                fix="Put the file back as it was, or make the run again",
            )
