"""The built-in starter facts: complete, consistent, and what their tables give."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from goldenlayers.facts import Fact, Probe
from goldenlayers.prompts import find_subject

ROOT = Path(__file__).parents[1]
TOOL = ROOT / "tools/starter_facts"
ROWS: list[dict[str, Any]] = [
    json.loads(line)
    for line in (ROOT / "src/goldenlayers/datasets/starter.jsonl")
    .read_text(encoding="utf-8")
    .splitlines()
]
FIELDS = ["id", "relation", "subject", "prompt", "target_new", "target_old"]
FIELDS += ["rephrasings", "locality", "portability", "generation_prompts"]


@pytest.fixture(scope="module")
def build() -> Iterator[ModuleType]:
    """The builder's module; its siblings are importable only while it is loaded."""
    before = set(sys.modules)
    sys.path.insert(0, str(TOOL))
    try:
        import build  # pyright: ignore[reportMissingImports]

        yield build
    finally:
        sys.path.remove(str(TOOL))
        for name in set(sys.modules) - before:
            if str(getattr(sys.modules[name], "__file__", "")).startswith(str(TOOL)):
                del sys.modules[name]


def as_fact(row: dict[str, Any]) -> Fact:
    return Fact(
        **{name.removesuffix("_new"): row[name] for name in FIELDS[:6]},
        rephrasings=tuple(row["rephrasings"]),
        locality=tuple(Probe(p["prompt"], p["answer"], p["kind"]) for p in row["locality"]),
        portability=tuple(Probe(p["prompt"], p["answer"], p["kind"]) for p in row["portability"]),
        generation_prompts=tuple(row["generation_prompts"]),
    )


def every_text(row: dict[str, Any]) -> list[str]:
    probes = [probe["prompt"] for probe in row["locality"] + row["portability"]]
    return [row["prompt"], *row["rephrasings"], *row["generation_prompts"], *probes]


def test_the_file_is_what_the_tables_give():
    done = subprocess.run(
        [sys.executable, str(TOOL / "build.py"), "--check"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_the_check_notices_a_changed_file(build: ModuleType, tmp_path: Path, monkeypatch, capsys):
    changed = tmp_path / "starter.jsonl"
    changed.write_text(build.text().replace("Paris", "Pariss", 1), encoding="utf-8")
    monkeypatch.setattr(build, "TARGET", changed)
    assert build.main(["--check"]) == 1
    assert "run python tools/starter_facts/build.py" in capsys.readouterr().err
    assert build.main([]) == 0
    assert build.main(["--check"]) == 0


def test_there_are_enough_facts_and_relations():
    relations = Counter(row["relation"] for row in ROWS)
    assert len(ROWS) >= 440
    assert len(relations) >= 18
    assert min(relations.values()) >= 10
    assert max(relations.values()) <= len(ROWS) / 10


def test_the_first_rows_show_every_relation():
    relations = {row["relation"] for row in ROWS}
    assert {row["relation"] for row in ROWS[: len(relations)]} == relations


def test_ids_and_subjects_of_a_relation_are_unique():
    for key in (
        [row["id"] for row in ROWS],
        [(row["subject"], row["relation"]) for row in ROWS],
        [row["prompt"] for row in ROWS],
    ):
        assert [name for name, times in Counter(key).items() if times > 1] == []


def test_every_row_is_a_valid_fact():
    for row in ROWS:
        assert list(row) == FIELDS
        fact = as_fact(row)
        assert fact.target_old is not None
        assert fact.id.isascii() and fact.id.startswith("starter-")


def test_the_subject_stands_whole_in_prompt_rephrasings_and_generation_prompts():
    for row in ROWS:
        asked = [row["prompt"], *row["rephrasings"]]
        assert len(set(asked)) == len(asked) >= 3
        for text in asked + row["generation_prompts"]:
            span = find_subject(row["subject"], text)
            assert span is not None, text
            assert not text[span[0] - 1 : span[0]].isalnum(), text
            assert not text[span[1] : span[1] + 1].isalnum(), text


def test_texts_are_clean():
    marks = ("{", "}", "[", "]", "|", " = ", "  ", "the the ", " a a", "The the ", "a the ")
    for row in ROWS:
        for text in every_text(row):
            assert text == text.strip()
            assert text[0].isupper() or not text[0].isalpha(), text
            assert not any(mark in text for mark in marks), text
            assert text[-1].isalnum() or text[-1] in "),.", text
        answers = [row["target_new"], row["target_old"]]
        answers += [probe["answer"] for probe in row["locality"] + row["portability"]]
        for answer in answers:
            assert answer == answer.strip() and len(answer.split()) <= 4, answer


def test_the_new_answer_is_not_given_away_by_a_prompt():
    for row in ROWS:
        for text in (row["prompt"], *row["rephrasings"]):
            answer = re.escape(row["target_new"].lower())
            assert re.search(rf"(?<!\w){answer}(?!\w)", text.lower()) is None, text


def test_the_new_answer_is_false_and_of_the_same_relation(build: ModuleType):
    truth = {(r.name, i.subject): i.answers for r in build.RELATIONS for i in r.items}
    pools = {relation.name: set(relation.pool) for relation in build.RELATIONS}
    assert len(truth) == len(ROWS)
    for row in ROWS:
        answers = truth[row["relation"], row["subject"]]
        assert row["target_old"] == answers[0]
        assert row["target_new"] not in answers
        assert row["target_new"] in pools[row["relation"]]


def test_no_false_answer_dominates_its_relation():
    for relation in {row["relation"] for row in ROWS}:
        new = Counter(row["target_new"] for row in ROWS if row["relation"] == relation)
        assert max(new.values()) <= max(3, 0.3 * new.total()), (relation, new)


def test_locality_asks_two_other_subjects_with_other_true_answers(build: ModuleType):
    old = {row["prompt"]: row for row in ROWS}
    truth = {(r.name, i.subject): i.answers for r in build.RELATIONS for i in r.items}
    for row in ROWS:
        assert len(row["locality"]) == 2
        assert len({probe["answer"] for probe in row["locality"]}) == 2
        for probe in row["locality"]:
            other = old[probe["prompt"]]
            answers = truth[other["relation"], other["subject"]]
            assert probe["kind"] == "neighborhood"
            assert other["relation"] == row["relation"]
            assert other["subject"] != row["subject"]
            assert find_subject(row["subject"], probe["prompt"]) is None
            assert probe["answer"] == answers[0]
            assert not {row["target_new"], row["target_old"]} & set(answers)


def test_portability_probes_are_of_known_kinds_and_tell_an_edit_from_none():
    kinds = Counter(probe["kind"] for row in ROWS for probe in row["portability"])
    assert set(kinds) == {"Subject_Aliasing", "Reasoning", "Logical_Generalization"}
    assert sum(bool(row["portability"]) for row in ROWS) >= 0.6 * len(ROWS)
    for row in ROWS:
        prompts = [probe["prompt"] for probe in row["portability"]]
        assert len(set(prompts)) == len(prompts)
        assert not set(prompts) & {row["prompt"], *row["rephrasings"]}
        for probe in row["portability"]:
            assert probe["answer"] != row["target_old"]
            if probe["kind"] == "Subject_Aliasing":
                assert probe["answer"] == row["target_new"]
                span = find_subject(row["subject"], probe["prompt"])
                assert span is None or probe["prompt"][span[1] : span[1] + 1].isalpha()


def test_consequences_follow_from_the_new_answer_only(build: ModuleType):
    """Rivers, capitals and the like: never the same as before the edit."""
    checked = 0
    for relation in build.RELATIONS:
        items = {item.subject: item for item in relation.items}
        for row in (row for row in ROWS if row["relation"] == relation.name):
            for consequence in relation.consequences:
                prompt = items[row["subject"]].fill(consequence.template)
                answer = next(
                    (p["answer"] for p in row["portability"] if p["prompt"] == prompt), None
                )
                if answer is None or consequence.answers is None:
                    continue
                assert answer == consequence.answers[row["target_new"]]
                assert answer != consequence.answers.get(row["target_old"])
                checked += 1
    assert checked > 150


@pytest.mark.parametrize(
    ("subject", "prompt"),
    [
        ("Netherlands", "The capital of the Netherlands is"),
        ("Kenya", "The country of Kenya is part of the continent of"),
        ("Eiffel Tower", "The Eiffel Tower is located in the city of"),
        ("The Magic Flute", "The opera The Magic Flute was composed by"),
        ("penicillin", "The person credited with the discovery of penicillin is"),
    ],
)
def test_articles_stand_where_english_wants_them(subject: str, prompt: str):
    assert prompt in {row["prompt"] for row in ROWS if row["subject"] == subject}


def test_vowels_take_an():
    young = next(row for row in ROWS if row["id"] == "starter-animal-young-elephant")
    assert young["prompt"] == "The young of an elephant is called a"


def test_a_table_line_without_an_answer_is_refused(build: ModuleType):
    relation = sys.modules[build.Relation.__module__]
    with pytest.raises(ValueError, match="not 'subject = answer'"):
        list(relation.parse("France Paris"))
