"""What a relation of the starter facts consists of, and how its rows are made.

A table is text, one subject a line: ``subject = answer | also true | also true``. The first answer
is the one asked for; the others are true too, or too near the truth to be used as a false answer.
A leading "the " belongs to the sentence and not to the subject; square brackets mark the subject
inside a longer phrase ("the discovery of [penicillin]").

Templates know ``{s}`` (the phrase), ``{S}`` (the phrase at the start of a sentence) and ``{a}``
(the phrase with "a" or "an").
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from goldenlayers.facts import Fact, Probe
from goldenlayers.prompts import find_subject


@dataclass(frozen=True, slots=True)
class Item:
    """One line of a table. ``answers[0]`` is the answer; all of them are kept off false targets."""

    phrase: str
    subject: str
    answers: tuple[str, ...]

    def fill(self, template: str) -> str:
        return fill(template, self.phrase)


@dataclass(frozen=True, slots=True)
class Alias:
    """Asks the same under another name of the subject; ``names`` gives it by subject.

    Descriptions that one must think about ("the Bard of Avon" is a name, "the painter of Guernica"
    is not) have the kind Reasoning.
    """

    template: str
    names: Mapping[str, str]
    kind: str = "Subject_Aliasing"


@dataclass(frozen=True, slots=True)
class Consequence:
    """Asks for something that follows from the new answer: ``answers`` gives it by that answer.

    A probe is made only when the consequence differs from that of the old answer, so that it tells
    an edited model from an unedited one. For that the old answer must be listed too, unless
    ``shared`` is false: then no answer outside ``answers`` has one of the listed consequences.
    ``answers`` None: the new answer itself is asked for.
    """

    template: str
    answers: Mapping[str, str] | None = None
    shared: bool = True
    kind: str = "Reasoning"

    def answer(self, item: Item, new: str) -> str | None:
        if self.answers is None:
            return new
        if self.shared and item.answers[0] not in self.answers:
            return None
        follows = self.answers.get(new)
        return None if follows in map(self.answers.get, item.answers) else follows


@dataclass(frozen=True, slots=True)
class Relation:
    """A relation: its table, its wordings and what follows from an answer."""

    name: str
    table: str
    prompt: str
    rephrasings: tuple[str, ...]
    aliases: tuple[Alias, ...] = ()
    consequences: tuple[Consequence, ...] = ()
    generation: tuple[str, ...] = ()
    items: tuple[Item, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "items", tuple(parse(self.table)))

    @property
    def pool(self) -> list[str]:
        """The answers a false one is taken from: each once, in a fixed order."""
        return sorted({item.answers[0] for item in self.items})

    def facts(self) -> Iterator[Fact]:
        """One fact for each line of the table, always the same ones."""
        used: dict[str, int] = {}
        for index, item in enumerate(self.items):
            new = self._false_answer(item, used)
            used[new] = used.get(new, 0) + 1
            yield Fact(
                id=f"starter-{self.name}-{slug(item.subject)}".replace("_", "-"),
                subject=item.subject,
                prompt=item.fill(self.prompt),
                target=new,
                target_old=item.answers[0],
                relation=self.name,
                rephrasings=tuple(item.fill(template) for template in self.rephrasings),
                locality=tuple(self._neighbours(index, new)),
                portability=tuple(self._portability(item, new)),
                generation_prompts=tuple(item.fill(template) for template in self.generation),
            )

    def _false_answer(self, item: Item, used: Mapping[str, int]) -> str:
        """An answer of the same type that is not true of the subject.

        The least used ones come first, so that no false answer dominates a relation; a hash of the
        subject decides among them, so that no order in the table shows through.
        """
        text = item.fill(self.prompt).lower()
        free = [a for a in self.pool if a not in item.answers and not has_word(a.lower(), text)]
        return min(free, key=lambda answer: (used.get(answer, 0), rank(item.subject, answer)))

    def _neighbours(self, index: int, new: str) -> Iterator[Probe]:
        """Two other subjects whose answers are neither the new nor the old one."""
        item = self.items[index]
        seen = {new, *item.answers}
        others = sorted(self.items, key=lambda other: rank(item.subject, other.subject, "near"))
        found = 0
        for other in others:
            prompt = other.fill(self.prompt)
            if other is item or find_subject(item.subject, prompt) or seen & set(other.answers):
                continue
            seen.add(other.answers[0])
            yield Probe(prompt, other.answers[0], "neighborhood")
            found += 1
            if found == 2:
                return
        raise ValueError(f"{self.name}: too few neighbours for {item.subject}")

    def _portability(self, item: Item, new: str) -> Iterator[Probe]:
        for alias in self.aliases:
            name = alias.names.get(item.subject)
            if name is not None:
                yield Probe(fill(alias.template, name), new, alias.kind)
        for consequence in self.consequences:
            answer = consequence.answer(item, new)
            if answer is not None:
                yield Probe(item.fill(consequence.template), answer, consequence.kind)


def parse(table: str) -> Iterator[Item]:
    """The items of a table, in its order; ValueError for a line that is not "subject = answer"."""
    for line in filter(None, map(str.strip, table.splitlines())):
        phrase, equals, answers = (part.strip() for part in line.partition(" = "))
        names = tuple(answer.strip() for answer in answers.split("|"))
        if not equals or not phrase or not all(names):
            raise ValueError(f"not 'subject = answer': {line!r}")
        marked = re.search(r"\[(.+)\]", phrase)
        subject = marked[1] if marked else phrase.removeprefix("the ")
        yield Item(phrase.replace("[", "").replace("]", ""), subject, names)


def pairs(table: str) -> dict[str, str]:
    """A table with one answer a line as a mapping (keys keep their article)."""
    return {item.phrase: item.answers[0] for item in parse(table)}


def fill(template: str, phrase: str) -> str:
    """The template with the phrase in place; replaces marks only, so other braces are safe."""
    article = "an" if phrase[0].lower() in "aeiou" else "a"
    capital = phrase[0].upper() + phrase[1:]
    marks = {"{s}": phrase, "{S}": capital, "{a}": f"{article} {phrase}"}
    return re.sub(r"\{[sSa]\}", lambda mark: marks[mark[0]], template)


def rank(*words: str) -> str:
    """A fixed, even shuffle: equal on every machine and Python."""
    return hashlib.sha256("\0".join(words).encode()).hexdigest()


def has_word(word: str, text: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text) is not None


def slug(text: str) -> str:
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")
