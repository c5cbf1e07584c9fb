"""Hooks: padded = unpadded on every family, resuming, and nothing left behind."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from families import shared
from reference import full_logits
from tokenizers_built import TOKENIZERS
from torch import Tensor, nn

from goldenlayers.hooks import (
    capture,
    final_hidden,
    first,
    graph_from_embedding,
    input_of,
    last_logits,
    observe,
    override,
    override_input,
    resume_from,
)
from goldenlayers.models import Model
from goldenlayers.tokens import pad_ids

ROWS = [[9, 70, 33, 150, 41], [201], [7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20], [5, 4]]


@cache
def wrapped(name: str, dtype: torch.dtype = torch.float32) -> Model:
    return Model.wrap(shared(name, dtype), TOKENIZERS["byte_level_bpe"]())


def n_hooks(model: Model) -> int:
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + ("forward" in m.__dict__)
        for m in model.hf.modules()
    )


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> bool:
    return bool((a - b).abs().max() <= tolerance * b.abs().max().clamp_min(1.0))


def test_padded_equals_alone(family: str) -> None:
    """No mask, no position ids: right padding changes no real token's logits, GPT-2's neither."""
    model = wrapped(family)
    batch = pad_ids(ROWS, model.device)
    before = n_hooks(model)
    with torch.no_grad():
        logits = model.layers.logits(final_hidden(model, batch.ids))
    assert n_hooks(model) == before
    for row, own in zip(ROWS, logits, strict=True):
        assert close(own[: len(row)], full_logits(model, row)), family
    # The control: the last column of a shorter row is padding, and is another prediction.
    assert not close(logits[0, -1], full_logits(model, ROWS[0])[-1])


def test_resuming_gives_the_same_head_input(family: str) -> None:
    model = wrapped(family)
    batch = pad_ids(ROWS, model.device)
    layer = 2
    entering: list[Tensor] = []

    def keep(hidden: Tensor) -> Tensor:
        entering.append(hidden)
        return hidden

    with torch.no_grad():
        with override_input(model.layers[layer].module, keep):
            whole = final_hidden(model, batch.ids)
        skipped: dict[int, int] = {}

        def count(key: int, _x: Tensor, _y: Tensor) -> None:
            skipped[key] = skipped.get(key, 0) + 1

        downs = {b.index: b.down.module for b in model.layers.blocks}
        with observe(downs, count), resume_from(model, layer, entering[0]):
            again = final_hidden(model, batch.ids)
        assert set(skipped) == {2, 3}  # the blocks above were not run
        assert torch.equal(again, whole)
        # The control: another state gives another result.
        with resume_from(model, layer, entering[0] * 1.5):
            assert not close(final_hidden(model, batch.ids), whole)
        assert torch.equal(final_hidden(model, batch.ids), whole)
    assert n_hooks(model) == 0


def test_last_logits_and_the_cache(family: str) -> None:
    model = wrapped(family)
    row = ROWS[2]
    with torch.no_grad():
        logits, past = last_logits(model, torch.tensor([row[:-1]]))
        assert logits.shape == (1, model.layers.vocab_size)
        assert close(logits[0], full_logits(model, row[:-1])[-1])
        logits, _ = last_logits(model, torch.tensor([row[-1:]]), past)
    assert close(logits[0], full_logits(model, row)[-1])


@pytest.mark.parametrize("fault", ["none kept", "refused", "refused later"])
def test_without_a_cache_that_works_all_is_run_again(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, row = wrapped("llama"), ROWS[2]
    real, asked = model.hf.forward, []

    def forward(*, input_ids: torch.Tensor, use_cache: bool, **kwargs: Any) -> Any:
        asked.append(input_ids.shape[1])
        given = kwargs.get("past_key_values")
        if use_cache and (fault == "refused" or (fault == "refused later" and given is not None)):
            raise ValueError("no cache here")
        out = real(input_ids=input_ids, use_cache=use_cache, **kwargs)
        if fault == "none kept":
            out.past_key_values = None
        return out

    monkeypatch.setattr(model.hf, "forward", forward)
    n, past, whole = len(row), None, full_logits(model, row)
    asked.clear()
    with torch.no_grad():
        for start, end in ((0, n - 2), (n - 2, n - 1), (n - 1, n)):
            logits, past = last_logits(model, torch.tensor([row[start:end]]), past)
            assert close(logits[0], whole[end - 1])
    assert asked[-1] == n
    if fault != "none kept":
        with pytest.raises(ValueError, match="no cache here"):
            once = last_logits(model, torch.tensor([row[:2]]), again=fault != "refused")[1]
            last_logits(model, torch.tensor([row[2:3]]), once, again=False)


def test_capture_and_override() -> None:
    model = wrapped("llama")
    ids = torch.tensor([ROWS[0]])
    down = model.layers[1].down
    with torch.no_grad():
        with capture({"d": down.module}) as out, capture({"d": down.module}, inputs=True) as given:
            clean = final_hidden(model, ids)
        assert given["d"].shape == (1, 5, down.in_features)
        assert torch.equal(down.module(given["d"]), out["d"])
        with override(down.module, lambda y: torch.zeros_like(y)):
            changed = final_hidden(model, ids)
        assert not torch.equal(changed, clean)
        assert torch.equal(final_hidden(model, ids), clean)


def test_a_tuple_keeps_its_other_members() -> None:
    class Two(nn.Module):
        def __init__(self, kind: type) -> None:
            super().__init__()
            self.kind = kind

        def forward(self, hidden_states: Tensor) -> Any:
            return self.kind((hidden_states, "weights"))

    for kind in (tuple, list):
        module = Two(kind)
        with override(module, lambda y: y + 1):
            output = module(hidden_states=torch.zeros(2))
        assert isinstance(output, kind) and output[1] == "weights"  # pyright: ignore
        assert first(output).tolist() == [1, 1]
        seen: list[Tensor] = []
        with observe({0: module}, lambda _k, x, _y, seen=seen: seen.append(x)):
            module(hidden_states=torch.ones(2))
        assert seen[0].tolist() == [1, 1]
        with override_input(module, lambda x: x * 3):
            assert first(module(hidden_states=torch.ones(2))).tolist() == [3, 3]
            assert first(module(torch.ones(2))).tolist() == [3, 3]


def test_hooks_go_after_an_exception() -> None:
    model = wrapped("gpt2")
    ids = torch.tensor([ROWS[0]])
    down = model.layers[1].down.module

    def fail(_y: Tensor) -> Tensor:
        raise ZeroDivisionError

    for context in (
        override(down, fail),
        override_input(down, fail),
        override_input(model.layers.head, fail),
    ):
        with pytest.raises(ZeroDivisionError), context, torch.no_grad():
            final_hidden(model, ids)
        assert n_hooks(model) == 0
    with (
        pytest.raises(ZeroDivisionError),
        resume_from(model, 2, torch.zeros(1, 5, 32)),
        override(model.layers[3].down.module, fail),
    ):
        final_hidden(model, ids)
    assert n_hooks(model) == 0
    assert "forward" not in model.layers[0].module.__dict__


def test_gradients_reach_activations_and_no_weight(family: str) -> None:
    model = wrapped(family)
    seen: list[Tensor] = []
    with graph_from_embedding(model):
        with observe({0: model.layers[0].down.module}, lambda _k, _x, y: seen.append(y)):
            hidden = final_hidden(model, torch.tensor([ROWS[0]]))
        (g,) = torch.autograd.grad(hidden.square().sum(), seen)
    assert float(g.norm()) > 0
    assert not any(p.requires_grad or p.grad is not None for p in model.hf.parameters())
    # Without it, frozen weights give no graph at all.
    assert not final_hidden(model, torch.tensor([ROWS[0]])).requires_grad


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama", "gemma3"])
def test_an_input_is_read_without_running_what_comes_after(name: str) -> None:
    model = wrapped(name)
    ids = torch.tensor(ROWS[:1])
    down, later = model.layers[1].down.module, model.layers[2].down.module
    with torch.no_grad(), capture({0: down}, inputs=True) as whole:
        final_hidden(model, ids)
    with torch.no_grad(), capture({0: later}) as after:
        found = input_of(model, down, ids)
    assert torch.equal(found, whole[0]) and not after
    assert n_hooks(model) == 0
    with pytest.raises(IndexError):  # what goes wrong before it is still told
        input_of(model, down, torch.tensor([[10**6]]))
