"""Facts and probes: what they accept, refuse, and where they find the subject."""

from __future__ import annotations

import dataclasses
import unicodedata
from typing import Any

import pytest

from goldenlayers.errors import DataError
from goldenlayers.facts import (
    Fact,
    Probe,
    refuse_contradictions,
    repeats,
)
from goldenlayers.prompts import find_subject, near_subject


def fact(**changes) -> Fact:
    values: dict[str, Any] = {
        "id": "f",
        "subject": "France",
        "prompt": "The capital of France is",
        "target": "Rome",
        "target_old": "Paris",
    }
    return Fact(**(values | changes))


def test_a_fact_is_immutable_and_knows_its_subject_span():
    made = fact()
    start, end = made.subject_span
    assert made.prompt[start:end] == "France"
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.prompt = "x"  # pyright: ignore[reportAttributeAccessIssue]


def test_a_fact_needs_no_id_and_one_made_of_its_content_stays():
    made = Fact(subject="France", prompt="The capital of {} is", target=" Rome")
    same = Fact("France", "The capital of France is", "Rome", target_old="Paris", joint="space")
    assert made.id == same.id and made.id.startswith("fact-") and made.joint == "space"
    assert Fact(subject="France", prompt="The capital of {} is", target="Oslo").id != made.id
    assert dataclasses.replace(made, target="Oslo").id == made.id
    assert fact().id == "f"


def test_space_around_subject_and_answers_is_dropped_and_prompts_are_kept():
    made = fact(subject=" France", target=" Rome\n", target_old=" Paris", prompt="France is ")
    assert (made.subject, made.target, made.target_old) == ("France", "Rome", "Paris")
    assert made.prompt == "France is "
    probe = Probe(" Q: ", " A ", aliases=(" B ",))
    assert (probe.prompt, probe.answer, probe.aliases) == (" Q: ", "A", ("B",))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"id": " "}, "id"),
        ({"id": None}, "id"),
        ({"subject": ""}, "subject"),
        ({"prompt": ""}, "prompt"),
        ({"target": "  "}, "target"),
        ({"target_old": ""}, "target_old"),
        ({"target": 1998}, "target"),
        ({"target": "Par\ud800is"}, "target"),
        ({"subject": "Spain"}, "subject"),
        ({"target": "Paris "}, "target"),
        ({"target": "Lutetia", "old_aliases": ("Lutetia",)}, "target"),
        ({"rephrasings": ("ok", " ")}, "rephrasings[2]"),
        ({"rephrasings": "France has the capital"}, "rephrasings"),
        ({"old_aliases": None}, "old_aliases"),
        ({"locality": ({"prompt": "x"},)}, "locality[1]"),
        ({"portability": "x"}, "portability"),
    ],
)
def test_bad_fields_are_refused_by_name(changes, field):
    with pytest.raises(DataError) as caught:
        fact(**changes)
    assert caught.value.field == field


@pytest.mark.parametrize(
    "values",
    [
        {"prompt": " "},
        {"prompt": "x", "answer": ""},
        {"prompt": "x", "aliases": ("",)},
        {"prompt": "x", "kind": "\ud800"},
        {"prompt": "x", "kind": 3},
        {"prompt": "x", "kind": None},
    ],
)
def test_bad_probes_are_refused(values):
    with pytest.raises(DataError):
        Probe(**values)


def test_lists_become_tuples():
    made = fact(rephrasings=["a", "b"], locality=[Probe("x")])
    assert made.rephrasings == ("a", "b") and made.locality == (Probe("x"),)


@pytest.mark.parametrize(
    ("subject", "text", "found"),
    [
        ("Iran", "Iranian oil comes from Iran, not", (23, 27)),
        ("Iran", "The Iranian flag", (4, 8)),
        ("A", "A and A", (6, 7)),
        ("U.S.", "the U.S. is", (4, 8)),
        ("x{}", "of x{} is", (3, 6)),
        ("東京", "日本の首都は東京です", (6, 8)),
        ("france", "The capital of France", None),
        (" ", "a b", None),
    ],
)
def test_find_subject(subject, text, found):
    assert find_subject(subject, text) == found


@pytest.mark.parametrize(
    ("subject", "prompt", "near"),
    [
        ("france", "The capital of France is", "France"),
        ("Jose Marti", "José Martí was born in", "José Martí"),
        ("Dario  Fo", "The plays of Dario Fo", "Dario Fo"),
        ("Dario Fo", "The plays of Dario \t Fo are", "Dario \t Fo"),
        ("STRASSE", "Die Straße ist", "Straße"),
        ("Élan", unicodedata.normalize("NFD", "An Élan vital"), "E\u0301lan"),
        ("cafe", unicodedata.normalize("NFD", "le café est"), "cafe\u0301"),
        ("Spain", "The capital of France is", None),
        (" ", "The capital", None),
        ("L'Aquila", "The mayor of L’Aquila is", "L’Aquila"),
        ("L’Aquila", "The mayor of L'Aquila is", "L'Aquila"),
        ("Ocean's Eleven", "Ocean´s Eleven is by", "Ocean´s Eleven"),
        ('"Heroes"', "Of “Heroes” the", "“Heroes”"),
        ("Heroes “live”", 'Of Heroes "live" the', 'Heroes "live"'),
        ("Jean-Luc", "Of Jean–Luc the", "Jean–Luc"),
        ("2019—20 season", "the 2019-20 season of", "2019-20 season"),
        ("New York", "In New\u00a0York the", "New\u00a0York"),
        ("Wait...", "The film Wait… is", "Wait…"),
        ("Wait…", "The film Wait... is", "Wait..."),
        ("Zoe", "Of Z\u200boe\u00ad the", "Z\u200boe"),
        ("e-mail", "the email of", None),
    ],
)
def test_near_subject_is_the_prompts_own_spelling(subject, prompt, near):
    assert near_subject(subject, prompt) == near
    assert near is None or find_subject(near, prompt) is not None


@pytest.mark.parametrize(
    ("subject", "prompt", "filled"),
    [
        ("France", "The capital of {} is", "The capital of France is"),
        ("Go", "Google's language {} is", "Google's language Go is"),
        ("A{}", "Of {}", "Of A{}"),
        ("x\\1", "{} is", "x\\1 is"),
        ("東京", "{}の首都は", "東京の首都は"),
        ("France", "France = {}", "France = {}"),
        ("d", "d = {}; d[", "d = {}; d["),
        ("東京", "東京は{}です", "東京は{}です"),
        ("A{}", "Of A{} the", "Of A{} the"),
        ("France", "France and {} and {}", "France and {} and {}"),
        ("France", "France {x}", "France {x}"),
    ],
)
def test_braces_stand_for_a_subject_that_is_not_in_the_prompt(subject, prompt, filled):
    made = fact(subject=subject, prompt=prompt, rephrasings=[prompt], generation_prompts=[prompt])
    assert (made.prompt, made.rephrasings, made.generation_prompts) == (
        *(filled, (filled,)),
        (filled,),
    )
    assert dataclasses.replace(made) == made  # and so does writing and reading it


def test_two_places_for_an_absent_subject_are_no_prompt():
    with pytest.raises(DataError, match=r"is not in the prompt .* or one \{\} in its place"):
        fact(prompt="{} and {} are")


def test_a_subject_that_differs_in_form_is_refused_with_the_right_spelling():
    with pytest.raises(DataError, match="Write the subject as the prompt has it: 'France'"):
        fact(subject="FRANCE")


def test_old_answer_filled_in_by_the_model_is_marked_and_checked():
    bare = fact(target_old=None)
    assert not bare.target_old_is_generated
    filled = bare.with_old(" Paris")
    assert filled.target_old == "Paris" and filled.target_old_is_generated
    for continuation in ("Rome", ""):
        with pytest.raises(DataError):
            bare.with_old(continuation)


def test_a_row_error_keeps_what_it_knew_when_it_is_placed():
    error = DataError("bad", field="x", fix="Mend it", reason="kind of bad")
    placed = error.at(source="f.json", row=3)
    assert str(placed) == "f.json, row 3, field 'x': bad. Mend it."
    assert placed.reason == "kind of bad" and placed.at(field="y").row == 3
    assert DataError("bad").reason == "bad"


def test_facts_that_repeat_or_contradict_an_earlier_one():
    first, other = fact(id="a"), fact(id="b", prompt="France has the capital")
    again = fact(id="c", prompt="The capital  of France is ", rephrasings=["x"])
    against = fact(id="d", target="Oslo")
    assert repeats([first, other]) == ([], [])
    assert repeats([first, other, again, against]) == ([(first, again)], [(first, against)])
    refuse_contradictions([first, other, again])
    with pytest.raises(DataError, match=r"'d' contradicts fact 'a'.*'Rome' and 'Oslo'") as said:
        refuse_contradictions([first, again, against], "Mend it")
    assert str(said.value).endswith("Mend it.")
    more = [first, against, fact(id="e", target="Bonn")]
    with pytest.raises(DataError, match="2 facts contradict an earlier one"):
        refuse_contradictions(more)
