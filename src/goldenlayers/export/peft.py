"""An edit as a LoRA adapter for ``peft``, which vLLM loads, too. Shapes: R rank."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from goldenlayers.delta import WeightDelta
from goldenlayers.delta.factors import hf_of
from goldenlayers.delta.targets import find_targets
from goldenlayers.errors import UserError
from goldenlayers.export.card import base_of, loadable, write_card
from goldenlayers.export.factors import cast, dtype_of, factors_of
from goldenlayers.export.places import new_folder

if TYPE_CHECKING:
    from goldenlayers.models import Model

VLLM_RANKS = (16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes for --max-lora-rank from its default on (LoRAConfig of version 0.14)."""


@dataclass(frozen=True)
class PeftExport:
    """A written adapter: its folder, the rank of its factors, what truncation cost per matrix.

    ``errors`` maps parameter names to the relative Frobenius error of their factors (of dense
    changes and such as were cut; the others are exact).
    """

    path: Path
    rank: int
    errors: dict[str, float]

    @property
    def vllm_rank(self) -> int | None:
        """The least --max-lora-rank with which vLLM loads it; None where it is too wide."""
        return next((rank for rank in VLLM_RANKS if rank >= self.rank), None)


def export_peft(
    delta: WeightDelta,
    out_dir: str | Path,
    model: Model | nn.Module | str | None = None,
    *,
    rank: int | None = None,
    dtype: str | None = None,
    force: bool = False,
    overwrite: bool = False,
    evidence: Sequence[str] = (),
) -> PeftExport:
    """Write ``delta`` as a LoRA adapter that ``peft`` loads, with or without its base at hand.

    lora_A = rightᵀ (R, in) and lora_B = left (out, R), alpha = R, so peft's scaling is 1. Only the
    changed modules are adapted, named by their full paths. What vLLM asks of an adapter holds: no
    biases, no DoRA, no whole modules, tensors named by modules of linear maps.

    Args:
        delta: the change to write.
        out_dir: a folder that does not exist yet.
        model: the base, to check the delta against it, to record how it stores its matrices and
            where it is loaded from; or the hub id or directory to write down as the base; or None
            for what the name in the delta stands for here. Without a model, peft finds out about
            Conv1D by itself when it loads the adapter.
        rank: cut changes to this rank whatever it costs.
        dtype: "float32", "float16", "bfloat16" or "float64" to store the factors in; None: as in
            the delta, at least float32.
        force: as for ``WeightDelta.applied``.
        overwrite: replace an earlier export.
        evidence: sentences for the model card, such as ``read_check`` gives.

    Raises:
        UserError: the folder exists, the delta is empty or does not belong to the model, a dense
            change has no exact form of lower rank, or transformers can load no such base.
    """
    wanted = dtype_of(dtype)
    hf, transposed = None, False
    if model is None:
        base = loadable(delta.base_name)
    elif isinstance(model, str):
        base = loadable(model)
        if not base:
            raise UserError(
                f"transformers can load no model by the name '{model}'",
                expected="a hub id (owner/name) or a directory",
            )
    else:
        delta.check(model, force=force)
        hf, base = hf_of(model), base_of(model)
        transposed = any(one.transposed for one in find_targets(hf, delta.changes).values())
    pairs, common, errors = factors_of(delta.changes, rank)
    tensors = {}
    for name, (right, left) in pairs.items():
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        tensors[f"{stem}.lora_A.weight"] = right  # (R, in)
        tensors[f"{stem}.lora_B.weight"] = left  # (out, R)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base or None,
        "r": common,
        "lora_alpha": common,
        "lora_dropout": 0.0,
        "bias": "none",
        "modules_to_save": None,
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": transposed,
        "target_modules": _module_names(hf, list(pairs)),
        "inference_mode": True,
        "init_lora_weights": True,
    }
    if wanted is not None:
        tensors = cast(tensors, dict.fromkeys(tensors, wanted))
    metadata = {"format": "pt", "goldenlayers.base_fingerprint": delta.base_fingerprint}
    about = {"to": "peft", "base_fingerprint": delta.base_fingerprint}
    done = PeftExport(Path(out_dir), common, errors)
    with new_folder(done.path, about, overwrite=overwrite) as part:
        save_file(tensors, part / "adapter_model.safetensors", metadata)
        (part / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        write_card(part, delta, "peft", base=base, rank=done.vllm_rank, evidence=evidence)
    return done


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
