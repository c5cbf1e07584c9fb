"""The algebra of changes and deltas."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from deltas import low

from goldenlayers.delta import Dense, LowRank, WeightDelta
from goldenlayers.errors import UserError


@pytest.mark.parametrize("rank", [1, 3, 20])
def test_norm_and_singular_values_without_materialising(rank: int) -> None:
    change = low(12, 17, rank, 0, torch.float64)
    dense = change.left @ change.right.T
    assert change.norm() == pytest.approx(float(dense.norm()), rel=1e-12)
    expected = torch.linalg.svdvals(dense)[: min(rank, 12)]
    torch.testing.assert_close(change.singular_values()[: len(expected)], expected)


def test_norm_survives_cancellation() -> None:
    change = low(12, 17, 1, 0, torch.float64)
    almost = change.plus(change.scaled(-1.0 + 2**-20))
    assert almost.norm() == pytest.approx(change.norm() * 2**-20, rel=1e-8)


def test_sum_is_the_sum_and_keeps_factors() -> None:
    a, b = low(6, 9, 2, 0), low(6, 9, 3, 1)
    total = a.plus(b)
    assert isinstance(total, LowRank) and total.rank == 5
    torch.testing.assert_close(total.dense, a.dense + b.dense)
    for mixed in (a.plus(Dense(b.dense)), Dense(b.dense).plus(a)):
        assert isinstance(mixed, Dense)
        torch.testing.assert_close(mixed.value, a.dense + b.dense)


def test_algebra_of_deltas() -> None:
    about: dict[str, Any] = {"base_fingerprint": "f", "base_name": "m", "method": "rome"}
    a = WeightDelta({"x.weight": low(6, 9, 2, 0)}, **about, layers=[3], facts=[{"id": "1"}])
    b = WeightDelta(
        {"x.weight": low(6, 9, 1, 1), "y.weight": low(4, 4, 1, 2)},
        **about,
        layers=[1],
        facts=[{"id": "2"}],
    )
    total = a + b
    torch.testing.assert_close(total.dense("x.weight"), a.dense("x.weight") + b.dense("x.weight"))
    torch.testing.assert_close(total.dense("y.weight"), b.dense("y.weight"))
    assert (total.layers, total.method, total.rank("x.weight")) == ((1, 3), "rome", 3)
    assert [fact["id"] for fact in total.facts] == ["1", "2"]
    torch.testing.assert_close(
        (total - b).dense("x.weight"), a.dense("x.weight"), atol=1e-6, rtol=1e-5
    )
    assert (total - b).facts == a.facts
    assert (a - b).facts == ({"id": "1"}, {"id": "2", "undone": True})
    torch.testing.assert_close((2 * a).dense("x.weight"), 2 * a.dense("x.weight"))
    torch.testing.assert_close((-a * 0.5).dense("x.weight"), -0.5 * a.dense("x.weight"))
    assert (-a * 0.5).settings["scale"] == -0.5
    summed = sum([a, b, a])
    assert isinstance(summed, WeightDelta)
    torch.testing.assert_close(
        summed.dense("x.weight"), 2 * a.dense("x.weight") + b.dense("x.weight")
    )


def test_settings_of_a_sum_name_every_part() -> None:
    parts = [
        WeightDelta({"x.weight": low(6, 9, 1, i)}, method="rome", settings={"steps": i})
        for i in range(3)
    ]
    total = parts[0] + parts[1] + parts[2]
    assert [part["steps"] for part in total.settings["parts"]] == [0, 1, 2]


def test_compress_finds_the_rank() -> None:
    a, b = low(12, 17, 2, 0), low(12, 17, 1, 1)
    delta = WeightDelta({"x.weight": a.plus(b).plus(a.scaled(3.0)).plus(b.scaled(-1.0))})
    small = delta.compress(1e-5)
    assert (delta.rank(), delta.numerical_rank(rtol=1e-5), small.rank()) == (6, 2, 2)
    torch.testing.assert_close(
        small.dense("x.weight"), delta.dense("x.weight"), atol=1e-4, rtol=1e-4
    )
    nothing = WeightDelta({"x.weight": a.scaled(0.0)}).compress()
    assert nothing.rank() == 0 and nothing.dense("x.weight").abs().max() == 0
    assert nothing.numerical_rank() == 0
    wide = WeightDelta({"x.weight": low(4, 5, 9, 0)})  # more columns than the matrix has
    assert wide.compress().rank() == 4
    torch.testing.assert_close(
        wide.compress().dense("x.weight"), wide.dense("x.weight"), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LowRank(torch.ones(3, 2), torch.ones(4, 1)), "2 and 1 columns"),
        (lambda: LowRank(torch.ones(3), torch.ones(4, 1)), "shape"),
        (lambda: LowRank(torch.ones(3, 1), torch.full((4, 1), torch.nan)), "NaN"),
        (lambda: Dense(torch.tensor([[1.0, torch.inf]])), "NaN or infinite"),
        (lambda: Dense(torch.ones(2, 2, dtype=torch.long)), "floating"),
        (lambda: WeightDelta({"x.weight": cast(Any, torch.ones(2, 2))}), "LowRank or Dense"),
        (lambda: WeightDelta({"x.weight": low(2, 2, 1, 0)}) * float("nan"), "scaled by nan"),
        (
            lambda: WeightDelta({}, base_fingerprint="a") + WeightDelta({}, base_fingerprint="b"),
            "different weights",
        ),
        (
            lambda: (
                WeightDelta({"x.weight": low(2, 3, 1, 0)})
                + WeightDelta({"x.weight": low(3, 2, 1, 0)})
            ),
            "different shapes",
        ),
        (lambda: WeightDelta({"x.weight": low(2, 3, 1, 0)}).rank("y.weight"), "does not change"),
    ],
)
def test_nonsense_is_refused(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


def test_moved_and_printed() -> None:
    delta = WeightDelta(
        {"x.weight": low(6, 9, 2, 0), "y.weight": Dense(torch.ones(2, 3))}, method="rome"
    )
    moved = delta.to("cpu")
    assert all(torch.equal(moved.dense(name), delta.dense(name)) for name in delta.changes)
    assert repr(delta).startswith("WeightDelta(rome") and "2 matrices, rank 2" in repr(delta)


def test_deltas_add_only_to_deltas() -> None:
    delta: Any = WeightDelta({"x.weight": low(6, 9, 2, 0)})
    for wrong in (lambda: delta + 1, lambda: delta - 1, lambda: delta * "2", lambda: 1 + delta):
        with pytest.raises(TypeError):
            wrong()


def test_a_changes_mapping_is_the_deltas_own() -> None:
    changes: dict[str, LowRank | Dense] = {"x.weight": low(6, 9, 2, 0)}
    delta = WeightDelta(changes)
    changes.clear()
    assert list(delta.changes) == ["x.weight"]
    with pytest.raises(TypeError):
        cast(Any, delta.changes)["y.weight"] = low(2, 2, 1, 0)
