"""Token losses in chunks: values and gradients of plain cross-entropy over whole logits."""

from __future__ import annotations

import pytest
import torch
from families import shared
from tokenizers_built import TOKENIZERS
from torch.nn.functional import cross_entropy

from goldenlayers import hooks
from goldenlayers.hooks import argmax_rows, token_nll
from goldenlayers.models import Model


def rows(model: Model, n: int = 11) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(n, model.layers.d_model, generator=generator, dtype=model.dtype)
    return hidden, torch.randint(0, model.layers.vocab_size, (n,), generator=generator)


# Families whose logits pass a soft cap, a scale, or nothing.
@pytest.mark.parametrize("name", ["llama", "gemma3", "cohere", "granite", "gpt2"])
@pytest.mark.parametrize("chunk", [1, 3 * 320, 1 << 23])
def test_value_and_gradient(name: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks, "_CHUNK_NUMBERS", chunk)
    model = Model.wrap(shared(name, torch.float64), TOKENIZERS["bytes"]())
    hidden, targets = rows(model)
    weights = torch.linspace(-1, 2, len(targets), dtype=torch.float64)  # each row its own slope
    ours = hidden.clone().requires_grad_(True)
    nll = token_nll(model.layers, ours, targets)
    (nll * weights).sum().backward()
    plain = hidden.clone().requires_grad_(True)
    expected = cross_entropy(model.layers.logits(plain), targets, reduction="none")
    (expected * weights).sum().backward()
    assert torch.allclose(nll, expected, rtol=1e-12, atol=1e-12)
    assert ours.grad is not None and plain.grad is not None
    assert torch.allclose(ours.grad, plain.grad, rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        again = token_nll(model.layers, hidden, targets)
        assert torch.allclose(again, nll, rtol=1e-12, atol=1e-12)
        assert torch.equal(
            argmax_rows(model.layers, hidden), model.layers.logits(hidden).argmax(-1)
        )


def test_rows_that_are_the_same_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model.wrap(shared("gemma3", torch.float64), TOKENIZERS["bytes"]())
    hidden, targets = rows(model, 6)
    hidden[4], targets[4] = hidden[1], targets[1]
    same_as = torch.tensor([0, 1, 2, 3, 1, 5])
    weights = torch.arange(1.0, 7.0, dtype=torch.float64)
    sizes: list[int] = []
    whole = type(model.layers).logits

    def spy(self: object, h: torch.Tensor) -> torch.Tensor:
        sizes.append(len(h))
        return whole(model.layers, h)

    results = []
    for twins in (None, same_as):
        leaf = hidden.clone().requires_grad_(True)
        with monkeypatch.context() as patch:
            patch.setattr(type(model.layers), "logits", spy)
            nll = token_nll(model.layers, leaf, targets, twins)
        (nll * weights).sum().backward()
        results.append((nll.detach(), leaf.grad))
    assert sizes == [6, 5]
    for plain, shared_rows in zip(*results, strict=True):
        assert torch.allclose(plain, shared_rows, rtol=1e-12, atol=1e-14)


def test_half_precision_is_summed_in_float32() -> None:
    model = Model.wrap(shared("llama", torch.bfloat16), TOKENIZERS["bytes"]())
    hidden, targets = rows(model)
    leaf = hidden.clone().requires_grad_(True)
    nll = token_nll(model.layers, leaf, targets)
    assert nll.dtype == torch.float32
    with torch.no_grad():
        logits = model.layers.logits(hidden).float()
    assert torch.allclose(nll, cross_entropy(logits, targets, reduction="none"), rtol=1e-5)
    nll.sum().backward()
    assert leaf.grad is not None and leaf.grad.dtype == torch.bfloat16
    assert bool(torch.isfinite(leaf.grad).all())


def test_no_rows() -> None:
    model = Model.wrap(shared("llama"), TOKENIZERS["bytes"]())
    assert argmax_rows(model.layers, torch.zeros(0, 32)).shape == (0,)
