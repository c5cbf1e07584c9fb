"""Tiny GGUF files written in code, in llama.cpp's layout: Llama weights, byte-level BPE."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFWriter, TokenType
from transformers import PreTrainedModel, PreTrainedTokenizerFast


def write_llama_gguf(
    path: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    *,
    extra: dict[str, Any] | None = None,
    without: str = "",
    halve: bool = False,
) -> Path:
    """Write ``model`` (a Llama) and a byte-level BPE ``tokenizer`` as GGUF.

    ``extra``: more header entries. ``without``: leave out the tensors whose name contains it.
    ``halve``: store matrices as float16.
    """
    config = model.config
    writer = GGUFWriter(str(path), "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, tokenizer, config.vocab_size)
    for key, value in (extra or {}).items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_uint32(key, value)
    for name, values in _tensors(model).items():
        if without and without in name:
            continue
        array = values.to(torch.float16 if halve and values.dim() > 1 else torch.float32).numpy()
        writer.add_tensor(name, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer: GGUFWriter, tokenizer: PreTrainedTokenizerFast, size: int) -> None:
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    by_id = {index: token for token, index in state["model"]["vocab"].items()}
    special = {entry["id"] for entry in state["added_tokens"]}
    tokens = [by_id.get(index, f"<unused{index}>") for index in range(size)]
    merges = [m if isinstance(m, str) else " ".join(m) for m in state["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types(
        [TokenType.CONTROL if i in special else TokenType.NORMAL for i in range(size)]
    )
    writer.add_token_merges(merges)
    end = tokenizer.eos_token_id
    assert isinstance(end, int)
    writer.add_bos_token_id(end)
    writer.add_eos_token_id(end)


def _tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    state = model.state_dict()
    heads = model.config.num_attention_heads
    groups = model.config.num_key_value_heads
    found = {
        "token_embd.weight": state["model.embed_tokens.weight"],
        "output_norm.weight": state["model.norm.weight"],
    }
    if not model.config.tie_word_embeddings:
        found["output.weight"] = state["lm_head.weight"]
    names = {
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for layer in range(model.config.num_hidden_layers):
        root, block = f"model.layers.{layer}.", f"blk.{layer}."
        for ours, theirs in names.items():
            found[f"{block}{theirs}.weight"] = state[f"{root}{ours}.weight"]
        for kind, count in (("q", heads), ("k", groups)):
            weight = state[f"{root}self_attn.{kind}_proj.weight"]
            found[f"{block}attn_{kind}.weight"] = _rotary_pairs(weight, count)
    return found


def _rotary_pairs(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """(out, in): llama.cpp keeps the two numbers of a rotary pair beside each other."""
    out, width = weight.shape
    return weight.reshape(heads, 2, out // heads // 2, width).transpose(1, 2).reshape(out, width)
