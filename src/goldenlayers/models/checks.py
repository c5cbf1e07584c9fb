"""What must be true of a checkpoint folder before its weights are read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from goldenlayers.errors import UserError
from goldenlayers.models.files import Weights, own_file, read_object

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_DTYPES = ("float64", "float32", "float16", "bfloat16")
# Methods of quantised checkpoints, with the entries that are handed on; all others are dropped.
_PACKED = ("bits", "group_size", "modules_to_not_convert")
QUANTISED = {
    "bitsandbytes": (
        *("load_in_4bit", "load_in_8bit", "bnb_4bit_compute_dtype", "bnb_4bit_quant_storage"),
        *("bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "llm_int8_has_fp16_weight"),
        *("llm_int8_skip_modules", "llm_int8_threshold"),
    ),
    "gptq": (*_PACKED, "desc_act", "sym", "checkpoint_format", "modules_in_block_to_quantize"),
    "awq": (*_PACKED, "zero_point", "version"),
}
# Entries of a configuration that make transformers fetch kernels, patch code or choose other files.
_STEERING = re.compile(
    r"_.*|(attn|experts)_implementation|kernel.*|use_kernels|fusion_config|transformers_weights"
    r"|name_or_path|distributed_config|custom_.*|auto_map|base_model_.*plan"
)
# Entries that count layers: so many modules are built, or lists of that length.
_COUNTS = re.compile(r"(.*_)?(n?layers?|blocks?|depths?|attention_types)")
_TOKENIZER_EXTRAS = (
    *("special_tokens_map.json", "added_tokens.json", "merges.txt", "chat_template.jinja"),
    *("chat_template.json", "generation_config.json"),
)
_DEPTH = 64
_LABELS = 1 << 16
# Weights without which a model predicts the same: what the classes compute anew, and heads and
# towers that a text does not pass through.
_HARMLESS = tuple(
    re.compile(pattern)
    for pattern in (
        r"(^|\.)rotary_emb\.(inv_freq|cos_cached|sin_cached)$",
        r"(^|\.)(position_ids|token_type_ids|_extra_state)$",
        r"\.(attn|attention)\.(attention\.)?(masked_)?bias$",  # causal masks of GPT-2 and others
        r"^(model\.)?mtp\.",  # predicts further tokens ahead
        r"^(v_head|value_head)\.",
        r"^(model\.)?(vision_tower|vision_model|visual|multi_modal_projector|mm_projector"
        r"|audio_tower|embed_vision|embed_audio)\.",
    )
)
_MERGE = (
    "This is a PEFT adapter: merge it into its base model first (merge_and_unload, then "
    "save_pretrained) and give that directory"
)
_NOT_GENERATING = ("MaskedLM", "SequenceClassification", "TokenClassification", "QuestionAnswering")
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model"),
    *("sentencepiece.bpe.model", "vocab.json", "vocab.txt", "tokenizer.tiktoken", "tekken.json"),
)


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's ``config.json``.

    Raises:
        UserError: there is none, it is not a JSON object, or the folder holds an adapter.
    """
    path = own_file(folder, "config.json")
    adapter = own_file(folder, "adapter_config.json")
    if path is None:
        if adapter is not None:
            fix = _MERGE
        elif ggufs := sorted(folder.glob("*.gguf")):
            fix = f"To load a GGUF file, name the file itself: {ggufs[0]}"
        else:
            fix = "Give the directory that save_pretrained wrote"
        raise UserError(
            f"The directory {folder} has no config.json",
            expected="a model directory: config.json, *.safetensors and tokenizer files",
            fix=fix,
        )
    if adapter is not None:  # with it or without it: both would be another model than one expects
        raise UserError(
            f"The directory {folder} holds a model and an adapter (adapter_config.json): it is "
            "not clear whether the adapter belongs to the model",
            fix=f"For the model alone, move the adapter_* files away. {_MERGE}",
        )
    return read_object(path)


def check_config(config: dict[str, Any], name: str, *, trust_remote_code: bool) -> None:
    """Refuse the kinds of model that cannot be handled, before a weight is downloaded or read.

    Raises:
        UserError: entries of a wrong type; encoder-decoder, encoder-only, quantised,
            custom code without permission, or a kind that transformers does not know.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    _check_types(config, name)
    kind = config.get("model_type", "")
    if kind not in CONFIG_MAPPING:
        _check_custom(config, kind, name, trust_remote_code)
    if config.get("is_encoder_decoder", _is_default_encoder_decoder(kind)):
        raise UserError(
            f"{name} is an encoder-decoder model ({kind})",
            expected="a decoder-only language model, such as Llama, GPT-2, Qwen or Gemma",
        )
    _check_generating(config, kind, name)
    if quantised := config.get("quantization_config"):
        config["quantization_config"] = _quantisation(quantised, name)
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        for key in ("num_hidden_layers", "n_layer", "n_layers", "num_layers"):
            if part.get(key) == 0:
                raise UserError(
                    f"{name} has no decoder layers ({key} is 0 in its config.json)",
                    expected="a decoder-only language model with at least one layer",
                )


def _quantisation(given: dict[str, Any], name: str) -> dict[str, Any]:
    """What a checkpoint may say of how it is quantised: plain values, by keys that are known.

    Raises:
        UserError: a method that is not let through.
    """
    method = given.get("quant_method")
    if not isinstance(method, str) or method not in QUANTISED:
        raise UserError(
            f"{name} is a quantised checkpoint ({method!r:.40}), of a method that is not let "
            "through",
            expected="one of " + ", ".join(QUANTISED) + ", or no quantisation",
            fix="Use the unquantised checkpoint, or a GGUF file, which is unpacked when loaded",
        )
    kept = {key: given[key] for key in ("quant_method", *QUANTISED[method]) if key in given}
    for key, value in kept.items():
        parts = value if isinstance(value, list) else [value]
        is_type = key in ("bnb_4bit_compute_dtype", "bnb_4bit_quant_storage")
        wrong = any(isinstance(part, list | dict) for part in parts)
        if wrong or (is_type and value not in (*_DTYPES, "uint8", None)):
            raise UserError(
                f"The quantization_config of {name} has {key} {value!r:.100}",
                fix="Copy or download the model again",
            )
    return kept


def _check_custom(config: dict[str, Any], kind: str, name: str, trusted: bool) -> None:
    import transformers

    if "auto_map" not in config:
        raise UserError(
            f"{name} is of a kind ('{kind}') that transformers {transformers.__version__} does "
            "not know",
            fix="Upgrade transformers if the model is newer; check model_type in config.json",
        )
    if not trusted:
        raise UserError(
            f"{name} needs model code that comes with the checkpoint (auto_map in config.json)",
            fix="If you trust its source, allow it with --trust-remote-code "
            "(in Python: load(..., trust_remote_code=True))",
        )


def _is_default_encoder_decoder(kind: str) -> bool:
    """Whether the kind is encoder-decoder by nature, also where its config.json does not say so."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES as SEQ_TO_SEQ,
    )

    if kind not in SEQ_TO_SEQ or kind not in CONFIG_MAPPING:
        return False
    return bool(getattr(CONFIG_MAPPING[kind](), "is_encoder_decoder", False))


def _check_generating(config: dict[str, Any], kind: str, name: str) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

    architectures = [str(item) for item in config.get("architectures") or []]
    wrong_head = any(item.endswith(_NOT_GENERATING) for item in architectures)
    if wrong_head or (kind in MASKED and not config.get("is_decoder")):
        raise UserError(
            f"{name} does not generate text ({', '.join(architectures) or kind})",
            expected="a decoder-only language model, such as Llama, GPT-2, Qwen or Gemma",
        )


def check_sizes(config: dict[str, Any], weights: Weights, name: str) -> None:
    """Refuse a configuration that counts far more layers than the weights can have.

    Before the model's classes see it: they build lists and modules of that length.

    Raises:
        UserError: says which entry, and how many layers there are.
    """
    most = 4 * weights.layers + 64
    left: list[tuple[str, Any, int]] = [("", config, 0)]
    while left:
        key, value, depth = left.pop()
        if depth > _DEPTH:
            raise UserError(f"The config.json of {name} is nested too deeply")
        if isinstance(value, dict):
            left += [(str(k), v, depth + 1) for k, v in value.items()]
        elif isinstance(value, list):
            left += [(key, v, depth + 1) for v in value]
        elif isinstance(value, int) and not isinstance(value, bool):
            if _COUNTS.fullmatch(key) and not -1 <= value <= most:
                raise UserError(
                    f"The config.json of {name} says {key} {_short(value)}, and its weights have "
                    f"{weights.layers} layers at most",
                    fix="Copy or download the model again",
                )
            if key == "num_labels" and not 0 <= value <= _LABELS:
                raise UserError(f"The config.json of {name} says num_labels {_short(value)}")


def check_room(model: PreTrainedModel, elements: int, size: int, name: str) -> None:
    """Refuse a model, built without memory, that is far larger than the weights in its files.

    ``model`` is on the meta device; ``elements`` weights are in its files of ``size`` bytes.

    Raises:
        UserError: with both sizes.
    """
    wanted = sum(parameter.numel() for parameter in model.parameters())
    packed = 32 if getattr(model.config, "quantization_config", None) else 1  # to a number
    if wanted > 2 * packed * elements + (1 << 20):
        raise UserError(
            f"The configuration of {name} describes a model of {_short(wanted)} weights, and its "
            f"files hold {elements}",
            fix="Copy or download the model again",
        )
    # What is computed at the start (masks, positions) is in no file.
    extra = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    if extra > 4 * size + (1 << 30):
        raise UserError(
            f"The configuration of {name} asks for {extra / 1e9:.3g} GB of masks and positions, "
            f"far more than its weights ({size / 1e9:.3g} GB)",
            fix="Check the number of positions that it states",
        )


def without_steering(value: Any) -> Any:
    """The configuration without what would make transformers fetch or run something else."""
    if isinstance(value, dict):
        return {
            key: without_steering(item)
            for key, item in value.items()
            if not _STEERING.fullmatch(str(key))
        }
    return [without_steering(item) for item in value] if isinstance(value, list) else value


def _check_types(config: dict[str, Any], name: str) -> None:
    """Refuse entries of a type that the checks below could not read."""
    kinds: dict[str, tuple[type | tuple[type, ...], str]] = {
        "model_type": (str, "a word"),
        "architectures": ((list, type(None)), "a list of names"),
        "text_config": ((dict, type(None)), "an object"),
        "quantization_config": ((dict, type(None)), "an object"),
        "tokenizer_class": ((str, type(None)), "a name"),
        "auto_map": ((dict, type(None)), "an object"),
    }
    for key, (kind, expected) in kinds.items():
        if key in config and not isinstance(config[key], kind):
            raise UserError(
                f"The config.json of {name} has {key} {config[key]!r:.100}", expected=expected
            )
    for key in ("dtype", "torch_dtype"):
        given = config.get(key)
        for dtype in given.values() if isinstance(given, dict) else [given]:
            if dtype is not None and str(dtype).removeprefix("torch.") not in _DTYPES:
                raise UserError(
                    f"The config.json of {name} has {key} {dtype!r:.100}",
                    expected="one of " + ", ".join(_DTYPES),
                )


def _short(number: int) -> str:
    """A whole number; where it is long, roughly."""
    if abs(number) < 10**15:
        return str(number)
    return f"{number:.3g}" if abs(number) < 10**300 else "more than 10 to the 300"


def check_loaded(report: dict[str, Any], config: dict[str, Any], name: str) -> None:
    """Refuse a load after which weights are made up or left out.

    Raises:
        UserError: weights are missing, of another shape, or have no place in the model.
    """
    if missing := sorted(report["missing_keys"]):
        raise UserError(
            f"The checkpoint of {name} lacks {len(missing)} of its model's weights, among them "
            f"{missing[0]}: they would be random",
            fix="Copy or download the model again, or check architectures in its config.json",
        )
    if mismatched := sorted(report["mismatched_keys"]):
        key, there, wanted = mismatched[0]
        raise UserError(
            f"{len(mismatched)} of the weights of {name} are not of the shape that its "
            f"configuration says, among them {key}: {tuple(there)}, not {tuple(wanted)}",
            fix="Copy or download the model again",
        )
    left_out = sorted(key for key in report["unexpected_keys"] if not is_harmless(key, config))
    if left_out:
        raise UserError(
            f"The checkpoint of {name} has {len(left_out)} weights that the model of its "
            f"configuration has no place for, among them {left_out[0]}: another model would be "
            "measured than the one in the files",
            fix="Check the number of layers and architectures in config.json, or copy the model "
            "again",
        )


def is_harmless(key: str, config: dict[str, Any]) -> bool:
    """Whether a weight that the model has no place for takes no part in predicting a text."""
    if any(pattern.search(key) for pattern in _HARMLESS):
        return True
    # Layers that predict further tokens ahead come after the model's own (GLM, DeepSeek).
    ahead, own = config.get("num_nextn_predict_layers"), config.get("num_hidden_layers")
    found = re.match(r"model\.layers\.(\d{1,6})\.", key)
    if found and isinstance(ahead, int) and isinstance(own, int):
        return own <= int(found[1]) < own + ahead
    return False


def check_tokenizer(folder: Path, config: dict[str, Any], name: str) -> None:
    """Refuse a folder without a tokenizer, or whose tokenizer files lead elsewhere.

    Without one transformers would make an empty tokenizer. Its settings can name other files, and
    any class of transformers: a model's, which would read what else lies in the folder.

    Raises:
        UserError: none of the known tokenizer files is there, or what is wrong with one.
    """
    there = [known for known in _TOKENIZER_FILES if own_file(folder, known) is not None]
    for known in _TOKENIZER_EXTRAS:
        own_file(folder, known)
    if not there:
        raise UserError(
            f"{folder} has no tokenizer",
            expected="tokenizer.json (or another tokenizer file) beside config.json",
            fix="Save the model's tokenizer there: tokenizer.save_pretrained(directory)",
        )
    settings: dict[str, Any] = {}
    if "tokenizer_config.json" in there:
        settings = read_object(folder / "tokenizer_config.json")
    versions = settings.get("fast_tokenizer_files")
    for other in versions if isinstance(versions, list) else []:
        own_file(folder, str(other))
    for place, said in (("tokenizer_config.json", settings), ("config.json", config)):
        chosen = said.get("tokenizer_class")
        if chosen is not None and not _is_tokenizer_class(chosen):
            raise UserError(
                f"The {place} of {name} has tokenizer_class {chosen!r:.100}, which is no tokenizer",
                fix="Save the model's tokenizer there: tokenizer.save_pretrained(directory)",
            )


def _is_tokenizer_class(chosen: Any) -> bool:
    """Whether transformers takes the name for a tokenizer, or does not know it at all."""
    import transformers

    if not isinstance(chosen, str) or not chosen.isidentifier():
        return False
    found = getattr(transformers, chosen, None)
    return found is None or (
        isinstance(found, type) and issubclass(found, transformers.PreTrainedTokenizerBase)
    )
