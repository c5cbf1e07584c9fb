"""Whether an edit does what it should, and nothing else: its answers before and after, and a word
on them.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from goldenlayers.checking.advice import advice_on, stronger
from goldenlayers.checking.answers import Texts, stays, ties
from goldenlayers.checking.probes import KEEP, Part, probes_of
from goldenlayers.delta import WeightDelta
from goldenlayers.delta.apply import deltas_in_force
from goldenlayers.durable import read_bytes_file
from goldenlayers.errors import UserError
from goldenlayers.evaluation.plan import first_block
from goldenlayers.facts import Fact
from goldenlayers.models import check_model
from goldenlayers.prompts import Joint
from goldenlayers.records import made, parse_json, text_of

if TYPE_CHECKING:
    from goldenlayers.models import Model

__all__ = ["FILE", "Check", "Probed", "check", "stronger"]

FILE = "check.json"
"""Where a run of ``golden edit`` keeps its check."""

FACTS = 32
"""Facts that are checked, of an edit of more: a draw."""
TOOK, FOLLOWED, CHANGED = 0.5, 0.5, 0.25
"""An edit did not take if fewer than this share of its facts give the new answer; is narrow if
fewer than this share of rephrasings follow; is damaging if more than this share of neighbours, or
of unrelated prompts, change their answer.
"""

Verdict = Literal["good", "narrow", "damaging", "did not take"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Probed:
    """One prompt of a check with what the model said before the edit and after it.

    Attributes:
        fact: the fact's id.
        part: "prompt" (the edited one), "rephrase", "neighbours" or "unrelated".
        prompt: what was asked.
        made: whether the prompt was made by the check, not given with the fact.
        name: the name in the subject's place, of a made neighbour.
        by_model: whether the model itself wrote it, as another way to ask.
        ok: whether it gives the new answer (prompt, rephrase) or keeps its own (the others).
        before: the greedy answer's first tokens without the edit.
        after: the same with it.
        p_before: the new answer's probability without the edit; None if it is no number.
        p_after: the same with it.
        tie: where an answer should be kept and another one came, how even the two are, before and
            after (see :func:`goldenlayers.checking.answers.ties`); None elsewhere, and in a chat.
    """

    fact: str
    part: Part
    prompt: str
    made: bool
    name: str = ""
    by_model: bool = False
    ok: bool
    before: str
    after: str
    p_before: float | None
    p_after: float | None
    tie: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Edited:
    """A fact that was checked, as it was edited."""

    id: str
    subject: str
    prompt: str
    target: str
    joint: Joint = "auto"


class Share(NamedTuple):
    """How many prompts of a part there are, how many are as they should be, and whether any of
    them was made.
    """

    n: int
    ok: int
    made: bool

    @property
    def failed(self) -> float:
        """Share of those that are not as they should be; 0 of none."""
        return (self.n - self.ok) / self.n if self.n else 0.0


@dataclass(frozen=True, kw_only=True)
class Check:
    """What :func:`check` found.

    Attributes:
        probes: every prompt, in the order of the facts.
        advice: what to try next, none of it followed already.
        n_edited: facts of the edit; those that were checked may be fewer.
        edited: the facts that were checked.
    """

    probes: tuple[Probed, ...]
    advice: tuple[str, ...] = ()
    n_edited: int = 1
    edited: tuple[Edited, ...] = ()

    def share(self, part: Part) -> Share:
        """How a part came out; a prompt that must stay beside several facts counts once."""
        mine = [one for one in self.probes if one.part == part]
        if part in KEEP:
            mine = list({one.prompt: one for one in mine}.values())
        return Share(len(mine), sum(one.ok for one in mine), any(one.made for one in mine))

    @property
    def verdict(self) -> Verdict:
        """One word: see the limits in ``TOOK``, ``FOLLOWED`` and ``CHANGED``."""
        return verdict_of(*map(self.share, ("prompt", "rephrase", "neighbours", "unrelated")))

    @property
    def worst(self) -> tuple[Probed, ...]:
        """The prompts that are not as they should be: what moved first, most moved in front."""

        def key(one: Probed) -> tuple[bool, float]:
            moved = one.part in KEEP
            return not moved, -(one.p_after or 0.0) if moved else (one.p_after or 0.0)

        return tuple(sorted((one for one in self.probes if not one.ok), key=key))

    def sentence(self) -> str:
        """The verdict with its figures and what to try next, in one line."""
        took, follow, near, others = map(self.share, _PARTS)
        why = {
            "did not take": f"{took.ok} of {took.n} facts give the new answer",
            "damaging": f"{near.n - near.ok} of {near.n} neighbours and {others.n - others.ok} of "
            f"{others.n} unrelated prompts changed their answers",
            "narrow": f"{follow.ok} of {follow.n} rephrasings follow",
            "good": f"{follow.ok} of {follow.n} rephrasings follow, and {near.ok + others.ok} of "
            f"{near.n + others.n} other prompts keep their answers",
        }[self.verdict]
        advice = f". Try {', or '.join(self.advice)}" if self.advice else ""
        return f"{self.verdict}: {why}{advice}."

    def to_json(self) -> dict[str, Any]:
        """The content of ``check.json``."""
        counted = {"rephrase": "followed", "neighbours": "kept", "unrelated": "kept"}
        shares = {part: self.share(part) for part in _PARTS}
        return {
            "schema": 1,
            "verdict": self.verdict,
            "advice": list(self.advice),
            "n_edited": self.n_edited,
            "facts": {"n": shares["prompt"].n, "took": shares["prompt"].ok},
            **{
                part: {"n": shares[part].n, name: shares[part].ok, "made": shares[part].made}
                for part, name in counted.items()
            },
            "edited": [dataclasses.asdict(one) for one in self.edited],
            "probes": [dataclasses.asdict(one) for one in self.probes],
        }

    @classmethod
    def from_json(cls, record: Any, where: str | Path = FILE) -> Check:
        """A check from the content of its file.

        Raises:
            UserError: it is no check, or its figures are not those of its probes.
        """
        if not isinstance(record, dict):
            raise UserError(f"{where} is no check of an edit", expected="what golden edit wrote")
        found = made(cls, record, where)
        chances = [p for one in found.probes for p in (one.p_before, one.p_after) if p is not None]
        checked = {one.fact for one in found.probes if one.part == "prompt"}
        wrong = [name for name, value in found.to_json().items() if record.get(name) != value]
        if wrong or not all(0 <= p <= 1 for p in chances) or found.n_edited < len(checked):
            raise UserError(
                f"{where}: '{wrong[0] if wrong else 'probes'}' does not fit the rest of it",
                expected="a check as golden edit wrote it",
            )
        return found

    @classmethod
    def load(cls, path: str | Path) -> Check:
        """The check of a run folder of ``golden edit``, or of its ``check.json``.

        Raises:
            UserError: not there, or no check.
        """
        file = Path(path)
        file = file / FILE if file.is_dir() else file
        return cls.from_json(parse_json(text_of(read_bytes_file(file), file), file), file)


_PARTS: tuple[Part, ...] = ("prompt", "rephrase", "neighbours", "unrelated")


def verdict_of(took: Share, follow: Share, near: Share, others: Share) -> Verdict:
    """The verdict on an edit by how its four parts came out."""
    if 1 - took.failed < TOOK:
        return "did not take"
    if max(near.failed, others.failed) > CHANGED:
        return "damaging"
    return "narrow" if 1 - follow.failed < FOLLOWED else "good"


def check(model: Model, delta: WeightDelta, facts: Sequence[Fact]) -> Check:
    """Ask the model about edited facts before and after an edit; the model is left as it is.

    A prompt and its rephrasings follow where greedy decoding gives the new answer. A neighbour or
    an unrelated prompt keeps its answer where its greedy continuation, of three tokens, is the
    same, or gave way to one that is neither the new answer nor more than twice as likely, as it was
    not more than twice as likely before; in a chat where the first three words are the same that do
    not say the question again. Of facts without rephrasings or locality probes they are made: see
    :mod:`goldenlayers.checking.probes`.

    Args:
        model: the model that the edit was made on.
        delta: the edit.
        facts: the facts it was made for, with their probes. Of more than 32 a draw is checked.

    Raises:
        UserError: no facts; another model; a delta is in force on the model.
    """
    check_model(model)
    if deltas_in_force(model):
        raise UserError(
            "an edit cannot be checked while a delta is applied to the model",
            fix="Leave the 'applied' context",
        )
    if not facts:
        raise UserError("there are no facts to check", expected="at least one fact")
    among, facts = list(facts), list(facts)
    if len(facts) > FACTS:
        drawn = random.Random("check").sample(range(len(facts)), FACTS)
        facts = [facts[i] for i in sorted(drawn)]
    layer = delta.layers[-1] if delta.layers else first_block(model, [delta])
    asked = probes_of(model, facts, among, layer, frozenset(_told_before(delta)))
    texts = Texts.of(model, facts, asked)
    before = texts.said(model)
    texts, before = texts.enough(before)
    with delta.applied(model):
        after = texts.said(model)
    even = ties(model, delta, texts, before, after)
    probes = tuple(
        Probed(
            fact=facts[one.fact].id,
            part=one.part,
            prompt=one.prompt,
            made=one.made,
            name=one.name,
            by_model=one.by_model,
            ok=stays(model, one, old, new, even.get(u)) if one.part in KEEP else new.is_new,
            before=old.text,
            after=new.text,
            p_before=old.chance,
            p_after=new.chance,
            tie=even.get(u),
        )
        for u, (one, old, new) in enumerate(zip(texts.asked, before, after, strict=True))
    )
    names = [field.name for field in dataclasses.fields(Edited)]
    edited = tuple(Edited(**{name: getattr(fact, name) for name in names}) for fact in facts)
    found = Check(probes=probes, n_edited=len(among), edited=edited)
    return dataclasses.replace(found, advice=advice_on(found, delta))


def _told_before(delta: WeightDelta) -> Iterable[str]:
    """The names that the edit stayed clear of, and the names and prompts that it was chosen by:
    those are no judges of it.
    """
    for row in delta.facts:
        for name in ("clear_of", "chosen_by"):
            texts = row.get(name)  # of a file that may come from anyone
            yield from (t for t in (texts if isinstance(texts, list) else ()) if isinstance(t, str))
