"""Tiny random models of every family the project promises, built from configs: no download.

``build(name)`` gives a private copy, ``shared(name)`` the one cached model (read only, faster),
``FAMILIES[name]()`` is ``build(name)``, ``tiny(name)`` a Goldenlayers model with a tokenizer.
Every weight is drawn from a seeded generator, norms and biases included, large enough that layers
differ and a wrong path shows in the logits.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache, partial
from typing import TYPE_CHECKING, Any, cast

import torch
from tokenizers_built import TOKENIZERS
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers import models as hf

if TYPE_CHECKING:
    from pathlib import Path

    from goldenlayers.models import Model

VOCAB = 320
WIDTH = 32
HEADS = 4
LAYERS = 4
INNER = 72
POSITIONS = 512
SPECIAL: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

# What the configs of Llama's many relatives have in common.
LLAMA_LIKE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
    "tie_word_embeddings": False,
    **SPECIAL,
}
GPT2_LIKE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "n_embd": WIDTH,
    "n_layer": LAYERS,
    "n_head": HEADS,
    "n_positions": POSITIONS,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "attn_pdrop": 0.0,
    **SPECIAL,
}
GEMMA_LIKE: dict[str, Any] = {
    **LLAMA_LIKE,
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "sliding_window": 8,
    "tie_word_embeddings": True,
}


def _gemma3_text(**changes: Any) -> PreTrainedConfig:
    kinds = ["sliding_attention", "full_attention"] * (LAYERS // 2)
    return hf.gemma3.Gemma3TextConfig(**{**GEMMA_LIKE, "layer_types": kinds, **changes})


def _gemma3_multimodal() -> PreTrainedConfig:
    # More vision layers than text layers: the longest list of blocks is the wrong one.
    vision = {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": LAYERS + 2,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 4,
    }
    return hf.gemma3.Gemma3Config(
        text_config=_gemma3_text(),
        vision_config=vision,
        mm_tokens_per_image=4,
        image_token_index=VOCAB - 1,
        boi_token_index=VOCAB - 3,
        eoi_token_index=VOCAB - 2,
        tie_word_embeddings=True,
    )


def _falcon(**changes: Any) -> PreTrainedConfig:
    return hf.falcon.FalconConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        ffn_hidden_size=INNER,
        max_position_embeddings=POSITIONS,
        **SPECIAL,
        **changes,
    )


CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "gpt2": lambda: hf.gpt2.GPT2Config(**GPT2_LIKE),
    # MLP matrices as square as they come: shapes cannot tell which way they are stored.
    "gpt2_square": lambda: hf.gpt2.GPT2Config(**GPT2_LIKE, n_inner=WIDTH),
    "gptj": lambda: hf.gptj.GPTJConfig(**GPT2_LIKE, rotary_dim=4),
    "gpt_neo": lambda: hf.gpt_neo.GPTNeoConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        num_layers=LAYERS,
        num_heads=HEADS,
        attention_types=[[["global", "local"], LAYERS // 2]],
        window_size=8,
        max_position_embeddings=POSITIONS,
        **SPECIAL,
    ),
    "gpt_neox": lambda: hf.gpt_neox.GPTNeoXConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=INNER,
        max_position_embeddings=POSITIONS,
        **SPECIAL,
    ),
    "opt": lambda: hf.opt.OPTConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        ffn_dim=INNER,
        max_position_embeddings=POSITIONS,
        word_embed_proj_dim=WIDTH,
        dropout=0.0,
        **SPECIAL,
    ),
    "bloom": lambda: hf.bloom.BloomConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, n_layer=LAYERS, n_head=HEADS, **SPECIAL
    ),
    "falcon": lambda: _falcon(multi_query=True, parallel_attn=True, bias=False),
    "falcon_new": lambda: _falcon(new_decoder_architecture=True, num_kv_heads=2, bias=False),
    "falcon_alibi": lambda: _falcon(alibi=True, parallel_attn=False, multi_query=False, bias=True),
    "mpt": lambda: hf.mpt.MptConfig(
        vocab_size=VOCAB, d_model=WIDTH, n_layers=LAYERS, n_heads=HEADS, max_seq_len=POSITIONS
    ),
    "llama": lambda: hf.llama.LlamaConfig(**LLAMA_LIKE),
    "llama_tied": lambda: hf.llama.LlamaConfig(**{**LLAMA_LIKE, "tie_word_embeddings": True}),
    "mistral": lambda: hf.mistral.MistralConfig(**LLAMA_LIKE, sliding_window=16),
    "qwen2": lambda: hf.qwen2.Qwen2Config(**LLAMA_LIKE),
    "qwen3": lambda: hf.qwen3.Qwen3Config(**LLAMA_LIKE, head_dim=16),
    "gemma": lambda: hf.gemma.GemmaConfig(
        **{**LLAMA_LIKE, "tie_word_embeddings": True}, head_dim=16
    ),
    "gemma2": lambda: hf.gemma2.Gemma2Config(**GEMMA_LIKE, final_logit_softcapping=4.0),
    "gemma3": lambda: _gemma3_text(final_logit_softcapping=4.0),
    "gemma3_multimodal": _gemma3_multimodal,
    "phi": lambda: hf.phi.PhiConfig(**LLAMA_LIKE),
    "phi3": lambda: hf.phi3.Phi3Config(**LLAMA_LIKE, sliding_window=16),
    "olmo2": lambda: hf.olmo2.Olmo2Config(**LLAMA_LIKE),
    "stablelm": lambda: hf.stablelm.StableLmConfig(**LLAMA_LIKE, use_qkv_bias=True),
    "cohere": lambda: hf.cohere.CohereConfig(
        **{**LLAMA_LIKE, "tie_word_embeddings": True}, logit_scale=1.5
    ),
    "granite": lambda: hf.granite.GraniteConfig(
        **LLAMA_LIKE,
        logits_scaling=0.5,
        embedding_multiplier=2.0,
        residual_multiplier=0.7,
        attention_multiplier=0.4,
    ),
    "glm4": lambda: hf.glm4.Glm4Config(**LLAMA_LIKE, head_dim=8, attention_bias=True),
    "smollm3": lambda: hf.smollm3.SmolLM3Config(**LLAMA_LIKE),
    "starcoder2": lambda: hf.starcoder2.Starcoder2Config(**LLAMA_LIKE, sliding_window=16),
}

FEW_EXPERTS: dict[str, Any] = {
    "moe_intermediate_size": 16,
    "num_experts_per_tok": 2,
}
# Mixtures of experts: of routed ones alone, with a shared one (behind a gate of its own, or not),
# stored (in, out) with biases, behind ordinary layers.
MIXTURES: dict[str, Callable[[], PreTrainedConfig]] = {
    "mixtral": lambda: hf.mixtral.MixtralConfig(
        **{**LLAMA_LIKE, "intermediate_size": 24}, num_local_experts=4, num_experts_per_tok=2
    ),
    "olmoe": lambda: hf.olmoe.OlmoeConfig(
        **{**LLAMA_LIKE, "intermediate_size": 24}, num_experts=4, num_experts_per_tok=2
    ),
    "qwen2_moe": lambda: hf.qwen2_moe.Qwen2MoeConfig(
        **LLAMA_LIKE, num_experts=4, shared_expert_intermediate_size=24, **FEW_EXPERTS
    ),
    "gpt_oss": lambda: hf.gpt_oss.GptOssConfig(
        **{**LLAMA_LIKE, "intermediate_size": 24},
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "deepseek_v3": lambda: hf.deepseek_v3.DeepseekV3Config(
        **{**LLAMA_LIKE, "num_key_value_heads": HEADS},
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        **FEW_EXPERTS,
    ),
}


def randomise(model: PreTrainedModel, seed: int) -> None:
    """Draw every parameter anew: matrices wide enough to matter, norms and biases off their rest.

    Each parameter is drawn once in float32, in the order of ``named_parameters`` (tied ones once).
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.add_(0.2 * noise)
            else:
                parameter.copy_(0.25 * noise)


def from_config(config: PreTrainedConfig, *, seed: int = 0) -> PreTrainedModel:
    """A frozen random model in float32 and eval mode."""
    with torch.random.fork_rng(devices=[]):
        if isinstance(config, hf.gemma3.Gemma3Config):
            model: PreTrainedModel = hf.gemma3.Gemma3ForConditionalGeneration(config)
        else:
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomise(model, seed)
    return model.eval().requires_grad_(False)


@cache
def shared(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """The cached model itself. Do not change it: take ``build`` for that."""
    model = from_config((CONFIGS | MIXTURES)[name](), seed=seed)
    return cast(PreTrainedModel, nn.Module.to(model, dtype=dtype))


def build(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """A private copy of the tiny model ``name``."""
    return copy.deepcopy(shared(name, dtype, seed))


def tiny(
    name: str,
    tokenizer: str = "byte_level_bpe",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Model:
    """A Goldenlayers model around a private copy; ``tokenizer`` is a name in ``TOKENIZERS``."""
    from goldenlayers.models import Model

    return Model.wrap(build(name, dtype, seed), TOKENIZERS[tokenizer](), name=f"tiny-{name}")


def save(model: Model, folder: Path) -> None:
    """Put a tiny model's checkpoint and tokenizer into a folder."""
    model.hf.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    name: partial(build, name) for name in CONFIGS
}
