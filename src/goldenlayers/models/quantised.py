"""Quantised matrices: which a model has, their values as numbers, and changes kept beside them.

A quantised matrix is never written to. A low-rank change of it is added to what its module gives:
y + (x @ right) @ leftᵀ. Shapes: R rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

# The package that a quantised weight's or module's class comes from, and what the method is called.
_METHODS = {"bitsandbytes": "bitsandbytes", "torchao": "torchao", "gptqmodel": "gptq"}
_PROBES = 256  # unit vectors at a time

Factors = tuple[Tensor, Tensor]


def stored_as(module: nn.Module) -> str:
    """How a module's matrix is quantised, such as "bitsandbytes Params4bit"; "" if it is not."""
    weight = module._parameters.get("weight")
    for one in (type(weight), type(module)):
        if (method := _METHODS.get(one.__module__.partition(".")[0])) is not None:
            return f"{method} {one.__name__}"
    return ""


def quantised_modules(hf: nn.Module) -> dict[str, nn.Module]:
    """The model's modules whose matrices are quantised, by path."""
    return {path: module for path, module in hf.named_modules() if stored_as(module)}


def allow_gradients(hf: nn.Module) -> None:
    """Keep quantised matrices in the form that gradients pass through.

    On some CPUs bitsandbytes 0.50 packs 4-bit matrices anew in their first forward pass, in a form
    through which gradients come out wrong.
    """
    for module in quantised_modules(hf).values():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]  # not a module
            module.state_dict()  # unpacks what was packed


def features(module: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear map."""
    given: Any = module
    return int(given.out_features), int(given.in_features)


@torch.no_grad()
def dense_weight(module: nn.Module, like: Tensor) -> Tensor:
    """The matrix (out, in) as numbers, without any change beside it.

    Whatever the method, it is what the module makes of the unit vectors. ``like``: a tensor of the
    number format and on the device that the module works with.
    """
    n = features(module)[1]
    forward: Any = module.forward  # not the call: changes beside the matrix are hooks of that
    rest = forward(like.new_zeros(1, n))  # the bias
    parts = []
    for start in range(0, n, _PROBES):
        size = min(_PROBES, n - start)
        unit = like.new_zeros(size, n)
        unit[torch.arange(size), torch.arange(start, start + size)] = 1
        parts.append((forward(unit) - rest).T)
    return torch.cat(parts, dim=1)


def stored_values(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What a quantised module holds, with its scales, and the factors beside it, by name."""
    for name, value in sorted(module.state_dict().items()):
        flatten: Any = getattr(value, "__tensor_flatten__", None)
        if flatten is not None:
            yield from ((f"{name}:{part}", getattr(value, part)) for part in flatten()[0])
        elif isinstance(value, Tensor):
            yield name, value
    for i, (left, right) in enumerate(beside(module)):
        yield f"left {i}", left
        yield f"right {i}", right


_BESIDE: WeakKeyDictionary[nn.Module, tuple[tuple[Factors, ...], RemovableHandle]] = (
    WeakKeyDictionary()
)


def beside(module: nn.Module) -> tuple[Factors, ...]:
    """The (left (out, R), right (in, R)) that are added to what a module gives."""
    return _BESIDE[module][0] if module in _BESIDE else ()


def put_beside(module: nn.Module, factors: Sequence[Factors]) -> None:
    """Add these to what the module gives from now on, in place of those so far."""
    if module in _BESIDE:
        _BESIDE.pop(module)[1].remove()
    if not factors:
        return
    left, right = (torch.cat(parts, dim=1) for parts in zip(*factors, strict=True))
    placed: dict[torch.device, Factors] = {}

    def add(_module: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
        x: Tensor = args[0]
        if y.device not in placed:
            placed[y.device] = left.to(y.device), right.to(y.device)
        u, v = placed[y.device]
        wide = torch.promote_types(u.dtype, y.dtype)
        extra = (x.to(y.device, wide) @ v.to(wide)) @ u.to(wide).T
        return (y.to(wide) + extra).to(y.dtype)

    # First of the module's hooks: whoever watches its output sees the edited one.
    handle = module.register_forward_hook(add, prepend=True)
    _BESIDE[module] = tuple(factors), handle
