"""Whatever stands in a record, reading it ends in facts or in a UserError, never in a traceback."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import json
import random

import pytest
from test_datasets_formats import RECORDS, records_of
from test_datasets_tables import CONTAINERS, parquet, save_to_disk

from goldenlayers.datasets import load_facts, write_jsonl
from goldenlayers.errors import UserError
from goldenlayers.facts import Fact

ODD: list[object] = [
    None,
    "",
    " ",
    3,
    True,
    [],
    {},
    ["x"],
    [[]],
    [[["a"]]],
    {"prompt": "x"},
    {"prompt": ["a"], "ground_truth": None},
    [{"prompt": None}],
    {"str": None},
    {"a": {"b": "c"}},
    float("nan"),
    "half \ud800",
    10**400,
    "x" * 5000,
    {"\ud800": [{"prompt": "x", "ground_truth": "y"}]},
    [{"prompt": "x", "answer": "y", "kind": "\ud800"}],
    [[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[["deep"]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]],
]
NAMES = ("promt", "more", "\ud800", "x" * 5000, "a\nb", "id", "kind", "relation", "target", "")
NOISE = (
    b"[",
    b"{",
    b'"',
    b"\0",
    b"\n",
    b",",
    b";",
    b"\t",
    b"\xff",
    b"\\ud800",
    b"NaN",
    b"9" * 4400,
)


def mutated(value: object, rng: random.Random) -> object:
    if rng.random() < 0.15:
        return rng.choice(ODD)
    if isinstance(value, dict):
        made = {key: mutated(item, rng) for key, item in value.items()}
        if made and rng.random() < 0.15:
            del made[rng.choice(list(made))]
        if rng.random() < 0.05:
            made[rng.choice(NAMES)] = rng.choice(ODD)
        return made
    return [mutated(item, rng) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("form", RECORDS)
def test_odd_records_end_in_facts_or_user_errors(form, tmp_path):
    rng = random.Random(form)
    good = records_of(form) * 2
    path, out = tmp_path / "f.json", tmp_path / "out.jsonl"
    ends = {"facts": 0, "errors": 0}
    seen: dict[str, Fact] = {}
    for _ in range(150):
        path.write_text(json.dumps([*good, mutated(rng.choice(good), rng)]))
        try:
            load_facts(path)
            ends["facts"] += 1
        except UserError:
            ends["errors"] += 1
        kept = load_facts(path, skip_invalid=True)  # the good records always remain
        assert kept.format == form and len(kept) >= 1
        assert "facts" in kept.summary()
        seen.update({repr(fact): fact for fact in kept})
    unique = [dataclasses.replace(fact, id=str(i)) for i, fact in enumerate(seen.values())]
    write_jsonl(unique, out)  # what was read in any form comes back from ours
    assert list(load_facts(out)) == unique
    assert ends["facts"] > 0 and ends["errors"] > 0


def damaged(raw: bytes, rng: random.Random) -> bytes:
    """A few bytes flipped, cut out, put in or doubled, or the end torn off."""
    made = bytearray(raw)
    for _ in range(rng.choice((0, 0, 1, 1, 2, 5))):
        at = rng.randrange(len(made) + 1)
        match rng.randrange(5):
            case 0 if at < len(made):
                made[at] ^= 1 << rng.randrange(8)
            case 1:
                del made[at : at + rng.randint(1, 30)]
            case 2:
                made[at:at] = rng.choice(NOISE)
            case 3:
                made[at:at] = made[at : at + 40]
            case _ if rng.random() < 0.3:
                del made[at:]
    return bytes(made)


def test_damaged_files_of_any_container_end_in_facts_or_user_errors(tmp_path, monkeypatch):
    """Damage before the packing and after it; what is said can be shown and stays short."""
    monkeypatch.setattr("goldenlayers.datasets.reading.LIMIT", 1 << 22)
    rng = random.Random("containers")
    path = tmp_path / "f"
    ends = {"facts": 0, "errors": 0}
    names = [name for name in CONTAINERS if not name.startswith("parquet")]
    for turn in range(600):
        form = rng.choice(list(RECORDS))
        records = [*records_of(form), mutated(records_of(form)[0], rng)]
        records = [one if isinstance(one, dict) else {"odd": one} for one in records]
        try:
            made = CONTAINERS[names[turn % len(names)]](records)
        except ValueError:  # half a character that this container cannot hold
            continue
        raw = damaged(made.encode("utf-8", "replace") if isinstance(made, str) else made, rng)
        path.write_bytes(gzip.compress(raw, 1) if rng.random() < 0.2 else raw)
        for skip_invalid in (False, True):
            try:
                facts = load_facts(path, skip_invalid=skip_invalid)
            except UserError as error:
                ends["errors"] += 1
                assert len(str(error).encode()) < 2000
            else:
                ends["facts"] += 1
                said = facts.summary().encode()
                assert len(said) < 10_000
    assert ends["facts"] > 200 and ends["errors"] > 200


def test_damaged_parquet_and_arrow_files_end_in_facts_or_user_errors(tmp_path):
    """Without a check of its offsets a damaged Arrow file ends the process."""
    pytest.importorskip("pyarrow")
    rng = random.Random("arrow")
    folder = save_to_disk(tmp_path / "mine", records_of("wiki-recent") * 20)
    part = folder / "data-00000-of-00002.arrow"
    files = {tmp_path / "f": parquet(records_of("jsonl") * 20), part: part.read_bytes()}
    for _ in range(80):
        for path, raw in files.items():
            path.write_bytes(damaged(raw, rng))
            with contextlib.suppress(UserError):
                facts = load_facts(folder if path == part else path, skip_invalid=True)
                facts.summary().encode()
