"""From a GGUF file to a folder of safetensors, configuration and tokenizer.

The weights are unpacked to float32: of the packaged models' values only 2-60 % per matrix are exact
in bfloat16 and 10-98 % in float16, so a shorter type would lose some.
"""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from goldenlayers.errors import UserError
from goldenlayers.models import cache
from goldenlayers.models.checks import check_loaded, check_room
from goldenlayers.models.gguf_checks import check_model
from goldenlayers.models.gguf_header import read_header
from goldenlayers.models.libraries import quiet_transformers, told

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_INSTEAD = "Use the model's safetensors checkpoint (a directory or a hub id) instead"

# Texts whose tokens must survive saving and loading: spaces, digits, accents, CJK, an emoji.
_SAMPLES = (
    "The capital of France is Paris.",
    " Jules Verne's café – naïve  1905\n\tend",
    "東京 Привет שלום \U0001f389",
)


def convert_gguf(
    gguf: Path, folder: Path, *, label: str = "", progress: cache.Progress = cache.say
) -> dict[str, Any]:
    """Convert ``gguf`` into ``folder``: save_pretrained layout, float32.

    Returns what the cache's manifest shall say about the model. ``label`` names it in messages.

    Raises:
        UserError: not a whole GGUF file, a kind of model or tokenizer that cannot be converted.

    """
    label = label or gguf.name
    header = read_header(gguf)
    check_model(gguf, header)
    cache.require_space(folder, 2 * 4 * header.elements, f"Converting {label}")
    if importlib.util.find_spec("accelerate") is None:  # transformers unpacks GGUF only with it
        raise UserError(
            f"Converting {label} needs the package accelerate, which is not installed",
            fix="python -m pip install accelerate",
        )
    progress(f"Converting {label} to safetensors, once; this takes a minute or two.")

    import torch
    import transformers
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    problem = (
        f"{gguf} (architecture '{header.architecture}') cannot be converted by transformers "
        f"{transformers.__version__}"
    )
    with told(problem, fix=_INSTEAD), quiet_transformers(), _alone(gguf) as (place, name):
        where: dict[str, Any] = {"gguf_file": name, "local_files_only": True}
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(place, **where))
        check_room(empty, header.elements, gguf.stat().st_size, label)
        tokenizer = AutoTokenizer.from_pretrained(place, **where)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            place,
            **where,
            **_dequantize_options(),
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # they are reported, and refused in our own words
            output_loading_info=True,
        )
    model, report = loaded
    check_loaded(report, model.config.to_dict(), str(gguf))
    clear_quantization(model)
    _follow_bos_flag(tokenizer, header.values)
    model.config.name_or_path = ""
    with quiet_transformers():
        try:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        except SafetensorError as error:  # the disk is full or read-only
            raise OSError(str(error)) from error
        again = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    for text in _SAMPLES:
        if again(text)["input_ids"] != tokenizer(text)["input_ids"]:
            raise UserError(
                f"The tokenizer of {gguf} does not survive saving: '{text}' is split differently",
                fix=_INSTEAD,
            )
    return {
        "file": label,
        "family": model.config.model_type,
        "layers": int(model.config.num_hidden_layers),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": "float32",
        "transformers": transformers.__version__,
    }


@contextmanager
def _alone(gguf: Path) -> Iterator[tuple[str, str]]:
    """(directory, name) of the file in a directory of its own.

    Transformers is given a directory, and would apply an adapter that lies beside the file.
    """
    with tempfile.TemporaryDirectory() as place:
        name = "model.gguf"
        try:
            Path(place, name).symlink_to(gguf.absolute())
        except OSError:  # a system without links
            shutil.copyfile(gguf, Path(place, name))
        yield place, name


def _dequantize_options() -> dict[str, Any]:
    """Ask for plain tensors where this transformers could keep the GGUF blocks packed."""
    import transformers

    kind = getattr(transformers, "GgufConfig", None)
    if kind is None:
        return {}
    return {"quantization_config": kind(dequantize=True), "device_map": "cpu"}


def clear_quantization(model: PreTrainedModel) -> None:
    """Forget that the weights were once quantised.

    Transformers keeps flags that make ``.float()`` and ``save_pretrained`` refuse a model although
    its tensors are plain ones.
    """
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        config.__dict__.pop("quantization_config", None)
    for name in ("hf_quantizer", "quantization_method", "is_quantized", "hf_device_map"):
        model.__dict__.pop(name, None)


def _follow_bos_flag(tokenizer: PreTrainedTokenizerBase, header: dict[str, Any]) -> None:
    """Make the tokenizer begin texts with BOS exactly when the file says so."""
    wanted = header.get("tokenizer.ggml.add_bos_token")
    if wanted is None or tokenizer.bos_token_id is None or begins_with_bos(tokenizer) == wanted:
        return
    tokenizer.add_bos_token = bool(wanted)  # type: ignore[attr-defined]
    if begins_with_bos(tokenizer) != wanted:
        raise UserError(
            f"The GGUF file says that texts {'begin' if wanted else 'do not begin'} with BOS, "
            "and the converted tokenizer cannot be made to do so",
            fix=_INSTEAD,
        )


def begins_with_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer puts its BOS token before a text by itself."""
    ids = tokenizer("a")["input_ids"]
    return bool(ids) and ids[0] == tokenizer.bos_token_id
