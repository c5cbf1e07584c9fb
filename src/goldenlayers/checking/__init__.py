"""Whether an edit does what it should, and nothing else: its answers before and after, and a word
on them.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from goldenlayers.checking.advice import advice_on, stronger
from goldenlayers.checking.probes import NEIGHBOURS, Asked, Part, probes_of
from goldenlayers.decoding import end_ids, greedy, settle_joints
from goldenlayers.delta import WeightDelta
from goldenlayers.delta.apply import deltas_in_force
from goldenlayers.durable import read_bytes_file
from goldenlayers.errors import UserError
from goldenlayers.evaluation.plan import first_block
from goldenlayers.evaluation.reading import Pass, Reading, read
from goldenlayers.evaluation.tokenised import continuation
from goldenlayers.facts import Fact, Probe
from goldenlayers.models import check_model
from goldenlayers.prompts import new_words
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

_WORDS = 3  # of an answer in a chat, beyond the question's

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
    """

    probes: tuple[Probed, ...]
    advice: tuple[str, ...] = ()
    n_edited: int = 1

    def share(self, part: Part) -> Share:
        """How a part came out."""
        mine = [one for one in self.probes if one.part == part]
        return Share(len(mine), sum(one.ok for one in mine), any(one.made for one in mine))

    @property
    def verdict(self) -> Verdict:
        """One word: see the limits in ``TOOK``, ``FOLLOWED`` and ``CHANGED``."""
        return verdict_of(*map(self.share, ("prompt", "rephrase", "neighbours", "unrelated")))

    @property
    def worst(self) -> tuple[Probed, ...]:
        """The prompts that are not as they should be: what moved first, most moved in front."""

        def key(one: Probed) -> tuple[bool, float]:
            moved = one.part in _KEEP
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
_KEEP: tuple[Part, ...] = ("neighbours", "unrelated")


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
    same; in a chat the first three words that do not say the question again. Of facts without
    rephrasings or locality probes they are made: see :mod:`goldenlayers.checking.probes`.

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
    texts = _Texts.of(model, facts, asked)
    before = texts.said(model)
    texts, before = texts.enough(before)
    with delta.applied(model):
        after = texts.said(model)
    probes = tuple(
        Probed(
            fact=facts[one.fact].id,
            part=one.part,
            prompt=one.prompt,
            made=one.made,
            name=one.name,
            by_model=one.by_model,
            ok=_kept(model, one, old, new) if one.part in _KEEP else new.is_new,
            before=old.text,
            after=new.text,
            p_before=old.chance,
            p_after=new.chance,
        )
        for one, old, new in zip(texts.asked, before, after, strict=True)
    )
    found = Check(probes=probes, n_edited=len(among))
    return dataclasses.replace(found, advice=advice_on(found, delta))


def _kept(model: Model, asked: Asked, old: _Said, new: _Said) -> bool:
    """Whether an answer is the one that was given before."""
    if not model.chat:
        return old.tokens == new.tokens
    was, now = (new_words(asked.prompt, one.text)[:_WORDS] for one in (old, new))
    return was == now


def _told_before(delta: WeightDelta) -> Iterable[str]:
    """The names that the edit stayed clear of, and the names and prompts that it was chosen by:
    those are no judges of it.
    """
    for row in delta.facts:
        for name in ("clear_of", "chosen_by"):
            texts = row.get(name)  # of a file that may come from anyone
            yield from (t for t in (texts if isinstance(texts, list) else ()) if isinstance(t, str))


class _Said(NamedTuple):
    """The greedy answer's first tokens and their text, the new answer's probability, and whether
    greedy decoding gives it.
    """

    tokens: tuple[int, ...]
    text: str
    chance: float | None
    is_new: bool


@dataclass(frozen=True, eq=False)
class _Texts:
    """Prompts as token ids: alone, and read along the new answer."""

    asked: list[Asked]
    rows: list[tuple[int, ...]]
    readings: list[Reading]

    @classmethod
    def of(cls, model: Model, facts: Sequence[Fact], asked: Sequence[Asked]) -> _Texts:
        """Those of the prompts that the model can be asked; made ones that it cannot are left out.

        Raises:
            UserError: a prompt of the data or the user cannot be asked.
        """
        settled = _settled(model, facts, asked)
        kept, rows, readings = [], [], []
        for one in asked:
            fact = settled[one.fact]
            joint = fact.joint_of(one.prompt, fact.target)
            try:
                alone = model.encoder.encode(one.prompt)
                whole = model.encoder.encode(one.prompt, fact.target, joint=joint)
            except UserError:
                if not one.made:
                    raise
                continue
            places = tuple(range(whole.n_prompt - 1, len(whole) - 1))
            kept.append(one)
            rows.append(alone.ids)
            readings.append(Reading(whole.ids[:-1], places, whole.answer_ids, nll=True))
        return cls(kept, rows, readings)

    def said(self, model: Model) -> list[_Said]:
        """What the model answers, as it is now."""
        n, ends, limit = len(self.rows), end_ids(model), model.encoder.max_length or math.inf
        most = continuation(model)
        if model.chat:  # many tokens, which a cache pays for
            reads = read(model, self.readings, Pass())
            answers = greedy(
                model, self.rows, most, stop=lambda u, new: len(self.rows[u]) + len(new) >= limit
            )
        else:  # rows of all lengths in one padded pass a token: no row is worth its own
            reads = read(model, [*self.readings, *map(_next, self.rows)], Pass())
            answers = [[one.tokens[0]] for one in reads[n:]]
        while running := [
            u
            for u, said in enumerate(answers)
            if not model.chat
            and len(said) < most
            and said[-1] not in ends
            and said[-1] >= 0  # no number
            and len(self.rows[u]) + len(said) <= limit
        ]:
            more = read(model, [_next((*self.rows[u], *answers[u])) for u in running], Pass())
            for u, one in zip(running, more, strict=True):
                answers[u] += one.tokens
        return [
            _Said(
                tuple(new),
                model.encoder.continuation(row, [t for t in new if t >= 0 and t not in ends]),
                _chance(one.nll, len(one.targets)),
                one.tokens == one.targets,
            )
            for row, new, one in zip(self.rows, answers, reads[:n], strict=True)
        ]

    def enough(self, before: Sequence[_Said]) -> tuple[_Texts, list[_Said]]:
        """Without made neighbours that have the new answer already, or are beyond the number."""
        counts: Counter[int] = Counter()
        kept = []
        for u, (one, said) in enumerate(zip(self.asked, before, strict=True)):
            if one.part == "neighbours" and one.made:
                if said.is_new or counts[one.fact] == NEIGHBOURS:
                    continue
                counts[one.fact] += 1
            kept.append(u)
        parts = ([some[u] for u in kept] for some in (self.asked, self.rows, self.readings))
        return _Texts(*parts), [before[u] for u in kept]


def _next(ids: tuple[int, ...]) -> Reading:
    """The arg-max token behind a text."""
    return Reading(ids, (len(ids) - 1,))


def _chance(nll: float | None, n_tokens: int) -> float | None:
    """The probability of an answer from its mean NLL in nats per token."""
    if nll is None or not math.isfinite(nll):
        return None
    return round(min(1.0, math.exp(-nll * n_tokens)), 6)


def _settled(model: Model, facts: Sequence[Fact], asked: Sequence[Asked]) -> list[Fact]:
    """The facts with the prompts as their probes, and what stands before the new answer decided."""
    whole = []
    for i, fact in enumerate(facts):
        mine = [one for one in asked if one.fact == i]
        given = {probe.prompt: probe for probe in fact.must_stay}
        stay = [one.prompt for one in mine if one.part in _KEEP]
        whole.append(
            dataclasses.replace(
                fact,
                rephrasings=tuple(one.prompt for one in mine if one.part == "rephrase"),
                locality=tuple(given.get(p) or Probe(p, contradicts=False) for p in stay),
                portability=(),
            )
        )
    return settle_joints(model, whole)
