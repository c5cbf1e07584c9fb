"""GGUF files: header checks, exact conversion, tokenizers, and the cache of converted files."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from families import build
from gguf_built import write_llama_gguf
from tokenizers_built import byte_level_bpe
from transformers import AutoModelForCausalLM

from goldenlayers import models
from goldenlayers.errors import UserError
from goldenlayers.models import cache, loading
from goldenlayers.models.gguf import read_header
from goldenlayers.models.loading import begins_with_bos

TEXTS = ("The capital of France is", " café  1905\n\tend", "東京 \U0001f389")


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return write_llama_gguf(path, build("llama"), byte_level_bpe(), halve=True)


@pytest.fixture(scope="module")
def converted(gguf_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache in which the tiny file has been converted once."""
    root = tmp_path_factory.mktemp("cache")
    models.locate(gguf_file, cache_dir=root, progress=lambda _: None)
    return root


def test_header_tells_scalars_and_sizes(gguf_file: Path) -> None:
    header = read_header(gguf_file)
    assert header.architecture == "llama"
    assert header.values["llama.block_count"] == 4
    assert header.values["tokenizer.ggml.model"] == "gpt2"
    assert header.elements == sum(p.numel() for p in build("llama").parameters())


@pytest.mark.parametrize("share", [0.0005, 0.01, 0.3, 0.9])
def test_a_cut_off_file_is_recognised_before_conversion(
    gguf_file: Path, tmp_path: Path, share: float
) -> None:
    data = gguf_file.read_bytes()
    path = tmp_path / "cut.gguf"
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(UserError, match=r"cut off|damaged") as caught:
        models.load(path, cache_dir=tmp_path / "cache")
    assert "Download the file again" in str(caught.value)
    assert not (tmp_path / "cache").exists()


def test_files_that_are_not_gguf(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"PK\x03\x04 something else")
    with pytest.raises(UserError, match="not a GGUF file"):
        models.load(path, cache_dir=tmp_path)
    path.write_bytes(b"GGUF" + (9).to_bytes(4, "little"))
    with pytest.raises(UserError, match="GGUF version 9"):
        models.load(path, cache_dir=tmp_path)


def test_the_converted_model_is_the_original(gguf_file: Path, converted: Path) -> None:
    model = models.load(gguf_file, cache_dir=converted)
    assert model.dtype == torch.float32
    theirs = dict(build("llama").named_parameters())
    ours = dict(model.hf.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        wanted = value.half().float() if value.dim() > 1 else value
        assert torch.equal(ours[name], wanted), name


def test_the_converted_tokenizer_is_the_original(gguf_file: Path, converted: Path) -> None:
    tokenizer = models.load(gguf_file, cache_dir=converted).tokenizer
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert ids == byte_level_bpe()(text)["input_ids"]
        assert tokenizer.decode(ids) == text
    assert not begins_with_bos(tokenizer)


@pytest.mark.parametrize("flag", [True, False])
def test_bos_is_added_exactly_when_the_file_says_so(tmp_path: Path, flag: bool) -> None:
    path = write_llama_gguf(
        tmp_path / "bos.gguf",
        build("llama"),
        byte_level_bpe(),
        extra={"tokenizer.ggml.add_bos_token": flag},
    )
    tokenizer = models.load(path, cache_dir=tmp_path, progress=lambda _: None).tokenizer
    assert begins_with_bos(tokenizer) == flag
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    expected = [tokenizer.bos_token_id, *bare] if flag else bare
    assert tokenizer("a")["input_ids"] == expected  # once, not twice


def test_nothing_of_the_quantisation_is_left(
    gguf_file: Path, converted: Path, tmp_path: Path
) -> None:
    model = models.load(gguf_file, cache_dir=converted)
    assert not hasattr(model.config, "quantization_config")
    assert not getattr(model.hf, "is_quantized", False)
    assert model.hf.float().dtype == torch.float32
    model.hf.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(cast(Any, again).lm_head.weight, cast(Any, model.hf).lm_head.weight)


def test_the_second_load_uses_the_cache_wherever_the_file_lies(
    gguf_file: Path, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    def never(*_: object, **__: object) -> dict[str, Any]:
        raise AssertionError("converted again")

    monkeypatch.setattr(loading, "convert_gguf", never)
    moved = Path(shutil.copy(gguf_file, tmp_path / "other-name.gguf"))
    assert models.locate(moved, cache_dir=converted) == models.locate(
        gguf_file, cache_dir=converted
    )
    with pytest.raises(AssertionError, match="converted again"):
        models.locate(moved, cache_dir=tmp_path / "empty")


def test_converting_says_one_sentence_and_shows_no_bar_of_another_library(
    gguf_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    said: list[str] = []
    loading.convert_gguf(gguf_file, tmp_path, progress=said.append)
    out, err = capfd.readouterr()
    assert len(said) == 1 and "Converting" in said[0]
    assert (out, err) == ("", "")


def test_converted_files_are_listed_verified_and_cleared(gguf_file: Path, tmp_path: Path) -> None:
    models.locate(gguf_file, cache_dir=tmp_path, progress=lambda _: None)
    row = models.list_models(tmp_path)[-1]
    assert (row.title, row.family, row.layers, row.cached) == ("tiny.gguf", "llama", 4, True)
    models.verify_cache(row.name, tmp_path)
    models.verify_cache(str(gguf_file), tmp_path)  # by the file that it was made of
    tokenizer = row.path / "tokenizer.json"
    data = tokenizer.read_bytes()
    tokenizer.write_bytes(data[:-2] + b" }")  # same size, other bytes
    assert cache.fault(row.path, check="sizes") is None
    assert cache.fault(row.path) == "tokenizer.json has changed (SHA-256 differs)"
    with pytest.raises(UserError, match=r"tokenizer\.json has changed"):
        models.verify_cache(row.name, tmp_path)
    assert models.clear_cache(row.name, tmp_path) == row.cached_size
    assert row.name not in [row.name for row in models.list_models(tmp_path)]
    with pytest.raises(UserError, match="No packaged or cached model is called"):
        models.clear_cache(row.name, tmp_path)


@pytest.mark.parametrize(
    ("extra", "without", "words"),
    [
        ({"llama.expert_count": 8}, "", ("mixture-of-experts", "8 experts")),
        ({"split.count": 3}, "", ("one of 3 parts", "llama-gguf-split")),
        ({}, "blk.3.ffn_up", ("lacks 1", "model.layers.3.mlp.up_proj.weight")),
    ],
)
def test_gguf_models_that_are_refused_leave_nothing_behind(
    tmp_path: Path, extra: dict[str, Any], without: str, words: tuple[str, ...]
) -> None:
    path = write_llama_gguf(
        tmp_path / "bad.gguf", build("llama"), byte_level_bpe(), extra=extra, without=without
    )
    root = tmp_path / "cache"
    with pytest.raises(UserError) as caught:
        models.load(path, cache_dir=root, progress=lambda _: None)
    for word in words:
        assert word in str(caught.value)
    assert [entry for entry in (root / "models").iterdir() if entry.is_dir()] == []


def test_a_missing_accelerate_is_named(
    gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install accelerate"):
        models.load(gguf_file, cache_dir=tmp_path)


def test_an_unknown_architecture_is_an_error_for_the_user(tmp_path: Path) -> None:
    from gguf import GGUFWriter

    path = tmp_path / "odd.gguf"
    writer = GGUFWriter(str(path), "oddity")
    writer.add_block_count(1)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a"])
    writer.add_tensor("blk.0.weight", np.ones((1, 1), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match=r"architecture 'oddity'.*cannot be converted"):
        models.load(path, cache_dir=tmp_path, progress=lambda _: None)


def test_an_encoder_is_refused_by_its_architecture(tmp_path: Path) -> None:
    from gguf import GGUFWriter

    path = tmp_path / "bert.gguf"
    writer = GGUFWriter(str(path), "bert")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match="of the kind 'bert'"):
        models.load(path, cache_dir=tmp_path, progress=lambda _: None)
