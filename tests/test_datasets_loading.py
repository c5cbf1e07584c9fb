"""Names, paths, limits, broken files, and the hub."""

from __future__ import annotations

import hashlib
import json
import sys
from types import SimpleNamespace

import pytest

from goldenlayers.datasets import list_datasets, load_facts
from goldenlayers.datasets.arrow import parse_address
from goldenlayers.errors import DataError, UserError


def row(i: int) -> dict:
    return {"id": str(i), "subject": f"s{i}", "prompt": f"s{i} is", "target_new": "x"}


@pytest.fixture
def lines(tmp_path):
    path = tmp_path / "facts.jsonl"
    path.write_text("".join(json.dumps(row(i)) + "\n" for i in range(40)), encoding="utf-8")
    return path


def refused(match: str, *args, **options) -> UserError:
    with pytest.raises(UserError, match=match) as caught:
        load_facts(*args, **options)
    return caught.value


def test_starter_is_the_default():
    facts = load_facts(limit=5)
    assert (facts.name, facts.source, facts.format, len(facts)) == (
        "starter",
        "starter",
        "jsonl",
        5,
    )
    assert facts == load_facts("starter", limit=5, seed=0)


def test_the_ways_to_name_a_file(lines):
    plain = load_facts(lines)
    assert plain.sha256 == hashlib.sha256(lines.read_bytes()).hexdigest()
    assert plain.name == "facts" and plain.source == str(lines)
    for same in (
        load_facts(str(lines)),
        load_facts(f"jsonl:{lines}"),
        load_facts(f"JSONL:{lines}"),
        load_facts(path=lines),
        load_facts("auto", path=lines),
        load_facts("jsonl", path=str(lines)),
    ):
        assert same == plain


def test_limit_is_a_seeded_sample_in_file_order(lines):
    whole = load_facts(lines)
    some = load_facts(lines, limit=10)
    assert some == whole.sample(10, seed=0) and some.facts != whole.facts[:10]
    assert [int(f.id) for f in some] == sorted(int(f.id) for f in some)
    assert load_facts(lines, limit=10, seed=1).facts != some.facts
    assert load_facts(lines, limit=10, seed=None).facts == whole.facts[:10]
    assert load_facts(lines, limit=1000).facts == whole.facts
    refused("limit is 0", lines, limit=0)


def test_rows_beyond_the_limit_are_checked_too(lines):
    lines.write_text(lines.read_text() + "\n" + json.dumps(row(1) | {"subject": "S1"}) + "\n")
    error = refused("line|row 42", lines, limit=1)
    assert isinstance(error, DataError) and error.row == 42 and "--skip-invalid" in str(error)
    assert len(load_facts(lines, limit=1, skip_invalid=True)) == 1


def test_the_first_error_tells_how_many_there_are(lines):
    bad = [row(100 + i) | {"target_new": ""} for i in range(3)]
    text = json.dumps(bad[0]) + "\n" + lines.read_text() + "\n".join(map(json.dumps, bad[1:]))
    lines.write_text(text)
    error = refused("row 1, field 'target_new': .* 3 of 43 rows are invalid", lines)
    assert "skip_invalid=True" in str(error)
    kept = load_facts(lines, skip_invalid=True)
    assert len(kept) == 40 and [e.row for e in kept.skipped] == [1, 42, 43]
    assert kept.skipped_reasons() == {"target_new is empty": 3}
    assert "3 × target_new is empty (row 1, 42, 43)" in kept.summary()


def test_no_valid_row_at_all(lines):
    lines.write_text(json.dumps(row(1) | {"subject": "z"}))
    refused("has no valid fact; its first error: .*row 1", lines, skip_invalid=True)


def test_missing_files_and_wrong_names(lines, tmp_path):
    refused("there is no file .*fact.jsonl.*Did you mean '?.*facts.jsonl", tmp_path / "fact.jsonl")
    refused("does not exist either", tmp_path / "no" / "facts.jsonl")
    refused(r"is a directory\. Expected a file, such as facts.jsonl in it", tmp_path)
    refused("'countrfact' is not a known format.*'counterfact'", "countrfact", path=lines)
    refused("'countrfact' is not a known format.*'counterfact'", f"countrfact:{lines}")
    refused("'countrfact' is neither a built-in.*'counterfact'", "countrfact")
    refused("'mquake' is a format, not a file.*mquake:PATH", "mquake")
    refused("there is no file", f"mquake:{tmp_path / 'none.json'}")
    refused("has no name", " ")
    refused("could not be read|no file", "~nobody-of-that-name/f.json")
    refused("could not be read|no file", "f\0.json")
    refused("could not be read|no file", "x" * 5000 + ".json")


def content(tmp_path, raw: bytes | str):
    path = tmp_path / "f.json"
    path.write_bytes(raw.encode() if isinstance(raw, str) else raw)
    return path


@pytest.mark.parametrize(
    ("raw", "match"),
    [
        (b"", "is empty"),
        (b" \n \n", "is empty"),
        (b"[]", "is an empty list"),
        (b"\xef\xbb\xbf", "is empty"),
        ('[{"a": 1},\n {"b" 2}]', r"broken JSON at line 2, column 7"),
        ('[{"a": "x"}, {"b": "y', "cut off"),
        ('[{"a": "x"},', "cut off"),
        ('{"a": "x"', "broken JSON at line 1, column 10.*cut off"),
        ('{\n"a": "x",\n"b" 3\n}', "broken JSON at line 3, column 5"),
        ("[" * 100_000, "cannot be read"),
        ("[" + "9" * 5000 + "]", "its rows are no objects"),
        (
            "subject,prompt\nx,y",
            "no row has 'target_new' .columns of its first line: subject, prompt",
        ),
        ("a,a is,x\nb,b is,y", "its first line names no field of one"),
        ("one two\nthree", "nor a table: it begins with 'one two'"),
        ('"text"', "neither a JSON array"),
        ('[{"a": "café"}]'.encode("latin-1"), "is not UTF-8 text: line 1"),
        ('[{"a": "b"}]'.encode("utf-16")[:-1], "is not UTF-16 text"),
        (b"PK\x03\x04 and so on", "is a ZIP archive or an Excel workbook"),
        ("[1, 2]", "in no format known here"),
        ("[{}]", "in no format known here"),
    ],
)
def test_files_that_are_no_data(raw, match, tmp_path):
    path = content(tmp_path, raw)
    error = refused(match, path)
    assert str(path) in str(error)
    refused(match, path, skip_invalid=True)


def test_byte_order_mark_blank_lines_windows_breaks_and_one_object(tmp_path):
    first, second = json.dumps(row(1)), json.dumps(row(2))
    raw = "\ufeff" + first + "\r\n\r\n" + second + "\r\n"
    assert [f.id for f in load_facts(content(tmp_path, raw))] == ["1", "2"]
    assert len(load_facts(content(tmp_path, json.dumps(row(1), indent=2)))) == 1
    assert len(load_facts(content(tmp_path, first))) == 1


def test_broken_lines_are_row_errors(tmp_path):
    path = content(tmp_path, "\n".join([json.dumps(row(1)), '{"a": ,}', json.dumps(row(2)), '{"a']))
    error = refused("row 2: broken JSON at column 7", path)
    assert isinstance(error, DataError) and "2 of 4 rows" in str(error)
    kept = load_facts(path, skip_invalid=True)
    assert len(kept) == 2 and kept.skipped_reasons() == {"broken JSON": 2}
    assert "cut off" in str(kept.skipped[1])


def test_a_row_that_is_no_object(tmp_path):
    path = content(tmp_path, json.dumps([row(1), "text", row(2)]))
    error = refused("row 2: the row is not an object", path)
    assert isinstance(error, DataError)
    assert len(load_facts(path, skip_invalid=True)) == 2


def test_half_a_character_is_a_row_error(tmp_path):
    path = content(tmp_path, json.dumps([row(1), row(2) | {"target_new": "a\ud800"}]))
    refused("row 2, field 'target_new': .*half a character", path)


def test_list_datasets_can_all_be_named():
    infos = list_datasets()
    assert infos[0].name == "starter" and not infos[0].needs_path
    assert len({info.name for info in infos}) == len(infos) >= 10
    assert all(info.title for info in infos)


# The hub ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("o/n", ("o/n", None, None)),
        ("o/n:test", ("o/n", None, "test")),
        ("o/n:train[:100]", ("o/n", None, "train[:100]")),
        ("o/n:zsre", ("o/n", "zsre", None)),
        ("o/n:zsre:test", ("o/n", "zsre", "test")),
        ("o/n::mine", ("o/n", None, "mine")),
        ("o/n:zsre:test[5:10]", ("o/n", "zsre", "test[5:10]")),
    ],
)
def test_hub_addresses(address, parts):
    assert parse_address(address) == parts


@pytest.fixture
def hub(monkeypatch):
    """Stands for the package `datasets`; its rows have None where a record lacks a field."""
    calls = []

    def load_dataset(name, config=None, split=None):
        calls.append((name, config, split))
        if name == "o/gone":
            raise FileNotFoundError("no such data set\nlong story")
        record = {
            "subject": "Ada",
            "prompt": "Ada comes from",
            "target_new": "Chad",
            "ground_truth": ["Mali"],
            "rephrase_prompt": None,
            "portability": {"Reasoning": None, "Subject_Aliasing": []},
            "locality": {"K": {"prompt": ["P"], "ground_truth": [["A"]]}},
        }
        rows = [record, record | {"subject": "ada"}] if name == "o/bad" else [record]
        rows = [] if name == "o/empty" else rows
        if split is None:
            return {"train": rows} if name == "o/one" else {"train": rows, "test": rows}
        return rows

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return calls


def test_hub_rows_are_read_like_a_files(hub):
    facts = load_facts("hub:o/n:cfg:test")
    assert hub == [("o/n", "cfg", "test")]
    assert (facts.name, facts.source) == ("o/n", "hub:o/n:cfg:test")
    assert facts[0].target_old == "Mali" and facts[0].portability == ()
    assert [(p.prompt, p.answer, p.kind) for p in facts[0].locality] == [("P", "A", "K")]
    assert facts.sha256 == load_facts("hub:o/one").sha256 and len(facts.sha256) == 64


def test_hub_errors(hub):
    refused("has the splits test, train.*hub:o/n:test", "hub:o/n")
    refused(r"could not be loaded from the hub \(no such data set\)", "hub:o/gone:test")
    refused("is empty", "hub:o/empty:test")
    error = refused("hub:o/bad:test, row 2, field 'subject'", "hub:o/bad:test")
    assert isinstance(error, DataError)
    for address in ("hub:", "hub::x", "hub:a:b:c:d"):
        refused("not an address", address)


def test_without_the_extra_the_install_command_is_given(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused(r"pip install 'goldenlayers\[hub\]'", "hub:o/n")


def test_importing_the_readers_imports_nothing_heavy():
    import subprocess

    code = (
        "import sys, goldenlayers.datasets as d; d.load_facts(limit=1); "
        "print([m for m in ('torch', 'transformers', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
