"""What must be true of a checkpoint folder before its weights are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from goldenlayers.errors import UserError

# Keys under which the families' configurations keep their number of experts.
_EXPERT_KEYS = (
    *("num_experts", "num_local_experts", "n_routed_experts", "num_routed_experts"),
    *("moe_num_experts", "n_experts", "num_moe_experts"),
)
# Values of these say that the experts of the configuration are switched off.
_EXPERT_SWITCHES = ("is_moe", "enable_moe_block", "use_moe")
_NOT_GENERATING = ("MaskedLM", "SequenceClassification", "TokenClassification", "QuestionAnswering")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack")
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model"),
    *("sentencepiece.bpe.model", "vocab.json", "vocab.txt", "tokenizer.tiktoken", "tekken.json"),
)


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's ``config.json``.

    Raises:
        UserError: there is none, or it is not a JSON object.

    """
    path = folder / "config.json"
    if not path.is_file():
        if (folder / "adapter_config.json").is_file():
            fix = (
                "This is a PEFT adapter: merge it into its base model first (merge_and_unload, "
                "then save_pretrained) and give that directory"
            )
        elif ggufs := sorted(folder.glob("*.gguf")):
            fix = f"To load a GGUF file, name the file itself: {ggufs[0]}"
        else:
            fix = "Give the directory that save_pretrained wrote"
        raise UserError(
            f"The directory {folder} has no config.json",
            expected="a model directory: config.json, *.safetensors and tokenizer files",
            fix=fix,
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} holds a JSON {type(config).__name__}", expected="an object")
    return config


def check_config(config: dict[str, Any], name: str, *, trust_remote_code: bool) -> None:
    """Refuse the kinds of model that cannot be handled, before a weight is downloaded or read.

    Raises:
        UserError: encoder-decoder, encoder-only, mixture of experts, quantised, custom code without
            permission, or a kind that this transformers does not know.

    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = str(config.get("model_type", ""))
    if kind not in CONFIG_MAPPING:
        _check_custom(config, kind, name, trust_remote_code)
    if config.get("is_encoder_decoder", _is_default_encoder_decoder(kind)):
        raise UserError(
            f"{name} is an encoder-decoder model ({kind})",
            expected="a decoder-only language model, such as Llama, GPT-2, Qwen or Gemma",
        )
    _check_generating(config, kind, name)
    experts = _experts(config)
    if experts > 1:
        raise UserError(
            f"{name} is a mixture-of-experts model ({experts} experts), not supported yet",
            fix="Choose a dense model of the family",
        )
    quantised = config.get("quantization_config")
    if quantised:
        method = quantised.get("quant_method", "?") if isinstance(quantised, dict) else "?"
        raise UserError(
            f"{name} is a quantised checkpoint ({method}): its packed weights cannot be edited",
            fix="Use the unquantised checkpoint, or a GGUF file, which is unpacked when loaded",
        )
    check_has_layers(config, name)


def check_has_layers(config: dict[str, Any], name: str) -> None:
    """Refuse a configuration that says it has no decoder layers."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        for key in ("num_hidden_layers", "n_layer", "n_layers", "num_layers"):
            if part.get(key) == 0:
                raise UserError(
                    f"{name} has no decoder layers ({key} is 0 in its config.json)",
                    expected="a decoder-only language model with at least one layer",
                )


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
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED,
    )

    architectures = [str(item) for item in config.get("architectures") or []]
    wrong_head = any(item.endswith(_NOT_GENERATING) for item in architectures)
    if wrong_head or (kind in MASKED and not config.get("is_decoder")):
        raise UserError(
            f"{name} does not generate text ({', '.join(architectures) or kind})",
            expected="a decoder-only language model, such as Llama, GPT-2, Qwen or Gemma",
        )


def _experts(config: dict[str, Any]) -> int:
    """Largest number of experts that the configuration, or its text part, tells of."""
    most = 0
    for part in (config, *(config.get(key) for key in ("text_config", "ffn_config", "llm_config"))):
        if not isinstance(part, dict) or any(part.get(key) is False for key in _EXPERT_SWITCHES):
            continue
        counts = [part.get(key) for key in _EXPERT_KEYS]
        for count in counts:
            values = count if isinstance(count, list) else [count]
            most = max([most, *(value for value in values if isinstance(value, int))])
    return most


def check_weights(folder: Path) -> None:
    """Refuse a folder whose safetensors are missing, incomplete or empty, or that has pickles only.

    Raises:
        UserError: says which file is missing, or how to convert.

    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"{index} is damaged", fix="Copy or download it again") from error
    elif (folder / "model.safetensors").is_file():
        shards = ["model.safetensors"]
    else:
        pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
        if pickles:
            raise UserError(
                f"{folder} has its weights only as {pickles[0]}, a format that can run code when "
                "it is opened, so it is not read",
                expected="model.safetensors",
                fix="If you trust the file, convert it: load it once with transformers and call "
                "save_pretrained on a new directory, which writes safetensors",
            )
        raise UserError(
            f"{folder} has no weights",
            expected="model.safetensors, or model.safetensors.index.json and its parts",
        )
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise UserError(
            f"{folder} is incomplete: {len(missing)} of {len(shards)} weight files are missing, "
            f"among them {missing[0]}",
            fix="Copy or download the model again",
        )
    for shard in shards:
        _check_whole(folder / shard)


def _check_whole(path: Path) -> None:
    """Compare a safetensors file's length with what its header says (milliseconds)."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        try:
            header = json.loads(stream.read(length)) if 0 < length <= size - 8 else None
            tensors = [entry for key, entry in header.items() if key != "__metadata__"]  # type: ignore[union-attr]
            end = 8 + length + max((entry["data_offsets"][1] for entry in tensors), default=0)
        except (ValueError, AttributeError, KeyError, TypeError):
            end = -1
    if end != size:
        raise UserError(
            f"{path} is cut off or damaged",
            expected=f"{end} bytes, not {size}" if end > 0 else "a whole safetensors file",
            fix="Copy or download the model again",
        )


def check_tokenizer_files(folder: Path) -> None:
    """Refuse a folder with no tokenizer at all (transformers would make an empty one).

    Raises:
        UserError: none of the known tokenizer files is there.

    """
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise UserError(
            f"{folder} has no tokenizer",
            expected="tokenizer.json (or another tokenizer file) beside config.json",
            fix="Save the model's tokenizer there: tokenizer.save_pretrained(directory)",
        )
