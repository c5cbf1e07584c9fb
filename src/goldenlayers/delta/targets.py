"""Which parameter a change belongs to, how it is stored, and what must not be touched."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from goldenlayers.delta.factors import Dense, LowRank, working_dtype
from goldenlayers.errors import UserError, near_matches

if TYPE_CHECKING:
    from goldenlayers.models.model import Model

SUFFIX = ".weight"


@dataclass(frozen=True, eq=False)
class Target:
    """One weight matrix that a delta changes. ``transposed``: stored (in, out), as Conv1D does."""

    name: str
    module: nn.Module
    parameter: nn.Parameter
    transposed: bool

    @property
    def path(self) -> str:
        """The module's path, without ``.weight``."""
        return self.name.removesuffix(SUFFIX)

    def changed(self, base: Tensor, changes: list[LowRank | Dense]) -> Tensor:
        """``base`` as stored plus the changes: summed in float32 or wider, rounded once."""
        parts = [part for change in changes for part in _tensors(change)]
        dtype = working_dtype(base, *parts)
        total = base.to(dtype, copy=True)
        for change in changes:
            parts = [part.to(base.device, dtype) for part in _tensors(change)]
            if len(parts) == 1:
                total += parts[0].T if self.transposed else parts[0]
            elif self.transposed:
                total.addmm_(parts[1], parts[0].T)  # (in, R) @ (R, out)
            else:
                total.addmm_(parts[0], parts[1].T)  # (out, R) @ (R, in)
        result = total.to(base.dtype)
        if not torch.isfinite(result).all():
            raise UserError(
                f"with the delta added, '{self.name}' holds values too large for {base.dtype}",
                fix="Scale the delta down, or load the model in float32",
            )
        return result


def _tensors(change: LowRank | Dense) -> tuple[Tensor, ...]:
    return (change.left, change.right) if isinstance(change, LowRank) else (change.value,)


def hf_of(model: Model | nn.Module) -> nn.Module:
    """The transformers model inside a ``Model``, or the module itself."""
    hf = model if isinstance(model, nn.Module) else getattr(model, "hf", None)
    if not isinstance(hf, nn.Module):
        raise UserError(
            f"a delta cannot be applied to a {type(model).__name__}",
            expected="a goldenlayers Model or a transformers model",
        )
    return hf


class TargetFinder:
    """Looks up changed parameters in one model and checks that the changes fit."""

    def __init__(self, hf: nn.Module) -> None:
        self.hf = hf
        self._owners = Counter(
            id(parameter)
            for module in hf.modules()
            for parameter in module._parameters.values()
            if parameter is not None
        )

    def find(self, name: str, change: LowRank | Dense) -> Target:
        """The matrix ``name`` and how it is stored.

        Raises:
            UserError: no such parameter, not a linear map, another shape, shared with another
                module (tied embeddings), quantised, or not in memory.
        """
        path = name.removesuffix(SUFFIX)
        try:
            module = self.hf.get_submodule(path)
        except AttributeError:
            module = None
        parameter = module._parameters.get("weight") if module is not None else None
        if path == name or module is None or parameter is None:
            raise UserError(
                f"the model ({type(self.hf).__name__}) has no weight matrix '{name}'",
                fix=near_matches(name, _likely_names(self.hf, name))
                or "Load the model that the delta was made on",
            )
        if not isinstance(module, nn.Linear | Conv1D):
            raise UserError(
                f"'{name}' belongs to a {type(module).__name__}",
                expected="a linear map (torch.nn.Linear or transformers' Conv1D)",
            )
        if parameter.is_meta or not parameter.is_floating_point():
            state = "not in memory" if parameter.is_meta else f"stored as {parameter.dtype}"
            raise UserError(
                f"'{name}' is {state}, so nothing can be added to it",
                fix="Load the model in float32, float16 or bfloat16 on one device",
            )
        if self._owners[id(parameter)] > 1:
            raise UserError(
                f"'{name}' is shared with another module (tied embeddings?), "
                "so a change would act on both",
                fix="Edit a matrix inside a block, or load the model with untied embeddings",
            )
        transposed = isinstance(module, Conv1D)
        stored = (parameter.shape[0], parameter.shape[1])
        shape = stored[::-1] if transposed else stored
        if change.shape != shape:
            raise UserError(
                f"the delta's change of '{name}' is {change.shape} (out, in)",
                expected=f"{shape}, the model's",
                fix="Load the model that the delta was made on",
            )
        return Target(name, module, parameter, transposed)


def find_targets(hf: nn.Module, changes: Mapping[str, LowRank | Dense]) -> dict[str, Target]:
    """``TargetFinder.find`` for every change of one delta."""
    finder = TargetFinder(hf)
    return {name: finder.find(name, change) for name, change in changes.items()}


def _likely_names(hf: nn.Module, name: str) -> list[str]:
    """Weight matrices whose path ends like ``name``: near matches among all would be slow."""
    tail = name.split(".")[-2:]
    return [known for known, _ in hf.named_parameters() if known.split(".")[-2:] == tail]
