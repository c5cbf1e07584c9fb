"""Quasi-Newton steps of many facts together: they find the least, stay in bounds, and never mix."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from goldenlayers.editors.descent import Adam, Descent, QuasiNewton

B, D = 5, 12
Loss = Callable[[dict[str, Tensor]], Tensor]


def bowls(seed: int = 0, sites: tuple[str, ...] = ("mlp",)) -> tuple[Loss, dict[str, Tensor]]:
    """B ill-conditioned parabolas over all sites, and where each is least (B, D)."""
    generator = torch.Generator().manual_seed(seed)
    width = D * len(sites)
    raw = torch.randn(B, width, width, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(raw).Q
    bends = torch.logspace(0, 2, width, dtype=torch.float64)
    least = torch.randn(B, width, generator=generator, dtype=torch.float64)

    def loss(x: dict[str, Tensor]) -> Tensor:
        off = (torch.cat(list(x.values()), 1) - least)[:, None] @ basis
        return (off[:, 0].square() * bends).sum(1)

    return loss, dict(zip(sites, least.split(D, 1), strict=True))


def newton(
    sites: tuple[str, ...] = ("mlp",), longest: float = 100.0, first: float = 1.0, size: float = 1.0
) -> QuasiNewton:
    sizes = {name: torch.full((B,), size, dtype=torch.float64) for name in sites}
    bounds = {name: torch.full((B,), longest, dtype=torch.float64) for name in sites}
    return QuasiNewton(sizes, bounds, D, first)


def walk(descent: Descent, loss: Loss, steps: int) -> list[Tensor]:
    """The loss at each trial, (B,) a step."""
    seen = []
    for _ in range(steps):
        trial = {name: x.detach().requires_grad_() for name, x in descent.trial.items()}
        value = loss(trial)
        slopes = torch.autograd.grad(value.sum(), list(trial.values()))
        seen.append(value.detach())
        descent.take(value.detach(), value.detach(), slopes)
    return seen


@pytest.mark.parametrize("sites", [("mlp",), ("mlp", "attention")])
def test_it_finds_the_least_of_a_parabola(sites: tuple[str, ...]) -> None:
    loss, least = bowls(sites=sites)
    descent = newton(sites)
    walk(descent, loss, 120)
    for name in sites:
        assert torch.allclose(descent.best[name], least[name], atol=1e-3)
    assert float(descent.loss.max()) < 1e-5
    assert torch.allclose(loss(descent.best), descent.loss)


def test_the_best_never_gets_worse_and_is_what_was_seen() -> None:
    loss, _ = bowls()
    descent = newton(first=30.0)  # far too long a first step
    before = torch.full((B,), math.inf, dtype=torch.float64)
    seen: list[Tensor] = []
    for _ in range(25):
        seen += walk(descent, loss, 1)
        assert bool((descent.loss <= before).all())
        before = descent.loss
        assert torch.equal(descent.loss, torch.stack(seen).amin(0))
    assert bool((torch.stack(seen)[1] > seen[0]).any())  # the first step was taken back


def test_it_needs_fewer_steps_than_adam() -> None:
    loss, _ = bowls()
    one = torch.ones(B, dtype=torch.float64)
    adam = Adam({"mlp": 0.2 * one}, {"mlp": 100 * one}, D)
    slow = walk(adam, loss, 30)[-1]
    descent = newton()
    walk(descent, loss, 15)
    assert bool((descent.loss < slow).all())


def test_facts_walk_alone_as_together() -> None:
    loss, _ = bowls()
    together = newton()
    walk(together, loss, 20)
    for b in range(B):
        alone = newton()
        alone.keep(torch.tensor([b]))

        def one(x: dict[str, Tensor], b: int = b) -> Tensor:
            rows = torch.zeros(B, D, dtype=torch.float64).index_put((torch.tensor([b]),), x["mlp"])
            return loss({"mlp": rows})[b : b + 1]

        walk(alone, one, 20)
        assert torch.allclose(alone.best["mlp"][0], together.best["mlp"][b], atol=1e-9)


def test_who_stays_goes_on_as_if_nobody_had_left() -> None:
    loss, _ = bowls()
    whole, left = newton(), newton()
    walk(whole, loss, 14)
    walk(left, loss, 7)
    stay = torch.tensor([3, 1])
    left.keep(stay)

    def of_stay(x: dict[str, Tensor]) -> Tensor:
        rows = torch.zeros(B, D, dtype=torch.float64).index_put((stay,), x["mlp"])
        return loss({"mlp": rows})[stay]

    walk(left, of_stay, 7)
    assert torch.allclose(left.best["mlp"], whole.best["mlp"][stay], atol=1e-9)
    assert torch.allclose(left.loss, whole.loss[stay], atol=1e-9)


def test_no_change_is_longer_than_it_may_be() -> None:
    loss, least = bowls()
    longest = 0.5 * float(least["mlp"].norm(dim=1).min())
    descent = newton(longest=longest)
    for _ in range(40):
        walk(descent, loss, 1)
        assert float(descent.trial["mlp"].norm(dim=1).max()) <= longest * (1 + 1e-9)
    # The least lies outside: the best lies on the rim.
    rim = torch.full((B,), longest, dtype=torch.float64)
    assert torch.allclose(descent.best["mlp"].norm(dim=1), rim, rtol=1e-3)


@pytest.mark.parametrize("hole", [math.nan, math.inf])
def test_where_the_loss_is_no_number_it_turns_back(hole: float) -> None:
    """As half precision gives it, far out."""
    loss, least = bowls()
    descent = newton(first=50.0)

    def holed(x: dict[str, Tensor]) -> Tensor:
        far = x["mlp"].norm(dim=1) > 2 * least["mlp"].norm(dim=1)
        return loss(x) * torch.where(far, hole, 1.0)

    seen = walk(descent, holed, 60)
    assert not bool(seen[1].isfinite().any())
    assert bool(descent.loss.isfinite().all())
    assert float(descent.loss.max()) < 1e-2 * float(seen[0].min())


def test_lengths_are_counted_in_the_clean_values() -> None:
    """Ten times as long values and a loss that sees a tenth: the same way, ten times as long."""
    loss, _ = bowls()
    plain, long = newton(), newton(size=10.0, longest=1000.0)
    walk(plain, loss, 10)
    walk(long, lambda x: loss({"mlp": x["mlp"] / 10}), 10)
    assert torch.allclose(long.best["mlp"], 10 * plain.best["mlp"], rtol=1e-6)
    assert torch.allclose(long.loss, plain.loss, rtol=1e-6)
