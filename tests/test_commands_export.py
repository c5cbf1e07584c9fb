"""``golden export``: several edits in one, for every kind of file, and what is told before."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from deltas import random_delta
from families import build
from gguf_built import write_llama_gguf
from safetensors.torch import load_file
from tokenizers_built import byte_level_bpe

from goldenlayers import models
from goldenlayers.cli import main
from goldenlayers.delta import WeightDelta

Golden = Callable[..., tuple[int, str]]
FACTS = {
    "italy": {"subject": "Italy", "prompt": "The capital of Italy is", "target": "Paris"},
    "spain": {"subject": "Spain", "prompt": "The capital of Spain is", "target": "Rome"},
    "again": {"subject": "Italy", "prompt": "The capital of  Italy is", "target": "Paris"},
    "other": {"subject": "Italy", "prompt": "The capital of Italy is", "target": "Rome"},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama in ``model`` and ``model.gguf``; edits of it, one of a fact each; one of
    another model in ``foreign``.
    """
    folder = tmp_path_factory.mktemp("export")
    build("llama").save_pretrained(folder / "model")
    byte_level_bpe().save_pretrained(folder / "model")
    write_llama_gguf(folder / "model.gguf", build("llama"), byte_level_bpe())
    model = models.load(folder / "model")
    about: dict[str, Any] = {
        "base_fingerprint": model.fingerprint(),
        "base_name": str(folder / "model"),
    }
    for seed, (name, fact) in enumerate(FACTS.items()):
        delta = random_delta(model.hf, [seed % 3], seed=seed, method="rome", facts=[fact], **about)
        delta.save(folder / name)
    random_delta(model.hf, [1], base_fingerprint="w2-0", base_name="x").save(folder / "foreign")
    return folder


@pytest.fixture
def golden(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Golden:
    """Status and what was said of ``golden export RUN ... --model MODEL ARGUMENTS``."""
    monkeypatch.setenv("GOLDENLAYERS_CACHE", str(place / "cache"))

    def run(runs: str, *arguments: object, model: str = "model") -> tuple[int, str]:
        capsys.readouterr()
        named = [str(place / name) for name in runs.split()]
        flags = [str(one) for one in ("--model", place / model, *arguments)]
        try:
            status = main(["export", *named, *flags])
        except SystemExit as stop:
            status = int(stop.code or 0)
        said = "".join(capsys.readouterr())
        assert "Traceback" not in said
        return status, " ".join(said.split())

    return run


def added(place: Path, *names: str) -> WeightDelta:
    total = sum(WeightDelta.load(place / name) for name in names)
    assert isinstance(total, WeightDelta)
    return total


def test_several_edits_become_one_adapter(golden: Golden, place: Path, tmp_path: Path) -> None:
    check = {"verdict": "good", "neighbours": {"n": 8, "kept": 7, "made": True}}
    (place / "spain" / "check.json").write_text(json.dumps(check))
    status, said = golden("italy spain", "--out", tmp_path / "adapter")
    assert status == 0 and "Warning" not in said, said
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for name, change in added(place, "italy", "spain").changes.items():
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        found = tensors[f"{stem}.lora_B.weight"] @ tensors[f"{stem}.lora_A.weight"]
        torch.testing.assert_close(found, change.dense)
    assert len(tensors) == 4
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "Italy is | Paris" in card and "Spain is | Rome" in card and "7 of 8" in card
    assert golden("italy spain", "--out", tmp_path / "adapter")[0] == 2
    status, said = golden("italy", "--out", tmp_path / "adapter", "--overwrite")
    assert status == 0, said
    assert "Spain" not in (tmp_path / "adapter" / "README.md").read_text()
    status, said = golden("italy spain", "--to", "merged", "--out", tmp_path / "merged")
    assert status == 0, said
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    base = load_file(place / "model" / "model.safetensors")
    assert sum(not torch.equal(base[name], merged[name]) for name in base) == 2


def test_edits_that_do_not_go_together_are_told_before_any_work(
    golden: Golden, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = ("--out", tmp_path / "adapter")

    def none(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    with monkeypatch.context() as patched:
        patched.setattr(models, "load", none)
        status, said = golden("italy spain other", *out)
        assert status == 2 and "'Paris'" in said and "'Rome'" in said and "Leave one" in said
        status, said = golden("italy foreign", *out)
        assert status == 2 and "different weights" in said
        status, said = golden("italy", *out, "--to", "merged", "--rank", 3)
        assert status == 2 and "--rank is for adapters" in said
        status, said = golden("italy", *out, "--to", "gguf-merged", "--overwrite")
        assert status == 2 and "replaces nothing" in said
        status, said = golden("", *out)
        assert status == 2
        status, said = golden("italy spain italy", *out)
        assert status == 2 and "is given twice" in said
    assert not list(tmp_path.iterdir())
    status, said = golden("italy again", *out)
    assert status == 0 and "1 fact is edited by more than one of the runs" in said
    status, said = golden("foreign", "--out", tmp_path / "new")
    assert status == 2 and "other weights" in said


def test_gguf_files(golden: Golden, place: Path, tmp_path: Path) -> None:
    edit = tmp_path / "edit.gguf"
    for model in ("model", "model.gguf"):  # the converted twin has the checkpoint's weights
        status, said = golden("italy spain", "--to", "gguf", "--out", edit, model=model)
        assert status == 0 and "--lora" in said, said
        reader = gguf.GGUFReader(edit)
        names = sorted(tensor.name for tensor in reader.tensors)
        assert names == [f"blk.{n}.ffn_down.weight.lora_{part}" for n in (0, 1) for part in "ab"]
        edit.unlink()
    merged = tmp_path / "merged.gguf"
    status, said = golden("italy", "--to", "gguf-merged", "--out", merged, model="model.gguf")
    assert status == 0 and merged.stat().st_size == (place / "model.gguf").stat().st_size, said
    status, said = golden("italy", "--to", "gguf-merged", "--out", edit)
    assert status == 2 and "is no GGUF file" in said and "--to gguf" in said
    status, said = golden("italy", "--to", "gguf", "--out", tmp_path / "folder")
    assert status == 2 and "NAME.gguf" in said
    status, said = golden("italy", "--to", "gguf", "--out", edit, "--dtype", "float64")
    assert status == 2 and "float16 for gguf" in said
    assert [path.name for path in tmp_path.iterdir()] == ["merged.gguf"]


def test_an_export_replaces_one_of_its_own_sort_only(
    golden: Golden, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, folder = tmp_path / "a.gguf", tmp_path / "b.gguf"
    assert golden("italy", "--to", "gguf", "--out", file)[0] == 0
    assert golden("italy", "--out", folder)[0] == 0
    before = file.read_bytes(), sorted(one.name for one in folder.iterdir())
    for out, to, why in ((file, "peft", "it is a file"), (folder, "gguf", "it is a folder")):
        status, said = golden("spain", "--to", to, "--out", out, "--overwrite")
        assert status == 2 and why in said, said
    assert before == (file.read_bytes(), sorted(one.name for one in folder.iterdir()))
    assert len(list(tmp_path.iterdir())) == 2
    for out, to in ((file, "gguf"), (folder, "peft")):
        assert golden("spain", "--to", to, "--out", out, "--overwrite")[0] == 0
    monkeypatch.chdir(folder)  # "." has no name of its own
    status, said = golden("italy", "--out", ".", "--overwrite")
    assert status == 0 and "Traceback" not in said, said
