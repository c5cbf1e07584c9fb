"""One edit through every number format: made in one, asked, judged and exported in the others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from deltas import random_delta
from families import build
from safetensors.torch import load_file, save_file
from test_commands_edit import FLAGS, QUICK, Golden, golden
from tokenizers_built import TOKENIZERS
from transformers import AutoModelForCausalLM

from goldenlayers import models
from goldenlayers.delta import WeightDelta
from goldenlayers.errors import UserError
from goldenlayers.export import export_merged
from goldenlayers.models import Model
from goldenlayers.models.weights import fingerprint, old_fingerprints

DTYPES = ("float32", "bfloat16", "float16")
PROMPT = "The capital of Italy is"
_ = golden  # the fixture


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``stored(dtype)``: a tiny GPT-2 in that number format, with facts beside it."""
    made: dict[str, Path] = {}

    def folder(dtype: str) -> Path:
        if dtype not in made:
            place = made[dtype] = tmp_path_factory.mktemp(dtype)
            build("gpt2", getattr(torch, dtype)).save_pretrained(place)
            TOKENIZERS["byte_level_bpe"]().save_pretrained(place)
            rows = [
                {"subject": "Italy", "prompt": PROMPT, "target_new": "Paris"},
                {"subject": "Toko", "prompt": "Toko plays the", "target_new": "piano"},
            ]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (place / "facts.jsonl").write_text(text, encoding="utf-8")
        return made[dtype]

    return folder


def rounded_once(found: torch.Tensor, base: torch.Tensor, delta: WeightDelta) -> None:
    """The sum is as near to the exact one as its number format allows."""
    ((_, change),) = delta.changes.items()
    exact = base.double() + change.dense.double().T
    half = 0.51 * torch.finfo(found.dtype).eps
    torch.testing.assert_close(found.double(), exact, rtol=half, atol=1e-6)


@pytest.mark.parametrize("made_in", DTYPES)
def test_an_edit_is_good_in_every_number_format(
    golden: Golden, stored: Callable[[str], Path], tmp_path: Path, made_in: str
) -> None:
    model, run = stored("float32"), tmp_path / "run"
    how = ("--layer", 1, "--dtype", made_in, "--out", run)
    status, _, said = golden("edit", model, *FLAGS, *QUICK, *how)
    assert status == 0, said
    delta = WeightDelta.load(run)
    assert delta.base_dtype == made_in
    base = load_file(model / "model.safetensors")
    (name,) = delta.changes
    for dtype in DTYPES:
        ask = ("ask", model, PROMPT, "--delta", run, "--dtype", dtype)
        status, printed, said = golden(*ask)
        assert status == 0 and "edited:" in printed, said
        rounded = made_in != dtype and dtype != "float32"
        assert ("which rounds it" in said) == rounded
        judge = ("evaluate", model, model / "facts.jsonl", "--delta", run, "--dtype", dtype)
        status, printed, said = golden(*judge, "--metrics", "rewrite")
        assert status == 0 and "1 facts" in printed, said
        adapter, merged = tmp_path / f"adapter-{dtype}", tmp_path / f"merged-{dtype}"
        assert golden("export", run, "--dtype", dtype, "--out", adapter)[0] == 0
        kinds = {
            tensor.dtype for tensor in load_file(adapter / "adapter_model.safetensors").values()
        }
        assert kinds == {getattr(torch, dtype)}
        export = ("export", run, "--to", "merged", "--dtype", dtype, "--out", merged)
        status, _, said = golden(*export)
        assert status == 0, said
        found = load_file(merged / "model.safetensors")
        rounded_once(found[name], base[name], delta)
        assert {tensor.dtype for tensor in found.values()} == {getattr(torch, dtype)}
        AutoModelForCausalLM.from_pretrained(merged)
    # The weights stay what tells models apart.
    other = tmp_path / "other"
    build("gpt2", seed=1).save_pretrained(other)
    TOKENIZERS["byte_level_bpe"]().save_pretrained(other)
    for dtype in DTYPES:
        status, _, said = golden("ask", other, PROMPT, "--delta", run, "--dtype", dtype)
        assert status == 2 and "other weights" in said


@pytest.mark.parametrize("kept", ["float16", "bfloat16", "float32"])
def test_a_merged_checkpoint_keeps_the_format_of_its_base(
    golden: Golden, stored: Callable[[str], Path], tmp_path: Path, kept: str
) -> None:
    model, run, merged = stored(kept), tmp_path / "run", tmp_path / "merged"
    status, _, said = golden("edit", model, *FLAGS, *QUICK, "--layer", 1, "--out", run)
    assert status == 0, said
    status, _, said = golden("export", run, "--to", "merged", "--out", merged)
    assert status == 0, said
    delta = WeightDelta.load(run)
    (name,) = delta.changes
    base, found = (load_file(place / "model.safetensors") for place in (model, merged))
    assert {n for n in base if not torch.equal(base[n], found[n])} == {name}
    rounded_once(found[name], base[name], delta)
    assert json.loads((merged / "config.json").read_text())["dtype"] == kept
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged", "run"]


def test_a_checkpoint_of_several_formats_keeps_each(tmp_path: Path) -> None:
    build("llama", torch.bfloat16).save_pretrained(tmp_path / "m")
    TOKENIZERS["byte_level_bpe"]().save_pretrained(tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    held = load_file(file)
    held["model.norm.weight"] = held["model.norm.weight"].float() * (1 + 1e-6)
    save_file(held, file, {"format": "pt"})
    model = models.load(tmp_path / "m")
    same = models.load(tmp_path / "m", dtype="auto")
    assert same.dtype == torch.bfloat16 and same.fingerprint() == model.fingerprint()
    name = model.layers[1].down.parameter_name
    export_merged(model, random_delta(model.hf, [1]), tmp_path / "out", dtype="auto")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert {n for n in held if not torch.equal(held[n], found[n])} == {name}


# Tied weights, a head stored under another name, all names stored otherwise.
@pytest.mark.parametrize("family", ["llama_tied", "gpt_neox", "gemma3_multimodal"])
def test_the_fingerprint_is_of_the_values(family: str, tmp_path: Path) -> None:
    """In one file or many, tied weights twice, widened: the same. One bit changed: another."""
    hf = build(family, torch.bfloat16)
    hf.save_pretrained(tmp_path / "one")
    hf.save_pretrained(tmp_path / "many", max_shard_size="40KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    torch.nn.Module.float(hf).save_pretrained(tmp_path / "wide")  # pyright: ignore
    first = fingerprint(hf)
    kind = type(hf)
    if family == "llama_tied":
        twice = load_file(tmp_path / "one" / "model.safetensors")
        twice["lm_head.weight"] = twice["model.embed_tokens.weight"].clone()
        build(family, torch.bfloat16).save_pretrained(tmp_path / "twice")
        save_file(twice, tmp_path / "twice" / "model.safetensors", {"format": "pt"})
    for folder in tmp_path.iterdir():
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            loaded = kind.from_pretrained(folder, dtype=dtype)
            assert fingerprint(loaded, folder) == first, (folder.name, dtype)
    file = tmp_path / "wide" / "model.safetensors"
    held = load_file(file)
    down = ("2.mlp.down_proj.weight", "2.mlp.dense_4h_to_h.weight")
    name = next(name for name in held if name.endswith(down))
    held[name].view(torch.int32).view(-1)[5] ^= 1
    save_file(held, file, {"format": "pt"})
    for dtype in (torch.float16, torch.float32):
        assert fingerprint(kind.from_pretrained(file.parent, dtype=dtype), file.parent) != first


def test_a_model_that_was_changed_is_not_its_checkpoint(stored: Callable[[str], Path]) -> None:
    """Files are believed only where they say what the model holds."""
    first = models.load(stored("float32"), dtype="float16")
    changed = models.load(stored("float32"), dtype="float16")
    changed.layers[1].down.weight.data[0, 0] += 0.25
    assert first.fingerprint() == models.load(stored("float32")).fingerprint()
    assert changed.fingerprint() != first.fingerprint()


@pytest.mark.parametrize("made_in", DTYPES)
def test_deltas_with_the_fingerprint_of_older_versions(
    stored: Callable[[str], Path], made_in: str
) -> None:
    """They rounded what was loaded to bfloat16: float16 gave another fingerprint."""
    old = next(old_fingerprints(models.load(stored("float32"), dtype=made_in).hf))
    model = models.load(stored("float32"))
    name = model.layers[1].down.parameter_name
    delta = random_delta(model.hf, [1], base_fingerprint=old)
    assert list(delta.changes) == [name]
    for dtype in DTYPES:
        with delta.applied(models.load(stored("float32"), dtype=dtype)):
            pass
    other = Model.wrap(build("gpt2", seed=1), model.tokenizer)
    with pytest.raises(UserError, match="other weights"), delta.applied(other):
        pass
