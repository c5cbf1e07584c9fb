"""Handing an edit on: as a LoRA adapter for ``peft``, or as a whole merged checkpoint.

Shapes: R rank.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from goldenlayers.delta import Dense, LowRank, WeightDelta
from goldenlayers.delta.factors import find_targets, hf_of
from goldenlayers.durable import is_abandoned, lock, sync
from goldenlayers.errors import UserError
from goldenlayers.models.loading import quiet_transformers
from goldenlayers.models.weights import Checkpoint

if TYPE_CHECKING:
    from goldenlayers.models import Model

# A dense change counts as low-rank when what is cut off is this small (relative, Frobenius).
EXACT = 1e-5
_MARK = ".goldenlayers-export"  # in a folder that is being written
_DTYPES = ("float32", "float16", "bfloat16", "float64")


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
    dtype: str | None = None,
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
        dtype: "float32", "float16", "bfloat16" or "float64" to store the factors in; None: as in
            the delta, at least float32.
        force: as for ``WeightDelta.applied``.

    Raises:
        UserError: the folder exists, the delta is empty or does not belong to the model, or a
            dense change has no exact form of lower rank.
    """
    out, wanted = Path(out_dir), _dtype(dtype)
    hf, base, transposed = None, model, False
    if model is not None and not isinstance(model, str):
        delta.check(model, force=force)
        hf, base = hf_of(model), delta.base_name or str(getattr(model, "name", ""))
        transposed = any(one.transposed for one in find_targets(hf, delta.changes).values())
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
        "base_model_name_or_path": delta.base_name if base is None else base,
        "r": common,
        "lora_alpha": common,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": transposed,
        "target_modules": _module_names(hf, list(factors)),
        "inference_mode": True,
        "init_lora_weights": True,
    }
    if wanted is not None:
        tensors = _cast(tensors, dict.fromkeys(tensors, wanted))
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
        dtype: "float32", "float16", "bfloat16" or "float64" to store the weights in. "auto": each
            as in the checkpoint that the model was loaded from. None: as loaded.
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
    out, one = Path(out_dir), None if dtype == "auto" else _dtype(dtype)
    with _new_folder(out) as part, delta.applied(model, force=force):
        state = hf.state_dict()
        wanted = {} if one is None else dict.fromkeys(state, one)
        if dtype == "auto":  # a model made in memory has no checkpoint
            checkpoint = Checkpoint.of(hf, getattr(model, "folder", None))
            wanted = checkpoint.dtypes if checkpoint is not None else {}
        state = _cast(state, wanted)
        recorded, used = hf.config.dtype, _most_used(state)
        try:
            with quiet_transformers():
                hf.save_pretrained(part, state_dict=state)
        finally:
            hf.config.dtype = recorded
        if wanted:  # transformers writes down the format that it computes in
            config = json.loads((part / "config.json").read_text("utf-8"))
            config["dtype"] = str(used).removeprefix("torch.")
            text = json.dumps(config, indent=2, sort_keys=True) + "\n"
            (part / "config.json").write_text(text, "utf-8")
        tokenizer = getattr(model, "tokenizer", None)
        if tokenizer is not None:
            tokenizer.save_pretrained(part)
    return out


def whole_dtype(model: Model, dtype: str) -> torch.dtype:
    """The number format to load a model in so that :func:`export_merged` rounds only once.

    Args:
        model: loaded in any format.
        dtype: what it is to be written in, as for ``export_merged``.
    """
    checkpoint = Checkpoint.of(model.hf, model.folder)
    stored = checkpoint.widest() if checkpoint is not None else model.dtype
    wanted = None if dtype == "auto" else _dtype(dtype)
    return stored if wanted is None else torch.promote_types(stored, wanted)


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
    if name is not None and name not in _DTYPES:
        raise UserError(f"unknown dtype '{name}'", expected=" or ".join(_DTYPES))
    return getattr(torch, name) if name is not None else None


def _cast(state: dict[str, Tensor], dtypes: dict[str, torch.dtype]) -> dict[str, Tensor]:
    """Cast floating-point tensors, tied ones to one tensor, so that they are saved once."""
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


def _most_used(state: dict[str, Tensor]) -> torch.dtype:
    """The number format that most of the weights have."""
    sizes: Counter[torch.dtype] = Counter()
    for tensor in state.values():
        if tensor.is_floating_point():
            sizes[tensor.dtype] += tensor.numel()
    return sizes.most_common(1)[0][0]


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A folder to write into that becomes ``out`` when all went well, and vanishes otherwise.

    While it is written it is locked and bears a mark. So the next export into the same place knows
    what a killed one has left there, and removes it.
    """
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        if out.is_symlink() or out.exists():
            raise UserError(
                f"'{out}' exists already", fix="Choose a folder that does not exist yet"
            )
        out.parent.mkdir(parents=True, exist_ok=True)
        for old in out.parent.glob(".*.part"):  # of exports that were killed
            if (old / _MARK).is_file() and not old.is_symlink() and is_abandoned(old):
                shutil.rmtree(old, ignore_errors=True)
        part.mkdir()
        with ExitStack() as stack:
            stack.callback(shutil.rmtree, part, ignore_errors=True)
            descriptor = os.open(part, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            lock(descriptor)
            (part / _MARK).touch()
            yield part
            for file in part.rglob("*"):
                sync(file)
            part.rename(out)
            (out / _MARK).unlink()
            sync(out.parent)
    except (OSError, ValueError, SafetensorError) as error:  # ValueError: NUL in the name
        raise UserError(
            f"'{out}' could not be written: {getattr(error, 'strerror', None) or error}",
            fix="Check the path, its permissions and the free space",
        ) from error
