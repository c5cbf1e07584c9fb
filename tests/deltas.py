"""Random deltas on the tiny models, and what the tests of deltas compare."""

from __future__ import annotations

from typing import Any, cast

import torch
from families import VOCAB
from torch import Tensor, nn

from goldenlayers.delta import LowRank, WeightDelta
from goldenlayers.models import Model
from goldenlayers.models.layers import LayerMap, Matrix


def low(out: int, inner: int, rank: int, seed: int, dtype: torch.dtype = torch.float32) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    return LowRank(
        torch.randn(out, rank, generator=generator, dtype=dtype),
        torch.randn(inner, rank, generator=generator, dtype=dtype),
    )


def random_delta(
    hf: Any, layers: list[int], *, rank: int = 1, seed: int = 0, size: float = 0.5, **about: Any
) -> WeightDelta:
    """A random change of some blocks' down projections, of ``size`` relative to the weight."""
    blocks = LayerMap.of(hf)
    return of_matrices([blocks[i].down for i in layers], rank, seed, size, layers=layers, **about)


def of_matrices(
    matrices: list[Matrix], rank: int, seed: int, size: float = 0.5, **about: Any
) -> WeightDelta:
    generator = torch.Generator().manual_seed(seed)
    changes = {}
    for matrix in matrices:
        left = torch.randn(matrix.out_features, rank, generator=generator)
        right = torch.randn(matrix.in_features, rank, generator=generator)
        low = LowRank(left, right)
        changes[matrix.parameter_name] = low.scaled(size * float(matrix.weight.norm()) / low.norm())
    return WeightDelta(changes, **about)


def ids(batch: int = 4, tokens: int = 7, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB - 8, (batch, tokens), generator=generator)


def logits(hf: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return hf(input_ids=tokens).logits


def bits(hf: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in hf.state_dict().items()}


def same_bits(hf: nn.Module, before: dict[str, Tensor]) -> bool:
    now = hf.state_dict()
    return all(
        torch.equal(now[name].contiguous().view(torch.uint8), old.contiguous().view(torch.uint8))
        for name, old in before.items()
    )


def wrapped(hf: Any, name: str = "tiny") -> Model:
    return Model.wrap(hf, cast(Any, None), name)
