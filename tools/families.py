"""docs/families.md: every causal language model of the installed transformers, tried.

    python tools/families.py                # try all and write the page, some ten minutes
    python tools/families.py llama jamba    # try these and print what comes

Each family is built small and random from its default configuration, by one table of sizes and a
few exceptions. It works if its layers are found, if the matrix that an edit changes gives what its
hook sees and moves the logits, and if LGA's products are those of autograd's own weight gradients.
"""

from __future__ import annotations

import argparse
import gc
import sys
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as FAMILIES

from goldenlayers.editors.partial_forward import Tails, agree
from goldenlayers.errors import UserError
from goldenlayers.hooks import capture, final_hidden, observe, override, token_nll
from goldenlayers.locating.lga import pair_products
from goldenlayers.models import Model
from goldenlayers.models.checks import check_config
from goldenlayers.tokens import Encoding, pad_ids

PAGE = Path(__file__).resolve().parents[1] / "docs" / "families.md"
VOCAB, LAYERS = 96, 4
_WIDTH, _HEADS, _INNER = 32, 4, 48
# What the configurations call their sizes. One that a family does not have is passed over.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "text_vocab_size", "audio_vocab_size"), VOCAB),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "emb_dim", "dim"), _WIDTH),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), _HEADS),
    **dict.fromkeys(("num_key_value_heads", "n_head_kv", "num_kv_heads"), _HEADS),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size"), _INNER),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size", "d_ff"), 24),
    **dict.fromkeys(("shared_expert_intermediate_size", "shared_intermediate_size"), 24),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "intermediate_size_mlp"), 24),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_num_experts", "num_moe_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk"), 2),
    **dict.fromkeys(("moe_k", "top_k_experts", "num_selected_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"), 1),
    **dict.fromkeys(("head_dim", "global_head_dim", "qk_rope_head_dim", "qk_nope_head_dim"), 8),
    **dict.fromkeys(("v_head_dim", "kv_channels", "attention_head_dim", "swa_head_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "rotary_dim", "index_head_dim"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "ssm_state_size"), 8),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), _HEADS),
    **dict.fromkeys(("mamba_d_state", "state_size", "mamba_d_head", "mamba_head_dim"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"), 128),
    **dict.fromkeys(("sliding_window", "window_size", "attention_window_size"), 16),
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0),
    **dict.fromkeys(
        ("resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout", "attention_dropout"), 0.0
    ),
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size_per_layer_input": 8,
    "mamba_n_heads": 8,
    "is_decoder": True,
}
# What the table cannot know of single families.
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "dbrx": {
        "attn_config": {"kv_n_heads": _HEADS, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "topk_method": "greedy", "q_lora_rank": 8},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_expand": 2},
    "gemma3n_text": {"num_kv_shared_layers": 0, "laurel_rank": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], LAYERS // 2]]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8, "moe_topk": 2, "num_experts": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * (LAYERS // 2)},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 8},
    "mpt": {"attn_config": {"attn_pdrop": 0}},
    "nemotron": {"num_key_value_heads": _HEADS},
    "zaya": {"num_experts_per_tok": 1},
}


def shrunk(kind: str) -> Any:
    """A small configuration of a family."""
    return _small(CONFIG_MAPPING[kind], EXCEPTIONS.get(kind, {}))


def _small(cls: Any, more: Mapping[str, Any]) -> Any:
    default = cls()
    values = default.to_dict()
    changed = {
        key: SIZES[key] for key, value in values.items() if key in SIZES and value is not None
    }
    changed |= {key: value for key, value in more.items() if not isinstance(value, dict)}
    for key in ("layer_types", "layers_block_type", "mlp_layer_types"):
        if isinstance(kinds := values.get(key), list) and kinds:
            distinct = list(dict.fromkeys(kinds))
            changed[key] = (distinct * LAYERS)[:LAYERS]
    for key in getattr(cls, "sub_configs", {}):
        part = getattr(default, key, None)
        if part is not None:
            changed[key] = _small(type(part), more.get(key, {}))
    return cls(**changed, **{k: v for k, v in more.items() if k not in changed})


@dataclass(frozen=True)
class Outcome:
    """What came of a family: ``works``, ``refused`` in our words, ``not built`` in theirs."""

    kind: str
    verdict: str
    why: str = ""
    edited: str = ""
    experts: str = ""
    bare: str = ""


def tried(kind: str) -> Outcome:
    """Build a family, and see whether all that is claimed of it holds."""
    try:
        config = shrunk(kind)
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(config)
        size = sum(p.numel() for p in empty.parameters())
        if size > 20_000_000:
            return Outcome(kind, "not built", f"{size / 1e6:.0f}M weights in its small form")
        torch.manual_seed(0)
        hf = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        randomise(hf)
        hf.eval()(input_ids=torch.tensor([[5, 6, 7]]), use_cache=False)
    except Exception as error:  # whatever a family raises: it is shown
        return Outcome(kind, "not built", _short(error))
    try:
        check_config(config.to_dict() | {"model_type": kind}, kind, trust_remote_code=False)
        model = Model.wrap(hf, tokenizer(), kind)
    except UserError as error:
        return Outcome(kind, "refused", error.found)
    why = ""
    try:
        fault = checked(model)
    except UserError as error:
        fault, why = "", f"none: {error.found}"
    except Exception as error:  # ours to mend: it is shown
        fault = _short(error)
    layers = model.layers
    first = next(block for block in layers if block.mlp_matrices)
    mixture = next((block for block in layers if block.n_experts), None)
    name = (mixture or first).edited_name or ""
    experts = ""
    if mixture is not None and mixture.routed is not None:
        experts = f"{mixture.n_experts}, {mixture.routed.per_token} a token"
        experts += ", one shared" if mixture.written is not None else ""
    return Outcome(
        kind,
        "defect" if fault else "works",
        fault,
        why or f"`{name.removeprefix((mixture or first).path + '.').removesuffix('.weight')}`",
        experts,
        ", ".join(map(str, layers.without_mlp)),
    )


def _short(error: BaseException) -> str:
    return (
        f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160] if str(error) else ''}"
    )


def randomise(model: nn.Module) -> None:
    """Weights that matter, drawn from one seed; what is no weight stays as it was made."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.add_(0.1 * noise)
            else:
                parameter.copy_(0.2 * noise)


def tokenizer() -> PreTrainedTokenizerFast:
    """One that nothing is asked of."""
    from tokenizers import Tokenizer, models

    words = {f"w{i}": i for i in range(VOCAB)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, "w0")))


def _text(ids: tuple[int, ...], n_prompt: int) -> Encoding:
    return Encoding("", ids, ((0, 0),) * len(ids), n_prompt, 1)


PAIR = (_text((5, 17, 60, 33, 8, 71), 4), _text((5, 17, 60, 33, 42), 4))


def checked(model: Model) -> str:
    """What is wrong with a family that was mapped; "" if all is as claimed."""
    blocks = [block for block in model.layers if block.mlp_matrices]
    for block in blocks:
        if left := _uncounted(model, block):
            return f"weights of the MLP that are not counted: {', '.join(left)}"
    found = pair_products(model, [PAIR[0]], [PAIR[1]])
    slow = _materialised(model, blocks)
    for block, old, new in zip(blocks, *slow, strict=True):
        inner = float(sum((a * b).sum() for a, b in zip(old, new, strict=True)))
        norms = [float(sum((a * a).sum() for a in side)) ** 0.5 for side in (old, new)]
        if not all(norms):
            return f"layer {block.index} has no gradient"
        if abs(float(found.inner[0, block.index]) - inner) > 1e-3 * norms[0] * norms[1]:
            return f"LGA's product at layer {block.index} is not that of the weight gradients"
    return _hook_fault(model, blocks)


def _uncounted(model: Model, block: Any) -> list[str]:
    """Matrices in the MLP that are in no scope, but for those that say where tokens go."""
    within = f"{block.mlp_path}." if block.mlp_path else f"{block.path}."
    known = {m.parameter_name for m in block.mlp_matrices}
    routers = {
        name.removeprefix(within).split(".")[0]
        for name, p in model.hf.named_parameters()
        if block.n_experts and name.startswith(within) and p.dim() == 2
        if p.shape[0] in (1, block.n_experts, block.n_experts + 1)  # one more: no expert at all
    }
    return [
        name.removeprefix(f"{block.path}.")
        for name, p in model.hf.named_parameters()
        if name.startswith(within)
        and name.removeprefix(within).split(".")[0] not in routers
        and not name.startswith(f"{block.attention_path or '-'}.")
        and p.dim() > 1
        and name not in known
    ]


def _hook_fault(model: Model, blocks: list[Any]) -> str:
    ids = torch.tensor([PAIR[0].ids])
    with torch.no_grad():
        for block in blocks:
            matrix = block.through(0).down if block.written is None else block.down
            with (
                capture({0: matrix.module}, inputs=True) as given,
                capture({0: matrix.module}) as gave,
            ):
                final_hidden(model, ids)
            weight = matrix.oriented(cast(Tensor, matrix.module.weight).detach())
            bias = getattr(matrix.module, "bias", None)
            product = nn.functional.linear(given[0], weight, bias)
            if not matrix.of_expert and not torch.allclose(product, gave[0], rtol=1e-3, atol=1e-4):
                return f"what {matrix.path} gives is not its input times its weight"
            if block.mlp is not None and not block.n_experts:
                with capture({0: block.mlp}) as whole:
                    final_hidden(model, ids)
                with override(matrix.module, lambda y: y + 1.0), capture({0: block.mlp}) as more:
                    final_hidden(model, ids)
                gain = more[0] - whole[0]  # 1, or a factor; a gate behind the matrix would show
                if not torch.allclose(gain, gain.mean().expand_as(gain), rtol=1e-2, atol=1e-3):
                    return f"what {matrix.path} gives is not what the MLP adds"
            if fault := _edit_fault(model, block):
                return fault
    return ""


def _edit_fault(model: Model, block: Any) -> str:
    """What is wrong with moving the matrix's output at the lookup token, as editors do."""
    if block.written is None:  # the expert that the token goes to
        at = PAIR[0].lookup or 0
        with torch.no_grad():
            final_hidden(model, torch.tensor([PAIR[0].ids]))
        if float(block.routed.weights[at, 0]) < 1e-3:
            return ""  # what this expert gives counts for nothing here
        block = block.through(int(block.routed.index[at, 0]))
        model = model.through(block.index, block.written.module.expert)
    module = block.down.module
    tails = Tails(model, [PAIR[0]], block.index, {"mlp": module})
    with torch.no_grad():
        change = torch.randn(1, block.down.out_features, generator=torch.Generator().manual_seed(0))
        moved = tails.run({module: 4 * change})
    return "" if not agree(moved, tails.clean) else f"a change of {block.down.path} has no effect"


def _materialised(model: Model, blocks: list[Any]) -> list[list[list[Tensor]]]:
    """[old or new][block][matrix]: autograd's weight gradients of the text's mean loss."""
    parameters = dict(model.hf.named_parameters())
    wanted = [[parameters[m.parameter_name] for m in block.mlp_matrices] for block in blocks]
    flat = [weight for part in wanted for weight in part]
    taps = {b.index: b.routed.down for b in blocks if b.routed is not None}
    batch = pad_ids([text.ids[:-1] for text in PAIR], "cpu")
    sides = []
    with ExitStack() as stack:
        stack.enter_context(observe(taps, lambda _key, _x, _y: None))
        for weight in flat:
            weight.requires_grad_(True)
            stack.callback(weight.requires_grad_, False)
        hidden = final_hidden(model, batch.ids)
        for row, text in enumerate(PAIR):
            n = len(text) - 1
            targets = torch.tensor(text.ids[1:])
            loss = token_nll(model.layers, hidden[row, :n], targets).mean()
            grads = torch.autograd.grad(loss, flat, retain_graph=True, allow_unused=True)
            pairs = zip(flat, grads, strict=True)
            each = iter(torch.zeros_like(w) if g is None else g for w, g in pairs)
            sides.append([[next(each) for _ in part] for part in wanted])
    return sides


HEAD = """# Families

What comes of every causal language model of transformers {version}, built small and random from its
default configuration: `python tools/families.py` writes this page, in some five minutes.

A family **works** if its layers and the matrix that an edit changes are found, if that matrix gives
what its hook sees and the MLP adds just that, if what editors do there has its effect, and if
[LGA](locate.md)'s products are those of autograd's own weight gradients, of every expert where
there are some. That is a test of the code. What a choice of layer or an edit is worth on pretrained
weights, it does not tell.

{works} of {all} work, {refused} are refused with a message, {rest} could not be built small by this
script, which says nothing about them.
"""


def page(outcomes: Sequence[Outcome]) -> str:
    """The page."""
    by = {
        verdict: [one for one in outcomes if one.verdict == verdict]
        for verdict in ("works", "refused", "not built", "defect")
    }
    head = HEAD.format(
        version=transformers.__version__,
        works=len(by["works"]),
        all=len(outcomes),
        refused=len(by["refused"]),
        rest=len(by["not built"]),
    )
    lines = ["## Work", ""]
    lines += ["| family | an edit changes, in a layer | experts | layers left out, of 4 |"]
    lines += ["| --- | --- | --- | --- |"]
    lines += [f"| {o.kind} | {o.edited} | {o.experts} | {o.bare} |" for o in by["works"]]
    lines += [
        "",
        "`*`: the expert that weighs most at the subject's last token. A layer is left out",
    ]
    lines += ["where it has no MLP, so that nothing there could be edited."]
    for title, verdict in (("Refused", "refused"), ("Not built", "not built")):
        lines += ["", f"## {title}", "", "| family | why |", "| --- | --- |"]
        lines += [f"| {o.kind} | {_cell(o.why)} |" for o in by[verdict]]
    return head + "\n" + "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())


def main() -> int:
    """Try what was named, or everything, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*")
    chosen = parser.parse_args().families
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    outcomes = []
    for kind in chosen or FAMILIES:
        outcomes.append(tried(kind))
        gc.collect()
        print(outcomes[-1], file=sys.stderr, flush=True)
    if not chosen:
        PAGE.write_text(page(outcomes), encoding="utf-8")
    return int(any(one.verdict == "defect" for one in outcomes))


if __name__ == "__main__":
    sys.exit(main())
