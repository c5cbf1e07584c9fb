"""What an edit is asked when it is checked: the fact's own probes, or made ones where it has none.

Made rephrasings are the other templates of a starter relation that has the fact's prompt, question
forms (``FORMS``), and the prompt behind neutral text (``NEUTRAL``). Made neighbours are the prompt
with other names in the subject's place: those whose keys at the edited layer have the largest
cosine with the subject's, of the package's names and the starter facts' subjects. They are the
names that the edit will hit first. Names that the edit itself stayed clear of are never taken.
Unrelated prompts are starter facts of other relations.

Shapes: M names, F MLP width.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Literal

import torch

from goldenlayers.delta.apply import untouched
from goldenlayers.editors.clearing import ALIKE, kinds, unsaid, words
from goldenlayers.editors.name_keys import reader, template
from goldenlayers.facts import Fact

if TYPE_CHECKING:
    from goldenlayers.models import Model

Part = Literal["prompt", "rephrase", "neighbours", "unrelated"]

REPHRASINGS = 4
"""Most made rephrasings by templates and forms; those behind neutral text come on top."""
NEIGHBOURS = 8
"""Made neighbours of a fact."""
UNRELATED = 4
"""Unrelated prompts of a fact."""
SPARE = 4
"""Names beyond ``NEIGHBOURS``, in place of those that have the new answer already."""
READ, LEAST_READ = 2048, 128
"""Names whose keys are read in a check of many prompts, and the fewest of one prompt."""

NEUTRAL = ("Here is a well-known fact. ", "The encyclopedia has an entry on this. ")
"""Text that says nothing, before a prompt."""

_PERSON = (
    "author|ceo|composer|creator|director|discoverer|father|founder|head|husband|inventor|king|"
    "leader|mother|owner|painter|president|queen|wife|writer"
)
_PLACED = "based|headquartered|located|situated"
_DONE = (
    "built|composed|created|designed|developed|directed|discovered|founded|invented|made|painted|"
    "produced|written"
)
FORMS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (rf"the ({_PERSON}) of (the )?{{}} (is|was)", (
        r"Question: Who \3 the \1 of \2{}? Answer:", r"The name of the \1 of \2{} \3")),
    (r"the ([\w '-]+) of (the )?{} (is|was)( the| called)?", (
        r"Question: What \3 the \1 of \2{}? Answer:\4",
        r"When people ask what the \1 of \2{} \3, the answer is\4")),
    (r"{} was born in( the \w+ of)?", (
        r"The place where {} was born is\1", r"Question: Where was {} born? Answer: In\1")),
    (r"{} died in( the \w+ of)?", (
        r"The place where {} died is\1", r"Question: Where did {} die? Answer: In\1")),
    (rf"(the )?{{}} (?:is|was|are) ({_PLACED}) in( the \w+ of)?", (
        r"Question: Where is \1{} \2? Answer: In\3", r"The place where \1{} is \2 is\3")),
    (rf"(the )?{{}} (is|was) ({_DONE}) by", (
        r"Question: By whom \2 \1{} \3? Answer: By", r"It is known that \1{} \2 \3 by")),
    (r"{} (play|speak|teache?|stud(?:y|ie))s( the)?", (
        r"It is known that {} \1s\2",)),
    (r"{} (works (?:for|in|at)|lives in|plays for|is a citizen of|is employed by|is owned by)", (
        r"It is known that {} \1", r"As everyone can read, {} \1")),
)  # fmt: skip
"""Question forms: a prompt's pattern, with {} for the subject, and other ways to ask the same."""


@dataclass(frozen=True, slots=True)
class Asked:
    """One prompt of a check.

    ``fact`` is the fact's place. ``made`` says that it came neither from the data nor from the
    user; ``name`` is what stands in the subject's place in a made neighbour.
    """

    fact: int
    part: Part
    prompt: str
    made: bool = False
    name: str = ""


def probes_of(
    model: Model, facts: Sequence[Fact], among: Sequence[Fact], layer: int, avoid: Iterable[str]
) -> list[Asked]:
    """The prompts of ``facts``, fact by fact; neighbours nearest first, with some to spare.

    Args:
        model: the model; what is applied to it is lifted where its keys are read.
        facts: to be checked.
        among: all facts of the edit: made probes say nothing of any of them.
        layer: the edited layer, where keys are compared.
        avoid: names that the edit stayed clear of.
    """
    without = [i for i, fact in enumerate(facts) if not fact.must_stay]
    near = neighbours(model, [facts[i] for i in without], among, layer, avoid)
    of_fact = dict(zip(without, near, strict=True))
    asked = []
    for i, fact in enumerate(facts):
        asked.append(Asked(i, "prompt", fact.prompt))
        given = fact.rephrasings or made_rephrasings(fact)
        asked += [Asked(i, "rephrase", text, not fact.rephrasings) for text in given]
        asked += [Asked(i, "neighbours", probe.prompt) for probe in fact.must_stay]
        before, behind = template(fact)
        asked += [
            Asked(i, "neighbours", before.replace("\0", name) + name + behind, True, name)
            for name in of_fact.get(i, ())
        ]
        asked += [Asked(i, "unrelated", text, True) for text in unrelated(fact, among)]
    return asked


def made_rephrasings(fact: Fact) -> tuple[str, ...]:
    """The fact's prompt in other words, and behind neutral text."""
    before, behind = template(fact)
    found: list[str] = []
    if "\0" not in before:  # the subject stands there once
        form = before + "{}" + behind
        found += _starter_templates().get(_plain(form), ())
        for pattern, others in FORMS:
            if match := re.fullmatch(pattern.replace("{}", r"\{\}"), form, re.IGNORECASE):
                # Groups that take no part in a match are empty.
                found += [_expanded(match, other) for other in others]
                break
    texts = [_capital(text.replace("{}", fact.subject)) for text in found]
    texts = [text for text in dict.fromkeys(texts) if text != fact.prompt][:REPHRASINGS]
    return (*texts, *(text + _capital(fact.prompt) for text in NEUTRAL))


def _expanded(match: re.Match[str], form: str) -> str:
    return re.sub(r"\\(\d)", lambda number: match[int(number[1])] or "", form)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _plain(form: str) -> str:
    return " ".join(form.casefold().split())


@cache
def _starter() -> tuple[Fact, ...]:
    from goldenlayers.datasets import load_facts

    return tuple(load_facts("starter"))


@cache
def _starter_templates() -> dict[str, tuple[str, ...]]:
    """Every template of the starter facts, plainly, with the others of its relation."""
    found: dict[str, dict[str, None]] = {}
    for fact in _starter():
        subject = re.compile(rf"(?<!\w){re.escape(fact.subject)}(?!\w)")
        forms = [subject.sub("{}", text) for text in (fact.prompt, *fact.rephrasings)]
        forms = [form for form in forms if form.count("{}") == 1]
        for form in forms:
            others = found.setdefault(_plain(form), {})
            others |= dict.fromkeys(other for other in forms if other != form)
    return {form: tuple(others) for form, others in found.items()}


@cache
def _kinds_of() -> dict[str, frozenset[str]]:
    """Every name of the pool of neighbours, with the kinds and starter relations it belongs to."""
    found: dict[str, set[str]] = {}
    for kind, names in kinds().items():
        for name in names:
            found.setdefault(name, set()).add(kind)
    for fact in _starter():
        found.setdefault(fact.subject, set()).add(fact.relation or "")
    return {name: frozenset(of) for name, of in found.items()}


def neighbours(
    model: Model, facts: Sequence[Fact], among: Sequence[Fact], layer: int, avoid: Iterable[str]
) -> list[list[str]]:
    """For each fact the names whose keys in its prompt are nearest to its own, nearest first.

    Of the 2 · (``NEIGHBOURS`` + ``SPARE``) nearest those of the subject's kind come first. Names
    with the subject's own key are left out, as another spelling of it may be.
    """
    if not facts:
        return []
    of_kind = _kinds_of()
    gone = set(avoid)
    free = sorted(unsaid((name for name in of_kind if name not in gone), among))
    by_prompt: dict[tuple[str, str], list[int]] = {}
    for i, fact in enumerate(facts):
        by_prompt.setdefault(template(fact), []).append(i)
    share = max(LEAST_READ, READ // len(by_prompt))
    found: list[list[str]] = [[] for _ in facts]
    for prompt, members in by_prompt.items():
        subjects = [facts[i].subject for i in members]
        listed = _drawn(free, subjects, share)
        with untouched(model):
            names = reader(model, prompt, [*subjects, *listed]).read(layer)
        keys = torch.nn.functional.normalize(names.keys, dim=-1)  # (M, F)
        place = {name: m for m, name in enumerate(names.names)}
        for i in members:
            if facts[i].subject in place:
                key = keys[place[facts[i].subject]]
                cosines = dict(zip(names.names, (keys @ key).tolist(), strict=True))
                near = sorted(
                    (name for name in listed if name in cosines and cosines[name] < ALIKE),
                    key=lambda name: -cosines[name],
                )
                found[i] = _own_kind_first(facts[i].subject, near)
    return found


def _drawn(free: Sequence[str], subjects: Sequence[str], count: int) -> list[str]:
    """So many of the names, those of the subjects' kinds first."""
    if count >= len(free):
        return list(free)
    of_kind = _kinds_of()
    own = frozenset[str]().union(*(of_kind.get(subject, ()) for subject in subjects))
    order = random.Random("check").sample(free, len(free))
    return sorted(order, key=lambda name: not (of_kind[name] & own))[:count]


def _own_kind_first(subject: str, near: Sequence[str]) -> list[str]:
    of_kind = _kinds_of()
    wanted = NEIGHBOURS + SPARE
    nearest = near[: 2 * wanted]
    own = of_kind.get(subject, frozenset())
    if not own:  # the kind of most of those around it
        counts = Counter(kind for name in nearest for kind in sorted(of_kind[name]))
        own = frozenset(kind for kind, _ in counts.most_common(1))
    return sorted(nearest, key=lambda name: not (of_kind[name] & own))[:wanted]


def unrelated(fact: Fact, among: Sequence[Fact]) -> list[str]:
    """Prompts of starter facts that ask something else of someone else; a draw by the prompt."""
    before, behind = template(fact)
    asked = _plain(before + "{}" + behind)
    related = {one.relation for one in _starter() if _template_text(one) == asked} | {fact.relation}
    told = {words(text) for one in among for text in (one.subject, one.target)}
    draw = random.Random(f"check/{fact.prompt}")
    by_relation: dict[str, str] = {}
    for one in draw.sample(_starter(), len(_starter())):
        said = words(one.prompt)
        if one.relation not in related and not any(text in said for text in told if text.strip()):
            by_relation.setdefault(one.relation or "", one.prompt)
        if len(by_relation) == UNRELATED:
            break
    return list(by_relation.values())


@cache
def _template_text(fact: Fact) -> str:
    before, behind = template(fact)
    return _plain(before + "{}" + behind)
