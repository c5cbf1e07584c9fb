"""What breaks below us, as one of our errors: weights that are no numbers, libraries that fail."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
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


@contextmanager
def told(problem: str, *, expected: str = "", fix: str = "") -> Iterator[None]:
    """Within it, whatever a library raises over a file from elsewhere becomes a ``UserError``.

    Only for calls that hand such a file to transformers, tokenizers, gguf or safetensors, whose
    readers raise whatever they like. The message keeps the original's class and first words, and
    the original is its cause, so that a defect of ours can still be told from a bad file.
    """
    try:
        yield
    except UserError:
        raise
    except MemoryError as error:
        raise UserError(f"{problem}: it needs more memory than there is", fix=fix) from error
    except BaseException as error:
        # A panic in Rust code comes as a class of no module, derived from BaseException.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{problem}: {summary(error)}", expected=expected, fix=fix) from error


def summary(error: BaseException) -> str:
    """An error's class and the first two lines of its text, as one line of bounded length."""
    lines = [line.strip() for line in str(error)[:2000].strip().splitlines()[:2]]
    text = " ".join(line for line in lines if line)
    text = text if len(text) <= 400 else f"{text[:399]}…"
    name = type(error).__name__
    return f"{text} ({name})" if text else name


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hush the progress bars and advice of transformers; errors still come as exceptions."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
