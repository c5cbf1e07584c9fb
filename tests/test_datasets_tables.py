"""CSV, TSV, gzip, parquet, saved folders and wrapped JSON: the facts are those of plain JSON."""

from __future__ import annotations

import csv
import dataclasses
import gzip
import io
import json
import os
import socket
import sys
from pathlib import Path

import pytest
from test_datasets_formats import RECORDS, records_of

from goldenlayers.datasets import FactSet, load_facts, reading
from goldenlayers.datasets.records import loads
from goldenlayers.errors import DataError, UserError
from goldenlayers.facts import Probe

HEADER = "subject,prompt,target_new\n"


def saved(tmp_path: Path, raw: str | bytes, name: str = "f.csv") -> Path:
    path = tmp_path / name
    path.write_bytes(raw.encode() if isinstance(raw, str) else raw)
    return path


def read(tmp_path: Path, raw: str | bytes, **options) -> FactSet:
    return load_facts(saved(tmp_path, raw), **options)


def refused(tmp_path: Path, raw: str | bytes, match: str) -> UserError:
    with pytest.raises(UserError, match=match) as caught:
        read(tmp_path, raw)
    return caught.value


def as_table(records: list[dict], delimiter: str = ",") -> str:
    """The records as a spreadsheet's export: lists and objects as JSON, nothing for null."""

    def cell(value: object) -> object:
        return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else value

    names = list(dict.fromkeys(name for record in records for name in record))
    out = io.StringIO(newline="")
    writer = csv.writer(out, delimiter=delimiter)
    writer.writerow(names)
    writer.writerows([cell(record.get(name)) for name in names] for record in records)
    return out.getvalue()


def plain(facts: FactSet) -> list[tuple]:
    """All of the facts but ids made from row numbers."""
    return [
        tuple(getattr(f, field.name) for field in dataclasses.fields(f) if field.name != "id")
        for f in facts
    ]


def parquet(records: list[dict]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    # Parquet knows no object without fields.
    filled = [{k: v for k, v in record.items() if v != {}} for record in records]
    out = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(filled), out)
    return out.getvalue().to_pybytes()


CONTAINERS = {
    "csv": as_table,
    "tsv": lambda records: as_table(records, "\t"),
    "semicolons": lambda records: as_table(records, ";"),
    "bars": lambda records: as_table(records, "|"),
    "excel": lambda records: as_table(records, "\t").encode("utf-16"),
    "mark": lambda records: as_table(records).encode("utf-8-sig"),
    "csv.gz": lambda records: gzip.compress(as_table(records).encode()),
    "json.gz": lambda records: gzip.compress(json.dumps(records).encode()),
    "jsonl.gz": lambda records: gzip.compress("\n".join(map(json.dumps, records)).encode()),
    "utf-16": lambda records: json.dumps(records).encode("utf-16"),
    "data": lambda records: json.dumps({"version": "1", "data": records, "n": [1, 2]}),
    "facts": lambda records: json.dumps({"facts": records}),
    "deeper": lambda records: json.dumps({"meta": {"a": {}}, "data": {"test": records}}, indent=1),
    "parquet": parquet,
    "parquet.gz": lambda records: gzip.compress(parquet(records)),
}


@pytest.mark.parametrize("form", RECORDS)
def test_every_format_reads_the_same_from_every_container(form, tmp_path):
    records = records_of(form)
    wanted = load_facts(saved(tmp_path, json.dumps(records), "f.json"))
    for name, write in CONTAINERS.items():
        if name.startswith("parquet"):
            pytest.importorskip("pyarrow")
        found = read(tmp_path, write(records))
        assert (found.format, plain(found)) == (form, plain(wanted)), name


@pytest.mark.parametrize(
    "name", ["counterfact/counterfact_500.json", "KnowEdit/ZsRE/ZsRE-test-all.json"]
)
def test_a_public_file_reads_the_same_as_a_packed_table(name, tmp_path):
    shared = Path(os.environ.get("GOLDENLAYERS_SHARED", Path(__file__).parents[1] / "../shared"))
    if not (shared / "data" / name).is_file():
        pytest.skip("the public data files are not here")
    raw = (shared / "data" / name).read_bytes()
    wanted = load_facts(shared / "data" / name, skip_invalid=True)
    table = gzip.compress(as_table(loads(raw.decode())).encode(), 1)
    found = read(tmp_path, table, skip_invalid=True)
    assert found.format == wanted.format and plain(found) == plain(wanted)


# Tables -----------------------------------------------------------------------------------------


def test_a_table_of_our_own_fields(tmp_path):
    raw = (
        "Id,SUBJECT,Prompt,Target New,target-old,rephrasings,old_aliases,locality,"
        "target_old_is_generated,relation\r\n"
        'x,"Ada, L.","Ada, L. was a",poet,,"[""Of Ada"", ""By Ada""]",,'
        '"[{""prompt"": ""Q"", ""answer"": ""A""}]",TRUE,\r\n'
        "\r\n"
        ",Bob,Bob is,1945,[x,One way,B,,,r\r\n"
    )
    first, second = read(tmp_path, raw)
    assert (first.id, first.subject, first.target, first.target_old) == (
        *("x", "Ada, L.", "poet"),
        None,
    )
    assert first.rephrasings == ("Of Ada", "By Ada") and first.old_aliases == ()
    assert first.locality == (Probe("Q", "A"),) and first.target_old_is_generated
    # Numbers are text, a text that only begins like a list is one, and empty cells are missing.
    assert (second.id, second.target, second.target_old) == ("fact-4", "1945", "[x")
    assert (second.rephrasings, second.old_aliases) == (("One way",), ("B",))
    assert second.relation == "r" and second.locality == ()


def test_prompts_of_code_stay_text(tmp_path):
    rows = 'a,[1; a,2\n"{""a"": 1}","{""a"": 1}.get(",[3]\nd,d = {},{}\n'
    facts = read(tmp_path, HEADER + rows)
    assert [f.prompt for f in facts] == ["[1; a", '{"a": 1}.get(', "d = {}"]
    assert [f.target for f in facts] == ["2", "[3]", "{}"]


def test_quotes_breaks_and_unicode_separators_inside_cells(tmp_path):
    raw = HEADER + '"Ada","He said ""x"",\nAda\u2028is","y"\nBob,Bob is,z\n"Cy",Cy is\u2029,w'
    facts = read(tmp_path, raw)
    assert [f.id for f in facts] == ["fact-2", "fact-4", "fact-5"]  # lines of the file
    assert facts[0].prompt == 'He said "x",\nAda\u2028is'
    old_mac = raw.replace("\n", "\r")
    assert len(read(tmp_path, old_mac)) == 3


def test_the_line_that_excel_names_the_delimiter_in(tmp_path):
    facts = read(tmp_path, 'sep=;\nsubject;prompt;target_new\n"A;b";"A;b is, so";c\n')
    assert facts[0].subject == "A;b" and facts[0].id == "fact-3"


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("Ada,Ada, who is,x", "the row has 4 cells, the header 3"),
        ("Ada,Ada is", "the row has 2 cells, the header 3"),
        ('Ada,"Ada "is,x', "something else than ','"),
        ('Ada,"Ada is,x', "never closed"),
        ("Ada," + "x" * 140_000 + ",y", "more than 131,072 characters"),
        ("Ada,,x", "field 'prompt': the field is missing"),
        ("ada,Ada is,x", "field 'subject'.*'Ada'"),
    ],
)
def test_broken_rows_are_row_errors_with_their_line(row, says, tmp_path):
    raw = HEADER + 'Cy,"Cy\nis",x\n' + row + "\n"
    error = refused(tmp_path, raw, says)
    assert isinstance(error, DataError) and error.row == 4
    kept = read(tmp_path, raw + ("" if "never" in says else "Bob,Bob is,y\n"), skip_invalid=True)
    assert [f.subject for f in kept] == ["Cy", "Bob"][: len(kept)] and len(kept.skipped) == 1


def test_cells_that_should_hold_json(tmp_path):
    header = "subject,prompt,target_new,rephrasings,locality\n"
    for row, field in (
        ("Ada,Ada is,x,\"['a', 'b']\",", "rephrasings"),
        ('Ada,Ada is,x,"[""a""",', "rephrasings"),
        ("Ada,Ada is,x,,Paris", "locality"),
        ("Ada,Ada is,x,," + "[" * 100_000, "locality"),
    ):
        error = refused(tmp_path, header + row, "a list as JSON, in double quotes")
        assert isinstance(error, DataError) and (error.row, error.field) == (2, field)


def test_headers(tmp_path):
    refused(tmp_path, "subject,subject,prompt\na,b,c", "column 'subject' twice")
    refused(tmp_path, "Subject,subject,prompt\na,b,c", "column 'subject' twice")
    refused(tmp_path, 'subject,"prompt\na,b', "row 1: a quotation mark")
    refused(tmp_path, HEADER, "has a header and no rows")
    refused(tmp_path, HEADER + "x,y\n", "the row has 2 cells")
    # The number that pandas puts before each row, and columns that a spreadsheet leaves empty.
    facts = read(tmp_path, ",subject,prompt,target_new,,\n0,Ada,Ada is,x,,\n")
    assert facts[0].target == "x" and facts.warnings == ()
    assert "'subjct'" in str(refused(tmp_path, "subjct,prompt,target\na,a is,x", "no row has"))
    facts = read(tmp_path, "subject,prompt,target,notes\nAda,Ada is,x,mine\n")
    assert "'notes' (1 row)" in facts.warnings[0]


# Wrapped JSON -----------------------------------------------------------------------------------


def test_wrapped_json(tmp_path):
    row = RECORDS["jsonl"]
    error = refused(tmp_path, json.dumps({"data": [row, row | {"target_new": ""}]}), "row 2")
    assert isinstance(error, DataError) and error.field == "target_new"
    refused(
        tmp_path, json.dumps({"train": [row], "test": [row]}), "several lists .*'train', 'test'"
    )
    refused(tmp_path, '{"data": [{"a": 1}], "data": [{"a": 2}]}', "holds 'data' twice")
    refused(tmp_path, '{"data": []}', "in no format known")
    refused(tmp_path, '{"a":' * 300 + "1" + "}" * 300, "in no format known")
    # A record is no wrapper, though it holds a list of objects.
    assert read(tmp_path, json.dumps(row))[0].locality == (Probe("Bob comes from"),)
    del (lacking := dict(row))["subject"]
    refused(tmp_path, json.dumps(lacking), "no row has 'subject'")


# Gzip -------------------------------------------------------------------------------------------


def test_damaged_gzip_and_too_much_data(tmp_path, monkeypatch):
    packed = gzip.compress(json.dumps([RECORDS["jsonl"]]).encode())
    refused(tmp_path, packed[:-9], "is cut off")
    refused(tmp_path, packed[:20] + b"x" + packed[21:], "damaged gzip|cut off")
    refused(tmp_path, gzip.compress(packed), "gzip twice")
    assert read(tmp_path, packed).name == "f"
    assert load_facts(saved(tmp_path, packed, "facts.json.gz")).name == "facts"
    monkeypatch.setattr(reading, "LIMIT", 1 << 20)
    refused(tmp_path, gzip.compress(b" " * (5 << 20)), "more than 1 MiB")
    refused(tmp_path, b" " * (5 << 20), "more than 1 MiB")


def test_a_file_larger_than_memory_is_refused_unread(tmp_path):
    path = saved(tmp_path, "[")
    os.truncate(path, 20 << 30)  # takes no room on the disk
    with pytest.raises(UserError, match="more than 512 MiB"):
        load_facts(path)


# What is no file --------------------------------------------------------------------------------


def test_pipes_and_devices_are_refused_at_once(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    server = socket.socket(socket.AF_UNIX)
    monkeypatch.chdir(tmp_path)  # a socket's name is short
    server.bind("socket")
    for name, says in (
        (tmp_path / "pipe", "is a pipe, not a file"),
        (tmp_path / "socket", "could not be read"),
        ("/dev/zero", "is a device, not a file"),
        ("/dev/null", "is a device, not a file"),
        ("mquake:/dev/zero", "is a device, not a file"),
    ):
        with pytest.raises(UserError, match=says):
            load_facts(name)
    server.close()


@pytest.mark.parametrize("name", ["x" * 5000, "y/" * 3000, "mquake:" + "x" * 5000, "a\0b.json"])
def test_names_that_no_file_can_have(name):
    with pytest.raises(UserError) as caught:
        load_facts(name)
    assert len(str(caught.value)) < 1000


def test_a_name_that_is_no_text(tmp_path):
    path = os.fsencode(tmp_path) + b"/\xff.jsonl"
    with open(path, "w") as file:
        file.write(json.dumps(RECORDS["jsonl"]))
    for name in (os.fsdecode(path), "\ud800.json"):
        with pytest.raises(UserError, match="is not UTF-8 text"):
            load_facts(name)


# pyarrow ----------------------------------------------------------------------------------------


def test_parquet_needs_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    refused(tmp_path, b"PAR1 and so on", r"pip install 'goldenlayers\[hub\]'")


def test_damaged_parquet(tmp_path):
    pytest.importorskip("pyarrow")
    raw = parquet(records_of("jsonl") * 3)
    refused(tmp_path, raw[:-20], "could not be read by pyarrow")
    refused(tmp_path, b"PAR1" + b"\0" * 100, "could not be read by pyarrow")
    refused(
        tmp_path, parquet([{"subject": "a"}])[:4] + raw[4:][::-1], "could not be read by pyarrow"
    )


def save_to_disk(folder: Path, records: list[dict]) -> Path:
    """What ``Dataset.save_to_disk`` writes, without the library (half a second of imports)."""
    pyarrow = pytest.importorskip("pyarrow")
    folder.mkdir(parents=True)
    table = pyarrow.Table.from_pylist(records)
    for number in range(2):
        name = folder / f"data-0000{number}-of-00002.arrow"
        with pyarrow.ipc.new_stream(str(name), table.schema) as stream:
            half = (table.num_rows + 1) // 2
            stream.write_table(table.slice(number * half, half))
    names = [{"filename": f"data-0000{number}-of-00002.arrow"} for number in range(2)]
    (folder / "state.json").write_text(json.dumps({"_data_files": names, "_split": "train"}))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def test_a_folder_of_save_to_disk(tmp_path):
    records = [RECORDS["jsonl"] | {"id": str(i)} for i in range(5)]
    folder = save_to_disk(tmp_path / "mine" / "test", records)
    facts = load_facts(folder)
    assert [f.id for f in facts] == list("01234") and (facts.name, facts.format) == (
        "test",
        "jsonl",
    )
    splits = tmp_path / "mine" / "dataset_dict.json"
    splits.write_text('{"splits": ["test"]}')
    whole = load_facts(tmp_path / "mine")
    assert (whole.facts, whole.sha256) == (facts.facts, facts.sha256)
    splits.write_text('{"splits": ["train", "test"]}')
    with pytest.raises(UserError, match=r"has the splits train, test\. Choose one: .*train"):
        load_facts(tmp_path / "mine")


@pytest.mark.parametrize(
    "state",
    [
        "[]",
        "{",
        "{}",
        '{"_data_files": 3}',
        '{"_data_files": []}',
        '{"_data_files": [{}]}',
        '{"_data_files": [{"filename": "gone.arrow"}]}',
        '{"_data_files": [{"filename": "state.json"}]}',
        '{"_data_files": [{"filename": "../secret.arrow"}]}',
        '{"_data_files": [{"filename": "/dev/zero"}]}',
        '{"_data_files": [{"filename": ".."}]}',
        "[" * 100_000,
        "\ud800",
    ],
)
def test_a_saved_folder_that_is_damaged_or_points_outside(state, tmp_path):
    folder = save_to_disk(tmp_path / "mine", [RECORDS["jsonl"]])
    (tmp_path / "secret.arrow").write_bytes((folder / "data-00000-of-00002.arrow").read_bytes())
    (folder / "state.json").write_bytes(state.encode("utf-8", "surrogatepass"))
    with pytest.raises(UserError):
        load_facts(folder)
    (folder / "dataset_dict.json").write_bytes(state.encode("utf-8", "surrogatepass"))
    (folder / "state.json").unlink()
    with pytest.raises(UserError):
        load_facts(folder)


def test_what_the_library_saves_is_read(tmp_path):
    library = pytest.importorskip("datasets")
    records = [
        RECORDS["wiki-recent"] | {"subject": f"Ada{i}", "prompt": f"Of Ada{i}"} for i in range(3)
    ]
    library.Dataset.from_list(records).shuffle(seed=1).save_to_disk(str(tmp_path / "mine"))
    facts = load_facts(tmp_path / "mine")
    assert sorted(f.subject for f in facts) == ["Ada0", "Ada1", "Ada2"]
    assert facts.format == "wiki-recent" and facts[0].locality[0].answer == "female"
