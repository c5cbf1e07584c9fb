"""Handing an edit on: as a LoRA adapter for ``peft``, or as a whole merged checkpoint.

Shapes: R rank.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from goldenlayers.delta import Dense, LowRank, WeightDelta
from goldenlayers.delta.targets import find_targets, hf_of
from goldenlayers.errors import UserError

if TYPE_CHECKING:
    from goldenlayers.models.model import Model

# A dense change counts as low-rank when what is cut off is this small (relative, Frobenius).
EXACT = 1e-5


@dataclass(frozen=True)
class PeftExport:
    """A written adapter: its folder, the rank of its factors, what truncation cost per matrix.

    ``errors`` maps parameter names to the relative Frobenius error of their factors (of dense
    changes and such as were cut; the others are exact).
    """

    path: Path
    rank: int
    errors: dict[str, float]


def export_peft(
    delta: WeightDelta,
    out_dir: str | Path,
    model: Model | nn.Module | str | None = None,
    *,
    rank: int | None = None,
    force: bool = False,
) -> PeftExport:
    """Write ``delta`` as a LoRA adapter that ``peft.PeftModel.from_pretrained`` loads.

    lora_A = rightᵀ (R, in) and lora_B = left (out, R), alpha = R, so peft's scaling is 1. Matrices
    of lower rank are padded with zeros to the common R: loaders differ in how they scale mixed
    ranks. Only the changed modules are adapted, named by their full paths.

    Args:
        delta: the change to write.
        out_dir: a folder that does not exist yet.
        model: the base, to check the delta against it and to record how it stores its matrices; or
            the name to write down as the base; or None for the name in the delta. Without a model,
            peft finds out about Conv1D by itself when it loads the adapter.
        rank: cut changes to this rank whatever it costs.
        force: as for ``WeightDelta.applied``.

    Raises:
        UserError: the folder exists, the delta is empty or does not belong to the model, or a
            dense change has no exact form of lower rank.
    """
    out = Path(out_dir)
    hf = None if model is None or isinstance(model, str) else hf_of(model)
    if model is not None and not isinstance(model, str):
        delta.check(model, force=force)
    factors: dict[str, LowRank] = {}
    errors: dict[str, float] = {}
    if rank is not None and rank < 1:
        raise UserError(f"rank is {rank}", expected="1 or more")
    for name, change in delta.changes.items():
        if isinstance(change, Dense):
            factors[name], errors[name] = _factored(name, change, rank)
        elif rank is not None and change.rank > rank:
            factors[name], errors[name] = Dense(change.dense).truncated(rank)
        else:
            factors[name] = change.compressed(1e-7) if change.rank > min(change.shape) else change
    factors = {name: low for name, low in factors.items() if low.rank}
    if not factors:
        raise UserError("the delta changes nothing, so there is no adapter to write")
    common = max(low.rank for low in factors.values())
    tensors = {}
    for name, low in factors.items():
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        tensors[f"{stem}.lora_A.weight"] = _padded(low.right, common).T.contiguous()  # (R, in)
        tensors[f"{stem}.lora_B.weight"] = _padded(low.left, common).contiguous()  # (out, R)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": _base_name(delta, model),
        "r": common,
        "lora_alpha": common,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": hf is not None and _stored_transposed(hf, delta),
        "target_modules": _module_names(hf, list(factors)),
        "inference_mode": True,
        "init_lora_weights": True,
    }
    metadata = {"format": "pt", "goldenlayers.base_fingerprint": delta.base_fingerprint}
    with _new_folder(out) as part:
        save_file(tensors, part / "adapter_model.safetensors", metadata)
        (part / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    return PeftExport(out, common, errors)


def export_merged(
    model: Model | PreTrainedModel,
    delta: WeightDelta,
    out_dir: str | Path,
    *,
    dtype: str | None = None,
    force: bool = False,
) -> Path:
    """Write the edited model as a checkpoint that ``AutoModelForCausalLM.from_pretrained`` loads.

    Apart from the edited matrices every tensor has the bytes that saving the base would give. A
    ``Model``'s tokenizer is saved beside it. The model itself stays as it is.

    Args:
        model: the base.
        delta: the change to merge.
        out_dir: a folder that does not exist yet.
        dtype: "float32", "float16" or "bfloat16" to store the weights in; None: as loaded.
        force: as for ``WeightDelta.applied``.

    Raises:
        UserError: the folder exists or cannot be written, or the delta does not fit the model.
    """
    hf = hf_of(model)
    if not isinstance(hf, PreTrainedModel):
        raise UserError(
            f"a {type(hf).__name__} cannot be saved as a checkpoint",
            expected="a goldenlayers Model or a transformers model",
        )
    wanted = _dtype(dtype)
    out = Path(out_dir)
    with _new_folder(out) as part, delta.applied(model, force=force):
        state = hf.state_dict()
        if wanted is not None:
            state = _cast(state, wanted)
        recorded = hf.config.dtype
        try:
            hf.save_pretrained(part, state_dict=state)
        finally:
            hf.config.dtype = recorded
        if wanted is not None:
            _record_dtype(part / "config.json", wanted)
        tokenizer = getattr(model, "tokenizer", None)
        if tokenizer is not None:
            tokenizer.save_pretrained(part)
    return out


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


def _base_name(delta: WeightDelta, model: Any) -> str:
    if isinstance(model, str):
        return model
    return delta.base_name or str(getattr(model, "name", ""))


def _stored_transposed(hf: nn.Module, delta: WeightDelta) -> bool:
    return any(target.transposed for target in find_targets(hf, delta.changes).values())


def _module_names(hf: nn.Module | None, names: list[str]) -> list[str] | str:
    """The paths of the changed modules, in the form that matches these modules and no others."""
    paths = [name.removesuffix(".weight") for name in names]
    others = [
        path
        for path, module in (hf.named_modules() if hf is not None else ())
        if isinstance(module, nn.Linear | Conv1D) and path not in paths
    ]
    # peft takes a listed name for the end of a path as well; a pattern is matched as a whole.
    if any(other.endswith(f".{path}") for other in others for path in paths):
        return "|".join(f"(?:{re.escape(path)})" for path in paths)
    return paths


def _dtype(name: str | None) -> torch.dtype | None:
    known = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if name is not None and name not in known:
        raise UserError(f"unknown dtype '{name}'", expected=" or ".join(known))
    return known[name] if name is not None else None


def _cast(state: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Cast floating-point tensors, tied ones to one tensor, so that they are saved once."""
    done: dict[tuple[int, torch.Size, tuple[int, ...]], Tensor] = {}
    result = {}
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if not tensor.is_floating_point():
            result[name] = tensor
            continue
        result[name] = done.setdefault(key, tensor.to(dtype))
        if torch.isinf(result[name]).any() and not torch.isinf(tensor).any():
            raise UserError(
                f"'{name}' holds values too large for {dtype}", fix="Choose bfloat16 or float32"
            )
    return result


def _record_dtype(config: Path, dtype: torch.dtype) -> None:
    text = json.loads(config.read_text("utf-8"))
    text["dtype"] = str(dtype).removeprefix("torch.")
    config.write_text(json.dumps(text, indent=2, sort_keys=True) + "\n", "utf-8")


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A folder to write into that becomes ``out`` when all went well, and vanishes otherwise."""
    if out.exists():
        raise UserError(f"'{out}' exists already", fix="Choose a folder that does not exist yet")
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        part.mkdir(parents=True)
        yield part
        part.rename(out)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"'{out}' could not be written: {getattr(error, 'strerror', None) or error}",
            fix="Check the path, its permissions and the free space",
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
