"""Slow, obvious versions of what the package computes cleverly. Nothing here is shared with src."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from goldenlayers.models.model import Model


def mean_nll(model: Model, ids: tuple[int, ...], first_target: int = 1) -> Tensor:
    """Mean −log p of tokens ``first_target``.. of one unpadded text, by the model's own logits."""
    row = torch.tensor([ids], device=model.device)
    logits = model.hf(input_ids=row, use_cache=False).logits[0]
    return F.cross_entropy(logits[first_target - 1 : -1], row[0, first_target:])


def weight_gradients(
    model: Model, ids: tuple[int, ...], scope: str, first_target: int = 1
) -> list[list[Tensor]]:
    """Materialised gradients of every matrix of the scope, per layer, by plain autograd."""
    weights = [[m.weight for m in block.matrices(scope)] for block in model.layers.blocks]
    flat = [w for layer in weights for w in layer]
    for weight in flat:
        weight.requires_grad_(True)
    try:
        gradients = iter(torch.autograd.grad(mean_nll(model, ids, first_target), flat))
    finally:
        for weight in flat:
            weight.requires_grad_(False)
    return [[next(gradients) for _ in layer] for layer in weights]


def inner(left: list[Tensor], right: list[Tensor]) -> float:
    """Sum of element-wise products, in float64."""
    return sum(float((a.double() * b.double()).sum()) for a, b in zip(left, right, strict=True))


def full_logits(model: Model, ids: Any) -> Tensor:
    """Logits (T, V) of one unpadded text."""
    with torch.no_grad():
        return model.hf(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]
