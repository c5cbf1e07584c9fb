"""Covariance: solves against dense inverses, ridge, caching, refusals."""

from __future__ import annotations

import pytest
import torch

from goldenlayers.errors import UserError
from goldenlayers.statistics.moments import Covariance

F = 12


def moment(tokens: int = 60, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(-2, 2, F, dtype=torch.float64)[:, None]
    keys = scales * torch.randn(F, tokens, generator=generator, dtype=torch.float64)
    return keys @ keys.T / tokens


def keys(n: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(F, n, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("ridge", [0.0, 0.01, 2.0])
def test_solve_and_matrix_against_the_dense_inverse(ridge: float):
    C = moment()
    cov = Covariance.from_matrix(C, ridge)
    dense = C + ridge * C.trace() / F * torch.eye(F, dtype=torch.float64)
    torch.testing.assert_close(cov.matrix(), dense, rtol=1e-14, atol=0)
    torch.testing.assert_close(cov.matrix(with_ridge=False), C, rtol=1e-12, atol=1e-12)
    K = keys(5)
    torch.testing.assert_close(dense @ cov.solve(K), K, rtol=0, atol=1e-8)
    # One key as a vector gives the column of the batch.
    assert cov.solve(K[:, 2]).shape == (F,)
    torch.testing.assert_close(cov.solve(K[:, 2]), cov.solve(K)[:, 2], rtol=1e-9, atol=1e-9)


def test_eigh_is_of_the_moment_without_ridge_ascending():
    C = moment()
    values, vectors = Covariance.from_matrix(C, 0.5).eigh()
    assert (values.diff() >= 0).all()
    torch.testing.assert_close(vectors * values @ vectors.T, C, rtol=1e-9, atol=1e-8)


def test_factorised_once_and_input_left_alone():
    C = moment()
    before = C.clone()
    cov = Covariance.from_matrix(C)
    assert cov.cholesky is cov.cholesky
    assert cov.eigh()[1] is cov.eigh()[1]
    cov.solve(keys(1))
    assert torch.equal(C, before)


def test_ridge_scales_with_the_keys():
    # Keys measured in other units give the same directions: the ridge is relative.
    C, K = moment(), keys(1)
    one = Covariance.from_matrix(C).solve(K)
    scaled = Covariance.from_matrix(C * 1e4).solve(K) * 1e4
    torch.testing.assert_close(one, scaled, rtol=1e-9, atol=1e-12)


def test_low_precision_input_is_computed_in_float64():
    cov = Covariance.from_matrix(moment().float())
    assert cov.solve(keys(2).bfloat16()).dtype == torch.float64
    assert Covariance.from_matrix(moment(), dtype=torch.float32).solve(keys(2)).dtype == (
        torch.float32
    )


def test_too_few_tokens_need_a_ridge():
    singular = torch.diag(torch.tensor([1.0, 0.0]))
    with pytest.raises(UserError, match="larger ridge"):
        Covariance.from_matrix(singular, 0.0).solve(torch.ones(2))
    # Five tokens in twelve dimensions: rank 5, solvable with the default ridge.
    C = moment(tokens=5)
    assert int(torch.linalg.matrix_rank(C)) == 5
    assert torch.isfinite(Covariance.from_matrix(C).solve(keys(1))).all()


def test_refusals():
    C = moment()
    with pytest.raises(ValueError, match="square"):
        Covariance.from_matrix(C[:3])
    with pytest.raises(UserError, match="NaN"):
        Covariance.from_matrix(C.clone().fill_diagonal_(float("nan")))
    with pytest.raises(UserError, match="zero"):
        Covariance.from_matrix(torch.zeros(3, 3))
    with pytest.raises(UserError, match="not symmetric"):
        Covariance.from_matrix(C.triu())
    for ridge in (-0.1, float("nan"), float("inf")):
        with pytest.raises(UserError, match="ridge"):
            Covariance.from_matrix(C, ridge)
    with pytest.raises(ValueError, match="columns"):
        Covariance.from_matrix(C).solve(torch.zeros(F + 1, 2))


@pytest.mark.parametrize("n", [1, 5, 40])
@pytest.mark.parametrize("weight", [1e-6, 1.0, 1e3])
def test_beside_more_keys_it_solves_with_the_whole_matrix(n: int, weight: float) -> None:
    generator = torch.Generator().manual_seed(n)
    text, keys, K = (
        torch.randn(m, 16, generator=generator, dtype=torch.float64) for m in (60, n, 3)
    )
    cov = Covariance.from_matrix(text.T @ text / 60)
    A, inverse = cov.matrix().clone(), torch.linalg.inv(cov.matrix())
    for key in keys:
        A += weight * torch.outer(key, key) / (key @ inverse @ key)
    beside = cov.beside(7.0 * keys.T, weight)  # the length of a key says nothing
    assert beside.size == 16
    torch.testing.assert_close(beside.solve(K.T), torch.linalg.solve(A, K.T))
    torch.testing.assert_close(
        beside.solve(K[0].float()), torch.linalg.solve(A, K[0].float().double())
    )
    if n == 1:  # alone, a key weighs 1 + λ times what it weighed
        alone = float(keys[0] @ beside.solve(keys[0]))
        assert alone == pytest.approx(float(keys[0] @ inverse @ keys[0]) / (1 + weight))


def test_beside_one_key_many_times_with_all_weight() -> None:
    cov = Covariance.from_matrix(torch.eye(6, dtype=torch.float64))
    key = torch.arange(1.0, 7.0)
    beside = cov.beside(torch.stack([key] * 9 + [2 * key], dim=1), 1e12)
    assert float(beside.solve(key).norm()) < 1e-8 * float(key.norm())
