"""Causal tracing: against whole-model passes, one layer, one sample and one text at a time."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from families import tiny
from reference import slow_greedy
from torch import Tensor, nn
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D

from goldenlayers.errors import UserError
from goldenlayers.facts import Fact
from goldenlayers.hooks import capture, final_hidden
from goldenlayers.locating import CMA, Work, locate
from goldenlayers.locating.tracing import (
    Noise,
    Traces,
    noise_sigma,
    restored_modules,
    tracing_grid,
    tracing_rows,
    windows,
)
from goldenlayers.models import Model
from goldenlayers.progress import Progress
from goldenlayers.tokens import subject_tokens

FACTS = [
    Fact(
        "Danielle Darrieux",
        "The mother tongue of Danielle Darrieux is",
        "English",
        "French",
        id="a",
    ),
    Fact("Toko Yasuda", "Toko Yasuda plays the", "piano", "old guitar", id="b"),
    Fact("Oslo", "What is near Oslo", "Rome", "Sweden", id="c"),
]
KINDS = ("mlp", "attention", "block")


# Random models give tiny probabilities, and even in float64 parts of them compute in float32.
def near(a: Any, b: Any, rel: float = 1e-3) -> bool:
    """Equal relative to their size, without any absolute allowance."""
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    return bool((np.abs(a - b) <= rel * np.maximum(np.abs(a), np.abs(b))).all())


def site(model: Model, layer: int, kind: str) -> nn.Module:
    block = model.layers[layer]
    if kind == "block":
        return block.module
    if kind == "mlp":
        return block.down.module
    # BLOOM's attention module adds the residual to what it returns.
    return block.attention_matrices[-1].module if "bloom" in model.name else block.attention


def slow_run(
    model: Model, fact: Fact, kind: str, noise: Tensor | None, restored: dict[int, Tensor]
) -> tuple[float, dict[int, Tensor]]:
    """p(old answer) of one unpadded text by its full logits, and the states at the lookup token."""
    encoding = model.encoder.fact(fact, fact.target_old or "")
    seen: dict[int, Tensor] = {}

    def corrupt(_module: Any, _args: Any, y: Tensor) -> Tensor:
        y = y.clone()
        for i, token in enumerate(range(*subject_tokens(fact, encoding))):
            y[0, token] += noise[i]  # pyright: ignore[reportOptionalSubscript]
        return y

    def state(layer: int) -> Any:
        def hook(_module: Any, _args: Any, output: Any) -> Any:
            y = output[0] if isinstance(output, tuple) else output
            flat = y.reshape(-1, y.shape[-1]).clone()
            seen[layer] = flat[encoding.lookup].clone()
            if layer not in restored:
                return None
            flat[encoding.lookup] = restored[layer]
            y = flat.reshape(y.shape)
            return (y, *output[1:]) if isinstance(output, tuple) else y

        return hook

    handles = [
        site(model, i, kind).register_forward_hook(state(i)) for i in range(len(model.layers))
    ]
    if noise is not None:
        handles.append(model.layers.embedding.register_forward_hook(corrupt))
    ids = torch.tensor([encoding.ids])
    with torch.no_grad():
        logits = model.hf(input_ids=ids, use_cache=False).logits[0].double().log_softmax(-1)
    for handle in handles:
        handle.remove()
    total = sum(
        float(logits[t - 1, encoding.ids[t]]) for t in range(encoding.n_prompt, len(ids[0]))
    )
    return math.exp(total), seen


def method(**options: Any) -> CMA:
    wide = {} if options.get("kind") == "block" else {"window": 2}
    return CMA(**{"samples": 3, "noise": 1.0, **wide} | options)


def rows_of(
    model: Model, facts: list[Fact], seed: int = 0, batch_size: int = 32, **options: Any
) -> dict[str, dict]:
    how = method(batch_size=batch_size, **options)
    rows = [row for part in tracing_rows(Work(model, facts, seed), how) for row in part]
    assert sorted(row["fact"] for row in rows) == sorted(fact.id for fact in facts)
    return {row["fact"]: row for row in rows}


@pytest.mark.parametrize("kind", KINDS)
def test_one_at_a_time_on_every_family(family: str, kind: Any) -> None:
    model = tiny(family, dtype=torch.float64)
    row = rows_of(model, FACTS, kind=kind, samples=2, batch_size=4)["b"]
    fact = FACTS[1]
    sigma = noise_sigma(model, FACTS, 1.0)
    encoding = model.encoder.fact(fact, fact.target_old or "")
    _, noises = Noise(sigma, 2, 0).of(model, fact, encoding)
    clean, states = slow_run(model, fact, kind, None, {})
    assert near(row["clean"], clean)
    corrupted = [slow_run(model, fact, kind, n.double(), {})[0] for n in noises]
    assert near(row["corrupted"], np.mean(corrupted))
    n_layers = len(model.layers)
    for layer in range(n_layers):
        low, high = (layer, layer + 1) if kind == "block" else (layer - 1, layer + 1)
        put = {i: states[i] for i in range(max(0, low), min(n_layers, high))}
        runs = [slow_run(model, fact, kind, n.double(), put)[0] for n in noises]
        assert near(row["restored"][layer], np.mean(runs))
        assert near(row["phi"][layer], row["restored"][layer] - row["corrupted"], 1e-12)
    # The controls: noise matters, and so does the layer.
    assert not near(row["corrupted"], clean, 5e-3)
    assert np.ptp(np.log(row["restored"])) > 5e-3, "layers are too alike for this test"
    assert not any(m._forward_hooks for m in model.hf.modules())


def test_the_attention_state_is_what_attention_adds(family: str) -> None:
    """What writes attention's output gives what the module returns; BLOOM's adds the residual."""
    model = tiny(family)
    found = restored_modules(model, "attention")
    ids = torch.tensor([[5, 9, 40, 7]])
    modules = {i: block.attention for i, block in enumerate(model.layers.blocks)}
    with torch.no_grad(), capture(found) as own, capture(modules) as whole:
        final_hidden(model, ids)
    same = all(torch.equal(own[i].reshape(whole[i].shape), whole[i]) for i in own)
    assert same == (family != "bloom")
    assert all(type(m) in (nn.Linear, Conv1D, FalconLinear) for m in found.values())


def test_windows() -> None:
    assert windows(12, "mlp", 10)[0] == range(5)
    assert windows(12, "mlp", 10)[6] == range(1, 11)
    assert windows(12, "attention", 10)[11] == range(6, 12)
    assert windows(12, "mlp", 3)[4] == range(3, 6)
    assert windows(12, "mlp", 1) == windows(12, "block", 10)


def traces_of(model: Model, kind: Any, sigma: float) -> Traces:
    encodings = [model.encoder.fact(f, f.target_old or "") for f in FACTS]
    return Traces(model, FACTS, encodings, restored_modules(model, kind), Noise(sigma, 2, 0), 4)


@pytest.mark.parametrize("name", ["gemma3", "falcon", "opt", "gptj"])
def test_restoring_nothing_and_restoring_everything(name: str) -> None:
    model = tiny(name, dtype=torch.float64)
    sigma = noise_sigma(model, FACTS, 1.0)
    rows = torch.arange(6)
    for kind in KINDS:
        traces = traces_of(model, kind, sigma)
        nowhere = (torch.empty(0, dtype=torch.long), torch.empty(0, dtype=torch.long))
        for layers in ((), (0,), range(4)):
            corrupted = traces.probability(rows, layers, nowhere).view(3, 2)
            assert near(corrupted, traces.corrupted)
        width = traces.ids.shape[1]
        everywhere = (rows.repeat_interleave(width), torch.arange(width).repeat(6))
        clean = traces.probability(rows, range(4), everywhere).view(3, 2)
        expected = traces.clean[:, None].expand(3, 2)
        if kind == "block":
            assert near(clean, expected)
        else:  # the noise itself stays in the residual stream
            assert not near(clean, expected, 1e-2)
        one = traces.probability(rows, [3], everywhere).view(3, 2)
        assert near(one, expected) == (kind == "block")


def test_no_noise_no_effect() -> None:
    model = tiny("llama", dtype=torch.float64)
    for kind in KINDS:
        for row in rows_of(model, FACTS, noise=0.0, kind=kind).values():
            assert near(row["corrupted"], row["clean"]) and near(row["restored"], row["clean"])


def test_batches_and_order_do_not_matter_but_the_seed_does() -> None:
    model = tiny("gemma3", tokenizer="sentencepiece_bpe", dtype=torch.float64)
    one = rows_of(model, FACTS, batch_size=1)
    for facts, size in ((FACTS[::-1], 6), (FACTS, 100)):
        many = rows_of(model, facts, batch_size=size)
        for fact in FACTS:
            assert near(many[fact.id]["restored"], one[fact.id]["restored"])
            assert near(many[fact.id]["corrupted"], one[fact.id]["corrupted"])
    assert not near(rows_of(model, FACTS, seed=1)["a"]["corrupted"], one["a"]["corrupted"], 0.01)
    # Every fact has a noise of its own.
    twin = dataclasses.replace(FACTS[0], id="d")
    both = rows_of(model, [*FACTS, twin])
    assert near(both["d"]["clean"], both["a"]["clean"])
    assert not near(both["d"]["corrupted"], both["a"]["corrupted"], 0.01)


def test_the_noise_is_measured_in_subject_embeddings() -> None:
    model = tiny("gemma3", tokenizer="sentencepiece_bpe", dtype=torch.float64)
    numbers = []
    for fact in FACTS:
        encoding = model.encoder.fact(fact)
        start, end = subject_tokens(fact, encoding)
        assert end - 1 == encoding.lookup
        text = encoding.text[encoding.spans[start][0] : encoding.spans[end - 1][1]]
        assert text.strip() == fact.subject
        numbers.append(model.layers.embedding(torch.tensor(encoding.ids[start:end])).flatten())
    spread = np.std(torch.cat(numbers).numpy())
    sigma = noise_sigma(model, FACTS)
    assert sigma == pytest.approx(3 * spread)
    encoding = model.encoder.fact(FACTS[0])
    start, noise = Noise(sigma, 400, 0).of(model, FACTS[0], encoding)
    assert start == subject_tokens(FACTS[0], encoding)[0]
    assert float(noise.std()) == pytest.approx(sigma, rel=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_the_grid_holds_the_rows_and_nothing_before_the_subject(kind: Any) -> None:
    model = tiny("falcon", dtype=torch.float64)
    sigma = noise_sigma(model, FACTS, 1.0)
    grid = tracing_grid(model, FACTS[0], method(kind=kind, batch_size=5), sigma=sigma)
    row = rows_of(model, FACTS, kind=kind)["a"]
    assert near(grid.effect[grid.lookup] + grid.corrupted, row["restored"])
    assert near([grid.clean, grid.corrupted], [row["clean"], row["corrupted"]])
    encoding = model.encoder.fact(FACTS[0])
    assert grid.effect.shape == (len(encoding), 4) and len(grid.tokens) == len(encoding)
    assert "".join(grid.tokens).startswith("The␣mother") and grid.answer == "French"
    assert not grid.effect[: grid.subject[0]].any()
    assert grid.effect[grid.subject[0] :].any(axis=1).all()
    # The zeros before the subject are no omission: restoring there changes nothing.
    encodings = [model.encoder.fact(f, f.target_old or "") for f in FACTS]
    traces = Traces(model, FACTS, encodings, restored_modules(model, kind), Noise(sigma, 3, 0), 9)
    before = (torch.arange(3), torch.full((3,), grid.subject[0] - 1))
    same = traces.probability(torch.arange(3), range(4), before)
    assert near(same, traces.corrupted[0])


def answered(model: Model, subject: str) -> Fact | None:
    """A fact with the model's own next token as old answer, if that token can be typed."""
    prompt = f"What stands in {subject} is"
    token = slow_greedy(model, model.encoder.encode(prompt).ids, 1)
    answer = str(model.tokenizer.decode(token)).strip()
    if not answer or model.encoder.encode(prompt, answer).answer_ids != tuple(token):
        return None
    return Fact(subject, prompt, "a lamp", answer, id="known")


def test_only_known_facts_are_traced_and_rank_the_layers() -> None:
    model = tiny("llama")
    known = next(fact for i in range(400) if (fact := answered(model, f"Room {i}")) is not None)
    facts = [FACTS[1], known]
    rows: list[dict[str, Any]] = []
    ranking = locate(model, facts, "cma", samples=2, progress=Progress(on_rows=rows.extend))
    assert [row["fact"] for row in rows] == ["known"]
    assert ranking.golden_layer == int(np.argmax(rows[0]["phi"])) and ranking.fence == "none"
    assert ranking.dropped == {"the model does not give the old answer": 1}
    # Asked for, the others are traced too.
    assert locate(model, facts, CMA(samples=2, known=False)).n_facts == 2


def test_what_the_user_can_get_wrong() -> None:
    model = tiny("llama")

    def run(facts: list[Fact] = FACTS, **options: Any) -> None:
        list(tracing_rows(Work(model, facts), CMA(**options)))

    with pytest.raises(UserError, match="none of the 1 facts"):
        locate(model, [dataclasses.replace(FACTS[0], target_old="zebra zebra zebra")], "cma")
    with pytest.raises(UserError, match="no old answer"):
        run([dataclasses.replace(FACTS[0], target_old=None)])
    with pytest.raises(UserError, match="unknown kind 'residual'"):
        run(kind="residual")
    for name in ("window", "samples", "batch_size"):
        with pytest.raises(UserError, match=name.replace("_", " ")):
            run(FACTS, **{name: 0})
    with pytest.raises(UserError, match="noise is -1"):
        run(noise=-1.0)
    with pytest.raises(UserError, match="window is for the kinds mlp and attention"):
        run(kind="block", window=5)


def test_the_window_is_half_of_a_small_model_and_can_be_said() -> None:
    assert [CMA().window_in(n) for n in (1, 3, 10, 11, 48)] == [1, 1, 5, 10, 10]
    assert CMA(window=5).window_in(48) == 5 and CMA(kind="block").window_in(48) == 1
    model = tiny("llama")
    how = CMA(samples=2, known=False)
    usual = locate(model, FACTS, how)
    one, wide = (locate(model, FACTS, how, window=n) for n in (1, 2))
    assert [x.score for x in usual.layers] == [x.score for x in wide.layers]
    assert [x.score for x in usual.layers] != [x.score for x in one.layers]
    assert any("here it restored 2" in text for text in usual.warnings)
    assert not any("restore" in text for text in wide.warnings)
