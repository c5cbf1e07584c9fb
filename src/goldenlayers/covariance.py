"""The second moment of a layer's keys, C = E[k kᵀ], and the solves the editors ask of it.

Shapes: F MLP width, n keys. Keys are columns: (F, n).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from goldenlayers.errors import UserError

DEFAULT_RIDGE = 0.01


@dataclass(frozen=True, eq=False)
class Covariance:
    """C = E[k kᵀ] (uncentred, a mean over tokens, not a sum) plus a ridge, factorised at most once.

    The Cholesky factor and the eigendecomposition are computed on first use and kept, so one
    object per layer serves every edit. Make it with :meth:`from_matrix`, which checks its input.

    Attributes:
        moment: (F, F) symmetric, without the ridge, in the dtype of the computation.
        ridge: share of the mean diagonal that is added to the diagonal before factorising.
    """

    moment: Tensor
    ridge: float = DEFAULT_RIDGE

    @classmethod
    def from_matrix(
        cls, C: Tensor, ridge: float = DEFAULT_RIDGE, *, dtype: torch.dtype = torch.float64
    ) -> Covariance:
        """Check a second moment and wrap it.

        Args:
            C: (F, F), the mean of k kᵀ over tokens.
            ridge: relative to the mean diagonal; 0 needs a positive definite ``C``.
            dtype: of all computation; float64 keeps solves exact where C spans many decades.

        Raises:
            ValueError: ``C`` is not a square matrix (a defect of the caller).
            UserError: ``C`` is not finite, not symmetric, or zero; ``ridge`` is negative.
        """
        if C.ndim != 2 or C.shape[0] != C.shape[1] or C.shape[0] == 0:
            raise ValueError(f"C must be a square matrix, got shape {tuple(C.shape)}")
        if not 0 <= ridge < float("inf"):
            raise UserError(f"The ridge is {ridge}", expected="a number of 0 or more")
        C = C.detach().to(dtype)
        if not torch.isfinite(C).all():
            raise UserError(
                "The second moment of the keys holds NaN or infinite values",
                fix="Collect the key statistics again in float32",
            )
        if C.diagonal().mean() <= 0 or C.diagonal().min() < 0:
            raise UserError(
                "The second moment of the keys is zero or has a negative diagonal",
                expected="a mean of k kᵀ over tokens of a layer that is not dead",
            )
        if (C - C.T).abs().max() > 1e-5 * C.diagonal().max():
            raise UserError(
                "The second moment of the keys is not symmetric", fix="Collect the statistics again"
            )
        return cls((C + C.T) / 2, float(ridge))

    @property
    def size(self) -> int:
        """F, the width of a key."""
        return self.moment.shape[0]

    @property
    def ridge_value(self) -> float:
        """What is added to every diagonal entry: ``ridge`` × mean diagonal."""
        return self.ridge * float(self.moment.diagonal().mean())

    def matrix(self, *, with_ridge: bool = True) -> Tensor:
        """(F, F): the matrix the solves invert, or the plain second moment."""
        if not with_ridge:
            return self.moment
        C = self.moment.clone()
        C.diagonal().add_(self.ridge_value)
        return C

    @cached_property
    def cholesky(self) -> Tensor:
        """(F, F) lower factor of the matrix with its ridge.

        Raises:
            UserError: the matrix is not positive definite (fewer tokens than F and no ridge).
        """
        factor, failed = torch.linalg.cholesky_ex(self.matrix())
        if int(failed):
            raise UserError(
                f"The second moment of the keys ({self.size} × {self.size}, ridge {self.ridge:g}) "
                "is not positive definite",
                fix=f"Use a larger ridge ({DEFAULT_RIDGE:g} is usual) or collect more tokens",
            )
        return factor

    @cached_property
    def _eigh(self) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(self.moment)
        return values, vectors

    def eigh(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues (F,), ascending, of the moment *without* ridge, and eigenvectors (F, F).

        The eigenvectors (columns) are those of the matrix with its ridge too.
        """
        return self._eigh

    def solve(self, K: Tensor) -> Tensor:
        """C⁻¹K, of the shape of ``K``: (F, n) or (F,)."""
        columns = self._columns(K)
        return torch.cholesky_solve(columns, self.cholesky).reshape(K.shape)

    def beside(self, keys: Tensor, weight: float) -> Beside:
        """A = C + weight · Σ n̂n̂ᵀ over the columns n of ``keys`` (F, n), none of them zero."""
        keys = self._columns(keys)
        solved = self.solve(keys)
        lengths = (keys * solved).sum(0).sqrt()  # (n,) in the norm √(nᵀC⁻¹n)
        return Beside(self, keys / lengths, solved / lengths, weight)

    def _columns(self, K: Tensor) -> Tensor:
        if K.ndim not in (1, 2) or K.shape[0] != self.size:
            raise ValueError(f"keys must be ({self.size}, n) columns, got {tuple(K.shape)}")
        # Moved before the cast: some accelerators have no float64.
        return K.detach().to(self.moment.device).to(self.moment.dtype).reshape(self.size, -1)


# More weight on a key than the inverse of this is taken as so much: beyond it is rounding.
_LEAST = 1e-10


@dataclass(frozen=True, eq=False)
class Beside:
    """A = C + λ Σ n̂n̂ᵀ: a second moment with some keys n more, each weighed λ.

    n̂ = n / √(nᵀC⁻¹n), so that λ has no unit: the key n alone weighs 1 + λ times what it weighed,
    nᵀA⁻¹n = nᵀC⁻¹n / (1 + λ). Made by :meth:`Covariance.beside`; solves go by the Woodbury identity
    with C's factor, A⁻¹K = C⁻¹K − C⁻¹N̂ (I/λ + N̂ᵀC⁻¹N̂)⁻¹ N̂ᵀC⁻¹K.

    Attributes:
        base: C, with its ridge.
        rows: (F, n) the keys n̂.
        solved: (F, n) C⁻¹n̂.
        weight: λ > 0.
    """

    base: Covariance
    rows: Tensor
    solved: Tensor
    weight: float

    @property
    def size(self) -> int:
        """F, the width of a key."""
        return self.base.size

    @property
    def moment(self) -> Tensor:
        """C without ridge: its dtype and device are those of the computation."""
        return self.base.moment

    @cached_property
    def _small(self) -> tuple[Tensor, Tensor]:
        """C⁻¹N̂ (F, r) and the lower factor (r, r) of the bracket."""
        rows, solved = self.rows, self.solved
        if rows.shape[1] > rows.shape[0]:  # as many as F have the same N̂N̂ᵀ: N̂ᵀ = QR, N̂N̂ᵀ = RᵀR
            Q, R = torch.linalg.qr(rows.T)
            rows, solved = R.T, solved @ Q
        inner = rows.T @ solved
        inner = (inner + inner.T) / 2
        inner.diagonal().add_(max(1 / self.weight, _LEAST))
        return solved, torch.linalg.cholesky(inner)

    def solve(self, K: Tensor) -> Tensor:
        """A⁻¹K, of the shape of ``K``: (F, n) or (F,)."""
        plain = self.base.solve(K)
        solved, factor = self._small
        columns = plain.reshape(self.size, -1)
        along = solved.T @ K.detach().to(solved.device).to(solved.dtype).reshape(self.size, -1)
        return (columns - solved @ torch.cholesky_solve(along, factor)).reshape(K.shape)
