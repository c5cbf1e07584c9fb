"""Rephrasings that an instruction model is asked for itself, and which of them are kept.

Small models write other questions, or answers, as readily as rephrasings. So a line is kept only if
it names the subject, gives neither answer away, and is answered by the model as it is with what it
answers the prompt with.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from goldenlayers.decoding import greedy
from goldenlayers.delta.apply import untouched
from goldenlayers.errors import UserError
from goldenlayers.facts import Fact
from goldenlayers.prompts import find_subject, mentions, new_words, plain_words

if TYPE_CHECKING:
    from goldenlayers.models import Model

FACTS = 4
"""Facts that the model is asked about, of more: each costs about as much as an edit."""
_ASK = (
    'Write three questions that have the same answer as "{prompt}". Each names "{subject}". '
    "One a line, without answers."
)
_LINES, _ANSWER = 72, 20  # tokens
_SHORTEST = 4  # letters of a word that two answers must share


def asked_of_model(model: Model, facts: Sequence[Fact]) -> list[list[str]]:
    """What the model, as it is without deltas, writes as other ways to ask; for each fact the lines
    that are kept, nothing beyond the first ``FACTS`` facts.
    """
    asked = list(facts[:FACTS])
    with untouched(model):
        written = _said(model, [_question(fact) for fact in asked], _LINES)
        lines = [list(_usable(fact, text)) for fact, text in zip(asked, written, strict=True)]
        prompts = [(fact.prompt, *some) for fact, some in zip(asked, lines, strict=True)]
        answers = iter(_said(model, [one for some in prompts for one in some], _ANSWER))
    kept: list[list[str]] = [[] for _ in facts]
    for i, (prompt, *some) in enumerate(prompts):
        right = next(answers)
        kept[i] = [one for one in some if _alike((prompt, right), (one, next(answers)))]
    return kept


def _question(fact: Fact) -> str:
    return _ASK.format(prompt=fact.prompt, subject=fact.subject)


def _said(model: Model, prompts: Sequence[str], tokens: int) -> list[str]:
    """The greedy answers; nothing where a prompt and an answer do not fit the context."""
    encoder, rows = model.encoder, []
    for prompt in prompts:
        try:
            ids = encoder.encode(prompt).ids
        except UserError:
            ids = ()
        limit = encoder.max_length
        rows.append(ids if limit is None or len(ids) + tokens <= limit else ())
    fitting = [row for row in rows if row]
    new = iter(greedy(model, fitting, tokens))
    return [encoder.continuation(row, next(new)) if row else "" for row in rows]


def _usable(fact: Fact, text: str) -> Iterator[str]:
    """The lines of a text that could be rephrasings, without their numbers and quotation marks."""
    told = [fact.target, fact.target_old or fact.target, *fact.old_aliases]
    seen = {plain_words(fact.prompt)}
    for line in text.split("\n"):
        one = re.sub(r"^\s*(?:[-*•]|\d+[.)])?\s*", "", line).strip().strip("\"“”'`").strip()
        words = plain_words(one)
        rest = set(words.split()) - set(plain_words(fact.subject).split())
        if find_subject(fact.subject, one) is None or len(rest) < 2 or words in seen:
            continue
        if not any(mentions(answer, one) for answer in told):
            seen.add(words)
            yield one


def _alike(first: tuple[str, str], second: tuple[str, str]) -> bool:
    """Whether two (question, answer) pairs are answered alike: by a word that is in neither
    question.
    """
    questions = f"{first[0]} {second[0]}"
    new = [set(new_words(questions, answer)) for _, answer in (first, second)]
    return any(len(word) >= _SHORTEST for word in new[0] & new[1])
