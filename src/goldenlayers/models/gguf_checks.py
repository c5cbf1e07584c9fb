"""What a GGUF file says about its model, held against its tensors and its own vocabulary."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from goldenlayers.errors import UserError
from goldenlayers.models.gguf_header import GgufHeader

_ENCODERS = ("t5", "t5encoder", "bert", "nomic-bert", "clip")
_IDS = ("bos", "eos", "unknown", "padding")
_BLOCK = re.compile(r"blk\.(\d{1,6})\.")
# Entries of an architecture that transformers reads: whole numbers above 0 (some families give
# one per layer), and finite numbers above 0.
_WHOLE = (
    *("block_count", "context_length", "embedding_length", "feed_forward_length"),
    *("attention.head_count", "attention.head_count_kv", "attention.key_length"),
    *("attention.value_length", "attention.sliding_window", "rope.dimension_count", "vocab_size"),
)
_FINITE = (
    *("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon", "rope.freq_base"),
    *("rope.scaling.factor", "rope.freq_base_swa", "attn_logit_softcapping"),
    *("final_logit_softcapping",),
)
_MOST = 1 << 31


def check_model(path: Path, header: GgufHeader) -> None:
    """Refuse a kind of model that cannot be handled, or entries that contradict the tensors.

    Raises:
        UserError: names the entry, what it says and what was expected.

    """
    arch = header.values.get("general.architecture")
    if not isinstance(arch, str) or not re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", arch):
        raise _wrong(path, "general.architecture", arch, "the name of a model family")
    _refuse_unsupported(path, header)
    for key in _WHOLE:
        value = header.values.get(f"{arch}.{key}")
        values = value if isinstance(value, list) else [value]
        # A layer without attention or without an MLP counts 0 of them.
        least = 0 if isinstance(value, list) or key.endswith("sliding_window") else 1
        if value is not None and not all(_is_whole(v, least) for v in values):
            raise _wrong(path, f"{arch}.{key}", value, "a whole number above 0")
    for key in _FINITE:
        value = header.values.get(f"{arch}.{key}")
        if value is not None and not (
            isinstance(value, float | int) and math.isfinite(value) and value >= 0
        ):
            raise _wrong(path, f"{arch}.{key}", value, "a finite number")
    _check_layers(path, header)
    _check_vocabulary(path, header)


def _refuse_unsupported(path: Path, header: GgufHeader) -> None:
    arch, values = header.architecture, header.values
    experts, parts = values.get(f"{arch}.expert_count", 0), values.get("split.count", 0)
    for key, value in ((f"{arch}.expert_count", experts), ("split.count", parts)):
        if not _is_whole(value, 0):
            raise _wrong(path, key, value, "a whole number")
    if experts > 1:
        raise UserError(
            f"{path} is a mixture-of-experts model ({experts} experts), not supported yet",
            fix="Choose a dense model",
        )
    if parts > 1:
        raise UserError(
            f"{path} is one of {parts} parts of a split GGUF file",
            fix="Join the parts first (llama-gguf-split --merge)",
        )
    if arch in _ENCODERS:
        raise UserError(
            f"{path} holds a model of the kind '{arch}'", expected="a decoder-only language model"
        )


def _check_layers(path: Path, header: GgufHeader) -> None:
    """The layers that are counted are those that have tensors, of the width that is stated."""
    arch = header.architecture
    count = header.values.get(f"{arch}.block_count")
    if not isinstance(count, int):
        raise _wrong(path, f"{arch}.block_count", count, "the number of layers")
    there = {int(found[1]) for name in header.tensors if (found := _BLOCK.match(name))}
    if there != set(range(min(count, len(header.tensors) + 1))):
        raise UserError(
            f"{path} says {arch}.block_count {count}, and its tensors are of {len(there)} layers"
            + (f" ({min(there)} to {max(there)})" if there else ""),
            fix="Download the file again",
        )
    width = header.values.get(f"{arch}.embedding_length")
    embedding = header.tensors.get("token_embd.weight")
    if embedding is not None and isinstance(width, int) and embedding.dims[0] != width:
        raise _wrong(path, f"{arch}.embedding_length", width, f"{embedding.dims[0]}, as the tensor")
    heads = header.values.get(f"{arch}.attention.head_count")
    groups = header.values.get(f"{arch}.attention.head_count_kv")
    if isinstance(heads, int) and isinstance(groups, int) and heads % groups:
        raise _wrong(
            path, f"{arch}.attention.head_count_kv", groups, f"a divisor of the {heads} heads"
        )


def _check_vocabulary(path: Path, header: GgufHeader) -> None:
    values = header.values
    kind = values.get("tokenizer.ggml.model")
    if not isinstance(kind, str):
        raise _wrong(path, "tokenizer.ggml.model", kind, "the kind of tokenizer, such as gpt2")
    tokens = _strings(path, values, "tokenizer.ggml.tokens")
    if not tokens:
        raise _wrong(path, "tokenizer.ggml.tokens", None, "the vocabulary, a list of texts")
    embedding = header.tensors.get("token_embd.weight")
    rows = embedding.dims[-1] if embedding is not None else len(tokens)
    if len(tokens) > rows:
        raise UserError(
            f"{path} has {len(tokens)} tokens in tokenizer.ggml.tokens and {rows} embeddings",
            fix="Download the file again",
        )
    for key in ("scores", "token_type"):
        items = values.get(f"tokenizer.ggml.{key}")
        if items is None:
            continue
        if not isinstance(items, list) or len(items) != len(tokens):
            size = len(items) if isinstance(items, list) else None
            raise _wrong(path, f"tokenizer.ggml.{key}", size, f"{len(tokens)} numbers")
        for place, item in enumerate(items):
            if not isinstance(item, int | float) or math.isnan(item):
                raise _wrong(path, f"tokenizer.ggml.{key}[{place}]", item, "a number")
    for place, merge in enumerate(_strings(path, values, "tokenizer.ggml.merges")):
        if merge.count(" ") != 1 or not merge.strip():
            raise _wrong(path, f"tokenizer.ggml.merges[{place}]", merge, "two pieces and a space")
    for name in _IDS:
        token = values.get(f"tokenizer.ggml.{name}_token_id")
        if token is not None and not (_is_whole(token, 0) and token < len(tokens)):
            raise _wrong(
                path, f"tokenizer.ggml.{name}_token_id", token, f"a token below {len(tokens)}"
            )
    for key in ("add_bos_token", "add_eos_token", "add_space_prefix"):
        flag = values.get(f"tokenizer.ggml.{key}")
        if flag is not None and not isinstance(flag, bool):
            raise _wrong(path, f"tokenizer.ggml.{key}", flag, "true or false")
    for key in ("tokenizer.chat_template", "tokenizer.ggml.pre"):
        if not isinstance(values.get(key, ""), str):
            raise _wrong(path, key, values[key], "a text")


def _strings(path: Path, values: dict[str, Any], key: str) -> list[str]:
    items = values.get(key, [])
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        raise _wrong(path, key, type(items).__name__, "a list of texts")
    return items


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= _MOST


def _wrong(path: Path, key: str, found: Any, expected: str) -> UserError:
    said = f"says {key} {str(found)[:80]!r}" if found is not None else f"does not say {key}"
    return UserError(f"{path} {said}", expected=expected, fix="Download the file again")
