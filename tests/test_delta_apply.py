"""Deltas on a model: the sum while applied, every bit back afterwards, wrong models refused."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, cast

import pytest
import torch
from deltas import bits, ids, logits, low, random_delta, same_bits, wrapped
from families import CONFIGS, build, shared

from goldenlayers.delta import WeightDelta
from goldenlayers.delta.apply import (
    applied_per_example,
    base_fingerprint,
    deltas_in_force,
    untouched,
)
from goldenlayers.errors import UserError
from goldenlayers.models.layers import LayerMap


@pytest.mark.parametrize("family", CONFIGS)
def test_applied_adds_the_change_and_gives_every_bit_back(family: str) -> None:
    hf = build(family)
    before = bits(hf)
    delta = random_delta(hf, [1, 2], rank=2)
    matrix, other = LayerMap.of(hf)[1].down, LayerMap.of(hf)[3].down
    plain = logits(hf, ids())
    with delta.applied(hf):
        expected = matrix.oriented(before[matrix.parameter_name]) + delta.dense(
            matrix.parameter_name
        )
        torch.testing.assert_close(matrix.oriented(matrix.weight.data), expected)
        assert torch.equal(other.weight, before[other.parameter_name])
        assert not torch.allclose(logits(hf, ids()), plain, atol=1e-3)
    assert same_bits(hf, before)
    assert torch.equal(logits(hf, ids()), plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_undone_after_an_exception_in_every_dtype(dtype: torch.dtype) -> None:
    hf = build("gpt2", dtype)
    before = bits(hf)
    delta = random_delta(hf, [0, 1])
    with pytest.raises(ZeroDivisionError), delta.applied(hf):
        assert not same_bits(hf, before)
        assert next(hf.parameters()).dtype == dtype
        raise ZeroDivisionError
    assert same_bits(hf, before)
    assert deltas_in_force(hf) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nested_is_the_sum_rounded_once(dtype: torch.dtype) -> None:
    hf = build("llama", dtype)
    before = bits(hf)
    a, b = random_delta(hf, [1, 2], seed=1), random_delta(hf, [2, 3], seed=2)
    with (a + b).applied(hf):
        wanted = bits(hf)
    with a.applied(hf):
        outer = bits(hf)
        with b.applied(hf):
            assert deltas_in_force(hf) == 2
            for name, tensor in hf.state_dict().items():
                torch.testing.assert_close(tensor, wanted[name])
        assert same_bits(hf, outer)
    assert same_bits(hf, before)


def test_the_same_delta_twice_and_leaving_in_any_order() -> None:
    hf = build("llama")
    before = bits(hf)
    a, b = random_delta(hf, [1], seed=1), random_delta(hf, [1], seed=2)
    first, second, third = ExitStack(), ExitStack(), ExitStack()
    for stack, delta in ((first, a), (second, b), (third, a)):
        stack.enter_context(delta.applied(hf))
    first.close()
    name = next(iter(a.changes))
    torch.testing.assert_close(
        hf.get_parameter(name).data,
        before[name] + a.dense(name) + b.dense(name),
    )
    third.close()
    second.close()
    assert same_bits(hf, before)


def test_float64_weights_keep_their_precision() -> None:
    hf = build("llama", torch.float64)
    name = LayerMap.of(hf)[1].down.parameter_name
    rows, columns = hf.get_parameter(name).shape
    change = low(rows, columns, 2, 0, torch.float64)
    before = hf.get_parameter(name).clone()
    with WeightDelta({name: change}).applied(hf):
        error = hf.get_parameter(name) - before - change.left @ change.right.T
    assert error.abs().max() < 1e-13


def test_fingerprints() -> None:
    model, other = wrapped(build("llama")), wrapped(build("llama", seed=5))
    delta = random_delta(model.hf, [1], base_fingerprint=model.fingerprint(), base_name="tiny")
    before = bits(other.hf)
    with pytest.raises(UserError, match="made on other weights"), delta.applied(other):
        pass
    with pytest.raises(UserError, match="made on other weights"):
        delta.merge(other)
    with (
        pytest.raises(UserError, match="made on other weights"),
        delta.applied(other.hf, verify=True),
    ):
        pass
    assert same_bits(other.hf, before)
    with delta.applied(other, force=True), delta.applied(other.hf):
        pass
    with delta.applied(model.hf, verify=True):
        pass
    assert same_bits(other.hf, before)


def test_the_base_fingerprint_holds_inside_nested_contexts() -> None:
    model = wrapped(build("llama"))
    delta = random_delta(model.hf, [1], base_fingerprint=wrapped(build("llama")).fingerprint())
    with delta.applied(model):
        assert base_fingerprint(model) == delta.base_fingerprint
        with delta.applied(model):  # the weights are not the base's now, the delta still fits
            assert model.fingerprint() == delta.base_fingerprint
    assert model.fingerprint() == delta.base_fingerprint


def test_the_base_fingerprint_is_found_under_a_plain_models_delta() -> None:
    hf = build("llama")
    model, known = wrapped(hf), wrapped(build("llama")).fingerprint()
    delta = random_delta(hf, [1], base_fingerprint=known)
    other = random_delta(hf, [1], base_fingerprint="0" * 64)
    with delta.applied(hf):  # nothing was hashed yet
        edited = bits(hf)
        with delta.applied(model), delta.applied(hf, verify=True):
            pass
        with pytest.raises(UserError, match="other weights"), other.applied(model):
            pass
        assert same_bits(hf, edited)
    assert model.fingerprint() == known


def test_untouched_lifts_every_delta_for_a_moment() -> None:
    hf = build("llama")
    before = bits(hf)
    with untouched(hf):
        assert same_bits(hf, before)
    first, second = random_delta(hf, [1], seed=0), random_delta(hf, [1, 2], seed=1)
    with first.applied(hf), second.applied(hf):
        inside = bits(hf)
        assert not same_bits(hf, before)
        with pytest.raises(ZeroDivisionError), untouched(hf):
            assert same_bits(hf, before)
            raise ZeroDivisionError
        assert same_bits(hf, inside) and deltas_in_force(hf) == 2
    assert same_bits(hf, before)


def test_merge_is_applied_for_good() -> None:
    model = wrapped(build("gpt2"))
    delta = random_delta(model.hf, [2], rank=3, base_fingerprint=model.fingerprint())
    with delta.applied(model):
        wanted = bits(model.hf)
        with pytest.raises(UserError, match="cannot be merged"):
            delta.merge(model)
    delta.merge(model)
    assert same_bits(model.hf, wanted)
    with pytest.raises(UserError, match="other weights"), delta.applied(model):
        pass


def _change(hf: Any, name: str) -> WeightDelta:
    rows, columns = hf.get_parameter(name).shape
    return WeightDelta({name: low(rows, columns, 1, 0)})


def test_what_cannot_be_changed_is_refused_and_nothing_moves() -> None:
    hf = build("llama_tied")
    before = bits(hf)
    good = random_delta(hf, [1])
    name = next(iter(good.changes))
    cases = [
        (WeightDelta({"model.layers.9.mlp.down_proj.weight": good.changes[name]}), "no weight"),
        (WeightDelta({"model.layers.1.mlp.down_proj": good.changes[name]}), "no weight matrix"),
        (WeightDelta({name: low(3, 4, 1, 0)}), r"\(3, 4\)"),
        (_change(hf, "model.embed_tokens.weight"), "Embedding"),
        (_change(hf, "model.embed_tokens.weight"), "linear map"),
        (_change(shared("llama"), "lm_head.weight"), "shared with another module"),
        (WeightDelta({"model.norm.weight": low(32, 1, 1, 0)}), "linear map"),
    ]
    for delta, message in cases:
        with pytest.raises(UserError, match=message), (good + delta).applied(hf):
            pass
        with pytest.raises(UserError, match=message), applied_per_example(hf, [good, delta]):
            pass
        assert same_bits(hf, before)
    with pytest.raises(UserError, match="cannot be applied"), good.applied(cast(Any, "llama")):
        pass


def test_weights_that_are_not_there_are_refused() -> None:
    hf = build("llama")
    down = LayerMap.of(hf)[1].down
    delta = random_delta(hf, [1])
    for kind, message in ((torch.int8, "stored as torch.int8"), ("meta", "not in memory")):
        down.module.weight = torch.nn.Parameter(down.weight.detach().to(kind), requires_grad=False)
        with pytest.raises(UserError, match=message), delta.applied(hf):
            pass


def test_the_untied_head_can_be_changed() -> None:
    hf = build("llama")
    before = bits(hf)
    with _change(hf, "lm_head.weight").applied(hf):
        assert torch.equal(
            hf.get_parameter("model.embed_tokens.weight"), before["model.embed_tokens.weight"]
        )
        assert not torch.equal(hf.get_parameter("lm_head.weight"), before["lm_head.weight"])


def test_overflow_of_the_weights_dtype_is_refused() -> None:
    hf = build("llama", torch.float16)
    before = bits(hf)
    delta = random_delta(hf, [1, 2]) * 1e6
    with pytest.raises(UserError, match=r"too large for torch.float16"), delta.applied(hf):
        pass
    assert same_bits(hf, before)
    assert deltas_in_force(hf) == 0


def test_norms_and_summary_are_relative_to_the_untouched_weight() -> None:
    hf = build("gpt2")
    delta = random_delta(hf, [0, 2], rank=2, size=0.25)
    name = next(iter(delta.changes))
    norms = delta.norms(hf)
    assert norms[name].relative == pytest.approx(0.25, rel=1e-5)
    assert norms[name].absolute == pytest.approx(float(delta.dense(name).norm()), rel=1e-5)
    with (delta * 100.0).applied(hf):
        assert delta.norms(hf) == norms
    rows = delta.summary(hf)
    assert [row["parameter"] for row in rows] == list(delta.changes)
    assert rows[0]["rank"] == 2 and rows[0]["relative_norm"] == norms[name].relative
    assert sum(row["bytes"] for row in rows) == delta.nbytes
    assert "relative_norm" not in delta.summary()[0]


def test_only_matrices_of_the_layers_are_changed() -> None:
    """A record from elsewhere may name any parameter; a model's head is no layer."""
    model = wrapped(build("llama"))
    head = WeightDelta({"lm_head.weight": low(*model.layers.head.weight.shape, 1, 0)})  # pyright: ignore
    before = bits(model.hf)
    with pytest.raises(UserError, match=r"lm_head.weight', which is no matrix of a layer"):
        head.check(model)
    with pytest.raises(UserError, match="no weight matrix"):
        WeightDelta({"model.layers.9.mlp.down_proj.weight": low(4, 4, 1, 0)}).check(model)
    with head.applied(model.hf):  # on purpose, in Python
        assert not same_bits(model.hf, before)
    assert same_bits(model.hf, before)
