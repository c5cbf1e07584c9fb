"""What an edit is asked when it is checked: the fact's own probes, or made ones where it has none.

Made rephrasings are the other templates of a starter relation that has the fact's prompt, question
forms (``FORMS``), and the prompt behind neutral text (``NEUTRAL``); of an instruction model, before
them, what it writes itself (:mod:`goldenlayers.checking.asking`). Made neighbours are the prompt
with other names of the subject's kind in its place: those whose keys at the edited layer are
nearest to the subject's by their cosine, which the edit will hit first. They come from a list of
the check's own (``judges.json``) and the starter facts' subjects, and are none of the names that
clear-rome stays clear of: a fair judge, and the same one for every editor. Unrelated prompts are
starter facts of other relations.

Shapes: M names, F MLP width.
"""

from __future__ import annotations

import importlib.resources
import json
import random
import re
from collections import Counter
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from goldenlayers.checking.asking import asked_of_model
from goldenlayers.delta.apply import untouched
from goldenlayers.editors.clearing import ALIKE, kinds, pool, unsaid, words
from goldenlayers.editors.name_keys import reader, template
from goldenlayers.editors.routing import seen_by
from goldenlayers.facts import Fact

if TYPE_CHECKING:
    from goldenlayers.models import Model

Part = Literal["prompt", "rephrase", "neighbours", "unrelated"]
KEEP: tuple[Part, ...] = ("neighbours", "unrelated")
"""The parts whose answers must stay."""

REPHRASINGS = 4
"""Most made rephrasings by templates and forms; those behind neutral text come on top."""
NEIGHBOURS = 8
"""Made neighbours of a fact."""
UNRELATED = 4
"""Unrelated prompts of a fact."""
SPARE = 4
"""Names beyond ``NEIGHBOURS``, in place of those that have the new answer already."""
RELATIVES = 2
"""Of them, made-up people with the last name of a person: their keys are the nearest of all."""
FEW = 6
"""Names of each kind that are read where it is not known what kind of thing the subject is."""
FIRST_NAMES = ("Anna", "John", "Maria", "Mary", "Paul", "Peter", "Pierre", "Robert")
PEOPLE = frozenset(
    {
        "actors and directors",
        "athletes",
        "musicians and composers",
        "painters, sculptors and architects",
        "rulers and politicians",
        "scientists and thinkers",
        "writers",
    }
)

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
        r"{} was born and raised in\1", r"Question: Where was {} born? Answer: In\1")),
    (r"{} died in( the \w+ of)?", (
        r"{} died and was buried in\1", r"Question: Where did {} die? Answer: In\1")),
    (rf"(the )?{{}} (?:is|was|are) ({_PLACED}) in( the \w+ of)?", (
        r"\1{} can be found in\3", r"Question: Where is \1{} \2? Answer: In\3")),
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
    user, ``by_model`` that the model wrote it; ``name`` is what stands in the subject's place in a
    made neighbour.
    """

    fact: int
    part: Part
    prompt: str
    made: bool = False
    name: str = ""
    by_model: bool = False


def probes_of(
    model: Model, facts: Sequence[Fact], among: Sequence[Fact], layer: int, avoid: Container[str]
) -> list[Asked]:
    """The prompts of ``facts``, fact by fact; neighbours nearest first, with some to spare.

    Args:
        model: the model; what is applied to it is lifted where its keys are read.
        facts: to be checked.
        among: all facts of the edit: made probes say nothing of any of them.
        layer: the edited layer, where keys are compared.
        avoid: names that the edit stayed clear of, and names and prompts that it was chosen by.
    """
    without = [i for i, fact in enumerate(facts) if not fact.must_stay]
    near = neighbours(model, [facts[i] for i in without], among, layer, avoid)
    of_fact = dict(zip(without, near, strict=True))
    bare = [i for i, fact in enumerate(facts) if model.chat and not fact.rephrasings]
    written = dict(zip(bare, asked_of_model(model, [facts[i] for i in bare]), strict=True))
    asked = []
    for i, fact in enumerate(facts):
        asked.append(Asked(i, "prompt", fact.prompt))
        own = written.get(i, ())
        texts = fact.rephrasings or made_rephrasings(fact, own)
        asked += [
            Asked(i, "rephrase", text, not fact.rephrasings, by_model=text in own)
            for text in texts
            if text not in avoid
        ]
        stay = (probe.prompt for probe in fact.must_stay)
        asked += [Asked(i, "neighbours", prompt) for prompt in stay if prompt not in avoid]
        before, behind = template(fact)
        asked += [
            Asked(i, "neighbours", before.replace("\0", name) + name + behind, True, name)
            for name in of_fact.get(i, ())
        ]
        asked += [Asked(i, "unrelated", text, True) for text in unrelated(fact, among)]
    return asked


def made_rephrasings(fact: Fact, first: Sequence[str] = ()) -> tuple[str, ...]:
    """The fact's prompt in other words, those of ``first`` in front, and behind neutral text."""
    form = form_of(fact)
    found = [*_starter_templates().get(_plain(form), ()), *in_other_words(form)]
    texts = [*first, *(filled_form(text, fact.subject) for text in found)]
    texts = [text for text in dict.fromkeys(texts) if text != fact.prompt][:REPHRASINGS]
    return (*texts, *(text + fact.prompt for text in NEUTRAL))


def form_of(fact: Fact) -> str:
    """The prompt with {} for its subject; empty where the subject stands there twice."""
    before, behind = template(fact)
    return "" if "\0" in before else before + "{}" + behind


def in_other_words(form: str) -> list[str]:
    """The question forms that ask the same as a form."""
    for pattern, others in FORMS:
        if match := re.fullmatch(pattern.replace("{}", r"\{\}"), form, re.IGNORECASE):
            # Groups that take no part in a match are empty.
            return [_expanded(match, other) for other in others]
    return []


def _expanded(match: re.Match[str], form: str) -> str:
    return re.sub(r"\\(\d)", lambda number: match[int(number[1])] or "", form)


def filled_form(form: str, subject: str) -> str:
    """The form about the subject, begun with a capital unless a name begins it (iPod)."""
    text = form.replace("{}", subject)
    plain = form.startswith("{}") and not subject.startswith("the ")
    return text if plain else text[:1].upper() + text[1:]


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
def _judges() -> dict[str, tuple[str, ...]]:
    """The names that are asked about, by kind: the check's own, and of the starter facts' subjects
    by relation those that no editor stays clear of by itself.
    """
    file = importlib.resources.files("goldenlayers.checking") / "judges.json"
    found: dict[str, list[str]] = dict(json.loads(file.read_text("utf-8"))["names"])
    pooled = {words(name) for name in pool()}
    for fact in _starter():
        if words(fact.subject) not in pooled:
            found.setdefault(fact.relation or "", []).append(fact.subject)
    return {kind: tuple(dict.fromkeys(names)) for kind, names in found.items()}


@cache
def _kinds_of() -> dict[str, frozenset[str]]:
    """Every name that is known, with the kinds and starter relations it belongs to."""
    found: dict[str, set[str]] = {}
    for some in (kinds(), _judges()):
        for kind, names in some.items():
            for name in names:
                found.setdefault(name, set()).add(kind)
    for fact in _starter():
        found.setdefault(fact.subject, set()).add(fact.relation or "")
    return {name: frozenset(of) for name, of in found.items()}


def neighbours(
    model: Model, facts: Sequence[Fact], among: Sequence[Fact], layer: int, avoid: Container[str]
) -> list[list[str]]:
    """For each fact other names, nearest first by the cosine of their keys in its prompt.

    They are of the subject's kind: the kinds it is listed under, or those of the names nearest to
    it, of a few of each kind. Of a person, ``RELATIVES`` with the same last name come first. Names
    with the subject's own key are left out, as another spelling of it may have it.
    """
    by_prompt: dict[tuple[str, str], list[int]] = {}
    for i, fact in enumerate(facts):
        by_prompt.setdefault(template(fact), []).append(i)
    found: list[list[str]] = [[] for _ in facts]
    for prompt, members in by_prompt.items():
        subjects = list(dict.fromkeys(facts[i].subject for i in members))
        near = _Near(seen_by(model, layer, facts[members[0]]), prompt, layer, among, avoid)
        near.read([*subjects, *near.few(subjects)])
        own = {subject: near.kinds(subject) for subject in subjects}
        listed = {subject: near.of_kinds(own[subject]) for subject in subjects}
        kin = {subject: near.relatives(subject, own[subject]) for subject in subjects}
        near.read([name for some in (*listed.values(), *kin.values()) for name in some])
        for i in members:
            subject = facts[i].subject
            first = near.nearest(subject, kin[subject])[:RELATIVES]
            names = dict.fromkeys([*first, *near.nearest(subject, listed[subject])])
            found[i] = list(names)[: NEIGHBOURS + SPARE]
    return found


class _Near:
    """The names around the subjects of one prompt, and their keys at one layer."""

    def __init__(
        self,
        model: Model,
        prompt: tuple[str, str],
        layer: int,
        among: Sequence[Fact],
        gone: Container[str],
    ) -> None:
        self.model, self.prompt, self.layer = model, prompt, layer
        self._among, self._gone = among, gone
        self._keys: dict[str, Tensor] = {}  # (F,), of length 1

    def read(self, names: Iterable[str]) -> None:
        """Read the keys of names that were not read yet."""
        new = [name for name in dict.fromkeys(names) if name not in self._keys]
        if not new:
            return
        with untouched(self.model):
            found = reader(self.model, self.prompt, new).read(self.layer)
        keys = torch.nn.functional.normalize(found.keys, dim=-1)  # (M, F)
        self._keys |= dict(zip(found.names, keys, strict=True))

    def nearest(self, subject: str, names: Iterable[str]) -> list[str]:
        """Those of the names that were read, by the cosine with the subject's key."""
        if subject not in self._keys:
            return []
        cosines = {
            name: float(self._keys[name] @ self._keys[subject])
            for name in names
            if name in self._keys
        }
        near = [name for name in cosines if cosines[name] < ALIKE]
        return sorted(near, key=lambda name: -cosines[name])

    def few(self, subjects: Iterable[str]) -> list[str]:
        """A few names of each kind, if a subject is not listed under any."""
        if all(subject in _kinds_of() for subject in subjects):
            return []
        draw = random.Random("check")
        return [name for kind in kinds() for name in draw.sample(_judges()[kind], FEW)]

    def kinds(self, subject: str) -> frozenset[str]:
        """What the subject is listed under, or most of the names nearest to it are."""
        if subject in _kinds_of():
            return _kinds_of()[subject]
        around = self.nearest(subject, self.few([subject]))[:FEW]
        counts = Counter(kind for name in around for kind in sorted(_kinds_of()[name]))
        return frozenset(kind for kind, _ in counts.most_common(2))

    def of_kinds(self, own: frozenset[str]) -> list[str]:
        """The free names of the kinds."""
        names = (name for kind, some in _judges().items() if kind in own for name in some)
        return self._free(dict.fromkeys(names))

    def relatives(self, subject: str, own: frozenset[str]) -> list[str]:
        """Other first names with a person's last name."""
        *first, last = subject.split()
        if not (first and own & PEOPLE):
            return []
        return self._free(f"{name} {last}" for name in FIRST_NAMES if name != first[0])

    def _free(self, names: Iterable[str]) -> list[str]:
        names = [name for name in names if name not in self._gone]
        free = unsaid(names, self._among)
        return [name for name in names if name in free]


def unrelated(fact: Fact, among: Sequence[Fact]) -> list[str]:
    """Prompts of starter facts that ask something else of someone else; a draw by the prompt."""
    related = _relations().get(_form(fact), frozenset()) | {fact.relation}
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


def _form(fact: Fact) -> str:
    before, behind = template(fact)
    return _plain(before + "{}" + behind)


@cache
def _relations() -> dict[str, frozenset[str | None]]:
    """Every form that starter facts are asked in, with the relations that ask so."""
    found: dict[str, set[str | None]] = {}
    for fact in _starter():
        found.setdefault(_form(fact), set()).add(fact.relation)
    return {form: frozenset(of) for form, of in found.items()}
