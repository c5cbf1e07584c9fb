"""The change of one weight matrix, ΔW (out, in), as two thin factors or as it is.

The orientation of a change is always y = x Wᵀ, however a model stores the matrix.
Shapes: R rank, N rows of activations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from goldenlayers.errors import UserError

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


Changes = Mapping[str, LowRank | Dense]
