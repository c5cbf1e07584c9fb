"""The editors' closed-form weight updates: linear algebra only, no model.

Shapes: F MLP width, D model width, n facts, m keys of earlier batches, R rank. Keys and values
are **columns**: K (F, n), values (D, n), W (D, F), so that a value is W k. Every update is handed
back as low-rank factors; nothing of size (D, F) is made unless ``dense`` is asked for. All solves
run in the covariance's dtype (float64 by default). Nothing here changes its input.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from goldenlayers.delta.factors import LowRank
from goldenlayers.errors import UserError
from goldenlayers.statistics.moments import Beside, Covariance

Metric = Covariance | Beside
"""What the least change is measured in: C, or C and the keys to stay clear of."""

MEMIT_LAMBDA = 15_000.0
"""MEMIT's weight on what is kept. It multiplies C as a *mean* over tokens, so it counts tokens:
the edit is weighed against that many keys drawn from the text."""

MIN_TRANSFER = 0.01
"""ROME: smallest (k_bare·u) / (k*·u) accepted. It is 1 where the two keys agree."""

# Below this share of the largest eigenvalue of KᵀC⁻¹K a direction is rounding, not a key.
_DEPENDENT = 1e-10


def rome_update(
    cov: Metric,
    k_star: Tensor,
    k_bare: Tensor,
    v_target: Tensor,
    v_now: Tensor,
    *,
    direction: Tensor | None = None,
) -> LowRank:
    """ROME's rank-one update (Meng et al. 2022, arXiv 2202.05262, equation 2, as released).

    u = C⁻¹k*, ΔW = (v_target − v_now) uᵀ / (k_bare·u), so (W + ΔW) k_bare = v_target exactly.
    With k_bare = k* it is the smallest change, measured as tr(ΔW C ΔWᵀ), that does so.

    Args:
        cov: second moment of the layer's keys.
        k_star: (F,) key averaged over prefixes.
        k_bare: (F,) key of the bare prompt.
        v_target: (D,) wanted value.
        v_now: (D,) W k_bare.
        direction: (F,) C⁻¹k* if the caller has solved for many facts at once.

    Raises:
        UserError: the bare key hardly lies along, or lies against, the averaged key: the update
            would be blown up or turned round (the "disabling edits" of arXiv 2403.07175).
    """
    k_star, k_bare = _vectors(cov, k_star, k_bare)
    if v_target.ndim != 1 or v_target.shape != v_now.shape:
        raise ValueError(f"values must be (D,): {tuple(v_target.shape)}, {tuple(v_now.shape)}")
    gap = _as("value", v_target, cov.moment) - _as("value", v_now, cov.moment)
    u = cov.solve(k_star) if direction is None else _as("direction", direction, cov.moment)
    reach, full = float(k_bare @ u), float(k_star @ u)
    if full <= 0:
        raise UserError("The key at the lookup token is zero, so no edit at this layer can act")
    if reach < MIN_TRANSFER * full:
        raise UserError(
            "The bare prompt's key does not agree with its mean over prefixes: "
            f"{reach / full:.3g} of the edit would arrive at the prompt",
            expected=f"at least {MIN_TRANSFER:g}",
            fix="Use r-rome, which has one key in every place, or another layer",
        )
    return LowRank((gap / reach)[:, None], u[:, None])


def r_rome_update(
    cov: Metric,
    k_star: Tensor,
    v_target: Tensor,
    v_now: Tensor,
    *,
    direction: Tensor | None = None,
) -> LowRank:
    """R-ROME (Gupta et al. 2024, arXiv 2403.07175): the averaged key in every place.

    As :func:`rome_update` with k_bare = k*; ``v_now`` must then be W k* (D,).
    """
    return rome_update(cov, k_star, k_star, v_target, v_now, direction=direction)


def memit_update(cov: Metric, K: Tensor, R: Tensor, lam: float = MEMIT_LAMBDA) -> LowRank:
    """MEMIT's least-squares update (Meng et al. 2023, arXiv 2210.07229, equation 14).

    ΔW = R Kᵀ(λC + KKᵀ)⁻¹, the minimum of λ·tr(ΔW C ΔWᵀ) + ‖ΔW K − R‖². Computed in n
    dimensions by the Woodbury identity: Kᵀ(λC + KKᵀ)⁻¹ = (KᵀC⁻¹K + λI)⁻¹KᵀC⁻¹.

    Args:
        cov: second moment of the layer's keys, a mean over tokens.
        K: (F, n) one key per fact.
        R: (D, n) what each key's value should change by.
        lam: λ > 0, in tokens (see ``MEMIT_LAMBDA``).
    """
    if not 0 < lam < math.inf:
        raise UserError(f"MEMIT's lambda is {lam}", expected="a number above 0")
    return _regularised(cov, K, R, lam)


def emmet_update(cov: Metric, K: Tensor, R: Tensor, lam: float = 0.0) -> LowRank:
    """EMMET's equality-constrained update (Gupta et al. 2024, arXiv 2403.14236, equation 13).

    ΔW = R (KᵀC⁻¹K + λI)⁻¹KᵀC⁻¹. With λ = 0, of all ΔW with ΔW K = R the one with the smallest
    tr(ΔW C ΔWᵀ); λ > 0 softens the equality (the same λ as MEMIT's, usually far smaller).

    With λ = 0 and keys that depend linearly (one fact twice), the pseudo-inverse is taken: the
    equality holds where the wanted values agree, in the least-squares sense where they
    contradict each other, and ``warnings`` says so.

    Args:
        cov: second moment of the layer's keys.
        K: (F, n) one key per fact.
        R: (D, n) what each key's value should change by.
        lam: λ ≥ 0.
    """
    if not 0 <= lam < math.inf:
        raise UserError(f"EMMET's lambda is {lam}", expected="a number of 0 or more")
    return _regularised(cov, K, R, lam)


def _regularised(cov: Metric, K: Tensor, R: Tensor, lam: float) -> LowRank:
    """R (KᵀC⁻¹K + λI)⁻¹KᵀC⁻¹ as factors; a pseudo-inverse where the bracket is singular."""
    K, R = _pair(K, R, cov.size, cov.moment)
    right = cov.solve(K)  # (F, n)
    gram = K.T @ right  # (n, n)
    energy = float(gram.diagonal().sum())
    if energy <= 0:
        raise UserError("The keys of the edit are zero, so no edit at this layer can act")
    gram = (gram + gram.T) / 2
    gram.diagonal().add_(lam)
    if lam > _DEPENDENT * energy:  # positive definite beyond doubt, and Cholesky is the fast way
        return LowRank(torch.cholesky_solve(R.T, torch.linalg.cholesky(gram)).T, right)
    values, vectors = torch.linalg.eigh(gram)
    kept = values > _DEPENDENT * values[-1]
    if bool(kept.all()):
        left = R @ (vectors / values) @ vectors.T
        return LowRank(left, right)
    vectors = vectors[:, kept]  # (n, R)
    left, right = R @ (vectors / values[kept]), right @ vectors
    missed = float((left @ (right.T @ K) - R).norm() / R.norm().clamp_min(1e-300))
    warning = (
        f"{int((~kept).sum())} of {K.shape[1]} keys depend linearly on the others (a fact given "
        "twice, or two prompts with one subject in the same words)"
    )
    if missed > 1e-6:
        warning += f"; their targets contradict each other, {missed:.1%} of the change is not met"
    return LowRank(left, right, (warning,))


@dataclass(frozen=True, eq=False)
class NullSpaceProjector:
    """AlphaEdit's P, kept as an orthonormal basis of the smaller side.

    Attributes:
        basis: (F, r) orthonormal columns.
        spans_kept: True when ``basis`` spans the directions an edit may use (P = QQᵀ), False
            when it spans the protected ones (P = I − QQᵀ).
    """

    basis: Tensor
    spans_kept: bool

    @property
    def size(self) -> int:
        """F."""
        return self.basis.shape[0]

    @property
    def dimension(self) -> int:
        """Number of directions an edit may use."""
        r = self.basis.shape[1]
        return r if self.spans_kept else self.size - r

    def apply(self, K: Tensor) -> Tensor:
        """P K, of the shape of ``K`` (F, n)."""
        K = K.detach().to(self.basis.device).to(self.basis.dtype)
        along = self.basis @ (self.basis.T @ K)
        return along if self.spans_kept else K - along

    def dense(self) -> Tensor:
        """P (F, F)."""
        return self.apply(torch.eye(self.size))


def null_space_projector(
    cov: Covariance, threshold: float = 0.02, *, absolute: bool = False
) -> NullSpaceProjector:
    """Projector on the directions that the text's keys hardly use (AlphaEdit, arXiv 2410.02355).

    The directions are the eigenvectors of C (without ridge) whose eigenvalue lies below
    ``threshold`` × the mean eigenvalue, tr(C)/F. So the text's keys have, per kept direction, less
    than that share of their mean energy per direction, whatever the model's scale.

    Args:
        cov: second moment of the layer's keys.
        threshold: relative to the mean eigenvalue, or to nothing with ``absolute``.
        absolute: compare eigenvalues with ``threshold`` itself, as published (0.02); what that
            keeps depends on the scale of the model's keys.

    Raises:
        UserError: no direction is left to edit in, or the threshold is not above 0.
    """
    if not 0 < threshold < math.inf:
        raise UserError(f"The null-space threshold is {threshold}", expected="a number above 0")
    values, vectors = cov.eigh()  # ascending
    mean = float(values.mean())
    bound = threshold if absolute else threshold * mean
    kept = int((values < bound).sum())
    if kept == 0:
        raise UserError(
            f"No direction of the keys lies below the null-space threshold {bound:.3g} "
            f"(smallest eigenvalue {float(values[0]):.3g}, mean {mean:.3g}), "
            "so AlphaEdit could not write anything",
            fix="Raise the threshold"
            + (" or use the relative one" if absolute else f" above {float(values[0]) / mean:.3g}"),
        )
    if 2 * kept <= cov.size:
        return NullSpaceProjector(vectors[:, :kept].contiguous(), spans_kept=True)
    return NullSpaceProjector(vectors[:, kept:].contiguous(), spans_kept=False)


def alphaedit_update(
    projector: NullSpaceProjector,
    K: Tensor,
    R: Tensor,
    previous: Tensor | None = None,
    l2: float = 10.0,
) -> LowRank:
    """AlphaEdit's update (Fang et al. 2025, arXiv 2410.02355, equation 12).

    ΔWᵀ solves [P(KKᵀ + K_pK_pᵀ) + l2·I] ΔWᵀ = P K Rᵀ: the minimum of
    ‖ΔW K − R‖² + ‖ΔW K_p‖² + l2·‖ΔW‖² over ΔW = ΔW P. As ΔW = ΔW P, the system is that of the
    projected keys Z = P[K K_p], and ΔW = [R 0](ZᵀZ + l2·I)⁻¹Zᵀ: a solve in n + m dimensions.
    ΔW has no component on the protected directions, and rank at most n.

    Args:
        projector: from :func:`null_space_projector`.
        K: (F, n) keys of this batch.
        R: (D, n) what each key's value should change by.
        previous: (F, m) keys of the batches before, K_p (see :func:`append_keys`): the published
            cache is K_pK_pᵀ.
        l2: weight > 0 of the size of ΔW, in squared key units.
    """
    if not 0 < l2 < math.inf:
        raise UserError(f"AlphaEdit's l2 is {l2}", expected="a number above 0")
    basis = projector.basis
    K, R = _pair(K, R, projector.size, basis)
    n = K.shape[1]
    if previous is not None:
        before = _columns("earlier key", previous, projector.size, basis)
        K = torch.cat([K, before], dim=1)
    Z = projector.apply(K)  # (F, n + m)
    system = Z.T @ Z
    system.diagonal().add_(l2)
    # Only the first n columns carry a wanted change; the earlier keys are wanted unmoved.
    first = torch.eye(Z.shape[1], n, dtype=Z.dtype, device=Z.device)
    solved = torch.cholesky_solve(first, torch.linalg.cholesky(system))  # (n + m, n)
    # Projected once more, so that what rounding put on the protected side is taken off again.
    return LowRank(R, projector.apply(Z @ solved))


def append_keys(previous: Tensor | None, K: Tensor) -> Tensor:
    """The keys to hand to the next batch: K_p with this batch's columns, in float64 on the CPU.

    Returns (F, m) columns with KKᵀ added to K_pK_pᵀ. More than F columns are replaced by F (or
    fewer) with the same K_pK_pᵀ, so memory stays bounded however many batches come.
    """
    K = _finite("key", K).cpu().to(torch.float64)
    keys = K if previous is None else torch.cat([previous.cpu().to(torch.float64), K], dim=1)
    if keys.shape[1] <= keys.shape[0]:
        return keys
    # keysᵀ = Q·upper, hence keys keysᵀ = upperᵀ upper.
    return torch.linalg.qr(keys.T, mode="r").R.T.contiguous()


def spread_residual(
    R: Tensor, i: int, n_layers: int, mode: Literal["memit", "pmet"] = "memit"
) -> Tensor:
    """The part of the residual R (D, n) that the ``i``-th of ``n_layers`` edited layers takes.

    R / (n_layers − i) for MEMIT (arXiv 2210.07229, algorithm 1), R / √(n_layers − i) for PMET
    (arXiv 2308.08742); ``i`` counts from 0, and the last layer takes all that is left.
    """
    if not 0 <= i < n_layers:
        raise ValueError(f"layer number {i} of {n_layers}")
    if mode not in ("memit", "pmet"):
        raise ValueError(f"unknown mode {mode!r}")
    left = n_layers - i
    return R / (left if mode == "memit" else math.sqrt(left))


def _finite(what: str, tensor: Tensor) -> Tensor:
    if not bool(torch.isfinite(tensor).all()):
        raise UserError(
            f"A {what} of the edit holds NaN or infinite values",
            fix="Lower the learning rate of the value optimisation; in place of float16 load the "
            "model with bfloat16 or float32",
        )
    return tensor.detach()


def _as(what: str, tensor: Tensor, like: Tensor) -> Tensor:
    # Moved before the cast: some accelerators have no float64.
    return _finite(what, tensor).to(like.device).to(like.dtype)


def _columns(what: str, tensor: Tensor, rows: int, like: Tensor) -> Tensor:
    if tensor.ndim != 2 or tensor.shape[0] != rows:
        raise ValueError(f"{what}s must be ({rows}, n) columns, got {tuple(tensor.shape)}")
    return _as(what, tensor, like)


def _pair(K: Tensor, R: Tensor, rows: int, like: Tensor) -> tuple[Tensor, Tensor]:
    K = _columns("key", K, rows, like)
    if R.ndim != 2 or R.shape[1] != K.shape[1] or K.shape[1] == 0:
        raise ValueError(f"one residual column per key: {tuple(K.shape)}, {tuple(R.shape)}")
    return K, _as("residual", R, like)


def _vectors(cov: Metric, *keys: Tensor) -> tuple[Tensor, ...]:
    for key in keys:
        if key.shape != (cov.size,):
            raise ValueError(f"a key must be ({cov.size},), got {tuple(key.shape)}")
    return tuple(_as("key", key, cov.moment) for key in keys)
