"""Every format from small records: recognition, reading, row errors."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from goldenlayers.datasets import list_datasets, load_facts
from goldenlayers.errors import DataError, UserError
from goldenlayers.facts import Probe

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
    "jsonl": {
        "subject": "Ada",
        "prompt": "Ada comes from",
        "target_new": "Chad",
        "locality": [{"prompt": "Bob comes from"}],
    },
}


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
