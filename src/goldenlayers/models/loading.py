"""From a checked model folder to a transformers model and its tokenizer."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from goldenlayers.durable import disk_errors
from goldenlayers.errors import UserError
from goldenlayers.models import checks
from goldenlayers.models.files import Weights, find_weights, own_file, read_object
from goldenlayers.models.libraries import quiet_transformers, told

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_LAYOUT = "a decoder-only language model in save_pretrained layout"
_SAVE_TOKENIZER = "Save the model's own tokenizer there: tokenizer.save_pretrained(directory)"


def open_folder(
    folder: Path, name: str, *, dtype: str, trust_remote_code: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Read the weights and the tokenizer of a model directory, on the CPU.

    Raises:
        UserError: the directory is incomplete, or holds a model that cannot be handled.

    """
    import transformers

    config = checks.read_config(folder)
    checks.check_config(config, name, trust_remote_code=trust_remote_code)
    weights = find_weights(folder)
    checks.check_sizes(config, weights, name)
    checks.check_tokenizer(folder, config, name)
    wanted = "auto" if dtype == "auto" else getattr(torch, dtype)
    problem = f"transformers {transformers.__version__} cannot load {name}"
    with told(problem, expected=_LAYOUT), quiet_transformers():
        if trust_remote_code:
            hf_model, report = getattr(transformers, _auto_class(config)).from_pretrained(
                str(folder),
                dtype=wanted,
                use_safetensors=True,
                trust_remote_code=True,
                output_loading_info=True,
            )
        else:
            hf_model, report = _read(folder, config, weights, name, wanted)
    checks.check_loaded(report, config, name)
    tokenizer = _tokenizer(folder, config, name, trust_remote_code)
    # A few tokens more than embeddings are usual (Gemma 3 counts an image token), many are not.
    embeddings: Any = hf_model.get_input_embeddings()
    rows = embeddings.weight.shape[0]
    if tokenizer.vocab_size > 1.05 * rows:
        raise UserError(
            f"The tokenizer of {name} is another model's: it has {tokenizer.vocab_size} tokens, "
            f"and the model {rows} embeddings",
            fix=_SAVE_TOKENIZER,
        )
    return hf_model, tokenizer


def _read(
    folder: Path, config: dict[str, Any], weights: Weights, name: str, dtype: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model, and what transformers reports about its weights.

    Transformers is given the configuration and the tensors, never the folder: so nothing else that
    lies there (adapters, pickles, code, kernels) can come in.
    """
    import transformers
    from safetensors.torch import load_file

    parsed = _configuration(config, folder)
    with torch.device("meta"):  # the classes and shapes alone, without memory
        empty = getattr(transformers, _auto_class(config)).from_config(parsed)
    checks.check_room(empty, weights.elements, weights.bytes, name)
    state: dict[str, torch.Tensor] = {}
    for path in weights.files:
        state |= load_file(path)
    model, report = type(empty).from_pretrained(
        None,
        config=empty.config,
        state_dict=state,
        dtype=dtype,
        ignore_mismatched_sizes=True,  # they are reported, and refused in our own words
        output_loading_info=True,
    )
    model.config.name_or_path = model.name_or_path = str(folder)
    if (path := own_file(folder, "generation_config.json")) is not None:
        given = checks.without_steering(read_object(path))
        model.generation_config = transformers.GenerationConfig.from_dict(given)
    return model, report


def _configuration(config: dict[str, Any], folder: Path) -> Any:
    """The configuration as transformers reads it, from a directory that holds nothing else."""
    from transformers import AutoConfig

    with tempfile.TemporaryDirectory() as alone:
        text = json.dumps(checks.without_steering(config))
        with disk_errors(Path(alone)):
            Path(alone, "config.json").write_text(text, encoding="utf-8")
        parsed = AutoConfig.from_pretrained(alone, local_files_only=True, trust_remote_code=False)
    parsed.name_or_path = str(folder)
    return parsed


def _tokenizer(
    folder: Path, config: dict[str, Any], name: str, trust_remote_code: bool
) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    with told(f"The tokenizer of {name} cannot be loaded", fix=_SAVE_TOKENIZER):
        with quiet_transformers():
            if trust_remote_code:
                tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=True)
            else:
                tokenizer = AutoTokenizer.from_pretrained(
                    str(folder),
                    config=_configuration(config, folder),
                    trust_remote_code=False,
                    local_files_only=True,
                )
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise TypeError(f"a {type(tokenizer).__name__} is no tokenizer")
        says = tokenizer("a", add_special_tokens=False)["input_ids"]
    if not says:
        raise UserError(
            f"The tokenizer of {name} is empty: it turns text into nothing", fix=_SAVE_TOKENIZER
        )
    return tokenizer


def _auto_class(config: Mapping[str, Any]) -> str:
    """The auto class that loads the checkpoint as what it is (multimodal Gemma 3 and the like)."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL,
    )
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as MULTIMODAL,
    )

    kind = config.get("model_type")
    architectures = {str(item) for item in config.get("architectures") or ()}
    if kind in MULTIMODAL and (kind not in CAUSAL or MULTIMODAL[kind] in architectures):
        return "AutoModelForImageTextToText"
    return "AutoModelForCausalLM"
