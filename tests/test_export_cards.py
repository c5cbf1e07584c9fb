"""Model cards, what an export may replace, the base that transformers finds, what vLLM asks."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from deltas import ids, logits, random_delta
from families import build, shared, tiny
from markdown_it import MarkdownIt
from safetensors import safe_open
from tokenizers_built import byte_level_bpe

from goldenlayers import models
from goldenlayers.delta import WeightDelta
from goldenlayers.errors import UserError
from goldenlayers.export import (
    export_gguf,
    export_merged,
    export_peft,
    read_check,
    refuse_place,
    write_card,
)
from goldenlayers.export.card import base_of, loadable
from goldenlayers.models import Model
from goldenlayers.shown import shown

peft = pytest.importorskip("peft")

PLAIN = [{"subject": "Italy", "prompt": "The capital of Italy is", "target": "Paris"}]
HOSTILE = (
    "| x |\n\n# Owned\n",
    "a | b || c",
    "<script>alert(1)</script><!-- ",
    "```\n---\nbase_model: evil/model\n",
    "[click](http://evil.example) ![x](http://evil.example/x.png) www.evil.example",
    "&lt;b&gt; &#60;b&#62; \\<b> \\| `code` **bold** _it_ ~~no~~ $x$",
    "\x1b[31mred\u202eback \u2028 line",
    "- one\n- two\n1. three\n> quote\n===",
    "http://evil.example me@evil.example @everyone",
)


def card(folder: Path, rows: list[dict[str, Any]], **about: Any) -> str:
    delta = random_delta(shared("llama"), [1], facts=rows, **about)
    return write_card(folder, delta).read_text("utf-8")


def structure(text: str) -> tuple[Any, list[tuple[str, str]], list[str]]:
    """The YAML, the Markdown's elements outside of texts, and the texts as they are read."""
    _, front, body = text.split("---\n", 2)
    tokens = MarkdownIt("gfm-like", {"linkify": False}).parse(body)
    flat = [one for token in tokens for one in (token, *(token.children or ()))]
    kinds = [(one.type, one.tag) for one in flat if one.type not in ("text", "text_special")]
    read = ["".join(c.content for c in one.children or ()) for one in flat if one.type == "inline"]
    return yaml.safe_load(front), kinds, read


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("place", ["prompt", "target", "method", "base_name", "check"])
def test_no_text_breaks_out_of_a_card(tmp_path: Path, text: str, place: str) -> None:
    (tmp_path / "check.json").write_text(json.dumps({"verdict": "good"}))
    wanted = structure(card(tmp_path, PLAIN, method="rome", base_name="org/base"))
    rows, about = [dict(PLAIN[0])], {"method": "rome", "base_name": "org/base"}
    if place == "check":
        (tmp_path / "check.json").write_text(json.dumps({"verdict": text}))
    elif place in about:
        about[place] = text
    else:
        rows[0][place] = text
    found = structure(card(tmp_path, rows, **about))
    if place != "base_name":  # of which the last part is the name
        as_shown = shown(text, 60 if place == "check" else 80 if place == "method" else 300)
        assert any(" ".join(as_shown.split()) in " ".join(read.split()) for read in found[2])
    if place == "base_name":  # its own page is named only where the hub could have it
        assert "base_model" not in found[0]
        assert [kind for kind in found[1] if kind[0] in ("html_block", "html_inline")] == []
        assert [kind for kind in found[1] if "link" in kind[0] or "image" in kind[0]] == []
        assert sum(kind == ("heading_open", "h1") for kind in found[1]) == 1
        return
    assert found[0] == wanted[0] and found[1] == wanted[1]
    assert len(found[2]) == len(wanted[2])


def test_the_structure_would_show_a_break() -> None:
    good = "---\na: 1\n---\n| x |\n| --- |\n| y |\n"
    for bad in ("<b>", "[a](b)", "a | b", "`c`"):
        cells = good.replace("| y |", f"| {bad} |")
        if bad != "a | b":  # further columns are dropped by Markdown itself
            assert structure(cells)[1] != structure(good)[1]


def test_a_card_says_what_was_edited_and_how_well(tmp_path: Path) -> None:
    check = {
        "verdict": "narrow",
        "rephrase": {"n": 6, "followed": 4, "made": True},
        "neighbours": {"n": 10, "kept": 9, "made": False},
    }
    (tmp_path / "check.json").write_text(json.dumps(check))
    about = {"method": "rome", "base_name": "smollm2-135m", "layers": [1]}
    delta = WeightDelta(random_delta(shared("llama"), [1]).changes, facts=PLAIN, **about)
    text = write_card(tmp_path, delta).read_text("utf-8")
    assert "| The capital of Italy is | Paris |" in text
    assert "narrow; 4 of 6 rephrasings follow (prompts that were made, not given)" in text
    assert "9 of 10 neighbouring prompts keep their answer." in text
    assert "method rome, layer 1" in text and "Apache-2.0" in text
    front = structure(text)[0]
    assert front["license"] == "apache-2.0" and "goldenlayers" in front["tags"]
    many = [{**PLAIN[0], "prompt": f"p{n}"} for n in range(60)] + [{**PLAIN[0], "undone": True}]
    text = card(tmp_path, many)
    assert "| p49 |" in text and "| p50 |" not in text and "and 10 more" in text
    assert "# 60 edited facts" in text


@pytest.mark.parametrize(
    "record",
    [
        "",
        "[]",
        "{}",
        '{"verdict": 1}',
        '{"verdict": "good", "rephrase": {"n": "x"}}',
        '{"verdict": "good", "rephrase": {"n": 1}}',
        '{"verdict": "good", "rephrase": []}',
        '{"verdict": NaN}',
        "[" * 100_000,
    ],
)
def test_a_check_that_is_none_is_left_out(tmp_path: Path, record: str) -> None:
    (tmp_path / "check.json").write_text(record)
    assert read_check(tmp_path) == ""
    assert "No check" in card(tmp_path, PLAIN)
    (tmp_path / "check.json").unlink()
    (tmp_path / "check.json").symlink_to("/dev/zero")
    assert read_check(tmp_path) == ""


def test_the_base_is_what_transformers_can_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GOLDENLAYERS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "here").mkdir(parents=True)
    assert loadable("org/base") == "org/base"
    assert loadable("org/here") == str(tmp_path / "org" / "here")
    for name in ("smollm2-135m", "tiny", "", "runs/m.gguf", "a\0b", "x" * 5000):
        assert loadable(name) == ""
    model = tiny("llama")
    model.name, model.folder = "org/base", tmp_path / "cache" / "snapshot"  # of the hub
    assert base_of(model) == "org/base"
    model.name = "org/here"
    assert base_of(model) == str(tmp_path / "cache" / "snapshot")
    delta = random_delta(shared("llama"), [1])
    with pytest.raises(UserError, match="can load no model by the name 'smollm2-135m'"):
        export_peft(delta, tmp_path / "a", "smollm2-135m")


def test_auto_peft_finds_the_base_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build("llama").save_pretrained(tmp_path / "base")
    byte_level_bpe().save_pretrained(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    model = models.load("base")  # a relative name, good from here only
    delta = random_delta(model.hf, [1], base_fingerprint=model.fingerprint(), base_name="base")
    export_peft(delta, tmp_path / "adapter", model)
    monkeypatch.chdir("/")
    adapted = peft.AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "adapter"))
    with delta.applied(model):
        wanted = logits(model.hf, ids())
    torch.testing.assert_close(logits(adapted, ids()), wanted, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits(model.hf, ids()), wanted, atol=1e-2)


def test_others_can_read_what_was_exported(tmp_path: Path) -> None:
    model = tiny("llama")
    for umask, file, folder in ((0o022, 0o644, 0o755), (0o027, 0o640, 0o750)):
        before = os.umask(umask)
        try:
            delta = random_delta(model.hf, [1])
            export_peft(delta, tmp_path / f"adapter{umask}", model)
            export_merged(model, delta, tmp_path / f"merged{umask}")
            export_gguf(delta, tmp_path / f"edit{umask}.gguf", model)
        finally:
            os.umask(before)
        for out in (tmp_path / f"adapter{umask}", tmp_path / f"merged{umask}"):
            assert out.stat().st_mode & 0o777 == folder
            assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {file}
        assert (tmp_path / f"edit{umask}.gguf").stat().st_mode & 0o777 == file


@pytest.mark.parametrize("rank", [1, 17, 300])
def test_vllm_takes_the_adapter(tmp_path: Path, rank: int) -> None:
    """What vLLM's PEFTHelper and LoRAModel ask of a configuration and of the tensors' names."""
    model = tiny("llama")
    down = model.layers[1].down
    generator = torch.Generator().manual_seed(0)
    from goldenlayers.delta import LowRank

    wide = LowRank(
        torch.randn(down.out_features, rank, generator=generator),
        torch.randn(down.in_features, rank, generator=generator),
    )
    done = export_peft(WeightDelta({down.parameter_name: wide}), tmp_path / "a", model)
    config = json.loads((done.path / "adapter_config.json").read_text())
    assert config["bias"] == "none" and not config["modules_to_save"]
    assert not config["use_dora"] and not config["use_rslora"]
    assert config["lora_alpha"] / config["r"] == 1
    assert done.vllm_rank is not None and config["r"] <= done.vllm_rank <= 512
    assert f"--max-lora-rank {done.vllm_rank}" in (done.path / "README.md").read_text()
    with safe_open(done.path / "adapter_model.safetensors", framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a mapping
            prefix, suffix = "base_model.model.", name.split(".")[-2]
            assert name.startswith(prefix) and suffix in ("lora_A", "lora_B")
            path = name.removeprefix(prefix).rsplit(".", 2)[0]
            assert path in config["target_modules"] and path.split(".")[-1] == "down_proj"


def test_only_an_earlier_export_is_replaced(tmp_path: Path) -> None:
    model = Model.wrap(build("llama"), byte_level_bpe(), "tiny")
    first, second = (random_delta(model.hf, [layer]) for layer in (1, 2))
    out = tmp_path / "out"
    export_peft(first, out, model)
    with pytest.raises(UserError, match="add --overwrite"):
        export_peft(second, out, model)
    export_merged(model, second, out, overwrite=True)
    assert not (out / "adapter_config.json").exists() and (out / "config.json").exists()
    export_peft(second, out, model, overwrite=True)
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["target_modules"] == ["model.layers.2.mlp.down_proj"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"no export wrote: notes\.txt"):
        export_peft(first, out, model, overwrite=True)
    (out / "notes.txt").unlink()
    (out / "sub").mkdir()
    with pytest.raises(UserError, match="no export wrote: sub"):
        export_peft(first, out, model, overwrite=True)
    (out / "sub").rmdir()
    (out / "goldenlayers.json").write_text('{"format": "other", "files": ["config.json"]}')
    with pytest.raises(UserError, match="no export of ours"):
        export_peft(first, out, model, overwrite=True)
    assert json.loads((out / "adapter_config.json").read_text()) == config


def test_what_is_no_export_stays(tmp_path: Path) -> None:
    model = Model.wrap(build("llama"), byte_level_bpe(), "tiny")
    delta = random_delta(model.hf, [1])
    (tmp_path / "folder").mkdir()
    (tmp_path / "file.gguf").write_text("GGUF")
    export_peft(delta, tmp_path / "out", model)
    (tmp_path / "link").symlink_to(tmp_path / "out")
    for name in ("folder", "link", "file.gguf"):
        with pytest.raises(UserError, match=f"{name} is there already, and it"):
            export_peft(delta, tmp_path / name, model, overwrite=True)
        with pytest.raises(UserError, match="is there already"):
            refuse_place(tmp_path / name)
    with pytest.raises(UserError, match="is there already, and it"):
        export_gguf(delta, tmp_path / "file.gguf", model, overwrite=True)
    assert (tmp_path / "file.gguf").read_text() == "GGUF"
    done = export_gguf(delta, tmp_path / "edit.gguf", model).path
    before = done.read_bytes()
    with pytest.raises(UserError, match="add --overwrite"):
        export_gguf(delta, done, model)
    export_gguf(delta * 2.0, done, model, overwrite=True)
    assert done.read_bytes() != before
    assert not list(tmp_path.glob("*.part"))
