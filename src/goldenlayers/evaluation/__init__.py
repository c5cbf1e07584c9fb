"""Evaluation: rows per fact and probe with their evidence, and the figures made of them."""

from __future__ import annotations

from goldenlayers.evaluation.evaluating import Evaluation, evaluate
from goldenlayers.evaluation.metrics import Estimate, Summary, summarise
from goldenlayers.evaluation.plan import EvaluationPlan
from goldenlayers.evaluation.questions import DEFAULT_METRICS, METRICS
from goldenlayers.evaluation.retention import retention

__all__ = [
    "DEFAULT_METRICS",
    "METRICS",
    "Estimate",
    "Evaluation",
    "EvaluationPlan",
    "Summary",
    "evaluate",
    "retention",
    "summarise",
]
