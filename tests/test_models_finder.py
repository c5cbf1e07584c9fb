"""The finder of layers: overrides by path, and models that it refuses with a word on why."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from families import GPT2_LIKE, INNER, LLAMA_LIKE, VOCAB, WIDTH, build, from_config, shared
from torch import Tensor, nn
from transformers import models as hf

from goldenlayers.errors import UserError
from goldenlayers.models.layers import LayerMap

# --- overrides -----------------------------------------------------------------------------------


def test_overrides_that_repeat_the_truth_change_nothing(family: str) -> None:
    model = shared(family)
    found = LayerMap.of(model)
    first = found[0]
    given = {
        "blocks": first.path.rpartition(".")[0],
        "attention": first.attention_path.removeprefix(f"{first.path}."),
        "down": first.down.path.removeprefix(f"{first.path}."),
        "embedding": found.embedding_path,
        "final_norm": cast(str, found.final_norm_path),
        "head": found.head_path,
    }
    if first.mlp_path is not None:
        given["mlp"] = first.mlp_path.removeprefix(f"{first.path}.")
    assert LayerMap.of(model, given).describe() == found.describe()


def test_override_of_down_is_obeyed() -> None:
    layers = LayerMap.of(shared("llama"), {"down": "mlp.up_proj"})
    assert all(block.down.path.endswith("mlp.up_proj") for block in layers)
    assert layers[0].mlp_matrices[-1] is layers[0].down
    assert len(layers[0].mlp_matrices) == 3


def test_override_leads_to_blocks_with_odd_names() -> None:
    model: Any = build("llama")
    for block in model.model.layers:
        block.mixer = block.self_attn  # the name that blocks usually have is gone
        del block.self_attn
        block.forward = _odd_forward.__get__(block)
    assert LayerMap.of(model)[0].mixer is None
    layers = LayerMap.of(model, {"attention": "mixer"})
    assert layers[0].attention_path == "model.layers.0.mixer"
    assert layers[0].down.path == "model.layers.0.mlp.down_proj"


def _odd_forward(self: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
    hidden_states = hidden_states + self.mixer(self.input_layernorm(hidden_states), **kwargs)[0]
    return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"block": "model.layers"}, "unknown layer path 'block'.*'blocks'"),
        ({"blocks": "model.layer"}, "no module 'model.layer'.*'model.layers'"),
        ({"blocks": "model.norm"}, "'model.norm' is a .*not a list"),
        ({"mlp": "mpl"}, "no module 'model.layers.0.mpl'.*'mlp'"),
        ({"mlp": "input_layernorm"}, "no MLP that runs"),
        ({"attention": "self_atn"}, "no module 'model.layers.0.self_atn'.*'self_attn'"),
        ({"down": "mlp.downproj"}, "no module .*'mlp.down_proj'"),
        ({"down": "self_attn.o_proj"}, "no matrix of the MLP.*mlp.gate_proj"),
        ({"embedding": "model.embed"}, "no module 'model.embed'.*'model.embed_tokens'"),
        ({"head": "lm_heads"}, "no module 'lm_heads'.*'lm_head'"),
        ({"head": "model.embed_tokens"}, "did not run after the last layer"),
        ({"final_norm": ""}, "layer path 'final_norm'"),
        ({"final_norm": "model.nrom"}, "no module 'model.nrom'.*'model.norm'"),
    ],
)
def test_wrong_overrides(given: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        LayerMap.of(shared("llama"), given)


# --- models that cannot be mapped ----------------------------------------------------------------


def test_encoder_decoder_is_refused() -> None:
    config = hf.t5.T5Config(
        vocab_size=VOCAB, d_model=WIDTH, d_kv=8, d_ff=64, num_layers=2, num_heads=4
    )
    with pytest.raises(UserError, match="encoder-decoder"):
        LayerMap.of(hf.t5.T5ForConditionalGeneration(config))


class _Listed(nn.Module):
    """Experts in a list, each run on the tokens that are its own."""

    def __init__(self, dense: nn.Module) -> None:
        super().__init__()
        self.experts = nn.ModuleList([copy.deepcopy(dense) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        first = x[..., :1] > 0
        return torch.where(first, self.experts[0](x), self.experts[1](x))


class _Stacked(nn.Module):
    """Experts in one parameter, run by code of its own."""

    def __init__(self, _dense: nn.Module) -> None:
        super().__init__()
        self.ways = nn.Parameter(torch.ones(2, WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x[..., :1] > 0, x @ self.ways[0], x @ self.ways[1])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (_Listed, "'model.layers.2.mlp.experts' .* several"),
        (_Stacked, "'model.layers.2.mlp' .*stack"),
    ],
)
def test_experts_whose_tokens_cannot_be_told_apart(
    kind: Callable[[nn.Module], nn.Module], message: str
) -> None:
    model: Any = build("llama")
    model.model.layers[2].mlp = kind(model.model.layers[2].mlp)
    with pytest.raises(UserError, match=f"{message}.*cannot be told apart"):
        LayerMap.of(model)


def test_model_without_an_mlp_is_refused() -> None:
    config = hf.mamba.MambaConfig(vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=2)
    with pytest.raises(UserError, match="has no MLP in any of its 2 layers"):
        LayerMap.of(from_config(config))


def test_model_without_head_is_refused() -> None:
    with pytest.raises(UserError, match="names no language-model head"):
        LayerMap.of(hf.llama.LlamaModel(hf.llama.LlamaConfig(**LLAMA_LIKE)))


def test_model_that_looks_ahead_is_refused() -> None:
    config = hf.bert.BertConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=INNER,
    )
    model = hf.bert.BertForMaskedLM(config)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    with pytest.raises(UserError, match="not causal"):
        LayerMap.of(model.eval())


def test_block_without_attention_has_its_mlp() -> None:
    model: Any = build("llama")
    model.model.layers[2].self_attn = _Nothing()
    layers = LayerMap.of(model)
    assert layers[2].down.path == "model.layers.2.mlp.down_proj"
    assert layers[2].mixer is None
    with pytest.raises(UserError, match=r"layer 2 \('model.layers.2'\) has no attention"):
        _ = layers[2].attention


class _Nothing(nn.Module):
    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        return torch.zeros_like(hidden_states), None


def test_block_with_two_attentions_is_named() -> None:
    config = hf.gpt2.GPT2Config(**GPT2_LIKE, add_cross_attention=True)
    with pytest.raises(UserError, match=r"2 attentions \(attn, crossattention\)"):
        LayerMap.of(from_config(config))


def test_unknown_kind_of_layer_is_named() -> None:
    class Bilinear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel = nn.Parameter(torch.ones(WIDTH, INNER))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.kernel

    model: Any = build("llama")
    model.model.layers[1].mlp.up_proj = Bilinear()
    with pytest.raises(UserError, match=r"'model.layers.1.mlp.up_proj' is a Bilinear.*'kernel'"):
        LayerMap.of(model)


def test_quantised_linear_by_its_stated_features() -> None:
    """Other libraries' linear layers, whose stored weight has a shape of its own."""

    class Packed(nn.Module):
        def __init__(self, dense: nn.Linear) -> None:
            super().__init__()
            self.in_features, self.out_features = dense.in_features, dense.out_features
            self.register_buffer("weight", dense.weight.detach().reshape(1, -1))

        def forward(self, x: Tensor) -> Tensor:
            return x @ cast(Tensor, self.weight).reshape(self.out_features, -1).T

    model: Any = build("llama")
    for block in model.model.layers:
        block.mlp.down_proj = Packed(block.mlp.down_proj)
    layers = LayerMap.of(model)
    assert (layers.d_mlp, layers.d_model) == (INNER, WIDTH)
    assert not layers[0].down.transposed


def test_model_that_cannot_run_is_refused() -> None:
    model: Any = build("llama")
    model.model.layers[0].mlp.down_proj = nn.Linear(INNER + 1, WIDTH)
    with pytest.raises(UserError, match="cannot run on three tokens"):
        LayerMap.of(model)


def test_blocks_run_more_than_once_are_refused() -> None:
    model: Any = build("llama")
    model.model.layers[3] = model.model.layers[1]
    with pytest.raises(UserError, match="ran in the order"):
        LayerMap.of(model)


def test_model_without_weights_is_refused() -> None:
    with torch.device("meta"):
        model = hf.gpt2.GPT2LMHeadModel(hf.gpt2.GPT2Config(**GPT2_LIKE))
    with pytest.raises(UserError, match="weights of GPT2LMHeadModel are not loaded"):
        LayerMap.of(model)
