"""Layer choices against the truth of a sweep: score, regret, hits, rank correlation and cost."""

from __future__ import annotations

from goldenlayers.compare.choices import Choice, Comparison
from goldenlayers.compare.judging import compare
from goldenlayers.compare.rules import SIZES, Rule, SizeCurve, rules_of, size_curve
from goldenlayers.compare.runs import LocateRun, overlap_warnings
from goldenlayers.compare.sweeps import SweepRun, transfer_warnings

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
