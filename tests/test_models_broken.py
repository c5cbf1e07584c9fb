"""NaN and infinite weights: the message names the weight, and advises by the type in use."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families import build, tiny
from safetensors.torch import load_file, save_file
from tokenizers_built import byte_level_bpe

import goldenlayers as gl
from goldenlayers import models
from goldenlayers.errors import UserError
from goldenlayers.models.weights import not_a_number, why_not_a_number

DOWN = "model.layers.2.mlp.down_proj.weight"
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture
def broken(tmp_path: Path) -> Callable[..., Path]:
    """A tiny Llama on disk with one value of one weight replaced."""

    def make(name: str, place: tuple[int, ...], value: float) -> Path:
        build("llama").save_pretrained(tmp_path)
        byte_level_bpe().save_pretrained(tmp_path)
        path = tmp_path / "model.safetensors"
        state = load_file(path)
        state[name][place] = value
        save_file(state, path, {"format": "pt"})
        return tmp_path

    return make


@pytest.mark.parametrize(
    ("value", "dtype", "words"),
    [
        (float("nan"), "float32", ("1 NaN of 2304 values", "(3, 5)", "copy or download it again")),
        (float("inf"), "float32", ("1 infinite of 2304", "copy or download it again")),
        (float("nan"), "float16", ("1 NaN of 2304", "copy or download it again")),
        (1e6, "float16", ("1 infinite of 2304", "too large for float16 only", "bfloat16")),
        (3e38, "float32", ("holds 3e+38, far more than a weight ever is", "damaged")),
    ],
)
def test_the_weight_is_named_when_the_model_is_loaded(
    broken: Callable[..., Path], value: float, dtype: str, words: tuple[str, ...]
) -> None:
    with pytest.raises(UserError) as caught:
        models.load(broken(DOWN, (3, 5), value), dtype=dtype)
    message = str(caught.value)
    for word in (f"layer 2, {DOWN}", *words):
        assert word in message
    if dtype == "float32":
        assert "float32" not in message  # who uses it already is not told to


def test_a_weight_that_only_some_facts_meet(broken: Callable[..., Path]) -> None:
    """Token rows of the embedding are no part of the trial pass: locating meets them."""
    token = byte_level_bpe()("Paris", add_special_tokens=False)["input_ids"][0]
    model = models.load(broken(EMBEDDING, (token, 0), float("nan")))
    facts = [gl.Fact("Paris", "Paris is the capital of", "Italy", "France", id="a")]
    with pytest.raises(UserError, match=rf"none of the 1 facts.*{EMBEDDING} holds 1 NaN"):
        gl.locate(model, facts)
    facts.append(gl.Fact("Rome", "Rome is the capital of", "France", "Italy", id="b"))
    ranking = gl.locate(model, facts)
    (warning,) = [line for line in ranking.warnings if "not finite" in line]
    assert f"{EMBEDDING} holds 1 NaN" in warning
    assert "float16" not in warning


def test_float16_that_overflows_in_between() -> None:
    model = tiny("llama", dtype=torch.float16)
    error = not_a_number(model.hf, "the loss is not a number", otherwise="Lower the rate")
    assert "65504" in str(error)
    assert "--dtype bfloat16" in str(error)


def test_whole_weights_in_a_wide_type_leave_the_callers_advice() -> None:
    model = tiny("llama")
    assert why_not_a_number(model.hf) == ("", "")
    assert str(not_a_number(model.hf, "x", otherwise="Lower the rate")) == "x. Lower the rate."


def test_an_editor_names_the_weight(broken: Callable[..., Path]) -> None:
    model = models.load(broken(DOWN, (3, 5), 0.0))
    with torch.no_grad():
        model.layers[2].down.weight[3, 5] = float("nan")
    fact = gl.Fact("Paris", "Paris is in", "Italy", id="a")
    with pytest.raises(UserError, match=rf"not a number: layer 2, {DOWN} holds 1 NaN"):
        gl.edit(model, [fact], "ft-m", layer=1)


def test_layer_names_of_other_families() -> None:
    model = tiny("gpt2")
    with torch.no_grad():
        model.hf.get_parameter("transformer.h.3.ln_1.bias")[0] = float("inf")
    cause, _ = why_not_a_number(model.hf)
    assert cause.startswith("layer 3, transformer.h.3.ln_1.bias holds 1 infinite of 32")
    assert json.dumps(cause)
