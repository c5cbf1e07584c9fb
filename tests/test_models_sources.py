"""Loading from a directory: what loads, what is refused, and what the user is told."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from families import GPT2_LIKE, build
from tokenizers_built import byte_level_bpe

from goldenlayers import models
from goldenlayers.errors import UserError
from goldenlayers.models.loading import open_folder


def save(folder: Path, family: str = "llama") -> Path:
    build(family).save_pretrained(folder)
    byte_level_bpe().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def folder(llama_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny Llama to spoil."""
    return Path(shutil.copytree(llama_folder, tmp_path / "model"))


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refused(folder: Path, *words: str, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        models.load(str(folder), **options)
    message = str(caught.value)
    for word in words:
        assert word in message
    return message


def test_a_directory_loads_frozen_in_eval_mode_with_the_saved_weights(llama_folder: Path) -> None:
    model = models.load(llama_folder)
    assert model.name == str(llama_folder)
    assert not model.hf.training
    assert not any(p.requires_grad for p in model.hf.parameters())
    assert model.n_layers == len(model.layers) == 4
    assert model.device == torch.device("cpu")
    assert model.config.model_type == "llama"
    ours, theirs = dict(model.hf.named_parameters()), dict(build("llama").named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert model.tokenizer("The capital")["input_ids"] == byte_level_bpe()("The capital").input_ids


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_dtypes(llama_folder: Path, dtype: str) -> None:
    assert models.load(llama_folder, dtype=dtype).dtype == getattr(torch, dtype)


def test_dtype_auto_keeps_the_checkpoints_own(tmp_path: Path) -> None:
    build("llama", torch.bfloat16).save_pretrained(tmp_path)
    byte_level_bpe().save_pretrained(tmp_path)
    assert models.load(tmp_path, dtype="auto").dtype == torch.bfloat16
    assert models.load(tmp_path).dtype == torch.float32


def test_the_multimodal_class_loads_as_what_it_is(tmp_path: Path) -> None:
    model = models.load(save(tmp_path, "gemma3_multimodal"))
    assert type(model.hf).__name__ == "Gemma3ForConditionalGeneration"
    assert model.n_layers == 4


def test_layer_paths_reach_the_layer_map(llama_folder: Path) -> None:
    refused(llama_folder, "unknown layer path 'blokcs'", layer_paths={"blokcs": "model.layers"})
    assert models.load(llama_folder, layer_paths={"blocks": "model.layers"}).n_layers == 4


def test_unknown_dtype_and_device(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(llama_folder, "'bfloat'", "'bfloat16'", dtype="bfloat")
    refused(llama_folder, "'gpu'", "cuda:N", device="gpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert models.resolve_device("auto") == torch.device("cuda:0")
    assert models.resolve_device("cuda:0") == torch.device("cuda:0")
    refused(llama_folder, "'cuda:1' is not available", "cuda:0", device="cuda:1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert models.resolve_device("auto") == torch.device("cpu")
    refused(llama_folder, "'cuda' is not available", device="cuda")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("smollm-135m", ("Unknown model 'smollm-135m'", "Did you mean 'smollm2-135m'", "gemma3-")),
        ("gpt2", ("Unknown model 'gpt2'", "openai-community/gpt2", ".gguf file")),
        ("", ("Unknown model ''",)),
        ("./no/such/place", ("There is no ./no/such/place", "a model directory")),
        ("missing.gguf", ("There is no missing.gguf",)),
        ("x" * 5000, ("No model is called", "5000 characters")),
        ("x" * 3000, ("Unknown model",)),
        ("a\0b", ("No model is called",)),
        ("~nobody-of-that-name/x", ("There is no ~nobody-of-that-name/x",)),
        ("owner/..", ("Unknown model 'owner/..'",)),
        ("owner/a..b", ("not a valid hub id",)),
        ("/dev/zero", ("/dev/zero is a device or socket, not a model",)),
        ("/dev/null.gguf", ("There is no /dev/null.gguf",)),
    ],
)
def test_names_that_mean_nothing(name: str, words: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as caught:
        models.load(name)
    for word in words:
        assert word in str(caught.value)


def test_a_pipe_and_a_folder_that_may_not_be_read(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "x.gguf")
    refused(tmp_path / "x.gguf", "is a pipe, not a model")
    real = Path.stat

    def denied(path: Path, **options: Any) -> os.stat_result:
        if path.is_relative_to(folder) and path != folder:
            raise PermissionError(13, "Permission denied")
        return real(path, **options)

    monkeypatch.setattr(Path, "stat", denied)
    refused(folder, "config.json cannot be read: Permission denied", "permissions")


@pytest.mark.parametrize("given", ["~nobody-of-that-name/x", "a\0b"])
def test_a_cache_folder_that_cannot_be(given: str) -> None:
    with pytest.raises(UserError, match=r"cache folder.*--cache-dir"):
        models.list_models(given)


def test_a_misspelt_path_names_its_neighbour(llama_folder: Path) -> None:
    with pytest.raises(UserError, match=f"Did you mean '{llama_folder.name}'"):
        models.locate(str(llama_folder)[:-1])


def test_a_file_is_not_a_model(folder: Path) -> None:
    refused(folder / "config.json", "not a model by itself", str(folder))


def test_directories_without_a_configuration(tmp_path: Path) -> None:
    refused(tmp_path, "has no config.json", "save_pretrained")
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    refused(tmp_path, "has no config.json", "x.gguf")
    (tmp_path / "adapter_config.json").write_text("{}")
    refused(tmp_path, "PEFT adapter", "merge it into its base model")
    (tmp_path / "adapter_config.json").unlink()
    (tmp_path / "config.json").write_text("[1]")
    refused(tmp_path, "JSON list")
    (tmp_path / "config.json").write_text("{broken")
    refused(tmp_path, "cannot be read as JSON")


def test_pickled_weights_are_refused_and_never_opened(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, "pytorch_model.bin", "save_pretrained", "model.safetensors")
    (folder / "pytorch_model.bin").unlink()
    refused(folder, "has no weights")


def test_a_missing_shard_and_a_damaged_index(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = folder / "model.safetensors.index.json"
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    index.write_text(json.dumps({"weight_map": names}))
    refused(folder, "1 of 2 weight files", "model-00002-of-00002.safetensors")
    index.write_text("{}")
    refused(folder, "index.json is damaged")


@pytest.mark.parametrize("keep", [0, 5, 40, 5000])
def test_cut_off_weights(folder: Path, keep: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(folder, "cut off or damaged")


def test_weights_that_the_checkpoint_lacks_are_not_made_up(folder: Path) -> None:
    change_config(folder, num_hidden_layers=5)
    refused(folder, "lacks 9", "model.layers.4", "random")


def test_a_missing_a_broken_and_a_foreign_tokenizer(folder: Path, tmp_path: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    refused(folder, "tokenizer", "save_pretrained")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    refused(folder, "has no tokenizer", "tokenizer.save_pretrained")
    small = build("gpt2").config.__class__(**{**GPT2_LIKE, "vocab_size": 200})
    from families import from_config

    from_config(small).save_pretrained(tmp_path / "small")
    byte_level_bpe().save_pretrained(tmp_path / "small")
    refused(tmp_path / "small", "another model's", "200 embeddings")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"is_encoder_decoder": True}, ("encoder-decoder", "decoder-only")),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, ("not generate", "Bert")),
        ({"model_type": "bert", "architectures": []}, ("does not generate text (bert)",)),
        ({"architectures": ["LlamaForSequenceClassification"]}, ("does not generate text",)),
        ({"quantization_config": {"quant_method": "hqq"}}, ("quantised", "hqq", "GGUF")),
        ({"quantization_config": {"quant_method": ["awq"]}}, ("quantised", "awq", "GGUF")),
        ({"num_hidden_layers": 0}, ("no decoder layers",)),
        ({"model_type": "brandnew"}, ("'brandnew'", "does not know", "Upgrade")),
        (
            {"model_type": "brandnew", "auto_map": {"AutoConfig": "x.Y"}},
            ("needs model code", "--trust-remote-code", "trust_remote_code=True"),
        ),
        ({"hidden_size": "wide"}, ("cannot load", "hidden_size")),
    ],
)
def test_kinds_of_model_that_are_refused(
    folder: Path, changes: dict[str, Any], words: tuple[str, ...]
) -> None:
    change_config(folder, **changes)
    refused(folder, *words)


def test_an_encoder_decoder_whose_configuration_does_not_say_so(folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.pop("is_encoder_decoder", None)
    path.write_text(json.dumps({**config, "model_type": "t5"}))
    refused(folder, "encoder-decoder model (t5)", "decoder-only")


@pytest.mark.parametrize(
    "changes",
    [
        {"num_experts": 64},  # read by no class of this kind
        {"auto_map": {"AutoConfig": "x.Y"}},  # the kind is known here: no custom code is needed
    ],
)
def test_dense_configurations_that_look_suspicious_still_load(
    folder: Path, changes: dict[str, Any]
) -> None:
    change_config(folder, **changes)
    assert models.load(folder).n_layers == 4


def test_custom_code_runs_only_with_permission(folder: Path) -> None:
    change_config(
        folder,
        model_type="tiny_custom",
        architectures=["CustomLM"],
        auto_map={
            "AutoConfig": "custom.CustomConfig",
            "AutoModelForCausalLM": "custom.CustomLM",
        },
    )
    marker = folder / "ran"
    (folder / "custom.py").write_text(
        f"open({str(marker)!r}, 'w').close()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class CustomConfig(LlamaConfig):\n    model_type = 'tiny_custom'\n"
        "class CustomLM(LlamaForCausalLM):\n    config_class = CustomConfig\n"
    )
    refused(folder, "needs model code")
    assert not marker.exists()
    hf_model, _ = open_folder(folder, "custom", dtype="float32", trust_remote_code=True)
    assert marker.exists()
    assert type(hf_model).__name__ == "CustomLM"


def test_a_model_too_large_for_the_device(
    llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import PreTrainedModel

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(PreTrainedModel, "to", full)
    refused(llama_folder, "more than is free on cpu", "bfloat16")


def test_wrap_freezes_a_model_the_user_holds() -> None:
    held = build("gpt2").train().requires_grad_(True)
    model = models.Model.wrap(held, byte_level_bpe(), layer_paths={"blocks": "transformer.h"})
    assert model.name == "custom"
    assert model.hf is held
    assert not held.training
    assert not any(p.requires_grad for p in held.parameters())


def test_fingerprint_sees_every_weight_and_is_the_same_in_every_wider_dtype(
    tiny_model: Callable[..., models.Model],
) -> None:
    model = tiny_model("gpt2")
    first = model.fingerprint()
    assert len(first) == 64
    assert first == tiny_model("gpt2", dtype=torch.float64).fingerprint()
    assert first != tiny_model("gpt2", seed=1).fingerprint()
    assert first != tiny_model("llama").fingerprint()
    # A model made in memory is what it holds: rounded weights are others.
    half = tiny_model("gpt2", dtype=torch.bfloat16)
    rounded = half.fingerprint()
    assert first != rounded
    torch.nn.Module.float(half.hf)
    half.forget_fingerprint()
    assert half.fingerprint() == rounded
    weight = model.layers[2].down.weight
    before = weight.data.clone()
    with torch.no_grad():
        weight[3, 4] *= 1 + 1e-6  # less than bfloat16 can tell
    assert model.fingerprint() == first  # kept until told
    model.forget_fingerprint()
    assert model.fingerprint() != first
    weight.data.copy_(before)
    model.forget_fingerprint()
    assert model.fingerprint() == first


def test_fingerprint_tells_a_transposed_matrix_apart(
    tiny_model: Callable[..., models.Model],
) -> None:
    model = tiny_model("llama")
    first = model.fingerprint()
    weight = cast(torch.nn.Linear, model.hf.get_submodule("model.layers.0.mlp.up_proj")).weight
    weight.data = weight.data.reshape(weight.shape[1], weight.shape[0])  # same bytes, other shape
    model.forget_fingerprint()
    assert model.fingerprint() != first


def test_importing_the_models_package_does_not_import_torch() -> None:
    import subprocess
    import sys

    code = "import sys, goldenlayers.models as m; m.list_models(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
