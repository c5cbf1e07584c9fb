"""Layer choices against the truth of a sweep: score, regret, hits, rank correlation and cost."""

from __future__ import annotations

from goldenlayers.comparing.judging import Choice, Comparison, compare
from goldenlayers.comparing.rules import SIZES, Rule, SizeCurve, rules_of, size_curve
from goldenlayers.comparing.runs import LocateRun, overlap_warnings
from goldenlayers.comparing.sweeps import SweepRun, transfer_warnings

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
