"""The edited model as a whole checkpoint."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel

from goldenlayers.delta import WeightDelta
from goldenlayers.delta.factors import hf_of
from goldenlayers.errors import UserError
from goldenlayers.export.card import base_of, write_card
from goldenlayers.export.factors import cast, dtype_of
from goldenlayers.export.places import new_folder
from goldenlayers.models.loading import quiet_transformers
from goldenlayers.models.quantised import quantised_modules, stored_as
from goldenlayers.models.weights import Checkpoint

if TYPE_CHECKING:
    from goldenlayers.models import Model


def export_merged(
    model: Model | PreTrainedModel,
    delta: WeightDelta,
    out_dir: str | Path,
    *,
    dtype: str | None = None,
    force: bool = False,
    overwrite: bool = False,
    evidence: Sequence[str] = (),
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
        overwrite: replace an earlier export.
        evidence: sentences for the model card, such as ``read_check`` gives.

    Raises:
        UserError: the folder exists or cannot be written, or the delta does not fit the model.
    """
    hf = hf_of(model)
    if not isinstance(hf, PreTrainedModel):
        raise UserError(
            f"a {type(hf).__name__} cannot be saved as a checkpoint",
            expected="a goldenlayers Model or a transformers model",
        )
    if method := next(map(stored_as, quantised_modules(hf).values()), ""):
        raise UserError(
            f"the weights are quantised ({method}): a change cannot be written into them",
            fix="Export to peft, whose adapter stands beside them, or merge into the "
            "unquantised model",
        )
    out, one = Path(out_dir), None if dtype == "auto" else dtype_of(dtype)
    about = {"to": "merged", "base_fingerprint": delta.base_fingerprint}
    with (
        new_folder(out, about, overwrite=overwrite) as part,
        delta.applied(model, force=force),
    ):
        state = hf.state_dict()
        wanted = {} if one is None else dict.fromkeys(state, one)
        if dtype == "auto":  # a model made in memory has no checkpoint
            checkpoint = Checkpoint.of(hf, getattr(model, "folder", None))
            wanted = checkpoint.dtypes if checkpoint is not None else {}
        state = cast(state, _without_elsewhere(state, wanted))
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
        write_card(part, delta, "merged", base=base_of(model), evidence=evidence)
    return out


def whole_dtype(model: Model, dtype: str) -> torch.dtype:
    """The number format to load a model in so that :func:`export_merged` rounds only once.

    Args:
        model: loaded in any format.
        dtype: what it is to be written in, as for ``export_merged``.
    """
    checkpoint = Checkpoint.of(model.hf, model.folder)
    stored = checkpoint.widest() if checkpoint is not None else model.dtype
    wanted = None if dtype == "auto" else dtype_of(dtype)
    return stored if wanted is None else torch.promote_types(stored, wanted)


def _without_elsewhere(
    state: dict[str, Tensor], wanted: Mapping[str, torch.dtype]
) -> Mapping[str, torch.dtype]:
    """``wanted``, or nothing where weights are kept elsewhere, which transformers reads itself.

    Raises:
        UserError: those would have to be cast.
    """
    elsewhere = {name: tensor.dtype for name, tensor in state.items() if tensor.is_meta}
    if other := {str(wanted[n]) for n, one in elsewhere.items() if wanted.get(n, one) != one}:
        raise UserError(
            f"the weights do not fit on one device, and were to be written as {', '.join(other)} "
            f"while loaded as {next(iter(elsewhere.values()))}",
            fix="Load the model in that number format, or with --device cpu",
        )
    return {} if elsewhere else wanted


def _most_used(state: dict[str, Tensor]) -> torch.dtype:
    """The number format that most of the weights have."""
    sizes: Counter[torch.dtype] = Counter()
    for tensor in state.values():
        if tensor.is_floating_point():
            sizes[tensor.dtype] += tensor.numel()
    return sizes.most_common(1)[0][0]
