"""Whatever stands in a record, reading it ends in facts or in a UserError, never in a traceback."""

from __future__ import annotations

import dataclasses
import json
import random

import pytest
from test_datasets_formats import RECORDS, records_of

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
]


def mutated(value: object, rng: random.Random) -> object:
    if rng.random() < 0.15:
        return rng.choice(ODD)
    if isinstance(value, dict):
        made = {key: mutated(item, rng) for key, item in value.items()}
        if made and rng.random() < 0.15:
            del made[rng.choice(list(made))]
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
