"""Our own JSON lines: the schema is what the reader reads, and nothing is lost on the way."""

from __future__ import annotations

import json

import pytest

from goldenlayers.datasets import load_facts, schema_text, write_jsonl
from goldenlayers.datasets.tables import EXAMPLE, FACT_FIELDS, OTHER_NAMES, PROBE_FIELDS
from goldenlayers.errors import DataError, UserError
from goldenlayers.facts import Fact, Probe

ROW = {"subject": "Ada", "prompt": "Ada comes from", "target_new": "Chad"}


def load(tmp_path, *rows, **options):
    path = tmp_path / "f.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return load_facts(path, **options)


def test_only_three_fields_are_required(tmp_path):
    fact = load(tmp_path, ROW)[0]
    assert (fact.id, fact.target_old, fact.rephrasings) == ("fact-1", None, ())
    for name in ROW:
        with pytest.raises(UserError):
            load(tmp_path, {key: value for key, value in ROW.items() if key != name})


def test_the_schema_names_every_field_of_fact_and_probe_and_its_example_loads(tmp_path):
    names = {OTHER_NAMES.get(name, name) for name in Fact.__dataclass_fields__}
    assert {field.name for field in FACT_FIELDS} == names - {"joints"}
    assert {field.name for field in PROBE_FIELDS} == set(Probe.__dataclass_fields__)
    text = schema_text()
    assert all(f"  {field.name} " in text for field in FACT_FIELDS + PROBE_FIELDS)
    header, line = text.split("as JSON:\n")[1].splitlines()[:2]
    (tmp_path / "f.csv").write_text(f"{header}\n{line}\n")
    table = load_facts(tmp_path / "f.csv")[0]
    assert (table.target, len(table.rephrasings)) == ("Sofia", 1)
    example = json.loads(text.splitlines()[-1])
    assert example == EXAMPLE
    fact = load(tmp_path, example)[0]
    assert fact.locality == (Probe("The capital of Nepal is", "Kathmandu", "neighborhood"),)


def test_round_trip(tmp_path):
    facts = (
        Fact(
            id="ä {}",
            subject="José",
            prompt=" José\u2028is\n",
            target="x",
            target_old="y",
            target_old_is_generated=True,
            relation="r",
            rephrasings=("a ", "b"),
            locality=(Probe("q"), Probe("q", "a", "k", ("b", "c"))),
            portability=(Probe("p", "a"),),
            generation_prompts=("g",),
            old_aliases=("z",),
        ),
        Fact("القاهرة", "القاهرة عاصمة", "ليبيا", id="مثال"),
    )
    path = tmp_path / "out.jsonl"
    write_jsonl(facts, path)
    loaded = load_facts(path)
    assert loaded.facts == facts and loaded.format == "jsonl"
    write_jsonl(loaded, tmp_path / "again.jsonl")
    assert (tmp_path / "again.jsonl").read_bytes() == path.read_bytes()


def test_round_trip_of_the_starter_facts(tmp_path):
    starter = load_facts()
    write_jsonl(starter, tmp_path / "s.jsonl")
    assert load_facts(tmp_path / "s.jsonl").facts == starter.facts


def test_writing_to_impossible_places(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        write_jsonl([], tmp_path / "no" / "f.jsonl")
    with pytest.raises(UserError, match="is a folder"):
        write_jsonl([], tmp_path)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"rephrasing": ["x"]}, "rephrasing"),
        ({"prompt": None}, "prompt"),
        ({"target_new": 5}, "target_new"),
        ({"target_new": ""}, "target_new"),
        ({"target_old": "Chad "}, "target_new"),
        ({"subject": "ada"}, "subject"),
        ({"subject": "Ada  "} | {"prompt": "Äda comes from"}, "subject"),
        ({"rephrasings": "one text"}, "rephrasings"),
        ({"rephrasings": ["ok", ""]}, "rephrasings[2]"),
        ({"locality": "x"}, "locality"),
        ({"locality": ["x"]}, "locality[1]"),
        ({"locality": [{"prompt": "x"}, {"answer": "x"}]}, "locality[2].prompt"),
        ({"locality": [{"prompt": "x", "answer": ""}]}, "locality[1].answer"),
        ({"locality": [{"prompt": "x", "ground_truth": "y"}]}, "locality[1].ground_truth"),
        ({"portability": [{"prompt": "x"}]}, "portability[1].answer"),
        ({"portability": [{"prompt": "x", "answer": "y", "kind": 3}]}, "portability[1].kind"),
        ({"target_old_is_generated": "yes"}, "target_old_is_generated"),
    ],
)
def test_wrong_lines_are_refused_by_line_and_field(changes, field, tmp_path):
    with pytest.raises(DataError) as caught:
        load(tmp_path, ROW, ROW | changes)
    assert (caught.value.row, caught.value.field) == (2, field)
    assert len(load(tmp_path, ROW, ROW | changes, skip_invalid=True)) == 1


def test_an_object_of_probes_is_another_format(tmp_path):
    rows = [ROW, ROW, ROW | {"locality": {"kind": []}}]
    with pytest.raises(DataError, match="row 3, field 'locality': it is not a list"):
        load(tmp_path, *rows)


def test_a_misspelled_field_is_pointed_out_and_remarks_are_allowed(tmp_path):
    with pytest.raises(DataError, match="Did you mean 'rephrasings'"):
        load(tmp_path, ROW | {"rephrasing": ["x"]})
    assert load(tmp_path, ROW | {"_source": 3})[0].prompt == ROW["prompt"]


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("promt", "prompt"),
        ("Prompt", "prompt"),
        ("subjekt", "subject"),
        ("target-old", "target_old"),
        ("prompts", "prompt"),
        ("paraphrases", "rephrasings"),
        ("ground_truths", None),
        ("relation_id", None),
        ("subject_2", None),
        ("idx", None),
        ("language", None),
        ("", None),
        ("\ud800", None),
        ("x" * 100_000, None),
    ],
)
def test_unknown_fields_are_a_warning_and_misspelled_ones_an_error(name, near, tmp_path):
    rows = [ROW, ROW | {name: 1, "locality": [{"prompt": "x"}]}]
    if near is not None:
        with pytest.raises(DataError, match=f"row 2, .*Did you mean '{near}'"):
            load(tmp_path, *rows)
        return
    facts = load(tmp_path, *rows)
    assert len(facts) == 2 and len(facts.warnings) == 1 and "(1 row)" in facts.warnings[0]
    assert len(facts.warnings[0]) < 200 and facts.warnings[0] in facts.summary()


def test_unknown_fields_are_told_in_one_warning_with_their_counts(tmp_path):
    probe = {"prompt": "x", "source": 1}
    rows = [ROW | {f"x{i}": 1 for i in range(20)}, ROW | {"x3": 1, "locality": [probe, probe]}]
    (warning,) = load(tmp_path, *rows).warnings
    assert warning.startswith("fields that are not read: 'x3' (2 rows), ")
    assert warning.endswith("16 more")
    assert load(tmp_path, ROW).warnings == ()


def test_target_is_another_name_of_target_new(tmp_path):
    row = {"subject": "Ada", "prompt": "Ada is", "target": "Chad"}
    assert load(tmp_path, row)[0].target == "Chad"
    assert load(tmp_path, row | {"target_new": None})[0].target == "Chad"
    with pytest.raises(DataError, match="field 'target': 'target_new' is there as well"):
        load(tmp_path, ROW, ROW | {"target": "Mali"})


def test_what_json_allows_and_a_record_not(tmp_path):
    path = tmp_path / "f.jsonl"
    good = json.dumps(ROW)
    deep = good[:-1] + ', "_x": ' + "[" * 500 + "]" * 500 + "}"
    deeper = good[:-1] + ', "_x": ' + "[" * 100_000 + "]" * 100_000 + "}"
    twice = good[:-1] + ', "prompt": "Ada is from"}'
    probe = good[:-1] + ', "locality": [{"prompt": "x", "answer": "a", "answer": "b"}]}'
    huge = good[:-1] + f', "target_old": {"9" * 10_000}' + "}"
    path.write_text("\n".join([good, deep, deeper, twice, probe, huge]))
    facts = load_facts(path, skip_invalid=True)
    assert [error.row for error in facts.skipped] == [2, 3, 4, 5, 6]
    reasons = facts.skipped_reasons()
    assert reasons["a field stands twice"] == 2 and reasons["the row is nested too deeply"] == 1
    assert all(len(str(error)) < 300 + len(str(path)) for error in facts.skipped)


def test_repeated_ids_are_renamed_and_noted(tmp_path):
    rows = [ROW | {"id": name} for name in ("a", "a", "a#2", "a", "b")]
    facts = load(tmp_path, *rows)
    assert [fact.id for fact in facts] == ["a", "a#2", "a#2#2", "a#3", "b"]
    assert any(note.startswith("3 facts had the id of an earlier one") for note in facts.notes)
    assert any(note.startswith("4 facts repeat an earlier one") for note in facts.notes)
    other = load(tmp_path, ROW, ROW | {"target_new": "Mali"})
    assert other.notes == ("1 facts contradict an earlier one (same prompt, another new answer)",)
