"""LayerMap on every family: the parts are the right ones, and each claim about them is tested."""

from __future__ import annotations

import copy
from typing import Any, cast

import pytest
import torch
from families import INNER, LAYERS, LLAMA_LIKE, VOCAB, WIDTH, build, from_config, shared
from torch import Tensor, nn
from transformers import models as hf

from goldenlayers.errors import UserError
from goldenlayers.models.layers import Block, LayerMap

NORMALISED = {"gemma2", "gemma3", "gemma3_multimodal", "olmo2", "glm4"}
SQUARE_FOUR = {"gpt2", "gptj", "gpt_neo", "bloom", "mpt"}  # MLP width 4 x model width by default
# Of logits between 1 and 10; a wrong path, scale, cap or mask moves them by more than 0.1.
NEAR = 1e-3
TUPLES = {"gptj", "gpt_neo", "bloom", "falcon", "falcon_new", "falcon_alibi", "mpt"}


def _ids(length: int = 12, rows: int = 2, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB - 5, (rows, length), generator=generator)


def _run(model: Any, ids: Tensor, *watched: nn.Module) -> tuple[Tensor, list[tuple[Tensor, Any]]]:
    """Logits and, for each watched module, its first input and its output, copied."""
    seen: dict[int, tuple[Tensor, Any]] = {}

    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        given = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
        seen[id(module)] = (given.clone(), copy.deepcopy(output))

    handles = [m.register_forward_hook(hook, with_kwargs=True) for m in watched]
    try:
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    return logits, [seen[id(m)] for m in watched]


def _silence(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return torch.zeros_like(output)


def _tensor(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def test_counts_widths_and_ends(family: str) -> None:
    model: Any = shared(family)
    layers = LayerMap.of(model)
    assert len(layers) == LAYERS == model.config.get_text_config().num_hidden_layers
    assert [block.index for block in layers] == list(range(LAYERS))
    inner = WIDTH if family == "gpt2_square" else 4 * WIDTH if family in SQUARE_FOUR else INNER
    assert (layers.d_model, layers.d_mlp, layers.vocab_size) == (WIDTH, inner, VOCAB)
    assert layers.embedding is model.get_input_embeddings()
    assert layers.head is model.get_output_embeddings()
    assert layers.tied == (layers.head.weight is layers.embedding.weight)
    for path, module in (
        (layers.embedding_path, layers.embedding),
        (layers.head_path, layers.head),
        (layers.final_norm_path, layers.final_norm),
        *((block.path, block.module) for block in layers),
        *((block.attention_path, block.attention) for block in layers),
        *((m.path, m.module) for block in layers for m in block.matrices("block")),
    ):
        assert path is not None
        assert model.get_submodule(path) is module
    assert "vision" not in layers[0].path


def test_scopes_are_disjoint_and_complete(family: str) -> None:
    model = shared(family)
    parameters = dict(model.named_parameters())
    for block in LayerMap.of(model):
        mlp, attention = block.matrices("mlp"), block.matrices("attention")
        assert mlp[-1] is block.down
        assert block.matrices("down") == (block.down,)
        assert not {m.path for m in mlp} & {m.path for m in attention}
        every = {f"{block.path}.{n}" for n, p in block.module.named_parameters() if p.dim() == 2}
        assert {m.parameter_name for m in mlp + attention} == every
        assert set(block.matrices("block")) == set(mlp + attention)
        assert all(parameters[m.parameter_name] is m.weight for m in block.matrices("block"))
        assert {"self_attn", "attn", "attention", "self_attention"} & set(
            block.attention_path.split(".")
        )
        assert (block.mlp is None) == (family == "opt")
        gated = {"gate_proj", "up_proj", "down_proj"}
        if {m.path.rpartition(".")[2] for m in mlp} & {"gate_proj"}:
            assert {m.path.rpartition(".")[2] for m in mlp} == gated
        else:
            assert len(mlp) == 2


def test_oriented_weight_computes_the_module(family: str) -> None:
    layers = LayerMap.of(shared(family))
    generator = torch.Generator().manual_seed(0)
    for block in (layers[0], layers[LAYERS - 1]):
        for matrix in block.matrices("block"):
            x = torch.randn(5, matrix.in_features, generator=generator)
            weight = matrix.oriented(matrix.weight)
            assert weight.shape == (matrix.out_features, matrix.in_features)
            bias = getattr(matrix.module, "bias", None)
            expected = x @ weight.T + (0 if bias is None else bias)
            torch.testing.assert_close(matrix.module(x), expected, rtol=NEAR, atol=NEAR)
            assert torch.equal(matrix.oriented(weight), matrix.weight)
            assert weight.data_ptr() == matrix.weight.data_ptr()  # a view, not a copy


def test_square_conv1d_is_known_by_its_type() -> None:
    down = LayerMap.of(shared("gpt2_square"))[0].down
    x = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(0))
    wrong = x @ down.weight.T + cast(Tensor, down.module.bias)
    assert down.transposed
    assert not torch.allclose(down.module(x), wrong, atol=1e-2)


def test_down_writes_the_mlp_output(family: str) -> None:
    """What is added to down's output reaches the block's output: as it is, or through the norm."""
    model: Any = build(family)
    layers = LayerMap.of(model)
    ids = _ids()
    scale = getattr(model.config, "residual_multiplier", 1.0)  # Granite
    for block in layers:
        _, ((_, before), (_, old)) = _run(model, ids, block.module, block.down.module)
        push = 0.1 * torch.randn(old.shape, generator=torch.Generator().manual_seed(1))
        handle = block.down.module.register_forward_hook(lambda m, a, out, p=push: out + p)
        try:
            _, ((_, after),) = _run(model, ids, block.module)
        finally:
            handle.remove()
        norm = block.mlp_output_norm
        assert (norm is not None) == (family in NORMALISED)
        moved = push if norm is None else norm(old + push) - norm(old)
        change = (_tensor(after) - _tensor(before)).reshape(moved.shape)
        torch.testing.assert_close(change, scale * moved, rtol=1e-4, atol=1e-5)


def test_norm_of_the_mlp_output_gives_the_block_output() -> None:
    """Block output = what entered the MLP branch + norm(MLP output), where there is such a norm."""
    for family in sorted(NORMALISED):
        model = build(family)
        for block in LayerMap.of(model):
            assert block.mlp_output_norm is not None
            assert block.mlp_output_norm_path is not None
            assert model.get_submodule(block.mlp_output_norm_path) is block.mlp_output_norm
            ids = _ids()
            _, ((_, output), (_, written)) = _run(model, ids, block.module, block.down.module)
            mute = block.mlp_output_norm.register_forward_hook(_silence)
            try:
                _, ((_, residual),) = _run(model, ids, block.module)
            finally:
                mute.remove()
            expected = _tensor(residual) + block.mlp_output_norm(written)
            torch.testing.assert_close(_tensor(output), expected, rtol=NEAR, atol=NEAR)


def test_logits_from_the_heads_input(family: str) -> None:
    model = shared(family)
    layers = LayerMap.of(model)
    assert layers.final_norm is not None
    logits, seen = _run(model, _ids(), layers.head, layers.final_norm)
    (head_input, _), (_, normed) = seen
    torch.testing.assert_close(layers.logits(head_input), logits, rtol=NEAR, atol=NEAR)
    assert torch.equal(normed, head_input)


def test_scale_and_cap_are_read_from_behaviour_not_from_a_name() -> None:
    """Without them the logits differ, and one key's meaning is found out per model."""
    for family in ("cohere", "granite", "gemma2", "gemma3"):
        model = shared(family)
        layers = LayerMap.of(model)
        logits, ((hidden, scores),) = _run(model, _ids(), layers.head)
        assert not torch.allclose(scores, logits, atol=1e-2)
        assert layers.transform.says
        assert layers.transform.says in layers.describe()
    # The same key divides in Granite and multiplies in HyperCLOVA X.
    config = hf.hyperclovax.HyperCLOVAXConfig(**LLAMA_LIKE, logits_scaling=3.0)
    model = from_config(config)
    layers = LayerMap.of(model)
    logits, ((hidden, _),) = _run(model, _ids(), layers.head)
    torch.testing.assert_close(layers.logits(hidden), logits, rtol=NEAR, atol=NEAR)
    assert layers.transform.scale == 3.0


def test_logits_that_do_not_come_from_the_head_are_refused(monkeypatch: Any) -> None:
    model: Any = build("llama")
    plain = type(model).forward

    def doubled(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = plain(self, *args, **kwargs)
        output.logits = output.logits * 2
        return output

    monkeypatch.setattr(type(model), "forward", doubled)
    with pytest.raises(UserError, match="are not its head's output"):
        LayerMap.of(model)


def test_mapping_leaves_no_trace(family: str) -> None:
    model = build(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.random.get_rng_state()
    LayerMap.of(model)
    assert torch.equal(torch.random.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_low_precision_maps_alike(family: str) -> None:
    wide, narrow = LayerMap.of(shared(family)), LayerMap.of(shared(family, torch.bfloat16))
    assert wide.describe() == narrow.describe()
    assert wide.transform == narrow.transform


def test_right_padding_needs_no_mask(family: str) -> None:
    """The convention of ``tokens``: padding on the right, no mask, real positions unmoved."""
    model: Any = shared(family)
    ids = _ids(length=20)
    padded = torch.cat([ids, torch.zeros(2, 7, dtype=torch.long)], dim=1)
    with torch.no_grad():
        alone = model(input_ids=ids, use_cache=False).logits
        beside = model(input_ids=padded, use_cache=False).logits[:, :20]
    torch.testing.assert_close(beside, alone, rtol=NEAR, atol=NEAR)


def test_which_families_return_tuples(family: str) -> None:
    model = shared(family)
    _, ((_, output),) = _run(model, _ids(), LayerMap.of(model)[0].module)
    assert isinstance(output, tuple) == (family in TUPLES)


def test_opt_with_norms_after_and_narrow_embedding() -> None:
    """OPT-350M's layout: no final norm, projections around the blocks, norms after each part."""
    config = hf.opt.OPTConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=INNER,
        word_embed_proj_dim=16,
        do_layer_norm_before=False,
        max_position_embeddings=64,
    )
    model = from_config(config)
    layers = LayerMap.of(model)
    assert layers.final_norm is None
    assert layers.d_model == WIDTH
    assert all(block.mlp_output_norm is None for block in layers)
    logits, ((hidden, _),) = _run(model, _ids(), layers.head)
    assert hidden.shape[-1] == 16
    torch.testing.assert_close(layers.logits(hidden), logits, rtol=NEAR, atol=NEAR)
    assert "final norm  none" in layers.describe()


def test_matrices_beside_the_mlp_are_told_apart() -> None:
    """Gemma 4's per-layer inputs write to the stream after the MLP, but are not the MLP."""
    config = hf.gemma4.Gemma4TextConfig(
        **LLAMA_LIKE, vocab_size_per_layer_input=VOCAB, hidden_size_per_layer_input=8
    )
    layers = LayerMap.of(from_config(config))
    assert layers[0].down.path.endswith("mlp.down_proj")
    assert {m.path.rpartition(".")[2] for m in layers[0].other_matrices} == {
        "per_layer_input_gate",
        "per_layer_projection",
    }
    assert set(layers[0].other_matrices) < set(layers[0].matrices("block"))
    assert "neither attention nor MLP" in layers.describe()


@pytest.mark.parametrize("index", [-LAYERS - 1, LAYERS, 99])
def test_layer_out_of_range(index: int) -> None:
    with pytest.raises(UserError, match=f"no layer {index}.*from 0 to {LAYERS - 1}"):
        LayerMap.of(shared("gpt2"))[index]


def test_unknown_scope() -> None:
    block: Block = LayerMap.of(shared("gpt2"))[0]
    with pytest.raises(UserError, match=r"unknown scope 'ffn'.*mlp, down, attention, block"):
        block.matrices("ffn")


def test_describe_is_readable() -> None:
    assert LayerMap.of(shared("gpt2")).describe().splitlines() == [
        "GPT2LMHeadModel: 4 decoder layers, model width 32, MLP width 128, vocabulary 320",
        "  embedding   transformer.wte",
        "  final norm  transformer.ln_f",
        "  head        lm_head (tied to the embedding)",
        "layer 0  transformer.h.0",
        "  attention   transformer.h.0.attn",
        "    attn.c_attn                      32 -> 96  stored (in, out)",
        "    attn.c_proj                      32 -> 32  stored (in, out)",
        "  MLP         transformer.h.0.mlp",
        "    mlp.c_fc                         32 -> 128  stored (in, out)",
        "    mlp.c_proj                       128 -> 32  stored (in, out)  <- down projection",
        "layers 1 to 3 are built like layer 0",
    ]
    assert "in the layer itself" in LayerMap.of(shared("opt")).describe()
    assert "post_feedforward_layernorm" in LayerMap.of(shared("gemma2")).describe()


def test_describe_names_layers_that_differ() -> None:
    model: Any = build("llama")
    mlp = model.model.layers[2].mlp
    mlp.up_proj, mlp.gate_proj = nn.Linear(WIDTH, 40), nn.Linear(WIDTH, 40)
    mlp.down_proj = nn.Linear(40, WIDTH)
    assert "layers built unlike layer 0: 2" in LayerMap.of(model).describe()
