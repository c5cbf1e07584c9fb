"""The forgetting curve against planted sequences."""

from __future__ import annotations

import json
from typing import Any

import pytest

from goldenlayers.evaluation.summary import retention


def sequence(final: list[float | None], at_once: list[float | None]) -> list[dict[str, Any]]:
    """Rows of facts edited in turn; the last first, as order must not matter."""
    rows = []
    for step, scores in enumerate(zip(final, at_once, strict=True)):
        for metric, score in zip(("rewrite", "rewrite_at_once"), scores, strict=True):
            row = {"fact": f"f{step}", "metric": metric, "probe": 0, "score": score, "step": step}
            rows.append(row | ({} if score is not None else {"reason": "no number"}))
        rows.append({"fact": f"f{step}", "metric": "locality", "probe": 0, "score": 1.0})
    return rows[::-1]


def test_what_came_long_ago_is_the_most_forgotten() -> None:
    # Each edit takes one point from every earlier one.
    n = 25
    found = retention(sequence([100.0 - (n - 1 - i) for i in range(n)], [100.0] * n))
    assert len(found) == 10 and sum(one["facts"] for one in found) == n
    assert found[0]["age"] == [0, 2] and found[-1]["age"] == [23, 24]
    for one in found:
        least, most = one["age"]
        assert one["facts"] == most - least + 1  # every age once, none in two bins
        assert one["rewrite"] == pytest.approx(100 - (least + most) / 2)
        assert one["rewrite_at_once"] == 100
    assert [one["age"][0] for one in found] == sorted(one["age"][0] for one in found)
    assert len(retention(sequence([1.0] * n, [1.0] * n), bins=3)) == 3


def test_few_facts_have_a_bin_each() -> None:
    found = retention(sequence([40.0, 50.0], [90.0, 50.0]))
    assert found == [
        {"age": [0, 0], "facts": 1, "rewrite": 50.0, "rewrite_at_once": 50.0},
        {"age": [1, 1], "facts": 1, "rewrite": 40.0, "rewrite_at_once": 90.0},
    ]
    assert json.loads(json.dumps(found)) == found  # plain values


def test_edits_that_failed_age_nobody_and_unscored_facts_are_left_out() -> None:
    rows = sequence([10.0, None, 30.0, None], [11.0, None, 31.0, 41.0])
    for row in rows:
        if row["fact"] == "f1" and row["score"] is None:
            row["reason"] = "the edit failed: abnormal key"
    # f1 was never edited; f3 was, though it has no score at the end: f0 saw two edits come.
    assert [(one["age"], one["rewrite"]) for one in retention(rows)] == [
        ([1, 1], 30.0),
        ([2, 2], 10.0),
    ]


def test_rows_of_another_mode_have_no_curve() -> None:
    assert retention([]) == []
    rows = [{"fact": "a", "metric": "rewrite", "probe": 0, "score": 3.0}]
    assert retention(rows) == []
    assert retention(sequence([None], [5.0])) == []
