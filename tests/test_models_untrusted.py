"""Model folders from elsewhere: what they name and claim never decides what is read or run."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import LAYERS, build
from safetensors.torch import load_file, save_file
from tokenizers_built import byte_level_bpe

from goldenlayers import models
from goldenlayers.errors import UserError
from goldenlayers.models.checks import is_harmless
from goldenlayers.models.loading import open_folder

SHARD = "model-00001-of-00001.safetensors"
LAYER_KEYS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    build("llama").save_pretrained(folder)
    byte_level_bpe().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy of a tiny Llama to spoil."""
    return Path(shutil.copytree(whole, tmp_path / "model"))


def change(folder: Path, name: str = "config.json", **changes: Any) -> None:
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refused(folder: Path, *words: str) -> str:
    with pytest.raises(UserError) as caught:
        models.load(str(folder))
    message = str(caught.value)
    for word in words:
        assert word in message
    return message


def sharded(folder: Path, shard: str) -> None:
    """An index that names ``shard`` for every tensor."""
    names = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    index = {"weight_map": dict.fromkeys(names, shard)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("shard", ["../other.safetensors", "/ABSOLUTE", "a/b", "..", "x\0y", ""])
def test_a_shard_index_names_files_of_its_folder_only(folder: Path, shard: str) -> None:
    outside = folder.parent / "other.safetensors"
    shutil.copy(folder / "model.safetensors", outside)  # whole and fitting: only its place is wrong
    sharded(folder, shard.replace("/ABSOLUTE", str(outside)))
    refused(folder, "as one of its own", "plain name")


def test_a_plain_shard_index_loads(folder: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder / SHARD)
    sharded(folder, SHARD)
    assert models.load(folder).n_layers == LAYERS


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_links_lead_into_the_hubs_cache_and_nowhere_else(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    outside = folder.parent / "blobs" / "0123"
    outside.parent.mkdir()
    (folder / name).rename(outside)
    (folder / name).symlink_to(outside)
    refused(folder, "leads out of its directory", name)
    # The hub's layout: models--owner--name/snapshots/REVISION/FILE -> ../../blobs/HASH.
    revision = folder.parent / "snapshots" / "abcdef"
    shutil.copytree(folder, revision, symlinks=True)
    assert models.load(revision).n_layers == LAYERS
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(outside.parent))
    assert models.load(folder).n_layers == LAYERS  # as older hub clients link into their cache
    outside.unlink()
    refused(folder, "leads to nothing", name)


def test_two_shards_with_one_tensor(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    sharded(folder, SHARD)
    save_file(state, folder / SHARD)
    save_file({"lm_head.weight": state["lm_head.weight"]}, folder / "more.safetensors")
    index = folder / "model.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": {**names, "x": "more.safetensors"}}))
    refused(folder, "holds lm_head.weight, which another part holds")


def test_an_adapter_beside_the_model_is_not_applied_in_silence(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1}))
    message = refused(folder, "an adapter (adapter_config.json)", "merge_and_unload")
    assert "move the adapter_* files away" in message


def test_pickles_and_distributed_parts_beside_the_weights_are_never_opened(folder: Path) -> None:
    for name in ("pytorch_model.bin", ".metadata", "__0_0.distcp", "training_args.bin"):
        (folder / name).write_bytes(b"cposix\nsystem\n(S'false'\ntR.")
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text("raise SystemExit(7)")
    assert models.load(folder).n_layers == LAYERS


def test_the_configuration_cannot_steer_what_is_loaded(folder: Path, whole: Path) -> None:
    change(
        folder,
        auto_map={"AutoConfig": "evil--x.Y", "AutoModelForCausalLM": "evil--x.Z"},
        _attn_implementation="owner/kernel",
        attn_implementation="owner/kernel",
        transformers_weights="../x.safetensors",
        fusion_config={"x": True},
        custom_generate="owner/name",
        _name_or_path="owner/name",
    )
    model = models.load(folder)
    assert model.fingerprint() == models.load(whole).fingerprint()
    assert model.config._attn_implementation == models.load(whole).config._attn_implementation
    assert model.config.name_or_path == str(folder)


@pytest.mark.parametrize("chosen", ["AutoModelForCausalLM", "pipeline", "LlamaForCausalLM", 5, "."])
@pytest.mark.parametrize("place", ["config.json", "tokenizer_config.json"])
def test_a_tokenizer_class_is_a_tokenizer(folder: Path, place: str, chosen: object) -> None:
    change(folder, place, tokenizer_class=chosen)
    refused(folder, "tokenizer_class")


def test_tokenizer_settings_cannot_name_files_elsewhere(folder: Path) -> None:
    change(folder, "tokenizer_config.json", fast_tokenizer_files=["../../tokenizer.4.0.json"])
    refused(folder, "as one of its own")


def test_generation_settings_are_read(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    model, _ = open_folder(folder, "x", dtype="float32", trust_remote_code=False)
    assert model.generation_config is not None
    assert model.generation_config.eos_token_id == [2, 7]
    (folder / "generation_config.json").write_text("[" * 5000)
    refused(folder, "generation_config.json", "nested too deeply")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_text('{"a":' * 100_000),
        lambda path: path.write_bytes(b"\xff\xfe{"),
        lambda path: path.write_bytes(b"\0" * 100),
        lambda path: path.write_bytes(b""),
        lambda path: (path.unlink(), os.mkfifo(path)),
        lambda path: (path.unlink(), path.mkdir()),
        lambda path: (path.unlink(), path.symlink_to("/dev/zero")),
        lambda path: (path.unlink(), path.symlink_to(path)),
        lambda path: os.truncate(path, 1 << 33),  # sparse: no disk is used
    ],
)
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "model.safetensors"])
def test_files_of_any_other_kind(folder: Path, name: str, spoil: Callable[[Path], object]) -> None:
    spoil(folder / name)
    refused(folder, name)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": 10**6}, ("num_hidden_layers 1000000", "4 layers at most")),
        ({"num_hidden_layers": -3}, ("num_hidden_layers -3",)),
        ({"hidden_size": 10**9}, ("weights, and its files hold",)),
        ({"vocab_size": 10**7}, ("weights, and its files hold",)),
        ({"vocab_size": 10**30}, ("cannot load",)),
        ({"vocab_size": 300}, ("not of the shape", "lm_head.weight", "(320, 32), not (300, 32)")),
        ({"num_labels": 10**9}, ("num_labels 1000000000",)),
        ({"layer_types": [[[]]] * 3}, ("cannot load",)),
        ({"architectures": 5}, ("architectures 5", "a list of names")),
        ({"model_type": ["llama"]}, ("model_type",)),
        ({"dtype": "save"}, ("dtype 'save'", "bfloat16")),
        ({"rope_parameters": "x"}, ("cannot load",)),
        ({"num_attention_heads": 0}, ("cannot load", "ZeroDivisionError")),
    ],
)
def test_configurations_that_ask_for_the_moon(
    folder: Path, changes: dict[str, Any], words: tuple[str, ...]
) -> None:
    change(folder, **changes)
    refused(folder, *words)


def test_masks_that_no_file_holds_are_bounded(tmp_path: Path) -> None:
    build("gpt_neo").save_pretrained(tmp_path)
    byte_level_bpe().save_pretrained(tmp_path)
    change(tmp_path, attention_types=[[["global"], 10**9]])
    refused(tmp_path, "attention_types 1000000000")


@pytest.mark.parametrize(
    "family", ["gpt2", "gpt_neo", "bloom", "mpt", "llama", "gemma3", "gemma3_multimodal"]
)
def test_one_layer_less_in_the_configuration_is_an_error(family: str, tmp_path: Path) -> None:
    build(family).save_pretrained(tmp_path)
    byte_level_bpe().save_pretrained(tmp_path)
    assert models.load(tmp_path).n_layers == LAYERS  # whole, in every family
    config = json.loads((tmp_path / "config.json").read_text())
    part = config.get("text_config", config)
    key = next(key for key in LAYER_KEYS if key in part)
    part[key] = LAYERS - 1
    for lists in ("layer_types", "attention_layers"):
        if lists in part:
            part[lists] = part[lists][:-1]
    if "attention_types" in part:
        part["attention_types"] = [[["global", "local", "global"], 1]]
    (tmp_path / "config.json").write_text(json.dumps(config))
    refused(tmp_path, "has no place for", f".{LAYERS - 1}.")


@pytest.mark.parametrize(
    ("key", "harmless"),
    [
        ("model.layers.0.self_attn.rotary_emb.inv_freq", True),
        ("transformer.h.0.attn.bias", True),
        ("transformer.h.0.attn.attention.masked_bias", True),
        ("model.vision_tower.blocks.0.weight", True),
        ("mtp.layers.0.mlp.up_proj.weight", True),
        ("model.layers.4.mlp.up_proj.weight", True),  # one layer that predicts ahead, after four
        ("model.layers.3.mlp.up_proj.weight", False),
        ("model.layers.5.mlp.up_proj.weight", False),
        ("transformer.h.0.attn.c_attn.bias", False),
        ("model.layers.0.mlp.down_proj.lora_A.weight", False),
        ("score.weight", False),
    ],
)
def test_weights_that_take_no_part_in_a_prediction(key: str, harmless: bool) -> None:
    config = {"num_hidden_layers": 4, "num_nextn_predict_layers": 1}
    assert is_harmless(key, config) == harmless


def test_old_checkpoints_with_masks_frequencies_and_short_names(tmp_path: Path) -> None:
    model = build("gpt2")
    model.save_pretrained(tmp_path)
    byte_level_bpe().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    state = {name.removeprefix("transformer."): t for name, t in load_file(path).items()}
    state.pop("lm_head.weight", None)
    state |= {f"h.{i}.attn.bias": torch.ones(1, 1, 8, 8) for i in range(LAYERS)}
    save_file(state, path, {"format": "pt"})
    ours = models.load(tmp_path).hf.state_dict()
    assert all(torch.equal(ours[name], value) for name, value in model.state_dict().items())
    state["h.0.mlp.extra.weight"] = torch.ones(3)
    save_file(state, path, {"format": "pt"})
    refused(tmp_path, "1 weights", "h.0.mlp.extra.weight")
