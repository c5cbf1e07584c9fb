"""Why a model's numbers are no numbers: which weight is at fault, or else the type in use."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch

from goldenlayers.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

# Weights of real models stay below some thousands; a flipped bit of an exponent gives far more.
_LARGE = 1e6


def not_a_number(model: nn.Module, problem: str, *, otherwise: str = "") -> UserError:
    """The error for a result of ``model`` that is NaN or infinite.

    Looks through all weights, so it is called only when there is such a result.

    Args:
        model: as it computed the result.
        problem: what came out, and where.
        otherwise: what to do when neither the weights nor their type explain it.

    """
    cause, fix = why_not_a_number(model)
    return UserError(f"{problem}: {cause}" if cause else problem, fix=fix or otherwise)


def why_not_a_number(model: nn.Module) -> tuple[str, str]:
    """(cause, what to do about it), both empty when the weights are whole and the type is wide."""
    largest, where = 0.0, ""
    half = False
    for name, weight in model.named_parameters():
        if not weight.is_floating_point():
            continue
        half |= weight.dtype == torch.float16
        values = weight.detach()
        if not bool(torch.isfinite(values).all()):
            return _broken(name, values)
        size = float(values.abs().max()) if values.numel() else 0.0
        if size > largest:
            largest, where = size, name
    if largest > _LARGE:
        return f"{_place(where)} holds {largest:.3g}, far more than a weight ever is", _FETCH
    if half:
        return (
            "its weights are finite, and float16 holds no number above 65504",
            "Load the model with --dtype bfloat16 or --dtype float32",
        )
    return "", ""


_FETCH = "The checkpoint itself is damaged: copy or download it again"


def _broken(name: str, values: Tensor) -> tuple[str, str]:
    nan, infinite = int(torch.isnan(values).sum()), int(torch.isinf(values).sum())
    kinds = [f"{nan} NaN"] * bool(nan) + [f"{infinite} infinite"] * bool(infinite)
    first = torch.nonzero(~torch.isfinite(values))[0].tolist()
    cause = (
        f"{_place(name)} holds {' and '.join(kinds)} of {values.numel()} values, the first at "
        f"{tuple(first)}"
    )
    if values.dtype == torch.float16 and not nan:
        return cause, (
            "They may be too large for float16 only: load the model with --dtype bfloat16 or "
            "--dtype float32. If it stays so, copy or download the checkpoint again"
        )
    return cause, _FETCH


def _place(name: str) -> str:
    """A weight's layer, where its name has one, and its name."""
    found = re.search(r"\.(\d+)\.", name)
    return f"layer {found[1]}, {name}" if found else name
