"""Each closed form against a dense solve of its own objective, in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from goldenlayers.editors.updates import (
    alphaedit_update,
    append_keys,
    emmet_update,
    memit_update,
    null_space_projector,
    r_rome_update,
    rome_update,
    spread_residual,
)
from goldenlayers.errors import UserError
from goldenlayers.statistics.moments import Covariance

F, D, N = 14, 6, 4


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariance(ridge: float = 0.01) -> Covariance:
    """Keys of a spectrum over two decades in a rotated basis, as real ones have."""
    keys = torch.linalg.qr(normal(F, F, seed=1))[0] * torch.logspace(-1, 1, F).double()
    keys = keys @ normal(F, 200, seed=2)
    return Covariance.from_matrix(keys @ keys.T / 200, ridge)


def spread(delta: Tensor, C: Tensor) -> Tensor:
    """tr(ΔW C ΔWᵀ), the change of values the text's keys would see."""
    return (delta @ C * delta).sum()


def constrained(C: Tensor, K: Tensor, R: Tensor) -> Tensor:
    """Solve the KKT system of: minimise tr(ΔW C ΔWᵀ) subject to ΔW K = R."""
    n = K.shape[1]
    system = torch.cat(
        [torch.cat([2 * C, K], dim=1), torch.cat([K.T, torch.zeros(n, n).double()], dim=1)]
    )
    right = torch.cat([torch.zeros(F, D).double(), R.T])
    return torch.linalg.solve(system, right)[:F].T


def rises(objective: Callable[[Tensor], Tensor], best: Tensor, mask: Tensor | None = None) -> bool:
    """Whether every one of 20 small random steps (right-multiplied by ``mask``) goes uphill."""
    at_best = objective(best)
    steps = [1e-3 * best.norm() * normal(D, F, seed=100 + i) / (D * F) ** 0.5 for i in range(20)]
    if mask is not None:
        steps = [step @ mask for step in steps]
    return all(bool(objective(best + step) > at_best) for step in steps)


# ROME


def test_rome_meets_its_constraint_at_the_bare_key():
    cov, W = covariance(), normal(D, F, seed=3)
    k_star = normal(F, seed=4)
    k_bare, target = k_star + 0.1 * normal(F, seed=5), normal(D, seed=6)
    update = rome_update(cov, k_star, k_bare, target, W @ k_bare)
    torch.testing.assert_close((W + update.dense) @ k_bare, target, rtol=0, atol=1e-11)
    assert update.rank == 1 and int(torch.linalg.matrix_rank(update.dense)) == 1
    # The wrong key does not meet it: the constraint is at the bare prompt.
    assert ((W + update.dense) @ k_star - target).norm() > 1e-3
    # Rows of ΔW lie along C⁻¹k*.
    u = torch.linalg.inv(cov.matrix()) @ k_star
    assert abs(torch.cosine_similarity(update.dense[0], u, dim=0)) > 1 - 1e-10


def test_r_rome_is_the_smallest_change_that_meets_the_constraint():
    cov, W = covariance(), normal(D, F, seed=3)
    k, target = normal(F, seed=4), normal(D, seed=6)
    delta = r_rome_update(cov, k, target, W @ k).dense
    C = cov.matrix()
    expected = constrained(C, k[:, None], (target - W @ k)[:, None])
    torch.testing.assert_close(delta, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close((W + delta) @ k, target, rtol=0, atol=1e-11)
    feasible = torch.eye(F).double() - torch.outer(k, k) / k.dot(k)  # steps that keep ΔW k
    assert rises(lambda d: spread(d, C), delta, feasible)
    # Negative control: without the covariance the constraint holds too, at a higher price.
    plain = torch.outer(target - W @ k, k) / k.dot(k)
    assert spread(plain, C) > 1.2 * spread(delta, C)


def test_rome_with_one_key_is_r_rome_and_takes_a_given_direction():
    cov, W = covariance(), normal(D, F, seed=3)
    K, target = normal(F, 3, seed=4), normal(D, seed=6)
    k = K[:, 1]
    one = rome_update(cov, k, k, target, W @ k)
    other = r_rome_update(cov, k, target, W @ k, direction=cov.solve(K)[:, 1])
    torch.testing.assert_close(one.dense, other.dense, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sign", [1e-4, -1.0])
def test_rome_refuses_a_bare_key_across_or_against_the_mean_key(sign: float):
    cov, k_star = covariance(), normal(F, seed=4)
    u = cov.solve(k_star)
    across = normal(F, seed=5)
    across -= k_star * across.dot(u) / k_star.dot(u)
    value = normal(D, seed=6)
    with pytest.raises(UserError, match="r-rome"):
        rome_update(cov, k_star, across + sign * k_star, value, 0 * value)
    # The same key with enough of k* in it is accepted.
    rome_update(cov, k_star, across + 0.5 * k_star, value, 0 * value)


# MEMIT


@pytest.mark.parametrize("lam", [0.3, 1.0, 15_000.0])
def test_memit_minimises_its_least_squares_objective(lam: float):
    cov, K, R = covariance(), normal(F, N, seed=7), normal(D, N, seed=8)
    update = memit_update(cov, K, R, lam)
    # ‖ΔW [K √λL] − [R 0]‖² with C = LLᵀ, stacked and solved as one least-squares problem.
    L = torch.linalg.cholesky(cov.matrix())
    A = torch.cat([K, lam**0.5 * L], dim=1)
    B = torch.cat([R, torch.zeros(D, F).double()], dim=1)
    expected = torch.linalg.lstsq(A.T, B.T).solution.T
    torch.testing.assert_close(update.dense, expected, rtol=1e-8, atol=1e-12)
    direct = R @ K.T @ torch.linalg.inv(lam * cov.matrix() + K @ K.T)
    torch.testing.assert_close(update.dense, direct, rtol=1e-8, atol=1e-12)
    assert update.rank == N and update.warnings == ()

    def objective(delta: Tensor) -> Tensor:
        return lam * spread(delta, cov.matrix()) + (delta @ K - R).square().sum()

    assert rises(objective, update.dense)


def test_memit_lambda_trades_the_edit_for_what_is_kept():
    cov, K, R = covariance(), normal(F, N, seed=7), normal(D, N, seed=8)
    loose, tight = memit_update(cov, K, R, 0.1), memit_update(cov, K, R, 100.0)
    assert (loose.dense @ K - R).norm() < 0.2 * (tight.dense @ K - R).norm()
    assert spread(loose.dense, cov.matrix()) > spread(tight.dense, cov.matrix())


def test_memit_takes_the_same_fact_twice_and_more_facts_than_width():
    cov, K, R = covariance(), normal(F, N, seed=7), normal(D, N, seed=8)
    twice = memit_update(cov, torch.cat([K, K], 1), torch.cat([R, R], 1), 2.0)
    once = memit_update(cov, K, R, 1.0)  # two copies weigh twice against λ
    torch.testing.assert_close(twice.dense, once.dense, rtol=1e-9, atol=1e-10)
    K, R = normal(F, 3 * F, seed=9), normal(D, 3 * F, seed=10)
    direct = R @ K.T @ torch.linalg.inv(1.0 * cov.matrix() + K @ K.T)
    torch.testing.assert_close(memit_update(cov, K, R, 1.0).dense, direct, rtol=1e-8, atol=1e-9)


# EMMET


def test_emmet_is_the_smallest_change_that_meets_every_equality():
    cov, K, R = covariance(), normal(F, N, seed=7), normal(D, N, seed=8)
    update = emmet_update(cov, K, R)
    C = cov.matrix()
    torch.testing.assert_close(update.dense @ K, R, rtol=0, atol=1e-10)
    torch.testing.assert_close(update.dense, constrained(C, K, R), rtol=0, atol=1e-9)
    basis = torch.linalg.qr(K)[0]
    feasible = torch.eye(F).double() - basis @ basis.T
    assert rises(lambda d: spread(d, C), update.dense, feasible)
    assert update.warnings == ()
    # Negative control: MEMIT's softened form does not meet the equality.
    assert (memit_update(cov, K, R, 1.0).dense @ K - R).norm() > 1e-3


def test_emmet_of_one_fact_is_r_rome_and_with_lambda_is_memit():
    cov, K, R = covariance(), normal(F, N, seed=7), normal(D, N, seed=8)
    rome = r_rome_update(cov, K[:, 0], R[:, 0], 0 * R[:, 0])
    torch.testing.assert_close(
        emmet_update(cov, K[:, :1], R[:, :1]).dense, rome.dense, rtol=1e-9, atol=1e-11
    )
    lam = 0.7
    G = K.T @ torch.linalg.inv(cov.matrix())
    direct = R @ torch.linalg.inv(G @ K + lam * torch.eye(N).double()) @ G
    update = emmet_update(cov, K, R, lam)
    torch.testing.assert_close(update.dense, direct, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(update.dense, memit_update(cov, K, R, lam).dense)


@pytest.mark.parametrize("noise", [0.0, 1e-7])
def test_emmet_takes_a_fact_given_twice_with_a_warning(noise: float):
    cov, K, R = covariance(), normal(F, N, seed=7), normal(D, N, seed=8)
    twin = K[:, :1] + noise * normal(F, 1, seed=11)
    update = emmet_update(cov, torch.cat([K, twin], 1), torch.cat([R, R[:, :1]], 1))
    torch.testing.assert_close(update.dense, emmet_update(cov, K, R).dense, rtol=1e-5, atol=1e-5)
    assert update.rank == N
    assert len(update.warnings) == 1 and "1 of 5 keys" in update.warnings[0]
    assert "contradict" not in update.warnings[0]


def test_emmet_meets_contradicting_targets_half_way_and_says_so():
    cov, K, R = covariance(), normal(F, N, seed=7), normal(D, N, seed=8)
    update = emmet_update(cov, torch.cat([K, K[:, :1]], 1), torch.cat([R, -R[:, :1]], 1))
    reached = update.dense @ K
    torch.testing.assert_close(reached[:, 0], 0 * R[:, 0], rtol=0, atol=1e-8)
    torch.testing.assert_close(reached[:, 1:], R[:, 1:], rtol=0, atol=1e-8)
    assert "contradict" in update.warnings[0]


# AlphaEdit


def dense_projector(cov: Covariance, bound: float) -> tuple[Tensor, Tensor]:
    """P and the protected basis Q, from the definition."""
    values, vectors = torch.linalg.eigh(cov.matrix(with_ridge=False))
    kept = vectors[:, values < bound]
    return kept @ kept.T, vectors[:, values >= bound]


@pytest.mark.parametrize(("threshold", "spans_kept"), [(0.02, True), (1.0, False)])
def test_projector_from_its_definition_on_either_side(threshold: float, spans_kept: bool):
    cov = covariance()
    mean = float(cov.moment.trace()) / F
    P, _ = dense_projector(cov, threshold * mean)
    projector = null_space_projector(cov, threshold)
    assert projector.spans_kept is spans_kept
    assert projector.dimension == round(float(P.trace())) and 0 < projector.dimension < F
    assert projector.basis.shape[1] <= F // 2
    torch.testing.assert_close(projector.dense(), P, rtol=0, atol=1e-12)
    same = null_space_projector(cov, threshold * mean, absolute=True)
    torch.testing.assert_close(same.dense(), P, rtol=0, atol=1e-12)


def test_relative_threshold_does_not_depend_on_the_scale_of_the_keys():
    cov = covariance()
    scaled = Covariance.from_matrix(cov.moment * 1e3)
    assert null_space_projector(scaled).dimension == null_space_projector(cov).dimension
    absolute = [null_space_projector(c, 0.5, absolute=True).dimension for c in (cov,)]
    with pytest.raises(UserError, match="relative"):
        null_space_projector(scaled, 0.5, absolute=True)
    assert absolute[0] > 0


def test_projector_refusals_and_full_space():
    cov = covariance()
    with pytest.raises(UserError, match="Raise the threshold above"):
        null_space_projector(cov, 1e-9)
    for bad in (0.0, -1.0, float("nan")):
        with pytest.raises(UserError, match="threshold"):
            null_space_projector(cov, bad)
    everything = null_space_projector(cov, 1e6)
    assert everything.dimension == F
    K = normal(F, 2, seed=7)
    assert torch.equal(everything.apply(K), K)


@pytest.mark.parametrize("threshold", [0.05, 1.0])
@pytest.mark.parametrize("m", [0, 3, 40])
def test_alphaedit_solves_its_normal_equations(threshold: float, m: int):
    cov, l2 = covariance(), 10.0
    K, R = normal(F, N, seed=7), normal(D, N, seed=8)
    previous = normal(F, m, seed=9) if m else None
    cache = previous @ previous.T if previous is not None else torch.zeros(F, F).double()
    bound = threshold * float(cov.moment.trace()) / F
    P, Q = dense_projector(cov, bound)
    update = alphaedit_update(null_space_projector(cov, threshold), K, R, previous, l2)
    system = P @ (K @ K.T + cache) + l2 * torch.eye(F).double()
    expected = torch.linalg.solve(system, P @ K @ R.T).T
    torch.testing.assert_close(update.dense, expected, rtol=0, atol=1e-10)
    assert update.rank == N
    assert float((update.dense @ Q).abs().max()) < 1e-10

    def objective(delta: Tensor) -> Tensor:
        kept = spread(delta, cache) + l2 * delta.square().sum()
        return (delta @ K - R).square().sum() + kept

    assert rises(objective, update.dense, P)


def test_alphaedit_protects_and_negative_controls():
    cov = covariance()
    K, R = normal(F, N, seed=7), normal(D, N, seed=8)
    bound = 0.3 * float(cov.moment.trace()) / F
    _, Q = dense_projector(cov, bound)
    projector = null_space_projector(cov, 0.3)
    # MEMIT on the same facts does write on the protected directions.
    assert float((memit_update(cov, K, R, 1.0).dense @ Q).abs().max()) > 1e-3
    # Also in float32 from large keys, ΔW Q stays at rounding.
    large = alphaedit_update(projector, (1e3 * K).float(), R.float(), None, 1e-2)
    assert float((large.dense @ Q).abs().max()) < 1e-10 * max(1.0, large.norm())
    # Earlier keys move less when they are in the cache.
    before = normal(F, N, seed=9)
    with_cache = (alphaedit_update(projector, K, R, before, 0.1).dense @ before).norm()
    without = (alphaedit_update(projector, K, R, None, 0.1).dense @ before).norm()
    assert with_cache < 0.9 * without


def test_append_keys_keeps_the_cache_and_bounds_its_size():
    kept = append_keys(None, normal(F, 5, seed=20).float())
    total = normal(F, 5, seed=20).float().double()
    assert kept.dtype == torch.float64 and torch.equal(kept, total)
    for step in range(6):
        batch = normal(F, 5, seed=21 + step)
        kept, total = append_keys(kept, batch), torch.cat([total, batch], dim=1)
        assert kept.shape == (F, min(F, total.shape[1]))
        torch.testing.assert_close(kept @ kept.T, total @ total.T, rtol=1e-10, atol=1e-9)
    projector = null_space_projector(covariance(), 1.0)
    K, R = normal(F, N, seed=7), normal(D, N, seed=8)
    torch.testing.assert_close(
        alphaedit_update(projector, K, R, kept).dense,
        alphaedit_update(projector, K, R, total).dense,
        rtol=0,
        atol=1e-11,
    )


# All of them


def test_factors_apply_and_norm_agree_with_the_dense_matrix():
    cov, K, R = covariance(), normal(F, N, seed=7), normal(D, N, seed=8)
    update = memit_update(cov, K.float(), R.bfloat16(), 1.0)
    assert update.left.shape == (D, N) and update.right.shape == (F, N)
    assert update.left.dtype == update.right.dtype == torch.float64
    torch.testing.assert_close(update.left @ (update.right.T @ K), update.dense @ K)
    assert update.norm() == pytest.approx(float(update.dense.norm()), rel=1e-12)


def test_inputs_are_left_alone():
    cov, K, R = covariance(), normal(F, N, seed=7), normal(D, N, seed=8)
    copies = K.clone(), R.clone(), cov.moment.clone()
    memit_update(cov, K, R)
    emmet_update(cov, K, R)
    alphaedit_update(null_space_projector(cov, 1.0), K, R, K)
    rome_update(cov, K[:, 0], K[:, 0], R[:, 0], R[:, 1])
    assert all(torch.equal(now, then) for now, then in zip((K, R, cov.moment), copies, strict=True))


def test_nan_zero_and_misshapen_input():
    cov, K, R = covariance(), normal(F, N, seed=7), normal(D, N, seed=8)
    projector = null_space_projector(cov, 1.0)
    nan = K.clone()
    nan[0, 0] = float("nan")
    for edit in (memit_update, emmet_update):
        with pytest.raises(UserError, match="NaN"):
            edit(cov, nan, R)
        with pytest.raises(UserError, match="zero"):
            edit(cov, 0 * K, R)
        with pytest.raises(UserError, match="lambda"):
            edit(cov, K, R, -1.0)
        with pytest.raises(ValueError, match="one residual"):
            edit(cov, K, R[:, :2])
        with pytest.raises(ValueError, match="columns"):
            edit(cov, K.T, R)
    with pytest.raises(UserError, match="NaN"):
        alphaedit_update(projector, K, R, nan)
    with pytest.raises(UserError, match="l2"):
        alphaedit_update(projector, K, R, None, 0.0)
    with pytest.raises(UserError, match="NaN"):
        rome_update(cov, K[:, 0], nan[:, 0], R[:, 0], R[:, 1])
    with pytest.raises(UserError, match="zero"):
        rome_update(cov, 0 * K[:, 0], K[:, 0], R[:, 0], R[:, 1])
    with pytest.raises(ValueError, match="key must be"):
        rome_update(cov, K[:3, 0], K[:, 0], R[:, 0], R[:, 1])
    with pytest.raises(ValueError, match="values must be"):
        rome_update(cov, K[:, 0], K[:, 0], R[:, 0], R[:2, 1])


def test_spread_residual():
    R = normal(D, N, seed=8)
    torch.testing.assert_close(spread_residual(R, 0, 4), R / 4)
    torch.testing.assert_close(spread_residual(R, 3, 4), R)
    torch.testing.assert_close(spread_residual(R, 1, 5, "pmet"), R / 2)
    # A linear network in which each layer adds its share ends exactly at the target.
    done = torch.zeros_like(R)
    for i in range(4):
        done = done + spread_residual(R - done, i, 4)
    torch.testing.assert_close(done, R)
    for i in (-1, 4):
        with pytest.raises(ValueError, match="layer number"):
            spread_residual(R, i, 4)
    with pytest.raises(ValueError, match="mode"):
        spread_residual(R, 0, 4, "other")  # pyright: ignore[reportArgumentType]
