"""Deltas on disk: what is read back is what was saved, or it is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from delta_damage import outcomes
from deltas import low
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from goldenlayers.delta import Dense, LowRank, WeightDelta
from goldenlayers.delta.files import digest, seal
from goldenlayers.errors import UserError


def saved(folder: Path, **about: Any) -> WeightDelta:
    delta = WeightDelta(
        {"a.weight": low(6, 9, 2, 0), "b.weight": Dense(low(4, 5, 4, 1).dense)},
        base_fingerprint="f" * 64,
        base_name="tiny",
        method="rome",
        layers=(1, 4),
        facts=({"id": "1", "subject": "Zoë", "prompt": "Zoë's tongue is"},),
        settings={"steps": 20, "lr": 0.5, "prefixes": ("a", "b")},
        **about,
    )
    delta.save(folder)
    return delta


@pytest.mark.parametrize("where", ["", "delta.safetensors", "delta.json"])
def test_round_trip(tmp_path: Path, where: str) -> None:
    delta = saved(tmp_path / "run")
    again = WeightDelta.load(tmp_path / "run" / where)
    for name, change in delta.changes.items():
        loaded = again.changes[name]
        if isinstance(change, LowRank) and isinstance(loaded, LowRank):
            assert torch.equal(change.left, loaded.left)
            assert torch.equal(change.right, loaded.right)
        else:
            assert torch.equal(change.dense, loaded.dense) and type(change) is type(loaded)
    assert (again.base_fingerprint, again.base_name, again.method, again.layers) == (
        "f" * 64,
        "tiny",
        "rome",
        (1, 4),
    )
    assert again.facts == delta.facts and again.created_with == delta.created_with
    assert again.settings["prefixes"] == ["a", "b"] and again.settings["lr"] == 0.5
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        "delta.json",
        "delta.safetensors",
    ]


def test_round_trip_keeps_dtype_and_empty_factors(tmp_path: Path) -> None:
    delta = WeightDelta(
        {
            "h.weight": low(6, 9, 2, 0, torch.bfloat16),
            "d.weight": low(6, 9, 2, 0, torch.float64),
            "e.weight": LowRank(torch.zeros(3, 0), torch.zeros(2, 0)),
        },
        settings={"nan": float("nan"), "path": Path("x")},
    )
    delta.save(tmp_path)
    again = WeightDelta.load(tmp_path)
    for name in delta.changes:
        assert torch.equal(again.dense(name), delta.dense(name))
        assert cast(LowRank, again.changes[name]).left.dtype == (
            cast(LowRank, delta.changes[name]).left.dtype
        )
    assert again.settings == {"nan": None, "path": "x"}


def test_equal_deltas_are_equal_files(tmp_path: Path) -> None:
    for folder in "abc":
        saved(tmp_path / folder)
    for name in ("delta.safetensors", "delta.json"):
        assert len({(tmp_path / f / name).read_bytes() for f in "abc"}) == 1


def test_one_rome_edit_on_smollm2_is_small(tmp_path: Path) -> None:
    edit = WeightDelta(
        {"model.layers.5.mlp.down_proj.weight": low(576, 1536, 1, 0)},
        base_fingerprint="f" * 64,
        facts=[{"subject": "s" * 40, "prompt": "p" * 200, "target_new": "t" * 40}],
    )
    edit.save(tmp_path)
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 64 * 1024
    assert edit.nbytes == (576 + 1536) * 4


def test_nothing_is_overwritten_or_left_in_halves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    delta = saved(tmp_path)
    with pytest.raises(UserError, match="holds a delta already"):
        delta.save(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def full(_fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("goldenlayers.delta.files.os.fsync", full)
    with pytest.raises(UserError, match="No space left"):
        (delta * 2).save(tmp_path, overwrite=True)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    monkeypatch.undo()
    (delta * 2).save(tmp_path, overwrite=True)
    assert WeightDelta.load(tmp_path).settings["scale"] == 2.0
    with pytest.raises(UserError, match="could not be written"):
        delta.save(tmp_path / "delta.json")


def _rewrite(
    file: Path,
    tensors: dict[str, Tensor | None] | None = None,
    record: dict[str, Any] | None = None,
) -> None:
    """Write a delta file again with other tensors (None: without) or another record."""
    with safe_open(str(file), framework="pt") as stream:
        text = json.loads(stream.metadata()["goldenlayers.delta"])
    held = load_file(file)
    for name, tensor in (tensors or {}).items():
        held.pop(name, None)
        if tensor is not None:
            held[name] = tensor
    text.update(record or {})
    text["sha256"] = seal(text, held)
    save_file(held, file, {"goldenlayers.delta": json.dumps(text)})


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    def fresh(name: str) -> Path:
        saved(tmp_path / name)
        (tmp_path / name / "delta.json").unlink()
        return tmp_path / name / "delta.safetensors"

    def refused(file: Path, message: str) -> None:
        with pytest.raises(UserError, match=message):
            WeightDelta.load(file)

    refused(tmp_path / "nowhere", "there is no delta")
    refused(tmp_path, "there is no delta")
    torn = fresh("torn")
    torn.write_bytes(torn.read_bytes()[:-9])
    refused(torn, "no readable safetensors")
    flipped = fresh("flipped")
    data = bytearray(flipped.read_bytes())
    data[-1] ^= 0x10
    flipped.write_bytes(data)
    refused(flipped, "its hash differs")
    (tmp_path / "text.safetensors").write_text("hello")
    refused(tmp_path / "text.safetensors", "no readable safetensors")
    save_file({"x": torch.ones(2)}, tmp_path / "other.safetensors")
    refused(tmp_path / "other.safetensors", "not a delta")
    # What carries a right hash but makes no sense: made by another program, or on purpose.
    nan = fresh("nan")
    _rewrite(nan, {"a.weight.left": torch.full((6, 2), torch.nan)})
    refused(nan, "NaN")
    shape = fresh("shape")
    _rewrite(shape, {"a.weight.left": torch.ones(7, 2)})
    refused(shape, r"\[7, 9\]")
    columns = fresh("columns")
    _rewrite(columns, {"a.weight.left": torch.ones(6, 3)})
    refused(columns, "3 and 2 columns")
    missing = fresh("missing")
    _rewrite(missing, {"a.weight.left": None})
    refused(missing, "lacks its tensor")
    extra = fresh("extra")
    _rewrite(extra, {"c.weight.left": torch.ones(1, 1)})
    refused(extra, "4 tensors, its record names 3")
    about = {"kind": "low-rank", "shape": [6, 9], "rank": 2, "norm": 1.0}
    for name, record, message in (
        ("schema", {"schema": 9}, "schema 9"),
        ("fields", {"base_fingerprint": None}, "base_fingerprint"),
        ("layers", {"layers": ["x"]}, "layers"),
        ("facts", {"facts": [1]}, "facts"),
        ("kinds", {"parameters": {"a.weight": about | {"kind": "odd"}}}, "odd"),
        ("list", {"parameters": []}, "parameters"),
        ("rank", {"parameters": {"a.weight": about | {"rank": 3}}}, "of rank 3"),
        ("norm", {"parameters": {"a.weight": about | {"norm": "long"}}}, "norm"),
        ("size", {"parameters": {"a.weight": about | {"shape": [6, 1 << 40]}}}, "the shape"),
        ("name", {"parameters": {"a\n" + "b" * 5000: about}}, "no name of a parameter"),
        ("text", {"facts": [{"subject": 7}]}, "fact 1 of its record: 'subject' is 7"),
        ("half", {"method": "\ud800"}, "lone surrogate"),
    ):
        file = fresh(name)
        _rewrite(file, record=record)
        refused(file, message)


def test_a_record_of_another_delta_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / "a")
    record = tmp_path / "a" / "delta.json"
    text = json.loads(record.read_text())
    record.write_text(json.dumps({**text, "base_fingerprint": "0" * 64}))
    with pytest.raises(UserError, match=r"do not belong together: they differ in .base_f"):
        WeightDelta.load(tmp_path / "a")
    record.write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        WeightDelta.load(tmp_path / "a")
    record.unlink()
    assert WeightDelta.load(tmp_path / "a").method == "rome"


def test_damaged_deltas_are_refused_or_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    found = outcomes(240, seed=1)
    assert set().union(*found.values()) <= {"refused", "same"}
    assert all(ends["refused"] > ends["same"] for ends in found.values())
    # The record under the hash is what does it: without, other deltas are loaded.
    monkeypatch.setattr("goldenlayers.delta.files.seal", lambda _record, tensors: digest(tensors))
    assert outcomes(60, seed=1)["record"]["other"]


def test_odd_files_are_refused_without_being_read(tmp_path: Path) -> None:
    def refused(path: Path, message: str) -> None:
        with pytest.raises(UserError, match=message) as caught:
            WeightDelta.load(path)
        assert len(str(caught.value)) < 1000

    delta = saved(tmp_path / "run")
    record, tensors = tmp_path / "run" / "delta.json", tmp_path / "run" / "delta.safetensors"
    text = record.read_bytes()
    record.unlink()
    os.mkfifo(record)
    refused(tmp_path / "run", "no plain file")
    record.unlink()
    record.symlink_to("/dev/zero")
    refused(tmp_path / "run", "no plain file")
    record.unlink()
    record.touch()
    os.truncate(record, 10 << 30)  # takes no space
    refused(tmp_path / "run", "too large")
    record.unlink()
    record.mkdir()
    refused(tmp_path / "run", "no plain file")
    record.rmdir()
    for name in ("delta.safetensors", "delta.json"):  # as in the hub's cache
        (tmp_path / "links").mkdir(exist_ok=True)
        (tmp_path / "links" / name).symlink_to(tmp_path / "run" / name)
    record.write_bytes(text)
    assert WeightDelta.load(tmp_path / "links").facts == delta.facts
    tensors.unlink()
    os.mkfifo(tensors)
    refused(tmp_path / "run", "no plain file")
    refused(tmp_path / ("x" * 5000), "there can be no delta")
    refused(tmp_path / "nul\0", "there can be no delta|there is no delta")


def test_deltas_of_older_versions_are_read(tmp_path: Path) -> None:
    delta = saved(tmp_path)
    (tmp_path / "delta.json").unlink()
    file = tmp_path / "delta.safetensors"
    with safe_open(str(file), framework="pt") as stream:
        text = json.loads(stream.metadata()["goldenlayers.delta"])
    held = load_file(file)
    del text["base_dtype"]
    text.update(schema=1, sha256=digest(held))
    save_file(held, file, {"goldenlayers.delta": json.dumps(text)})
    again = WeightDelta.load(file)
    assert again.facts == delta.facts and again.base_dtype == ""


def test_what_could_not_be_read_again_is_not_saved(tmp_path: Path) -> None:
    (tmp_path / ".delta.json.123.part").write_text("left by a killed save")
    fine = WeightDelta({"a.weight": low(6, 9, 2, 0)})
    fine.save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["delta.json", "delta.safetensors"]
    for odd in (
        WeightDelta(fine.changes, method="half \ud800"),
        WeightDelta(fine.changes, layers=[-1]),
        WeightDelta(fine.changes, facts=[{"subject": 3}]),
        WeightDelta({"a\nb": low(6, 9, 2, 0)}),
    ):
        with pytest.raises(UserError, match="cannot be saved"):
            odd.save(tmp_path / "new")
    assert not (tmp_path / "new").exists()
