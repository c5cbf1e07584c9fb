"""The change of each matrix as two thin factors of one common rank, which adapters are made of.

Shapes: R rank.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from goldenlayers.delta import Dense, LowRank
from goldenlayers.delta.factors import of_expert
from goldenlayers.errors import UserError

# A dense change counts as low-rank when what is cut off is this small (relative, Frobenius).
EXACT = 1e-5
DTYPES = ("float32", "float16", "bfloat16", "float64")


def factors_of(
    changes: Mapping[str, LowRank | Dense], rank: int | None
) -> tuple[dict[str, tuple[Tensor, Tensor]], int, dict[str, float]]:
    """(A (R, in), B (out, R)) of every matrix that changes, R, and what truncation cost.

    ΔW = B A. Matrices of lower rank are padded with zeros to the common R: loaders differ in how
    they scale mixed ranks. The factors are at least float32. The last are relative Frobenius
    errors, of dense changes and of such as were cut.

    Args:
        changes: by parameter name.
        rank: cut changes to this rank whatever it costs.

    Raises:
        UserError: nothing changes, an expert's matrix does, or a dense change has no exact form of
            lower rank.
    """
    if rank is not None and rank < 1:
        raise UserError(f"rank is {rank}", expected="1 or more")
    thin: dict[str, LowRank] = {}
    errors: dict[str, float] = {}
    for name, change in changes.items():
        if of_expert(name):
            raise UserError(
                f"'{name}' is the matrix of one expert, which lies stacked with the others in one "
                "weight: no adapter holds a change of it",
                fix="Export the whole model (--to merged)",
            )
        if isinstance(change, Dense):
            thin[name], errors[name] = _factored(name, change, rank)
        elif rank is not None and change.rank > rank:
            thin[name], errors[name] = Dense(change.dense).truncated(rank)
        else:
            thin[name] = change.compressed(1e-7) if change.rank > min(change.shape) else change
    thin = {name: low for name, low in thin.items() if low.rank}
    if not thin:
        raise UserError("the delta changes nothing, so there is no adapter to write")
    common = max(low.rank for low in thin.values())
    pairs = {
        name: (_padded(low.right, common).T.contiguous(), _padded(low.left, common).contiguous())
        for name, low in thin.items()
    }
    return pairs, common, errors


def _factored(name: str, change: Dense, rank: int | None) -> tuple[LowRank, float]:
    """A dense change as factors, and their relative error; refused when it costs accuracy."""
    if rank is not None:
        return change.truncated(rank)
    values = change.singular_values()
    total = float(values.norm())
    # tail[r]: what is lost with r values kept.
    tail = values.square().flip(0).cumsum(0).flip(0).sqrt()
    exact = int((tail > EXACT * total).sum())
    out_features, in_features = change.shape
    limit = out_features * in_features // (out_features + in_features)
    if exact > limit:
        error = float(tail[limit]) / total
        largest = float((change.dense - change.truncated(limit)[0].dense).abs().max())
        raise UserError(
            f"the change of '{name}' is dense: rank {limit}, the most that is smaller than the "
            f"matrix itself, leaves a relative error of {error:.2g} (largest entry {largest:.2g})",
            expected=f"a change that factors to {EXACT:g}",
            fix="Export the merged model, or accept the error with rank=R (--rank R)",
        )
    return change.truncated(exact)


def _padded(factor: Tensor, rank: int) -> Tensor:
    """(n, r) to (n, R) by columns of zeros, at least float32."""
    wide = factor.to(torch.promote_types(factor.dtype, torch.float32))
    return nn.functional.pad(wide, (0, rank - factor.shape[1])).cpu()


def dtype_of(name: str | None) -> torch.dtype | None:
    """The number format of that name.

    Raises:
        UserError: there is none that weights are stored in.
    """
    if name is not None and name not in DTYPES:
        raise UserError(f"unknown dtype '{name}'", expected=" or ".join(DTYPES))
    return getattr(torch, name) if name is not None else None


def cast(state: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
    """Cast floating-point tensors, tied ones to one tensor, so that they are saved once.

    Raises:
        UserError: a value is too large for its new number format.
    """
    done: dict[tuple[int, torch.Size, tuple[int, ...]], Tensor] = {}
    result = {}
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride())
        dtype = dtypes.get(name)
        if dtype is None or not tensor.is_floating_point():
            result[name] = tensor
            continue
        result[name] = done.setdefault(key, tensor.to(dtype))
        if torch.isinf(result[name]).any() and not torch.isinf(tensor).any():
            raise UserError(
                f"'{name}' holds values too large for {dtype}", fix="Choose bfloat16 or float32"
            )
    return result
