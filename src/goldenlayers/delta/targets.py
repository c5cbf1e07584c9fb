"""The matrices of a model that deltas change, and how each takes a change.

A matrix in memory is put aside, and its sum with the changes put in its place. One that is kept
elsewhere (CPU memory, disk) is read from memory for as long as it is changed. A quantised one stays
as it is, and its changes act beside it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from goldenlayers.delta.factors import Dense, LowRank, tensors_of, working_dtype
from goldenlayers.errors import UserError, near_matches
from goldenlayers.models import offload, quantised

SUFFIX = ".weight"
_EXPERT = re.compile(r"(.+)\.(\d{1,6})\.(\w+)")  # EXPERTS.3.down_proj
Change = LowRank | Dense


@dataclass(frozen=True, eq=False)
class Target:
    """One weight matrix that a delta changes. ``transposed``: stored (in, out), as Conv1D does.

    ``now``, ``put``, ``changed`` and ``weight`` deal in states: what stands for the matrix, changed
    or not. Putting a state back that ``now`` gave brings back every bit.
    """

    name: str
    module: nn.Module
    transposed: bool

    @property
    def path(self) -> str:
        """The module's path, without ``.weight``."""
        return self.name.removesuffix(SUFFIX)

    @property
    def device(self) -> torch.device:
        """Where the module computes."""
        return offload.runs_on(self.module)

    @property
    def parameter(self) -> Any:
        """The parameter as it is at the moment."""
        return self.module._parameters["weight"]

    def now(self) -> Any:
        """The state in force."""
        return self.parameter.data

    def put(self, state: Any) -> None:
        """Let a state be in force."""
        self.parameter.data = state

    def weight(self, state: Any) -> Tensor:
        """The matrix as stored, in a state."""
        return state

    def changed(self, state: Any, changes: list[Change]) -> Any:
        """The state with changes added: summed in float32 or wider, rounded once.

        Raises:
            UserError: the sum is too large for the matrix's number format.
        """
        return self._sum(self.weight(state), changes)

    def merged(self, changes: list[Change]) -> Any:
        """The state with changes added, for :meth:`write`.

        Raises:
            UserError: the matrix cannot be changed for good.
        """
        return self.changed(self.now(), changes)

    def write(self, state: Any) -> None:
        """Let a state be the matrix for good."""
        self.parameter.data.copy_(state)

    def _sum(self, base: Tensor, changes: list[Change]) -> Tensor:
        dtype = working_dtype(base, *(part for change in changes for part in tensors_of(change)))
        total = base.to(dtype, copy=True)
        for change in changes:
            parts = [part.to(base.device, dtype) for part in tensors_of(change)]
            if len(parts) == 1:
                total += parts[0].T if self.transposed else parts[0]
            else:
                left, right = reversed(parts) if self.transposed else parts
                total.addmm_(left, right.T)  # (out, R) @ (R, in), or the other way round
        result = total.to(base.dtype)
        if not torch.isfinite(result).all():
            raise UserError(
                f"with the delta added, '{self.name}' holds values too large for {base.dtype}",
                fix="Scale the delta down, or load the model in float32",
            )
        return result


@dataclass(frozen=True, eq=False)
class _Expert(Target):
    """One slice of a parameter in which experts are stacked: ``own`` is its name in ``module``.

    A state is a copy, written over the slice. The other experts' bits are not touched.
    """

    own: str
    expert: int

    @property
    def parameter(self) -> Any:
        """The slice as it is at the moment."""
        stacked: Any = self.module._parameters[self.own]
        return stacked.data[self.expert]

    def now(self) -> Tensor:
        """A copy of the matrix."""
        return self.parameter.clone()

    def put(self, state: Tensor) -> None:
        """Write the matrix."""
        self.parameter.copy_(state)

    def write(self, state: Tensor) -> None:
        """Write the matrix."""
        self.put(state)


class _Elsewhere(Target):
    """Kept in CPU memory or on disk: a state is where the module's weights are read."""

    def now(self) -> Mapping[str, Tensor]:
        return offload.kept(self.module)

    def put(self, state: Mapping[str, Tensor]) -> None:
        offload.keep(self.module, state)

    def weight(self, state: Mapping[str, Tensor]) -> Tensor:
        return state["weight"]

    def changed(self, state: Mapping[str, Tensor], changes: list[Change]) -> Mapping[str, Tensor]:
        return offload.Replaced(state, self._sum(self.weight(state), changes).cpu())

    def write(self, state: Mapping[str, Tensor]) -> None:
        self.put(state)


class _Quantised(Target):
    """A state is the factors beside the matrix."""

    def now(self) -> tuple[quantised.Factors, ...]:
        return quantised.beside(self.module)

    def put(self, state: tuple[quantised.Factors, ...]) -> None:
        quantised.put_beside(self.module, state)

    def weight(self, state: tuple[quantised.Factors, ...]) -> Tensor:
        del state
        tensors = [*self.module.parameters(), *self.module.buffers()]
        dtype = next((t.dtype for t in tensors if t.is_floating_point()), torch.get_default_dtype())
        like = torch.zeros((), dtype=dtype, device=self.device)
        return quantised.dense_weight(self.module, like)

    def changed(self, state: Any, changes: list[Change]) -> tuple[quantised.Factors, ...]:
        new = [change for change in changes if isinstance(change, LowRank)]
        assert len(new) == len(changes)  # the finder refuses others
        return (*state, *((change.left, change.right) for change in new))

    def merged(self, changes: list[Change]) -> Any:
        del changes
        raise UserError(
            f"'{self.name}' is quantised ({quantised.stored_as(self.module)}), and a change cannot "
            "be written into it",
            fix="Keep the change beside it (applied, or export to peft), or merge it into the "
            "unquantised model",
        )


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
        tied = offload.tied_names(hf)
        self._tied = {*tied.keys(), *tied.values()}

    def find(self, name: str, change: Change) -> Target:
        """The matrix ``name`` and how it is stored.

        Raises:
            UserError: no such parameter, not a linear map, another shape, shared with another
                module (tied embeddings), a dense change of a quantised matrix, or not loaded.
        """
        path = name.removesuffix(SUFFIX)
        try:
            module = self.hf.get_submodule(path)
        except AttributeError:
            module = None
        if module is None and path != name and (expert := self._expert(name, path)) is not None:
            rows, columns = expert.parameter.shape
            _check_shape(name, change, (columns, rows) if expert.transposed else (rows, columns))
            return expert
        method = quantised.stored_as(module) if module is not None else ""
        parameter = module._parameters.get("weight") if module is not None else None
        if path == name or module is None or (parameter is None and not method):
            raise UserError(
                f"the model ({type(self.hf).__name__}) has no weight matrix '{name}'",
                fix=near_matches(name, _likely_names(self.hf, name))
                or "Load the model that the delta was made on",
            )
        if method:
            return self._quantised(name, module, method, change)
        if not isinstance(module, nn.Linear | Conv1D):
            raise UserError(
                f"'{name}' belongs to a {type(module).__name__}",
                expected="a linear map (torch.nn.Linear or transformers' Conv1D)",
            )
        assert parameter is not None
        elsewhere = parameter.is_meta and offload.is_elsewhere(module)
        if (parameter.is_meta and not elsewhere) or not parameter.is_floating_point():
            state = "not in memory" if parameter.is_meta else f"stored as {parameter.dtype}"
            raise UserError(
                f"'{name}' is {state}, so nothing can be added to it",
                fix="Load the model in float32, float16 or bfloat16",
            )
        if self._owners[id(parameter)] > 1 or (elsewhere and name in self._tied):
            raise UserError(
                f"'{name}' is shared with another module (tied embeddings?), "
                "so a change would act on both",
                fix="Edit a matrix inside a block, or load the model with untied embeddings",
            )
        transposed = isinstance(module, Conv1D)
        rows, columns = parameter.shape
        _check_shape(name, change, (columns, rows) if transposed else (rows, columns))
        return (_Elsewhere if elsewhere else Target)(name, module, transposed)

    def _expert(self, name: str, path: str) -> _Expert | None:
        """The slice that ``path``, EXPERTS.3.down_proj, names; None if there is no such expert."""
        if (found := _EXPERT.fullmatch(path)) is None:
            return None
        try:
            module = self.hf.get_submodule(found[1])
        except AttributeError:
            return None
        parameter, index = module._parameters.get(found[3]), int(found[2])
        if parameter is None or not hasattr(module, "is_transposed"):
            return None
        if parameter.dim() != 3 or index >= len(parameter):
            return None
        if parameter.is_meta or not parameter.is_floating_point():
            state = "not in memory" if parameter.is_meta else f"stored as {parameter.dtype}"
            raise UserError(
                f"'{name}' is {state}, so nothing can be added to it",
                fix="Load the model in float32, float16 or bfloat16 on one device",
            )
        return _Expert(name, module, bool(module.is_transposed), found[3], index)

    def _quantised(self, name: str, module: nn.Module, method: str, change: Change) -> Target:
        _check_shape(name, change, quantised.features(module))
        if isinstance(change, Dense):
            raise UserError(
                f"the change of '{name}' is dense, and the matrix is quantised ({method}): only a "
                "low-rank change can act beside it",
                fix="Edit with rome, clear-rome, memit or another editor of low rank, or load the "
                "unquantised model",
            )
        return _Quantised(name, module, False)


def _check_shape(name: str, change: Change, shape: tuple[int, int]) -> None:
    if change.shape != shape:
        raise UserError(
            f"the delta's change of '{name}' is {change.shape} (out, in)",
            expected=f"{shape}, the model's",
            fix="Load the model that the delta was made on",
        )


def find_targets(hf: nn.Module, changes: Mapping[str, Change]) -> dict[str, Target]:
    """``TargetFinder.find`` for every change of one delta."""
    finder = TargetFinder(hf)
    return {name: finder.find(name, change) for name, change in changes.items()}


def _likely_names(hf: nn.Module, name: str) -> list[str]:
    """Weight matrices whose path ends like ``name``: near matches among all would be slow."""
    tail = name.split(".")[-2:]
    return [known for known, _ in hf.named_parameters() if known.split(".")[-2:] == tail]
