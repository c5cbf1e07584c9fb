"""Every format from small records: recognition, reading, row errors."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from goldenlayers.datasets import FORMATS, Format, Record, Row, list_datasets, load_facts
from goldenlayers.datasets.fields import text
from goldenlayers.errors import DataError, UserError
from goldenlayers.facts import Fact, Probe

KNOWEDIT = {
    "subject": "Ada",
    "prompt": "The country of Ada is",
    "target_new": "Chad",
    "portability": {},
    "locality": {"Forgetfulness": [{"prompt": "The sex of Ada is", "ground_truth": [["female"]]}]},
}
REWRITE = {
    "prompt": "{} comes {from}",
    "subject": "Ada {x}",
    "relation_id": "P27",
    "target_new": {"str": "Chad", "id": "Q1"},
    "target_true": {"str": "Mali", "id": "Q2"},
}
RECORDS: dict[str, dict] = {
    "counterfact-nested": {
        "case_id": 5,
        "requested_rewrite": REWRITE,
        "paraphrase_prompts": ["Where from is Ada?"],
        "neighborhood_prompts": ["Bob comes from"],
        "generation_prompts": ["Ada likes"],
    },
    "counterfact-flat": {
        "case_id": 5,
        "subject": "Ada",
        "prompt": "Ada comes from",
        "target_new": "Chad",
        "ground_truth": "Mali",
        "rephrase_prompt": "Where from is Ada?",
        "locality_prompt": "Bob comes from",
        "locality_ground_truth": "Mali",
    },
    "zsre-mend": {
        "subject": "Ada",
        "src": "Where is Ada from?",
        "pred": "Niger",
        "rephrase": "Whence Ada?",
        "alt": "Chad",
        "answers": ["Mali", "Republic of Mali"],
        "loc": "nq question: who sang it",
        "loc_ans": "Bob",
    },
    "zsre-knowedit": KNOWEDIT | {"ground_truth": ["Mali"], "rephrase_prompt": "Whence Ada?"},
    "wiki-counterfact": KNOWEDIT | {"ground_truth": "Mali"},
    "wiki-recent": KNOWEDIT,
    "wikibio": {
        "text": "This is about ada. She writes. ",
        "labels": " She sings.",
        "concept": "ada",
        "locality": {},
    },
    "mquake": {
        "case_id": 7,
        "requested_rewrite": [
            REWRITE | {"question": "Whence Ada {x}?"},
            REWRITE | {"subject": "Chad"},
        ],
        "questions": ["What language is spoken where Ada is from?"],
        "new_answer": "French",
        "new_answer_alias": ["fr"],
        "single_hops": [
            {"question": "Whence Ada {x}?", "answer": "Mali", "answer_alias": ["ML", "Mali"]}
        ],
    },
    "known": {
        "known_id": 3,
        "subject": "Ada",
        "attribute": "Mali",
        "template": "{} is from",
        "prompt": "Ada is from",
        "relation_id": "P27",
    },
    "check": {
        "verdict": "good",
        "edited": [
            {"id": "a", "subject": "Ada", "prompt": "Ada comes from", "target": "Chad"},
            {"id": "b", "subject": "Bo", "prompt": 'Bo said "', "target": "x", "joint": "none"},
        ],
        "probes": [
            {"fact": "a", "part": "prompt", "prompt": "Ada comes from", "ok": True},
            {"fact": "a", "part": "rephrase", "prompt": "Whence Ada?", "ok": True},
            {"fact": "a", "part": "unrelated", "prompt": "Two and two is", "ok": False},
            {"fact": "a", "part": "neighbours", "prompt": "Bob comes from", "ok": True},
            {"fact": "b", "part": "neighbours", "prompt": "Bob said", "ok": True},
        ],
    },
    "jsonl": {
        "subject": "Ada",
        "prompt": "Ada comes from",
        "target_new": "Chad",
        "locality": [{"prompt": "Bob comes from"}],
    },
}
EDITED, ASKED = (RECORDS["check"][name] for name in ("edited", "probes"))


def write(path: Path, records: list, *, lines: bool = False) -> Path:
    text = "\n".join(map(json.dumps, records)) if lines else json.dumps(records, indent=1)
    path.write_text(text, encoding="utf-8")
    return path


def records_of(form: str) -> list[dict]:
    record = copy.deepcopy(RECORDS[form])
    if form == "known":
        return [record, record | {"known_id": 4, "subject": "Ada is", "attribute": "Chad"}]
    return [record]


def test_there_is_a_record_for_every_format():
    assert set(RECORDS) == {info.name for info in list_datasets() if info.needs_path}


@pytest.mark.parametrize("lines", [False, True])
@pytest.mark.parametrize("form", RECORDS)
def test_recognition_from_content_whatever_the_container(form, lines, tmp_path):
    path = write(tmp_path / "facts.data", records_of(form), lines=lines)
    facts = load_facts(path)
    assert facts.format == form and facts.name == "facts" and facts.skipped == ()
    assert facts[0].subject.startswith("Ada") or facts[0].subject == "ada"
    assert load_facts(form.replace("-", "_"), path=path) == facts


def first(form: str, tmp_path: Path, **changes):
    records = records_of(form)
    records[0] |= changes
    return load_facts(write(tmp_path / "f.json", records))


def test_braces_are_text_and_only_the_place_is_filled(tmp_path):
    fact = first("counterfact-nested", tmp_path)[0]
    assert fact.prompt == "Ada {x} comes {from}" and fact.subject == "Ada {x}"
    assert fact.locality == (Probe("Bob comes from", "Mali", "neighborhood"),)
    assert fact.generation_prompts == ("Ada likes",)
    for template in ("no place", "{} and {}"):
        with pytest.raises(DataError, match=r"places '\{\}' for the subject") as caught:
            first("counterfact-nested", tmp_path, requested_rewrite=REWRITE | {"prompt": template})
        assert caught.value.field == "requested_rewrite.prompt"


def test_zsre_mend_takes_the_true_answers(tmp_path):
    fact = first("zsre-mend", tmp_path)[0]
    assert (fact.target_old, fact.old_aliases) == ("Mali", ("Republic of Mali",))
    assert fact.locality == (Probe("who sang it?", "Bob", "unrelated"),)
    with pytest.raises(DataError, match="is right already"):
        first("zsre-mend", tmp_path, alt="Republic of Mali")


def test_wikibio_passages_are_kept_letter_for_letter(tmp_path):
    fact = first("wikibio", tmp_path)[0]
    assert (fact.prompt, fact.target) == ("This is about ada. She writes. ", "She sings.")
    assert fact.target_old is None and fact.locality == ()


@pytest.mark.parametrize(
    ("form", "changes"),
    [
        ("counterfact-flat", {"prompt": " Ada:\n", "rephrase_prompt": " Ada:\n"}),
        ("wiki-recent", {"prompt": " Ada:\n", "rephrase": [" Ada:\n"]}),
        ("known", {"prompt": " Ada:\n"}),
        ("zsre-mend", {"src": " Ada:\n", "rephrase": " Ada:\n"}),
        ("counterfact-nested", {"requested_rewrite": REWRITE | {"prompt": " {}:\n"}}),
        ("mquake", {"requested_rewrite": [REWRITE | {"prompt": " {}:\n"}]}),
    ],
)
def test_prompts_are_kept_letter_for_letter(tmp_path, form, changes):
    fact = first(form, tmp_path, **changes, subject="Ada")[0]
    assert fact.prompt == f" {fact.subject}:\n"
    assert all(text == " Ada:\n" for text in fact.rephrasings if ":" in text)


def test_mquake_makes_one_fact_per_rewrite(tmp_path):
    facts = first("mquake", tmp_path)
    assert [fact.id for fact in facts] == ["7.1", "7.2"]
    assert facts[0].old_aliases == ("ML",) and facts[0].rephrasings == ("Whence Ada {x}?",)
    assert [probe.aliases for probe in facts[0].portability] == [("fr",)]
    assert facts[1].portability == () and facts[1].old_aliases == ()
    same = REWRITE | {"target_new": REWRITE["target_true"]}
    with pytest.raises(DataError, match="equals the old answer") as caught:
        first("mquake", tmp_path, requested_rewrite=[REWRITE, same])
    assert caught.value.field == "requested_rewrite[2].target_new" and caught.value.row == 1
    single = first("mquake", tmp_path, requested_rewrite=[REWRITE])
    assert not any("together" in note for note in single.notes)
    for nothing in (None, []):
        with pytest.raises(DataError):
            first("mquake", tmp_path, requested_rewrite=nothing)
    unanswered = first("mquake", tmp_path, new_answer=None, new_answer_alias=[])
    assert unanswered[0].portability == () and "without a new answer" in unanswered.notes[0]


def test_known_answers_do_not_overlap_the_true_one(tmp_path):
    base = RECORDS["known"]
    records = [
        base | {"known_id": i, "subject": name, "prompt": f"{name} is from", "attribute": answer}
        for i, (name, answer) in enumerate(
            [("Ada", "York"), ("Bob", "New York"), ("Cy", "Rome"), ("Ada", "Bonn")]
        )
    ]
    facts = load_facts(write(tmp_path / "k.json", records))
    assert facts[0].target == "Rome" and facts[3].target in {"New York", "Rome"}
    again = load_facts(write(tmp_path / "k.json", records[::-1]), seed=9)
    assert {f.id: f.target for f in again} == {f.id: f.target for f in facts}


def test_the_check_of_an_edit_is_asked_again(tmp_path):
    ada, bo = first("check", tmp_path)
    assert (ada.id, ada.subject, ada.target, ada.rephrasings) == (
        "a", "Ada", "Chad", ("Whence Ada?",)
    )  # fmt: skip
    assert [(one.kind, one.prompt, one.answer) for one in ada.must_stay] == [
        ("neighbours", "Bob comes from", None),
        ("unrelated", "Two and two is", None),
    ]
    assert (bo.joint, bo.rephrasings, len(bo.locality)) == ("none", (), 1)


def test_missing_and_empty_optional_parts(tmp_path):
    fact = first("zsre-knowedit", tmp_path, rephrase_prompt=None, portability=None, locality={})[0]
    assert (fact.rephrasings, fact.portability, fact.locality) == ((), (), ())
    fact = first("counterfact-flat", tmp_path, locality_prompt=None, ground_truth=[])[0]
    assert (fact.target_old, fact.locality) == (None, ())
    fact = first(
        "counterfact-flat", tmp_path, locality_prompt=["a", "b"], locality_ground_truth=["x", ""]
    )[0]
    assert [probe.answer for probe in fact.locality] == ["x", None]


@pytest.mark.parametrize(
    ("form", "changes", "field"),
    [
        ("counterfact-nested", {"requested_rewrite": "x"}, "requested_rewrite"),
        (
            "counterfact-nested",
            {"requested_rewrite": REWRITE | {"target_new": {"str": ""}}},
            "requested_rewrite.target_new",
        ),
        (
            "counterfact-nested",
            {"requested_rewrite": REWRITE | {"target_true": {"str": "Chad"}}},
            "requested_rewrite.target_new",
        ),
        (
            "counterfact-flat",
            {"locality_prompt": ["a", "b"]},
            "locality_ground_truth",
        ),
        ("counterfact-flat", {"subject": "ada"}, "subject"),
        ("counterfact-flat", {"ground_truth": ""}, "ground_truth"),
        ("zsre-mend", {"subject": "ADA"}, "subject"),
        ("zsre-mend", {"alt": " "}, "alt"),
        ("zsre-mend", {"alt": "Mali"}, "alt"),
        ("zsre-mend", {"src": 4}, "src"),
        ("wiki-recent", {"locality": 3, "target_new": "Chad"}, "locality"),
        ("wiki-recent", {"target_new": 3}, "target_new"),
        ("wikibio", {"concept": "bob"}, "concept"),
        ("known", {"attribute": None}, "attribute"),
        ("known", {"relation_id": "P1"}, "relation_id"),
        ("check", {"edited": {}}, "edited"),
        ("check", {"edited": [EDITED[0], 3]}, "edited[2]"),
        ("check", {"edited": [EDITED[0], EDITED[1] | {"id": "a"}]}, "edited[2].id"),
        ("check", {"edited": [EDITED[0], EDITED[1] | {"subject": "Cy"}]}, "edited[2].subject"),
        ("check", {"edited": [EDITED[0], EDITED[1] | {"target": None}]}, "edited[2].target"),
        ("check", {"edited": [EDITED[0], EDITED[1] | {"joint": ["none"]}]}, "edited[2].joint"),
        ("check", {"probes": None}, "probes"),
        ("check", {"probes": [ASKED[0] | {"fact": "c"}]}, "probes[1].fact"),
        ("check", {"probes": [ASKED[0], ASKED[1] | {"part": "other"}]}, "probes[2].part"),
        ("check", {"probes": [ASKED[0], ASKED[1] | {"prompt": " "}]}, "probes[2].prompt"),
    ],
)
def test_row_errors_name_row_and_the_files_own_field(form, changes, field, tmp_path):
    records = records_of(form)
    records.append(records[0] | changes)
    path = write(tmp_path / "f.json", records)
    with pytest.raises(DataError) as caught:
        load_facts(path)
    assert (caught.value.row, caught.value.field) == (len(records), field)
    assert caught.value.source == str(path)
    kept = load_facts(path, skip_invalid=True)
    assert [error.row for error in kept.skipped] == [len(records)] and len(kept) >= 1


def test_a_named_format_that_is_not_the_files(tmp_path):
    path = write(tmp_path / "f.json", records_of("zsre-mend"))
    with pytest.raises(UserError, match="not in the format 'mquake': it looks like 'zsre-mend'"):
        load_facts("mquake", path=path)
    other = write(tmp_path / "g.json", [{"a": 1}])
    with pytest.raises(UserError, match="not in the format 'mquake'"):
        load_facts("mquake", path=other)
    with pytest.raises(UserError, match=r"in no format known here: .*first record: a\)"):
        load_facts(other)


def without(form: str, name: str) -> dict:
    record = copy.deepcopy(RECORDS[form])
    record.pop(name)
    return record


@pytest.mark.parametrize(
    ("record", "says"),
    [
        (without("jsonl", "subject"), r"nearest is 'jsonl' .*no row has 'subject'"),
        (without("zsre-mend", "alt"), r"nearest is 'zsre-mend' .*no row has 'alt'"),
        (without("wikibio", "labels"), r"nearest is 'wikibio' .*no row has 'labels'"),
        (without("counterfact-nested", "requested_rewrite"), "no row has a field of one"),
        (RECORDS["jsonl"] | {"target_new": None, "subject": None}, "row 1, field 'subject'"),
        ({"subject": "Ada", "promt": "Ada is", "target": "x"}, "Is 'promt' meant for 'prompt'"),
        ({"x" * 5000: 1, "subject": "Ada"}, "no row has 'prompt' or 'target_new'"),
    ],
)
def test_a_refusal_names_the_nearest_format_and_what_it_lacks(record, says, tmp_path):
    with pytest.raises(UserError, match=says) as caught:
        load_facts(write(tmp_path / "f.json", [record] * 3))
    message = str(caught.value).replace(str(tmp_path), "")
    assert len(message) < 700
    assert sum(f"'{form}'" in message for form in RECORDS) <= 1  # not the whole list


def test_a_field_that_only_some_rows_have_is_counted(tmp_path):
    rows = [without("jsonl", "subject")] * 2 + [without("jsonl", "prompt")]
    with pytest.raises(UserError, match="'subject' is in 1 of the first 3 rows"):
        load_facts(write(tmp_path / "f.json", rows))


def outside(name: str, *keys: str) -> Format:
    def read(record: Record, row: Row) -> list[Fact]:
        subject = text(record, "subject")
        return [
            Fact(subject, f"{subject} is", text(record, "target_new"), id=f"{name}-{row.number}")
        ]

    return Format(name, f"the form {name}", set(keys), read, families=("mine",))


def test_formats_from_outside_are_recognised_where_they_are_more_particular(tmp_path):
    forms = (
        outside("my_short", "subject", "target_new"),
        outside("long", "subject", "prompt", "target_new", "mood"),
    )
    try:
        for form in forms:
            FORMATS.register(form.name, form)
        ours = {"subject": "Ada", "prompt": "Ada is", "target_new": "x"}
        path = tmp_path / "f.json"

        def read(record: dict, name: str = "auto") -> str:
            path.write_text(json.dumps([record]))
            return load_facts(name, path=path)[0].id

        assert read(ours) == "fact-1"  # ours fits, and has all its keys
        assert read(ours | {"mood": "gay"}) == "long-1"
        assert read({"subject": "Ada", "target_new": "x"}) == "my_short-1"
        for name in ("my_short", "my-short", "MINE"):
            assert read(ours, name) == "my_short-1"
        assert [i.title for i in list_datasets()][-2:] == ["the form my_short", "the form long"]
        # What fits none is still told of ours.
        with pytest.raises(UserError, match="The nearest is 'jsonl'"):
            read({"prompt": "Ada is", "x": "y"})
        with pytest.raises(UserError, match="there is format 'long' already"):
            FORMATS.register("long", forms[0])
    finally:
        for form in forms:
            FORMATS.unregister(form.name)
    with pytest.raises(UserError, match="not a known format"):
        read(ours, "my-short")
