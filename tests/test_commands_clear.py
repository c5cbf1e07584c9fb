"""``golden edit`` with names to stay clear of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from families import tiny

from goldenlayers.cli import main
from goldenlayers.editors import clearing


def golden(folder: Path, capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str]:
    flags = (
        "--subject",
        "France",
        "--prompt",
        "The capital of {} is",
        "--target",
        "Rome",
        "--layer",
        1,
    )
    quick = ("--layer", 1, "--statistics", "none", "--set", "steps", 3, "prefixes", 1)
    capsys.readouterr()
    status = main([str(a) for a in ("edit", folder / "model", *flags, *quick, *arguments)])
    printed = capsys.readouterr()
    return status, printed.out + printed.err


def test_names_are_given_by_flag_and_file_and_recorded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clearing, "pool", lambda: ("Italy", "Spain", "Peru", "FRANCE"))
    monkeypatch.setenv("GOLDENLAYERS_CACHE", str(tmp_path / "cache"))
    model = tiny("gpt2")
    for part in (model.hf, model.tokenizer):
        part.save_pretrained(tmp_path / "model")
    file, out = tmp_path / "names.txt", tmp_path / "run"
    file.write_text("\ufeffItaly\n\n  Oz \nSpain\n", "utf-8")
    names = ("--clear-of", "Spain", "Atlantis", "--clear-of-file", file)
    status, said = golden(tmp_path, capsys, "--method", "clear-rome", *names, "--out", out)
    assert status == 0, said
    (row,) = json.loads((out / "delta.json").read_text("utf-8"))["facts"]
    used = {"Italy", "Spain", "Peru", "Oz", "Atlantis"}
    assert row["neighbours"] == len(used) and "overlap" not in row
    assert f"Kept clear of {len(used)} names." in said
    settings = yaml.safe_load((out / "config.yaml").read_text("utf-8"))["settings"]
    assert settings["clear_of"] == ["Spain", "Atlantis", "Italy", "Oz"]
    assert settings["clear_of_file"] is None  # all that a repetition needs is in the record
    assert main(["run", str(out), "--out", str(tmp_path / "again")]) == 0
    weights = [(run / "delta.safetensors").read_bytes() for run in (out, tmp_path / "again")]
    assert weights[0] == weights[1]
    few = ("--method", "memit", "--set", "neighbours", 3, "steps", 3, "prefixes", 1)
    status, said = golden(tmp_path, capsys, *few)
    assert status == 0 and "Kept clear of 3 names." in said
    fact = ("--subject", "France", "--prompt", "The capital of {} is", "--target", "Rome")
    how = ("--layer", 1, "--statistics", "none", "--method", "ft-l", *names)
    status = main([str(a) for a in ("edit", tmp_path / "model", *fact, *how)])
    said = capsys.readouterr().err
    assert status == 2 and "ft-l cannot stay clear of names" in said
    for content, what in (
        (b"\n \n", "empty"),
        (b"\xff\xfe\x00", "UTF-8"),
        (b"a" * 1_000_001, "larger"),
    ):
        file.write_bytes(content)
        status, said = golden(tmp_path, capsys, *names)
        assert status == 2 and what in said and "Traceback" not in said
