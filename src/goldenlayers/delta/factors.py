"""The change of one weight matrix, ΔW (out, in), as two thin factors or as it is, and the matrices
of a model that are changed.

The orientation of a change is always y = x Wᵀ, however a model stores the matrix.
Shapes: R rank, N rows of activations.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from goldenlayers.errors import UserError, near_matches

if TYPE_CHECKING:
    from goldenlayers.models import Model

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def _checked(tensor: object, what: str) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise UserError(f"{what} is a {type(tensor).__name__}", expected="a torch tensor")
    if tensor.dim() != 2 or tensor.dtype not in _DTYPES:
        raise UserError(
            f"{what} has shape {tuple(tensor.shape)} and type {tensor.dtype}",
            expected="a matrix of floating-point numbers",
        )
    finite = torch.isfinite(tensor)
    if not finite.all():
        raise UserError(
            f"{what} holds {int((~finite).sum())} values that are NaN or infinite",
            expected="finite numbers",
            fix="The edit that made it diverged: lower its learning rate or use float32",
        )
    return tensor.detach()


def working_dtype(*tensors: Tensor) -> torch.dtype:
    """At least float32, and as wide as the widest of ``tensors``."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


@dataclass(frozen=True, eq=False)
class LowRank:
    """ΔW = ``left`` @ ``right``ᵀ with ``left`` (out, R) and ``right`` (in, R).

    ``warnings``: sentences on how it came about that the user should read; they are not saved.

    Raises:
        UserError: the factors are no matrices, differ in R, or hold NaN or infinity.
    """

    left: Tensor
    right: Tensor
    warnings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "left", _checked(self.left, "the left factor"))
        object.__setattr__(self, "right", _checked(self.right, "the right factor"))
        if self.left.shape[1] != self.right.shape[1]:
            raise UserError(
                f"the factors have {self.left.shape[1]} and {self.right.shape[1]} columns",
                expected="as many in the left (out, R) as in the right (in, R)",
            )

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.left.shape[0], self.right.shape[0]

    @property
    def rank(self) -> int:
        """Columns of the factors: the rank is at most this."""
        return self.left.shape[1]

    @property
    def nbytes(self) -> int:
        return self.left.nbytes + self.right.nbytes

    @property
    def dense(self) -> Tensor:
        """ΔW itself (out, in), at least float32."""
        dtype = working_dtype(self.left, self.right)
        return self.left.to(dtype) @ self.right.to(dtype).T

    def as_float32(self) -> LowRank:
        """The same in float32."""
        return LowRank(self.left.float(), self.right.float())

    def scaled(self, factor: float) -> LowRank:
        return LowRank(self.left * factor, self.right)

    def plus(self, other: LowRank | Dense) -> LowRank | Dense:
        """The sum of two changes of one matrix: factors side by side, dense if one is dense."""
        if isinstance(other, Dense):
            return other.plus(self)
        left, right = (
            torch.cat([a, b.to(a.device)], dim=1)  # (out, R1 + R2), (in, R1 + R2)
            for a, b in ((self.left, other.left), (self.right, other.right))
        )
        return LowRank(left, right)

    def norm(self) -> float:
        """Frobenius norm, from the factors alone (in float64)."""
        return float(torch.linalg.matrix_norm(self._core()[1]))

    def singular_values(self) -> Tensor:
        """Singular values of ΔW in float64, largest first."""
        return torch.linalg.svdvals(self._core()[1])

    def compressed(self, tol: float) -> LowRank:
        """The fewest factors that keep every singular value above ``tol`` times the largest."""
        outer_left, core, outer_right = self._core()
        u, s, vt = torch.linalg.svd(core, full_matrices=False)
        keep = int((s > tol * s.max()).sum()) if s.numel() else 0
        root = s[:keep].sqrt()
        left, right = u[:, :keep] * root, vt[:keep].T * root  # (·, R') each
        if outer_left is not None and outer_right is not None:
            left, right = outer_left @ left, outer_right @ right
        return LowRank(left.to(self.left.dtype), right.to(self.right.dtype))

    def _core(self) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """(Q, M, P) with ΔW = Q M Pᵀ, Q and P orthonormal (None: identity), M small, in float64."""
        left, right = self.left.double(), self.right.double()
        if self.rank >= min(self.shape):
            return None, left @ right.T, None
        q, a = torch.linalg.qr(left)  # (out, R), (R, R)
        p, b = torch.linalg.qr(right)  # (in, R), (R, R)
        return q, a @ b.T, p


@dataclass(frozen=True, eq=False)
class Dense:
    """ΔW as it is, ``value`` (out, in): for fine-tuning, whose changes have full rank.

    Raises:
        UserError: no matrix, or it holds NaN or infinity.
    """

    value: Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "value", _checked(self.value, "the dense change"))

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.value.shape[0], self.value.shape[1]

    @property
    def rank(self) -> int:
        """The most the rank can be: min(out, in)."""
        return min(self.shape)

    @property
    def nbytes(self) -> int:
        return self.value.nbytes

    @property
    def dense(self) -> Tensor:
        """ΔW itself (out, in), at least float32."""
        return self.value.to(working_dtype(self.value))

    def scaled(self, factor: float) -> Dense:
        return Dense(self.value * factor)

    def plus(self, other: LowRank | Dense) -> Dense:
        return Dense(self.dense + other.dense.to(self.value.device))

    def norm(self) -> float:
        """Frobenius norm (in float64)."""
        return float(torch.linalg.vector_norm(self.value, dtype=torch.float64))

    def singular_values(self) -> Tensor:
        """Singular values of ΔW in float64, largest first."""
        return torch.linalg.svdvals(self.value.double())

    def compressed(self, tol: float) -> Dense:
        """Itself: ``truncated`` is the way to factors, and it costs accuracy."""
        return self

    def truncated(self, rank: int) -> tuple[LowRank, float]:
        """The closest change of rank at most ``rank``, and its relative Frobenius error."""
        u, s, vt = torch.linalg.svd(self.value.double(), full_matrices=False)
        root = s[:rank].sqrt()
        low = LowRank(
            (u[:, :rank] * root).to(self.dense.dtype), (vt[:rank].T * root).to(self.dense.dtype)
        )
        total = float(s.norm())
        return low, float(s[rank:].norm()) / total if total else 0.0


SUFFIX = ".weight"
_EXPERT = re.compile(r"(.+)\.(\d{1,6})\.(\w+)")  # EXPERTS.3.down_proj


@dataclass(frozen=True, eq=False)
class Target:
    """One weight matrix that a delta changes. ``transposed``: stored (in, out), as Conv1D does.

    ``expert`` is None; or the matrix is that slice of a parameter in which experts are stacked.
    """

    name: str
    module: nn.Module
    parameter: nn.Parameter
    transposed: bool
    expert: int | None = None

    @property
    def path(self) -> str:
        """The module's path, without ``.weight``."""
        return self.name.removesuffix(SUFFIX)

    @property
    def place(self) -> Tensor:
        """The memory of the matrix as it is now, as stored."""
        data = self.parameter.data
        return data if self.expert is None else data[self.expert]

    @property
    def tensor(self) -> Tensor:
        """The matrix as it is now; of an expert a copy, since ``put`` writes over it."""
        return self.place if self.expert is None else self.place.clone()

    def put(self, tensor: Tensor) -> None:
        """Let the matrix be ``tensor``. The other experts' bits are not touched."""
        if self.expert is None:
            self.parameter.data = tensor
        else:
            self.place.copy_(tensor)

    def changed(self, base: Tensor, changes: list[LowRank | Dense]) -> Tensor:
        """``base`` as stored plus the changes: summed in float32 or wider, rounded once."""
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


def tensors_of(change: LowRank | Dense) -> tuple[Tensor, ...]:
    """(left, right), or (value,)."""
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


def of_expert(name: str) -> bool:
    """Whether a changed matrix is that of one routed expert."""
    return "experts" in name.split(".")


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
        expert = None if module is not None or path == name else self._expert(path)
        if expert is not None:
            module, parameter, index = expert
            transposed = bool(module.is_transposed)
            return self._checked(name, Target(name, module, parameter, transposed, index), change)
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
        return self._checked(
            name, Target(name, module, parameter, isinstance(module, Conv1D)), change
        )

    def _expert(self, path: str) -> tuple[nn.Module, nn.Parameter, int] | None:
        """What ``path``, EXPERTS.3.down_proj, is a slice of; None if there is no such expert."""
        found = _EXPERT.fullmatch(path)
        if found is None:
            return None
        try:
            module = self.hf.get_submodule(found[1])
        except AttributeError:
            return None
        parameter, index = module._parameters.get(found[3]), int(found[2])
        stacked = (
            parameter is not None and parameter.dim() == 3 and hasattr(module, "is_transposed")
        )
        if parameter is None or not stacked or index >= len(parameter):
            return None
        return module, parameter, index

    def _checked(self, name: str, target: Target, change: LowRank | Dense) -> Target:
        parameter = target.parameter
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
        stored = (parameter.shape[-2], parameter.shape[-1])
        shape = stored[::-1] if target.transposed else stored
        if change.shape != shape:
            raise UserError(
                f"the delta's change of '{name}' is {change.shape} (out, in)",
                expected=f"{shape}, the model's",
                fix="Load the model that the delta was made on",
            )
        return target


def find_targets(hf: nn.Module, changes: Mapping[str, LowRank | Dense]) -> dict[str, Target]:
    """``TargetFinder.find`` for every change of one delta."""
    finder = TargetFinder(hf)
    return {name: finder.find(name, change) for name, change in changes.items()}


def _likely_names(hf: nn.Module, name: str) -> list[str]:
    """Weight matrices whose path ends like ``name``: near matches among all would be slow."""
    tail = name.split(".")[-2:]
    return [known for known, _ in hf.named_parameters() if known.split(".")[-2:] == tail]


Changes = Mapping[str, LowRank | Dense]
