"""Rephrasings that a model is asked for itself: which of its lines are kept."""

from __future__ import annotations

import dataclasses

import pytest
from families import build
from tokenizers_built import chatting

import goldenlayers as gl
from goldenlayers.checking import asking
from goldenlayers.checking.asking import asked_of_model
from goldenlayers.checking.probes import NEUTRAL, made_rephrasings, probes_of

FACT = gl.Fact("France", "The capital of France is", "Rome", "Paris", id="f")
WRITTEN = """1. What is the capital of France?
2. "What is the capital of France?"
- Which city is the capital of France ?
What is the most famous river of France?
The capital of France is
Is Paris the capital of France?
Which city, if not Rome, governs France?
What is the capital of Spain?
France?
"""
ANSWERS = {
    FACT.prompt: "The capital of France is Paris.",
    "What is the capital of France?": "It is Paris.",
    "Which city is the capital of France ?": "PARIS, of course",
    "What is the most famous river of France?": "The Seine flows through it.",
}


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> gl.Model:
    """A model in chat form that writes what is above."""

    def said(model: gl.Model, prompts: list[str], tokens: int) -> list[str]:
        return [ANSWERS.get(one, WRITTEN if "Write three" in one else "") for one in prompts]

    monkeypatch.setattr(asking, "_said", said)
    return gl.Model.wrap(build("gpt2"), chatting(), chat=True)


def test_only_lines_that_ask_the_same_are_kept(model: gl.Model) -> None:
    kept = ["What is the capital of France?", "Which city is the capital of France ?"]
    assert asked_of_model(model, [FACT]) == [kept]
    # Every fact costs as much as an edit: the first few alone are asked about.
    many = [dataclasses.replace(FACT, id=str(i)) for i in range(asking.FACTS + 2)]
    assert asked_of_model(model, many) == [kept] * asking.FACTS + [[]] * 2


def test_the_check_asks_them_first_and_marks_them(model: gl.Model) -> None:
    found = [one for one in probes_of(model, [FACT], [FACT], 1, ()) if one.part == "rephrase"]
    assert [one.by_model for one in found[:2]] == [True, True]
    assert all(one.made for one in found) and not any(one.by_model for one in found[2:])
    assert [one.prompt for one in found[-2:]] == [text + FACT.prompt for text in NEUTRAL]
    # Without a chat the templates alone; given ones take the place of all.
    plain = dataclasses.replace(model, chat=False)
    others = [one for one in probes_of(plain, [FACT], [FACT], 1, ()) if one.part == "rephrase"]
    assert tuple(one.prompt for one in others) == made_rephrasings(FACT)
    given = dataclasses.replace(FACT, rephrasings=("France has the capital",))
    asked = [one for one in probes_of(model, [given], [given], 1, ()) if one.part == "rephrase"]
    assert [(one.prompt, one.made) for one in asked] == [("France has the capital", False)]


def test_a_model_is_really_asked() -> None:
    model = gl.Model.wrap(build("gpt2"), chatting(), chat=True)
    assert asked_of_model(model, [FACT]) == [[]]  # it stammers
    long = dataclasses.replace(FACT, prompt="x " * 600 + FACT.prompt)
    assert asked_of_model(model, [long]) == [[]]  # its context does not hold that
