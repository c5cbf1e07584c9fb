"""A pytest plugin (``-p off_a_bit``): a processor whose sums come out differently in each batch.

How a sum's last bits come out depends on the processor, and on some of them on the shapes that
are computed together. Here every product, sum and norm is off by up to two last places, differently
for other shapes, and equally whenever the same operation runs on the same data. So a test that
compares to the bit what different batches gave fails, on whatever machine it runs.
"""

from __future__ import annotations

import zlib
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

PLACES = 2
NAMES = (
    *("_log_softmax", "_scaled_dot_product_flash_attention_for_cpu", "_softmax", "logsumexp"),
    *("addmm", "baddbmm", "bmm", "dot", "mm", "mv"),
    *("linalg_vector_norm", "mean", "native_layer_norm", "sum"),
)


@lru_cache(512)
def _factors(seed: int, count: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    off = 2 * torch.rand(count, generator=generator, dtype=torch.float64) - 1
    # Half precision is rounded after it was multiplied: a fraction of a place moves some numbers.
    full = dtype in (torch.float32, torch.float64)
    factors = 1 + (PLACES if full else 0.5) * torch.finfo(dtype).eps * off
    return factors.to(dtype if full else torch.float32)


class OffABit(TorchDispatchMode):
    """Within it, the results of sums are off by some last places."""

    def __init__(self) -> None:
        super().__init__()
        self.seeds = {
            getattr(getattr(torch.ops.aten, name), overload): zlib.crc32(name.encode())
            for name in NAMES
            for overload in getattr(torch.ops.aten, name).overloads()
        }

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        seed = self.seeds.get(func)
        if seed is None:
            return out
        shapes = [(x.shape, x.stride()) for x in args if isinstance(x, Tensor)]
        seed = hash((seed, *shapes)) & 0xFFFF
        for one in out if isinstance(out, tuple) else (out,):
            if isinstance(one, Tensor) and one.is_floating_point() and one.device.type == "cpu":
                one.copy_(one * _factors(seed, one.numel(), one.dtype).view(one.shape))
        return out


@pytest.fixture(scope="session", autouse=True)
def _off_a_bit() -> Any:
    with OffABit():
        yield
