"""Whatever comes from outside, reading it ends in a value or in a ``UserError``.

Hypothesis looks for what would not.

The suite tries some hundred cases of each property, the same on every run; ``make test-faults``
tries many more (GOLDENLAYERS_EXAMPLES of each).
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import os
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from families import build
from gguf_built import write_llama_gguf
from gguf_mutations import layout
from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st
from run_mutations import ODD
from test_datasets_formats import RECORDS, records_of
from tokenizers_built import byte_level_bpe

from goldenlayers import shown
from goldenlayers.commands import COMMANDS, options_of
from goldenlayers.commands.options import Role, default_settings, from_record, roles, types_of
from goldenlayers.datasets import load_facts
from goldenlayers.delta import WeightDelta
from goldenlayers.errors import UserError
from goldenlayers.facts import Fact
from goldenlayers.locating.building import RankingBuilder
from goldenlayers.locating.ranking import LayerRanking
from goldenlayers.models.gguf import check_model, read_header
from goldenlayers.prompts import JOINTS, join
from goldenlayers.records import parse_json, parse_yaml
from goldenlayers.report.figures import ranking_figure

EXAMPLES = int(os.environ.get("GOLDENLAYERS_EXAMPLES", "150"))


def many(share: float = 1.0) -> Any:
    """So many cases of a property, the same on every run; a slow one takes a share of them."""
    return settings(
        max_examples=max(5, int(EXAMPLES * share)),
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


# Characters that editors, terminals, XML and JSON stumble over come up as often as letters.
_WILD = st.sampled_from(
    "\x00\x07\x1b\x7f\x85\r\n\t\u200b\u202e\u2028\ufeff\ud800\U0001f600$\\{}<&%'\""
)
TEXTS = st.text(st.one_of(st.characters(), _WILD), max_size=30)
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), TEXTS, st.sampled_from(ODD)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXTS, inner, max_size=4)),
    max_leaves=12,
)


def safe(text: str) -> bool:
    """Whether a text is one line that a terminal can be given."""
    controls = any(ord(c) < 32 or 127 <= ord(c) < 160 for c in text)
    return not controls and all(c.isprintable() or c.isspace() for c in text)


@contextlib.contextmanager
def told() -> Iterator[None]:
    """Within it a ``UserError`` is as good an end as any, if what it says can be shown."""
    try:
        yield
    except UserError as error:
        text = str(error)
        assert text and len(text) < 4000
        assert safe(shown.shown(text))
        event("told")
    else:
        event("read")


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def _json(value: Any) -> str:
    return json.dumps(value, default=str)


# --- data files -----------------------------------------------------------------------------------


@given(form=st.sampled_from(sorted(RECORDS)), name=TEXTS, value=VALUES, data=st.data())
@many()
def test_fact_files_with_an_odd_field(folder: Path, form: str, name: str, value: Any, data: Any):
    rows = [dict(row) for row in records_of(form)]
    row = data.draw(st.sampled_from(rows))
    row[data.draw(st.sampled_from([*row, name]))] = value
    wrapped = data.draw(st.sampled_from([rows, {"data": rows}, {"x": {"facts": rows}}]))
    path = folder / "facts.json"
    path.write_text(_json(wrapped), encoding="utf-8")
    with told():
        load_facts(path)
    with told():
        load_facts(path, skip_invalid=True).summary()


@given(data=st.one_of(st.binary(max_size=300), TEXTS.map(lambda t: t.encode(errors="replace"))))
@many()
def test_fact_files_of_any_bytes(folder: Path, data: bytes):
    for name, content in (
        ("f.json", data),
        ("f.jsonl", data),
        ("f.csv", data),
        ("f.parquet", data),
    ):
        (folder / name).write_bytes(content)
        with told():
            load_facts(folder / name)
    (folder / "f.jsonl.gz").write_bytes(gzip.compress(data, 1)[: len(data) + 10])
    with told():
        load_facts(folder / "f.jsonl.gz")


@given(
    cells=st.lists(st.lists(TEXTS, max_size=6), min_size=1, max_size=4),
    delimiter=st.sampled_from(",;\t"),
)
@many()
def test_tables_of_any_cells(folder: Path, cells: list[list[str]], delimiter: str):
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter)
    writer.writerow(["subject", "prompt", "target_new", "rephrasings"])
    with contextlib.suppress(csv.Error):
        writer.writerows(cells)
    path = folder / "table.csv"
    path.write_bytes(text.getvalue().encode(errors="surrogatepass"))
    with told():
        load_facts(path)


# --- records --------------------------------------------------------------------------------------


@given(text=st.one_of(TEXTS, VALUES.map(_json), st.integers(1, 3000).map(lambda n: "[" * n)))
@many()
def test_json_and_yaml_of_any_text(text: str):
    with told():
        parse_json(text, "a file")
    with told():
        parse_yaml(text, "a file")


@given(kind=st.sampled_from([options_of(name) for name in COMMANDS]), data=st.data())
@many()
def test_settings_of_any_kind(kind: type, data: Any):
    names = st.one_of(st.sampled_from(["model", *sorted(types_of(kind))]), TEXTS)
    record = data.draw(st.dictionaries(names, VALUES, max_size=5))
    needed = data.draw(
        st.sampled_from([{}, {"model": "m", "sweep": "s", "run": "r", "facts": "f"}])
    )
    with told():
        config = from_record(kind, {**needed, **record}, {"out": Path("out")})
        asked = {name for name, role in roles(kind).items() if role is not Role.SOURCE}
        for name in asked - {"out"}:  # no record decides what is replaced, run, or written where
            assert getattr(config, name) == default_settings(kind).get(name)


@given(name=TEXTS, value=VALUES, data=st.data())
@many()
def test_rankings_with_an_odd_field(name: str, value: Any, data: Any):
    builder = RankingBuilder("lga", 3, bootstrap=5)
    builder.update({"fact": f"f{i}", "phi": [1.0, 2.0 + i, 0.5]} for i in range(3))
    record = builder.result().to_json()
    place = record if data.draw(st.booleans()) else record["layers"][0]
    place[data.draw(st.sampled_from([*place, name]))] = value
    with told():
        LayerRanking.from_json(_json(record))


# --- deltas and GGUF headers ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def delta(folder: Path) -> Path:
    from delta_damage import saved

    place = folder / "delta"
    place.mkdir()
    saved(place)
    return place


@given(data=st.data())
@many()
def test_deltas_with_damaged_bytes(delta: Path, data: Any):
    file = delta / data.draw(st.sampled_from(["delta.safetensors", "delta.json"]))
    whole = file.read_bytes()
    place = data.draw(st.integers(0, len(whole) - 1))
    put = data.draw(st.binary(max_size=8))
    damaged = whole[:place] + put + whole[place + data.draw(st.integers(0, 8)) :]
    assume(damaged != whole)
    before = WeightDelta.load(delta)
    try:
        file.write_bytes(damaged)
        with told():
            found = WeightDelta.load(delta)
            # What is not of the delta, such as a space in its record, may differ: no more.
            assert found.facts == before.facts and found.changes.keys() == before.changes.keys()
    finally:
        file.write_bytes(whole)


@pytest.fixture(scope="module")
def gguf(folder: Path) -> bytes:
    path = write_llama_gguf(folder / "whole.gguf", build("llama"), byte_level_bpe())
    return path.read_bytes()


@given(data=st.data())
@many()
def test_gguf_headers_with_odd_numbers_and_bytes(folder: Path, gguf: bytes, data: Any):
    header = layout(gguf)
    changed = bytearray(gguf)
    for _ in range(data.draw(st.integers(1, 3))):
        if data.draw(st.booleans()):
            field = data.draw(st.sampled_from(header.fields))
            number = data.draw(st.integers(0, 256**field.width - 1))
            changed[field.offset : field.offset + field.width] = number.to_bytes(
                field.width, "little"
            )
        else:
            place = data.draw(st.integers(0, header.end - 1))
            put = data.draw(st.binary(min_size=1, max_size=16))
            changed[place : place + len(put)] = put
    path = folder / "odd.gguf"
    path.write_bytes(changed[: data.draw(st.sampled_from([None, header.end // 2, 30]))])
    with told():
        check_model(path, read_header(path))


# --- what is shown and drawn, and the joint -------------------------------------------------------


@given(text=st.text(max_size=200) | TEXTS)
@many()
def test_what_is_shown_is_one_safe_line(text: str):
    once = shown.shown(text)
    assert safe(once) and "\n" not in once and "\u2028" not in once
    once.encode()
    assert shown.shown(once) == once


@given(name=TEXTS, data=TEXTS)
@many(0.03)
def test_pictures_are_xml_whatever_the_names(folder: Path, name: str, data: str):
    builder = RankingBuilder("lga", 3, bootstrap=5)
    builder.update({"fact": f"f{i}", "phi": [1.0, 2.0 + i, 0.5]} for i in range(3))
    ranking_figure(builder.result(model=name, data=data), folder / "drawn", formats=("svg",))
    ElementTree.parse(folder / "drawn.svg")


@given(prompt=TEXTS, answer=TEXTS, joint=st.sampled_from(JOINTS))
@many()
def test_the_joint_changes_neither_prompt_nor_answer(prompt: str, answer: str, joint: Any):
    text, end = join(prompt, answer, joint)
    assert text[:end] in (prompt, prompt.rstrip())
    assert text[end:].strip() == answer.strip()
    assert len(text) <= len(prompt) + len(answer) + 1


@given(subject=TEXTS, prompt=TEXTS, target=TEXTS, more=st.lists(TEXTS, max_size=2))
@many()
def test_facts_of_any_text(subject: str, prompt: str, target: str, more: list[str]):
    with told():
        fact = Fact(subject, prompt + subject, target, id="f", rephrasings=tuple(more))
        assert fact.subject in fact.prompt
