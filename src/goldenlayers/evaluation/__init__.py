"""Evaluation: rows per fact and probe with their evidence, and the figures made of them."""

from __future__ import annotations

from goldenlayers.evaluation.evaluating import Evaluation, evaluate
from goldenlayers.evaluation.metrics import DEFAULT_METRICS, METRICS, Metric, Question
from goldenlayers.evaluation.plan import EvaluationPlan
from goldenlayers.evaluation.scoring import Scoring
from goldenlayers.evaluation.summary import Estimate, Summary, retention, summarise

__all__ = [
    "DEFAULT_METRICS",
    "METRICS",
    "Estimate",
    "Evaluation",
    "EvaluationPlan",
    "Metric",
    "Question",
    "Scoring",
    "Summary",
    "evaluate",
    "retention",
    "summarise",
]
