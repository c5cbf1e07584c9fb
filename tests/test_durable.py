"""Rows and files after torn writes, full disks and odd values."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from disks import room_for

from goldenlayers import durable, records
from goldenlayers.errors import UserError


@dataclass
class Setting:
    rate: float
    where: Path


def test_plain_values_are_strict_json():
    value = {
        1: float("nan"),
        "a": (np.float32(0.5), np.int64(3), np.array([1.0, np.inf])),
        "b": Setting(float("-inf"), Path("x/y")),
        "c": [True, None, "é", np.bool_(False), np.str_("s")],
    }
    assert json.loads(records.json_text(value)) == {
        "1": None,
        "a": [0.5, 3, [1.0, None]],
        "b": {"rate": None, "where": "x/y"},
        "c": [True, None, "é", False, "s"],
    }
    with pytest.raises(TypeError, match="set cannot be written"):
        records.plain({"a": {1, 2}})


def rows_file(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    "torn",
    [b'{"a": 3', b"{", b'{"a": 3, "b": "\xc3', b"nul", b"\x00\x00\x00\x00", b'{"a":\n', b"3"],
)
def test_a_torn_last_line_is_dropped_and_cut_before_the_next_append(tmp_path, torn):
    path = rows_file(tmp_path, b'{"a": 1}\n{"a": 2}\n' + torn)
    assert durable.read_rows(path) == [{"a": 1}, {"a": 2}]
    durable.mend_tail(path)
    durable.append_rows(path, [{"a": 4}])
    assert path.read_bytes() == b'{"a": 1}\n{"a": 2}\n{"a": 4}\n'


def test_every_cut_of_a_file_leaves_a_prefix_of_its_rows(tmp_path):
    rows = [{"fact": f"é{i}", "score": i / 3, "text": 'a"}\n{'} for i in range(4)]
    path = tmp_path / "rows.jsonl"
    durable.append_rows(path, rows)
    whole = path.read_bytes()
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        kept = durable.read_rows(path)
        assert kept == rows[: len(kept)]
        assert len(kept) >= whole[:cut].count(b"\n")
        durable.mend_tail(path)
        durable.append_rows(path, rows[len(kept) :])
        assert path.read_bytes() == whole


def test_a_broken_line_in_the_middle_is_an_error_with_its_number(tmp_path):
    path = rows_file(tmp_path, b'{"a": 1}\n\n{"a": \n{"a": 3}\n')
    with pytest.raises(UserError, match="line 3: a broken row"):
        durable.read_rows(path)
    with pytest.raises(UserError, match="line 3"):
        durable.mend_tail(path)
    assert path.read_bytes() == b'{"a": 1}\n\n{"a": \n{"a": 3}\n'
    with pytest.raises(UserError, match="could not be read"):
        durable.read_rows(tmp_path / "none.jsonl")


@pytest.mark.parametrize("stop", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
def test_a_batch_cut_short_is_taken_back(tmp_path, monkeypatch, stop):
    path = tmp_path / "rows.jsonl"
    durable.append_rows(path, [{"a": 1}])
    write, calls = os.write, []

    def short(descriptor, data):
        if calls:
            raise stop
        calls.append(1)
        return write(descriptor, data[:5])

    monkeypatch.setattr(os, "write", short)
    expected = UserError if isinstance(stop, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        durable.append_rows(path, [{"a": 2}, {"a": 3}])
    monkeypatch.undo()
    assert calls and path.read_bytes() == b'{"a": 1}\n'


def test_a_full_disk_is_said_plainly(tmp_path):
    path = tmp_path / "rows.jsonl"
    durable.append_rows(path, [{"a": 1}])
    with room_for(12), pytest.raises(UserError, match="the disk is full"):
        durable.append_rows(path, [{"a": 1}])
    assert path.read_bytes() == b'{"a": 1}\n'
    with room_for(12), pytest.raises(UserError, match="the disk is full"):
        durable.write_text(path, "x" * 20)
    assert path.read_bytes() == b'{"a": 1}\n' and list(tmp_path.iterdir()) == [path]


def test_write_text_is_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    durable.write_text(path, "old")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="disk is full"):
        durable.write_text(path, "new")
    monkeypatch.undo()
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(UserError, match="could not be written"):
        durable.write_text(tmp_path / "absent" / "x", "new")


def test_what_is_written_in_place_of_a_file_or_folder_is_whole_or_not_there(tmp_path):
    path, folder = tmp_path / "file", tmp_path / "folder"
    with durable.in_place_of(path) as part:
        part.write_text("old")
        assert not path.exists()
    for _ in range(2):
        with pytest.raises(KeyError), durable.in_place_of(path) as part:
            part.write_text("half")
            raise KeyError
        assert path.read_text() == "old"
        with pytest.raises(KeyError), durable.in_place_of(folder) as part:
            part.mkdir()
            (part / "half").touch()
            raise KeyError
        assert list(tmp_path.iterdir()) == [path]
    with durable.in_place_of(folder) as part:
        part.mkdir()
        (part / "whole").touch()
    assert [item.name for item in folder.iterdir()] == ["whole"]
    for one in (path, folder, tmp_path / "none"):
        durable.discard(one)
    assert not list(tmp_path.iterdir())
