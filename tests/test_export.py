"""Exported edits: the real ``peft`` and ``from_pretrained`` see the merged model."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from deltas import bits, ids, logits, of_matrices, random_delta, same_bits
from families import CONFIGS, build, shared
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers_built import byte_level_bpe
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from goldenlayers.delta import Dense, WeightDelta
from goldenlayers.durable import lock
from goldenlayers.errors import UserError
from goldenlayers.export import export_merged, export_peft
from goldenlayers.models import Model
from goldenlayers.models.layers import LayerMap

peft = pytest.importorskip("peft")

KINDS = ["gpt2", "gpt2_square", "llama", "llama_tied", "opt", "gemma3", "gpt_neox"]


def loaded(family: str, adapter: Path) -> Any:
    """A fresh base with the adapter on it; peft's warnings about a bad fit are errors."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected|matched|fan_in).*")
        return peft.PeftModel.from_pretrained(build(family), str(adapter))


def merged_logits(family: str, delta: WeightDelta, tokens: Tensor) -> Tensor:
    with delta.applied(shared(family)):
        return logits(shared(family), tokens)


@pytest.mark.parametrize("family", KINDS)
def test_peft_gives_the_merged_models_logits(family: str, tmp_path: Path) -> None:
    hf = shared(family)
    blocks = LayerMap.of(hf)
    matrices = [blocks[0].down, blocks[1].mlp_matrices[0], blocks[3].attention_matrices[-1]]
    # Ranks that differ from layer to layer.
    delta = of_matrices(matrices[:1], 1, 0) + of_matrices(matrices[1:2], 4, 1)
    delta = delta + of_matrices(matrices[2:], 2, 2)
    export = export_peft(delta, tmp_path / "adapter", hf)
    assert export.rank == 4 and export.errors == {}
    adapted = loaded(family, export.path)
    tokens = ids(3)
    wanted, plain = merged_logits(family, delta, tokens), logits(hf, tokens)
    torch.testing.assert_close(logits(adapted, tokens), wanted, atol=1e-4, rtol=1e-4)
    with adapted.disable_adapter():
        torch.testing.assert_close(logits(adapted, tokens), plain, atol=1e-4, rtol=1e-4)
    assert (wanted - plain).abs().max() > 1e-2
    touched = {
        name.removeprefix("base_model.model.").removesuffix(".lora_A")
        for name, _ in adapted.named_modules()
        if name.endswith(".lora_A")
    }
    assert touched == {matrix.path for matrix in matrices}
    unloaded = adapted.merge_and_unload()
    with delta.applied(hf):
        for matrix in matrices:
            torch.testing.assert_close(
                unloaded.get_parameter(matrix.parameter_name),
                hf.get_parameter(matrix.parameter_name),
                atol=1e-5,
                rtol=1e-5,
            )


def test_peft_with_every_layer_changed(tmp_path: Path) -> None:
    """peft rewrites long lists of modules to short endings: it must not widen them."""
    hf = shared("llama")
    matrices = [m for block in LayerMap.of(hf) for m in block.matrices("block")][:-1]
    assert len(matrices) > 20
    delta = of_matrices(matrices, 1, 0, size=0.1)
    adapted = loaded("llama", export_peft(delta, tmp_path / "a", hf).path)
    wanted = merged_logits("llama", delta, ids())
    torch.testing.assert_close(logits(adapted, ids()), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_peft_without_a_model_at_hand(family: str, tmp_path: Path) -> None:
    delta = random_delta(shared(family), [1], rank=2, base_name="tiny")
    for model, name in ((None, None), ("org/base", "org/base")):
        out = export_peft(delta, tmp_path / str(name).replace("/", "-"), model).path
        assert (
            json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == name
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted = peft.PeftModel.from_pretrained(build(family), str(out))
        wanted = merged_logits(family, delta, ids())
        torch.testing.assert_close(logits(adapted, ids()), wanted, atol=1e-4, rtol=1e-4)


def test_a_path_that_ends_another_path_is_matched_as_a_whole(tmp_path: Path) -> None:
    hf = build("llama")
    hf.add_module("twin", torch.nn.ModuleDict({"model": build("llama").model}))
    delta = of_matrices([LayerMap.of(shared("llama"))[1].down], 1, 0)
    out = export_peft(delta, tmp_path / "a", hf).path
    config = json.loads((out / "adapter_config.json").read_text())
    assert isinstance(config["target_modules"], str)
    adapted = peft.PeftModel.from_pretrained(hf, str(out))
    assert sum(name.endswith(".lora_A") for name, _ in adapted.named_modules()) == 1


def test_dense_changes(tmp_path: Path) -> None:
    hf = shared("llama")
    thin = random_delta(hf, [1], rank=3)
    name = next(iter(thin.changes))
    hidden = WeightDelta({name: Dense(thin.dense(name))})
    export = export_peft(hidden, tmp_path / "thin", hf)
    assert export.rank == 3 and export.errors[name] < 1e-5
    wanted = merged_logits("llama", thin, ids())
    found = logits(loaded("llama", export.path), ids())
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    generator = torch.Generator().manual_seed(0)
    full = WeightDelta({name: Dense(torch.randn(*thin.dense(name).shape, generator=generator))})
    with pytest.raises(UserError, match=r"relative error of 0.*rank=R"):
        export_peft(full, tmp_path / "full", hf)
    assert not (tmp_path / "full").exists()
    cut = export_peft(full, tmp_path / "full", hf, rank=5)
    low = Dense(full.dense(name)).truncated(5)[0]
    expected = float((full.dense(name) - low.dense).norm() / full.dense(name).norm())
    assert cut.rank == 5 and cut.errors[name] == pytest.approx(expected, rel=1e-4)
    with pytest.raises(UserError, match="rank is 0"):
        export_peft(full, tmp_path / "zero", hf, rank=0)


def test_low_rank_changes_are_cut_to_the_rank_that_is_asked_for(tmp_path: Path) -> None:
    hf = shared("llama")
    delta = random_delta(hf, [1], rank=3)
    cut = export_peft(delta, tmp_path / "cut", hf, rank=1)
    (error,) = cut.errors.values()
    assert cut.rank == 1 and 0 < error < 1
    whole = export_peft(delta, tmp_path / "whole", hf, rank=3)
    assert whole.rank == 3 and not whole.errors
    with pytest.raises(UserError, match="rank is 0"):
        export_peft(delta, tmp_path / "none", hf, rank=0)


def test_adapter_of_a_long_sum_is_no_wider_than_the_matrix(tmp_path: Path) -> None:
    hf = shared("gpt2")
    delta = sum(random_delta(hf, [1], rank=8, seed=i, size=0.1) for i in range(6))
    assert isinstance(delta, WeightDelta) and delta.rank() == 48
    export = export_peft(delta, tmp_path / "a", hf)
    assert export.rank == 32
    wanted = merged_logits("gpt2", delta, ids())
    found = logits(loaded("gpt2", export.path), ids())
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_refusals_leave_nothing(tmp_path: Path) -> None:
    hf = shared("llama")
    delta = random_delta(hf, [1])
    (tmp_path / "there").mkdir()
    model = Model.wrap(build("llama"), cast(Any, None))
    strange = random_delta(hf, [1], base_fingerprint="0" * 64)
    (tmp_path / "file").write_text("")
    attempts: list[tuple[Any, str]] = [
        (lambda: export_peft(delta, tmp_path / "there", hf), "there already"),
        (lambda: export_merged(hf, delta, tmp_path / "there"), "there already"),
        (lambda: export_peft(WeightDelta({}), tmp_path / "new", hf), "changes nothing"),
        (lambda: export_peft(strange, tmp_path / "new", model), "other weights"),
        (lambda: export_merged(model, strange, tmp_path / "new"), "other weights"),
        (lambda: export_peft(delta, tmp_path / "new", build("gpt2")), "no weight matrix"),
        (lambda: export_merged(hf, delta, tmp_path / "new", dtype="int8"), "unknown dtype"),
        (lambda: export_peft(delta, tmp_path / "file" / "new", hf), "could not be written"),
        (lambda: export_merged(hf, delta, tmp_path / "file" / "new"), "could not be written"),
        (
            lambda: export_merged(hf, delta * 1e6, tmp_path / "new", dtype="float16"),
            "too large for torch.float16",
        ),
        (
            lambda: export_merged(cast(Any, torch.nn.Linear(2, 2)), delta, tmp_path / "new"),
            "cannot be saved",
        ),
    ]
    for attempt, message in attempts:
        with pytest.raises(UserError, match=message):
            attempt()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "there"]
    assert list((tmp_path / "there").iterdir()) == []


def tensors_of(folder: Path) -> dict[str, bytes]:
    held: dict[str, bytes] = {}
    for file in folder.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            held[name] = bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return held


@pytest.mark.parametrize("family", CONFIGS)
def test_merged_checkpoint_differs_only_in_the_edited_tensors(family: str, tmp_path: Path) -> None:
    hf = build(family)
    before = bits(hf)
    hf.save_pretrained(tmp_path / "base")
    delta = random_delta(hf, [1, 3], rank=2)
    tokens = ids()
    with delta.applied(hf):
        wanted = logits(hf, tokens)
    out = export_merged(hf, delta, tmp_path / "merged")
    assert same_bits(hf, before)
    base, merged = tensors_of(tmp_path / "base"), tensors_of(out)
    assert base.keys() == merged.keys()
    changed = {name for name in base if base[name] != merged[name]}
    old, new = "model.language_model.", "language_model.model."  # the one name saved differently
    swap = family == "gemma3_multimodal"
    assert changed == {name.replace(old, new) if swap else name for name in delta.changes}
    if family != "gemma3_multimodal":
        again = AutoModelForCausalLM.from_pretrained(out)
        torch.testing.assert_close(logits(again.eval(), tokens), wanted, atol=1e-4, rtol=1e-4)
    assert json.loads((out / "config.json").read_text()) == json.loads(
        (tmp_path / "base" / "config.json").read_text()
    )


def test_merged_checkpoint_has_the_tokenizer_and_the_models_dtype(tmp_path: Path) -> None:
    model = Model.wrap(build("llama_tied", torch.bfloat16), byte_level_bpe(), "tiny")
    delta = random_delta(model.hf, [2], base_fingerprint=model.fingerprint())
    out = export_merged(model, delta, tmp_path / "nested" / "merged")
    text = "The capital of France is Paris."
    assert (
        AutoTokenizer.from_pretrained(out)(text)["input_ids"] == model.tokenizer(text)["input_ids"]
    )
    with safe_open(str(out / "model.safetensors"), framework="pt") as stream:
        assert {stream.get_slice(name).get_dtype() for name in stream.keys()} == {"BF16"}  # noqa: SIM118
        assert "lm_head.weight" not in stream.keys()  # noqa: SIM118
    again = Model.wrap(AutoModelForCausalLM.from_pretrained(out), model.tokenizer)
    assert again.dtype == torch.bfloat16
    assert again.fingerprint() != model.fingerprint()
    delta.merge(model)
    assert again.fingerprint() == model.fingerprint()
    assert list((tmp_path / "nested").iterdir()) == [out]


def test_merged_checkpoint_in_another_dtype(tmp_path: Path) -> None:
    hf = build("llama_tied")
    delta = random_delta(hf, [2])
    out = export_merged(hf, delta, tmp_path / "half", dtype="bfloat16")
    assert hf.config.dtype != torch.bfloat16 and hf.dtype == torch.float32
    again = AutoModelForCausalLM.from_pretrained(out)
    assert again.dtype == torch.bfloat16
    with delta.applied(hf):
        for name, tensor in hf.named_parameters():
            assert torch.equal(again.get_parameter(name), tensor.to(torch.bfloat16))
    with safe_open(str(out / "model.safetensors"), framework="pt") as stream:
        assert "lm_head.weight" not in stream.keys()  # noqa: SIM118


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hf = build("llama")
    before = bits(hf)

    def full(*_args: Any, **_kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(hf), "save_pretrained", full)
    monkeypatch.setattr("goldenlayers.export.peft.save_file", full)
    for attempt in (
        lambda: export_merged(hf, random_delta(hf, [1]), tmp_path / "m"),
        lambda: export_peft(random_delta(hf, [1]), tmp_path / "a", hf),
    ):
        with pytest.raises(UserError, match="No space left"):
            attempt()
    assert list(tmp_path.iterdir()) == []
    assert same_bits(hf, before)


def test_what_a_killed_export_left_is_removed_by_the_next(tmp_path: Path) -> None:
    def left(name: str, mark: bool = True) -> Path:
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text("half")
        if mark:
            (tmp_path / name / ".goldenlayers-export").touch()
        return tmp_path / name

    killed, other = left(".merged.1.part"), left(".else.22.part")
    at_work, foreign = left(".merged.3.part"), left(".merged.4.part", mark=False)
    link = tmp_path / ".merged.5.part"
    link.symlink_to(left("elsewhere"))
    descriptor = os.open(at_work, os.O_RDONLY)
    lock(descriptor)
    hf = shared("llama")
    out = export_peft(random_delta(hf, [1]), tmp_path / "merged", hf).path
    assert not killed.exists() and not other.exists()
    for kept in (at_work, foreign, tmp_path / "elsewhere"):
        assert (kept / "model.safetensors").read_text() == "half"
    assert link.is_symlink()
    assert sorted(p.name for p in out.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "goldenlayers.json",
    ]
    os.close(descriptor)
    export_peft(random_delta(hf, [1]), tmp_path / "again", hf)
    assert not at_work.exists()


@pytest.mark.parametrize("odd", ["link", "dangling", "x" * 5000, "nul\0"])
def test_places_that_cannot_be_written(tmp_path: Path, odd: str) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    hf = shared("llama")
    for attempt in (export_peft, lambda delta, out, model: export_merged(model, delta, out)):
        with pytest.raises(UserError, match=r"there already|could not be written"):
            attempt(random_delta(hf, [1]), tmp_path / odd, hf)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dangling", "link", "there"]
    assert list((tmp_path / "there").iterdir()) == []
