"""One forward, another delta for every sequence: equal to the merged models one by one."""

from __future__ import annotations

import time
from typing import Any, cast

import pytest
import torch
from deltas import bits, ids, logits, low, of_matrices, random_delta, same_bits, wrapped
from families import CONFIGS, build, shared
from torch import Tensor

from goldenlayers.delta import Dense, WeightDelta, applied_per_example
from goldenlayers.errors import UserError
from goldenlayers.models.layers import LayerMap


@pytest.mark.parametrize("family", CONFIGS)
def test_per_example_equals_the_merged_models(family: str) -> None:
    hf = shared(family)
    matrices = [m for block in LayerMap.of(hf) for m in block.mlp_matrices]
    deltas = [
        of_matrices([matrices[-1], matrices[0]], 1, seed=1),
        None,
        of_matrices([matrices[-1]], 3, seed=2),
        of_matrices([matrices[len(matrices) // 2]], 2, seed=3),
    ]
    tokens = ids(8)
    expected = []
    for i in range(8):
        delta = deltas[i // 2]
        private = build(family)
        if delta is not None:
            delta.merge(private)
        expected.append(logits(private, tokens[i : i + 1]))
    wanted, plain = torch.cat(expected), logits(hf, tokens)
    before = bits(hf)
    with applied_per_example(hf, deltas) as batch:
        batch.select([i // 2 for i in range(8)])
        torch.testing.assert_close(logits(hf, tokens), wanted, atol=1e-4, rtol=1e-4)
        batch.select([-1] * 8)
        assert torch.equal(logits(hf, tokens), plain)
        order = torch.tensor([5, 0, 7, 2, 3])
        batch.select(order // 2)
        torch.testing.assert_close(logits(hf, tokens[order]), wanted[order], atol=1e-4, rtol=1e-4)
    assert same_bits(hf, before)
    assert torch.equal(logits(hf, tokens), plain)
    # The control: sequences with a delta differ from the untouched model, those without do not.
    torch.testing.assert_close(wanted[2:4], plain[2:4], atol=1e-4, rtol=1e-4)
    assert all((wanted[i] - plain[i]).abs().max() > 1e-2 for i in (0, 1, 4, 5, 6, 7))


def test_per_example_with_dense_changes() -> None:
    hf = build("gpt2_square")
    a = random_delta(hf, [1], seed=1)
    name = next(iter(a.changes))
    dense = WeightDelta({name: Dense(low(*a.changes[name].shape, 32, 4).dense * 0.05)})
    tokens = ids(4)
    with dense.applied(hf):
        wanted_dense = logits(hf, tokens)
    with a.applied(hf):
        wanted_low = logits(hf, tokens)
    with applied_per_example(hf, [dense, a]) as batch:
        batch.select([0, 1, 0, -1])
        found = logits(hf, tokens)
    torch.testing.assert_close(found[[0, 2]], wanted_dense[[0, 2]], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found[1], wanted_low[1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found[3], logits(hf, tokens)[3], atol=1e-4, rtol=1e-4)


def test_per_example_on_top_of_applied_and_in_generation() -> None:
    hf: Any = build("llama")
    a, b = random_delta(hf, [1], seed=1), random_delta(hf, [1, 2], seed=2)
    prompt = ids(2)
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    mask = torch.ones_like(prompt)
    with (a + b).applied(hf):
        wanted = hf.generate(prompt, attention_mask=mask, **options)
    with a.applied(hf):
        plain = hf.generate(prompt, attention_mask=mask, **options)
        with applied_per_example(hf, [b, None]):
            found = hf.generate(prompt, attention_mask=mask, **options)
    assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], plain[1])
    assert not torch.equal(wanted[0], plain[0])


def test_per_example_lets_gradients_through() -> None:
    hf: Any = build("llama")
    delta = random_delta(hf, [1])
    embedded = hf.get_input_embeddings()(ids(2)).detach().requires_grad_(True)
    with applied_per_example(hf, [delta, None]):
        hf(inputs_embeds=embedded).logits.square().mean().backward()
    found = cast(Tensor, embedded.grad)
    again = embedded.detach().requires_grad_(True)
    with delta.applied(hf):
        hf(inputs_embeds=again).logits.square().mean().backward()
    torch.testing.assert_close(found[0], cast(Tensor, again.grad)[0], atol=1e-5, rtol=1e-3)


def test_per_example_in_bfloat16_stays_in_bfloat16() -> None:
    hf = build("llama", torch.bfloat16)
    delta = random_delta(hf, [1])
    with delta.applied(hf):
        wanted = logits(hf, ids(2))
    with applied_per_example(hf, [delta, delta]):
        found = logits(hf, ids(2))
    assert found.dtype == torch.bfloat16
    assert (found - wanted).norm() < 0.05 * wanted.norm()


def test_per_example_mistakes_are_named() -> None:
    hf = build("llama")
    delta = random_delta(hf, [1])
    with applied_per_example(hf, [delta, delta]) as batch:
        with pytest.raises(UserError, match="2 sequences"):
            logits(hf, ids(4))
        for wrong in ([0, 2], [-2], [[0]], [0.5]):
            with pytest.raises(UserError, match="the selection"):
                batch.select(cast(Any, wrong))
    model, strange = wrapped(hf), random_delta(hf, [1], base_fingerprint="0" * 64)
    with pytest.raises(UserError, match="other weights"), applied_per_example(model, [strange]):
        pass
    hf.add_module("experts", torch.nn.ModuleList([torch.nn.Linear(3, 2)]))
    expert = WeightDelta({"experts.0.weight": low(2, 3, 1, 0)})
    with pytest.raises(UserError, match="expert"), applied_per_example(hf, [expert]):
        pass
    assert not any(module._forward_hooks for module in hf.modules())


def test_per_example_gains_on_one_at_a_time() -> None:
    """Not a benchmark: only that 16 edits in a batch do not cost 16 passes."""
    hf = shared("llama")
    deltas = [random_delta(hf, [1], seed=i) for i in range(16)]
    tokens = ids(16)
    with applied_per_example(hf, deltas):
        logits(hf, tokens)
        times = []
        for _ in range(3):
            start = time.perf_counter()
            logits(hf, tokens)
            times.append(time.perf_counter() - start)
    start = time.perf_counter()
    for i, delta in enumerate(deltas):
        with delta.applied(hf):
            logits(hf, tokens[i : i + 1])
    assert min(times) < time.perf_counter() - start
