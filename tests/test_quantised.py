"""Quantised weights: everything as on the dequantised twin, and changes beside the matrices."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import LLAMA_LIKE, from_config
from test_offload import FACTS
from tokenizers_built import TOKENIZERS
from transformers import PreTrainedModel
from transformers.models.llama import LlamaConfig

import goldenlayers as gl
from goldenlayers.delta import Dense, LowRank, WeightDelta
from goldenlayers.errors import UserError
from goldenlayers.models import Model
from goldenlayers.models.checks import check_config
from goldenlayers.models.quantised import beside, dense_weight, quantised_modules

IDS = torch.tensor([[5, 6, 7, 8], [5, 6, 9, 8]])


def small() -> PreTrainedModel:
    # As wide as bitsandbytes packs numbers together.
    return from_config(
        LlamaConfig(**{**LLAMA_LIKE, "hidden_size": 64, "intermediate_size": 128}), seed=1
    )


def by_torchao(_folder: Path) -> Model:
    torchao = pytest.importorskip("torchao.quantization")
    hf = small()
    torchao.quantize_(hf.get_submodule("model"), torchao.Int8WeightOnlyConfig())
    return Model.wrap(hf, TOKENIZERS["byte_level_bpe"]())


def by_bitsandbytes(folder: Path) -> Model:
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    tokenizer = TOKENIZERS["byte_level_bpe"]()
    small().save_pretrained(folder / "plain")
    how = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    hf: Any = type(small()).from_pretrained(folder / "plain", quantization_config=how)
    hf.save_pretrained(folder / "packed")
    tokenizer.save_pretrained(folder / "packed")
    return gl.load(folder / "packed")


@pytest.fixture(scope="module", params=[by_bitsandbytes, by_torchao])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A quantised model, and its twin whose matrices are the same numbers."""
    model = request.param(tmp_path_factory.mktemp("quantised"))
    twin = small()
    for path, module in quantised_modules(model.hf).items():
        weight: Any = twin.get_submodule(path).weight
        numbers = dense_weight(module, torch.zeros(()))
        assert 0.001 < float((numbers - weight).norm() / weight.norm()) < 0.2
        weight.data = numbers
    return model, Model.wrap(twin, model.tokenizer)


def logits(model: Model) -> torch.Tensor:
    with torch.no_grad():
        return model.hf(IDS).logits


def test_layers_are_scored_as_on_the_twin(pair: tuple[Model, Model]) -> None:
    model, _ = pair
    assert len(quantised_modules(model.hf)) == 7 * 4
    assert "Params4bit" in model.layers.describe() or "Int8Tensor" in model.layers.describe()
    for method in ("lga", "cma"):
        how = {"samples": 2, "known": False} if method == "cma" else {}
        one, other = (gl.locate(m, FACTS, method, bootstrap=0, **how).layers for m in pair)
        assert [a.score for a in one] == pytest.approx([b.score for b in other], rel=1e-3)


def test_an_edit_takes_beside_the_matrix_and_goes(pair: tuple[Model, Model]) -> None:
    model, twin = pair
    fingerprint, before = model.fingerprint(), logits(model)
    statistics = gl.key_statistics(twin, [2], tokens=256, cache=False)
    settings: dict[str, Any] = {"steps": 10, "prefixes": 1, "statistics": statistics}
    delta = gl.edit(model, FACTS[:1], "rome", layer=2, **settings)
    again = gl.edit(twin, FACTS[:1], "rome", layer=2, **settings)
    (name,) = delta.changes
    assert torch.allclose(delta.dense(name), again.dense(name), rtol=1e-2, atol=1e-3)
    assert delta.norms(model)[name].relative == pytest.approx(
        delta.norms(twin)[name].relative, rel=1e-3
    )
    nll = []
    with delta.applied(model), delta.applied(twin, force=True):
        edited = logits(model)
        assert torch.allclose(edited, logits(twin), rtol=1e-3, atol=1e-3)
        assert not torch.allclose(edited, before, atol=0.1)
        with delta.applied(model), delta.applied(twin, force=True):  # twice as much
            assert torch.allclose(logits(model), logits(twin), rtol=1e-3, atol=1e-3)
        assert torch.equal(logits(model), edited)
        for one in pair:
            nll.append([row["score"] for row in gl.evaluate(one, FACTS[:1]).rows])
        assert gl.key_statistics(model, [3], tokens=128, cache=False)[3] is not None
    assert nll[0] == nll[1]
    assert delta.facts[0]["nll_after"] < delta.facts[0]["nll_before"]
    assert torch.equal(logits(model), before)
    assert model.fingerprint() == fingerprint
    assert not any(beside(module) for module in model.hf.modules())


def test_an_adapter_gives_what_the_applied_edit_gives(
    pair: tuple[Model, Model], tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    model, _ = pair
    name = model.layers[1].down.parameter_name
    delta = WeightDelta({name: LowRank(torch.randn(64, 2), torch.randn(128, 2))})
    gl.export_peft(delta, tmp_path / "adapter", model)
    with delta.applied(model):
        expected = logits(model)
    if "Int8Tensor" in model.layers.describe():
        return  # peft knows torchao's models by transformers' own flag
    adapted = peft.PeftModel.from_pretrained(copy.deepcopy(model.hf), tmp_path / "adapter")
    with torch.no_grad():
        assert torch.allclose(adapted(IDS).logits, expected, rtol=1e-3, atol=1e-3)


def test_what_would_write_into_the_matrix_is_refused(
    pair: tuple[Model, Model], tmp_path: Path
) -> None:
    model, _ = pair
    name = model.layers[1].down.parameter_name
    low = WeightDelta({name: LowRank(torch.randn(64, 1), torch.randn(128, 1))})
    with pytest.raises(UserError, match=r"quantised .*cannot be written"):
        low.merge(model)
    with pytest.raises(UserError, match=r"quantised .*peft"):
        gl.export_merged(model, low, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    with pytest.raises(UserError, match="only a low-rank change"):
        gl.edit(model, FACTS[:1], "ft-m", layer=1)
    dense = WeightDelta({name: Dense(torch.randn(64, 128))})
    with pytest.raises(UserError, match="is dense"), dense.applied(model):
        pass


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        ({"quant_method": "made_up"}, "not let through"),
        ({"quant_method": "fp8"}, "not let through"),
        ({}, "not let through"),
        ({"quant_method": "bitsandbytes", "llm_int8_skip_modules": [{}]}, "skip_modules"),
        (
            {"quant_method": "bitsandbytes", "bnb_4bit_compute_dtype": "load"},
            "compute_dtype 'load'",
        ),
    ],
)
def test_only_known_methods_are_let_through(said: dict[str, Any], problem: str) -> None:
    config = {"model_type": "llama", "quantization_config": {"bits": 4, **said}}
    with pytest.raises(UserError, match=problem):
        check_config(config, "x", trust_remote_code=False)


def test_what_is_not_known_of_a_method_is_dropped() -> None:
    given = {"quant_method": "gptq", "bits": 4, "backend": "evil", "dataset": "x", "tokenizer": "y"}
    config: dict[str, Any] = {"model_type": "llama", "quantization_config": given}
    check_config(config, "x", trust_remote_code=False)
    assert json.dumps(config["quantization_config"]) == '{"quant_method": "gptq", "bits": 4}'
