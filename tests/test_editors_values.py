"""Value optimisation: a batch = the one-fact loop, tails = whole rows, and both = a slow loop."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from families import CONFIGS, from_config, shared
from reference import slow_value
from tokenizers_built import TOKENIZERS
from torch import Tensor
from torch.nn.functional import cross_entropy

from goldenlayers.editors import ValueSearch
from goldenlayers.editors import partial_forward as forward_module
from goldenlayers.editors import prompt_batches as batches_module
from goldenlayers.editors import values as values_module
from goldenlayers.editors.partial_forward import Tails
from goldenlayers.editors.prompt_batches import Row, split
from goldenlayers.editors.values import Value, fact_prompts, optimise_values
from goldenlayers.errors import UserError
from goldenlayers.facts import Fact
from goldenlayers.hooks import capture, final_hidden
from goldenlayers.models import Model

# Subjects at the beginning, in the middle and at the end; answers of one and of several tokens.
FACTS = [
    Fact("Italy", "The capital of Italy is", "Paris", id="italy"),
    Fact("Toko Yasuda", "Toko Yasuda plays the", "piano in town", id="toko"),
    Fact("gold", "The chemical symbol of the element gold", "is Fe", id="gold"),
]
PREFIXES = ["", "The city. ", "She was born in Ulm. "]
LAYER = 1
# Steps of Adam enlarge the last bits that other batches differ in; another fact's delta is 0.1 off.
NEAR = 1e-3
# One of each way of building a block: Conv1D, no MLP module, residual inside the MLP, norms behind
# the MLP, parallel attention, alibi, windows.
NAMES = [
    "gpt2", "gpt2_square", "opt", "bloom", "gemma3", "gemma2", "olmo2", "gpt_neox", "gptj", "mpt",
    "llama", "falcon_alibi", "glm4", "cohere", "mistral",
]  # fmt: skip


@cache
def wrapped(name: str, dtype: torch.dtype = torch.float32) -> Model:
    return Model.wrap(shared(name, dtype), TOKENIZERS["byte_level_bpe"]())


def settings(**changes: Any) -> ValueSearch:
    return ValueSearch(**{"steps": 5, "stop_loss": 0.0, **changes})


def gap(left: Sequence[Value], right: Sequence[Value]) -> float:
    """The largest relative difference of deltas."""
    return max(
        float((a.delta - b.delta).norm() / b.delta.norm()) for a, b in zip(left, right, strict=True)
    )


@pytest.mark.parametrize("name", NAMES)
def test_batch_equals_one_by_one_and_tails_equal_whole_rows(name: str) -> None:
    model, s = wrapped(name), settings()
    batch = optimise_values(model, FACTS, LAYER, PREFIXES, s)
    assert [v.fact for v in batch] == FACTS
    single = [optimise_values(model, [f], LAYER, PREFIXES, s)[0] for f in FACTS]
    whole = optimise_values(model, FACTS, LAYER, PREFIXES, s, reuse=False)
    assert gap(batch, single) < NEAR
    assert gap(batch, whole) < NEAR
    for a, b in zip(batch, single, strict=True):
        assert a.steps == b.steps == s.steps - 1
        assert a.nll_before == pytest.approx(b.nll_before, rel=NEAR)
        assert a.nll_after == pytest.approx(b.nll_after, rel=NEAR)
        assert a.nll_after < a.nll_before
        assert a.keys.shape == (3, model.layers[LAYER].down.in_features)
        assert a.values.shape == (3, 32) and a.delta.shape == (32,)
        assert torch.equal(a.target, a.values[0] + a.delta)
    # The control: another fact's delta is not this one's.
    assert gap(batch, single[1:] + single[:1]) > 0.1


def slow(model: Model, fact: Fact, s: ValueSearch, modules: tuple[str, ...]) -> Any:
    rows = []
    for e in fact_prompts(model, fact, PREFIXES, fact.target):
        assert e.lookup is not None
        rows.append((e.ids, e.n_prompt, e.lookup))
    kl = model.encoder.encode(f"{fact.subject} is a", "", fact.subject)
    assert kl.lookup is not None
    block = model.layers[LAYER]
    sites = {"mlp": block.down.module, "attention": block.attention}
    return slow_value(
        model,
        rows,
        (kl.ids, kl.lookup),
        {name: sites[name] for name in modules},
        steps=s.steps,
        lr=s.lr,
        kl_factor=s.kl_factor,
        weight_decay=s.weight_decay,
        clamp=s.clamp,
        stop_loss=s.stop_loss,
    )


@pytest.mark.parametrize("with_attention", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_equal_to_whole_model_passes(name: str, with_attention: bool) -> None:
    """In float64, so that steps of Adam agree to many digits; KL and decay have weight."""
    model = wrapped(name, torch.float64)
    s = settings(steps=4, kl_factor=0.5, weight_decay=0.7, lr=0.5, adam=True)
    values = optimise_values(model, FACTS, LAYER, PREFIXES, s, with_attention=with_attention)
    modules = ("mlp", "attention") if with_attention else ("mlp",)
    for value in values[2:] if with_attention else values[1:2]:
        delta, losses, nlls = slow(model, value.fact, s, modules)
        assert value.nll_before == pytest.approx(nlls[0], rel=1e-6)  # the first step's loss
        assert value.nll_after == pytest.approx(nlls[-1], rel=1e-5)
        assert value.loss == pytest.approx(losses[-1], rel=1e-5)
        expected = delta["mlp"]
        # Some families compute parts in float32 whatever their weights are.
        assert float((value.delta - expected).norm()) <= 1e-4 * float(expected.norm())


def test_the_kl_term_is_there_and_can_be_left_out() -> None:
    model = wrapped("llama", torch.float64)
    for kl in (0.0, 2.0):
        s = settings(steps=4, kl_factor=kl, adam=True)
        (value,) = optimise_values(model, FACTS[:1], LAYER, PREFIXES, s)
        delta, losses, _ = slow(model, FACTS[0], s, ("mlp",))
        assert value.loss == pytest.approx(losses[-1], rel=1e-5)
        assert float((value.delta - delta["mlp"]).norm()) < 1e-4 * float(value.delta.norm())


def test_keys_and_values_are_the_clean_ones() -> None:
    for name in ("gpt2", "opt", "gemma3", "bloom"):
        model = wrapped(name)
        values = optimise_values(model, FACTS, LAYER, PREFIXES, settings(steps=2))
        down = model.layers[LAYER].down.module
        for value in values:
            prompts = fact_prompts(model, value.fact, PREFIXES, value.fact.target)
            for p, e in enumerate(prompts):
                with torch.no_grad(), capture({0: down}, inputs=True) as x, capture({0: down}) as y:
                    model.hf(input_ids=torch.tensor([e.ids]), use_cache=False)
                key, clean = (t[0].reshape(-1, t[0].shape[-1])[e.lookup] for t in (x, y))
                assert torch.allclose(value.keys[p], key, rtol=1e-4, atol=1e-5), name
                assert torch.allclose(value.values[p], clean, rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma3"])
def test_the_delta_does_what_the_optimisation_says(name: str) -> None:
    """With δ added by a hook on the whole model, the new answer's NLL is ``nll_after``."""
    model = wrapped(name)
    values = optimise_values(model, FACTS, LAYER, PREFIXES, settings(steps=12))
    for value in values:
        found = []
        for e in fact_prompts(model, value.fact, PREFIXES, value.fact.target):

            def add(_m: Any, _a: Any, y: Tensor, at: int = e.lookup or 0, v: Value = value) -> Any:
                flat = y.reshape(-1, y.shape[-1]).clone()
                flat[at] += v.delta
                return flat.reshape(y.shape)

            handle = model.layers[LAYER].down.module.register_forward_hook(add)
            try:
                with torch.no_grad():
                    logits = model.hf(input_ids=torch.tensor([e.ids]), use_cache=False).logits[0]
            finally:
                handle.remove()
            answer = torch.tensor(e.answer_ids)
            found.append(float(cross_entropy(logits[e.n_prompt - 1 : -1], answer)))
        assert sum(found) / len(found) == pytest.approx(value.nll_after, rel=1e-4)
        assert value.nll_after < value.nll_before


def test_finished_facts_leave_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrapped("llama")
    s = settings(steps=24)
    single = [optimise_values(model, [f], LAYER, PREFIXES, s)[0] for f in FACTS]
    losses = sorted(v.loss for v in single)
    s = dataclasses.replace(
        s, stop_loss=(losses[1] + losses[2]) / 2
    )  # two facts reach it, one does not
    rows: list[int] = []
    run = Tails.run

    def spy(self: Tails, changes: Any) -> Tensor:
        rows.append(len(self))
        return run(self, changes)

    monkeypatch.setattr(Tails, "run", spy)
    # One part, so that each run is a whole step.
    monkeypatch.setattr(batches_module, "_OVERHEAD", {"cpu": 10**6})
    done: list[int] = []
    batch = optimise_values(model, FACTS, LAYER, PREFIXES, s, on_done=done.append)
    # The first run is the trial of the tails; four rows per fact, the KL prompt's included.
    assert rows[1] == 12 and rows[-1] == 4
    assert rows[1:] == sorted(rows[1:], reverse=True)
    assert done == [1, 2, 3]
    alone = [optimise_values(model, [f], LAYER, PREFIXES, s)[0] for f in FACTS]
    assert [v.steps for v in batch] == [v.steps for v in alone]
    assert len({v.steps for v in batch}) > 1 and max(v.steps for v in batch) == 23
    for a, b in zip(batch, alone, strict=True):
        assert float((a.delta - b.delta).norm()) < NEAR * float(b.delta.norm())
        assert (a.loss < s.stop_loss) == (a.steps < 23)


def test_a_fact_done_at_once_is_not_moved() -> None:
    model = wrapped("llama")
    values = optimise_values(model, FACTS, LAYER, PREFIXES, settings(stop_loss=1e6))
    for value in values:
        assert value.steps == 0 and not value.delta.any()
        assert value.nll_before == value.nll_after


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_where_no_change_reaches_the_answer_nothing_is_moved(name: str) -> None:
    """In the last block a subject in mid-prompt is out of the answer's reach."""
    model = wrapped(name)
    last = len(model.layers) - 1
    values = optimise_values(model, FACTS, last, PREFIXES, settings())
    mid, end = values[:2], values[2]  # "gold" ends its prompt
    assert all(v.steps == 0 and not v.delta.any() for v in mid)
    assert end.steps == 4 and end.nll_after < end.nll_before
    for value in optimise_values(model, FACTS, last - 1, PREFIXES, settings()):
        assert value.delta.any() and value.nll_after < value.nll_before


def test_the_clamp_holds() -> None:
    model = wrapped("llama")
    values = optimise_values(model, FACTS, LAYER, PREFIXES, settings(clamp=0.5))
    for value in values:
        assert float(value.delta.norm()) == pytest.approx(
            0.5 * float(value.values[0].norm()), rel=1e-4
        )


@pytest.mark.parametrize("name", ["llama", "gpt2", "gptj"])
def test_published_clamps_count_in_lengths_of_the_blocks_output(name: str) -> None:
    model = wrapped(name)
    s = settings(steps=24, clamp=0.2, block_norm=True)
    block = model.layers[LAYER].module
    for value in optimise_values(model, FACTS, LAYER, PREFIXES, s):
        e = fact_prompts(model, value.fact, PREFIXES, value.fact.target)[0]
        with torch.no_grad(), capture({0: block}) as out:
            model.hf(input_ids=torch.tensor([e.ids]), use_cache=False)
        length = float(out[0][0, e.lookup].norm())
        assert float(value.delta.norm()) == pytest.approx(0.2 * length, rel=1e-4)
        assert length != pytest.approx(float(value.values[0].norm()), rel=0.05)


def test_published_step_sizes_are_per_coordinate() -> None:
    model = wrapped("llama")
    s = settings(steps=2, lr=0.01, lr_absolute=True, adam=True)
    (value,) = optimise_values(model, FACTS[:1], LAYER, PREFIXES, s)
    # Adam's first step moves every coordinate by the step size.
    assert torch.allclose(value.delta.abs(), torch.full((32,), 0.01), rtol=1e-3)


@pytest.mark.parametrize("given", [{"lr": 0.5}, {"lr_absolute": True}])
def test_what_only_adam_reads_is_refused_without_it(given: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(given))} is for steps of Adam.*adam true"):
        settings(**given)
    settings(**given, adam=True)


def test_groups_bound_the_tokens_and_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, s = wrapped("gpt2"), settings()
    whole = optimise_values(model, FACTS, LAYER, PREFIXES, s)
    sizes: list[int] = []
    inside = values_module._Group.__init__

    def spy(self: Any, model: Model, layer: int, rows: Any, *more: Any) -> None:
        sizes.append(len(rows))
        inside(self, model, layer, rows, *more)

    monkeypatch.setattr(values_module._Group, "__init__", spy)
    done: list[int] = []
    parts = optimise_values(model, FACTS, LAYER, PREFIXES, s, group_tokens=1, on_done=done.append)
    assert sizes == [4, 4, 4] and done == [1, 2, 3]
    assert [v.fact.id for v in parts] == [f.id for f in FACTS]
    assert gap(parts, whole) < NEAR


def test_the_model_is_left_as_it_was() -> None:
    model = wrapped("gpt2")
    before = model.fingerprint()
    optimise_values(model, FACTS, LAYER, PREFIXES, settings(), with_attention=True)
    model.forget_fingerprint()
    assert model.fingerprint() == before
    for module in model.hf.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
        assert "forward" not in module.__dict__
    assert not any(p.requires_grad for p in model.hf.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    full, half = wrapped("llama"), wrapped("llama", dtype)
    s = settings(steps=8)
    a = optimise_values(full, FACTS, LAYER, PREFIXES, s)
    b = optimise_values(half, FACTS, LAYER, PREFIXES, s)
    for x, y in zip(a, b, strict=True):
        assert y.delta.dtype == torch.float32 and bool(torch.isfinite(y.delta).all())
        assert y.nll_before == pytest.approx(x.nll_before, rel=0.05)
        assert torch.cosine_similarity(x.delta, y.delta, dim=0) > 0.9


def test_a_loss_that_is_no_number_is_the_users_error() -> None:
    hf = copy.deepcopy(shared("llama"))
    model = Model.wrap(hf, TOKENIZERS["byte_level_bpe"]())
    with torch.no_grad():
        model.layers[2].down.weight[0, 0] = float("nan")
    with pytest.raises(UserError, match=r"fact 'italy'.*not a number: layer 2, .* holds 1 NaN"):
        optimise_values(model, FACTS[:1], LAYER, PREFIXES, settings())


def test_too_long_a_prompt_is_the_users_error() -> None:
    long = Fact("Italy", "x y z " * 300 + "Italy is", "Paris", id="long")
    with pytest.raises(UserError, match="at most 512"):
        optimise_values(wrapped("llama"), [long], LAYER, PREFIXES, settings())


# --- parts


def test_parts_of_similar_length_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, s = wrapped("llama"), settings()
    found = []
    for overhead in (0, 10**6):
        monkeypatch.setattr(batches_module, "_OVERHEAD", {"cpu": overhead})
        found.append(optimise_values(model, FACTS, LAYER, PREFIXES, s))
    assert gap(found[0], found[1]) < NEAR


def test_rows_are_split_where_padding_costs_more_than_another_part() -> None:
    widths = [3, 9, 3, 8, 1, 1, 1]

    def cost(parts: list[list[int]], overhead: int) -> int:
        return sum(overhead + len(p) * max(widths[i] for i in p) for p in parts)

    for overhead in (0, 1, 2, 4, 8, 100):
        parts = split(widths, overhead)
        assert sorted(i for p in parts for i in p) == list(range(len(widths)))
        order = sorted(range(len(widths)), key=lambda i: (-widths[i], i))
        cuts = [[i for i in range(1, 7) if mask >> i & 1] for mask in range(0, 128, 2)]
        every = [
            cost([order[a:b] for a, b in zip([0, *c], [*c, 7], strict=True)], overhead)
            for c in cuts
        ]
        assert cost(parts, overhead) == min(every)
    assert len(split(widths, 0)) == 4 and len(split(widths, 100)) == 1
    assert split([], 5) == []


def test_of_the_kl_prompt_only_the_lookup_token_is_run() -> None:
    model = wrapped("llama")
    kl = model.encoder.encode("Italy is a", "", "Italy")
    row = Row(kl, 0, None)
    assert row.tail == 1 and len(row.run) == (kl.lookup or 0) + 1 < len(kl)


# --- tails


def rows_of(model: Model) -> list[Any]:
    return [e for f in FACTS for e in fact_prompts(model, f, PREFIXES, f.target)]


def test_which_families_remember_their_prefix(family: str) -> None:
    """Tails give the head's input of whole rows, remembered prefix or not."""
    model = wrapped(family)
    encodings = rows_of(model)
    made = Tails(model, encodings, LAYER, {"down": model.layers[LAYER].down.module})
    # Tiny windows are shorter than these prompts, MPT takes no such mask: those run whole rows.
    windowed = ("gemma2", "gemma3", "gemma3_multimodal", "gpt_neo", "mistral", "phi3", "starcoder2")
    assert made.reuses == (family not in (*windowed, "mpt"))
    generator = torch.Generator().manual_seed(0)
    change = torch.randn(len(encodings), 32, generator=generator)
    down = model.layers[LAYER].down.module
    with torch.no_grad():
        hidden = made.run({down: change})
        for r, e in enumerate(encodings):

            def add(_m: Any, _a: Any, y: Tensor, at: int = e.lookup, r: int = r) -> Tensor:
                flat = y.reshape(-1, y.shape[-1]).clone()
                flat[at] += change[r]
                return flat.reshape(y.shape)

            handle = down.register_forward_hook(add)
            try:
                whole = final_hidden(model, torch.tensor([e.ids]))[0]
            finally:
                handle.remove()
            start = int(made.start[r])
            tail = hidden[r, : len(e) - start]
            assert float((tail - whole[start:]).norm()) <= 1e-5 * float(whole[start:].norm())
            clean = made.clean[r, : len(e) - start]
            assert float((tail - clean).norm()) > 1e-3 * float(clean.norm())


@pytest.mark.parametrize("name", ["gemma3", "gemma2", "mistral", "phi3", "starcoder2", "gpt_neo"])
def test_windows_longer_than_the_prompt_do_not_matter(name: str) -> None:
    """As in real models: Gemma 3's window is 512 tokens, prompts have a few dozen."""
    config = CONFIGS[name]()
    setattr(config, "window_size" if name == "gpt_neo" else "sliding_window", 256)
    model = Model.wrap(from_config(config), TOKENIZERS["byte_level_bpe"]())
    made = Tails(model, rows_of(model), LAYER, {})
    assert made.reuses
    batch = optimise_values(model, FACTS[:2], LAYER, PREFIXES, settings(steps=3))
    whole = optimise_values(model, FACTS[:2], LAYER, PREFIXES, settings(steps=3), reuse=False)
    assert gap(batch, whole) < NEAR


def test_selected_rows_are_the_same_rows() -> None:
    model = wrapped("llama")
    down = model.layers[LAYER].down.module
    made = Tails(model, rows_of(model), LAYER, {"down": down})
    keep = torch.tensor([1, 4, 8])
    part = made.select(keep)
    assert len(part) == 3 and part.reuses
    change = torch.ones(len(made), 32)
    with torch.no_grad():
        whole, some = made.run({down: change}), part.run({down: change[keep]})
    assert torch.allclose(whole[keep], some, rtol=1e-4, atol=1e-5)
    assert torch.equal(part.inputs["down"], made.inputs["down"][keep])


def test_a_cache_that_does_not_fit_shows_in_the_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were remembered keys used wrongly, rows would run whole: never a wrong number."""
    model = wrapped("llama")
    honest = forward_module.growing_cache

    def spoiled(keys_values: Any = ()) -> Any:
        return honest([(k * 1.1, v) for k, v in keys_values])

    monkeypatch.setattr(forward_module, "growing_cache", spoiled)
    made = Tails(model, rows_of(model), LAYER, {})
    assert not made.reuses and int(made.start.max()) == 0

    def failing(keys_values: Any = ()) -> Any:
        if keys_values:
            raise TypeError("no such cache")
        return honest()

    monkeypatch.setattr(forward_module, "growing_cache", failing)
    assert not Tails(model, rows_of(model), LAYER, {}).reuses
