"""What a model answers when an edit is checked: the first tokens, whether they are the new answer,
and how likely that is.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, NamedTuple

from goldenlayers.checking.probes import KEEP, NEIGHBOURS, Asked
from goldenlayers.decoding import end_ids, greedy, log_probs, settle_joints
from goldenlayers.errors import UserError
from goldenlayers.evaluation.reading import Pass, Reading, read
from goldenlayers.evaluation.tokenised import continuation
from goldenlayers.facts import Fact, Probe
from goldenlayers.prompts import new_words

if TYPE_CHECKING:
    from goldenlayers.delta import WeightDelta
    from goldenlayers.models import Model

TIE = 0.5
"""Between two tokens a model wavers where each is at least this share as likely as the other."""
_WORDS = 3  # of an answer in a chat, beyond the question's


class Said(NamedTuple):
    """The greedy answer's first tokens and their text, the new answer's probability, and whether
    greedy decoding gives it.
    """

    tokens: tuple[int, ...]
    text: str
    chance: float | None
    is_new: bool


@dataclass(frozen=True, eq=False)
class Texts:
    """Prompts as token ids: alone, and read along the new answer."""

    asked: list[Asked]
    rows: list[tuple[int, ...]]
    readings: list[Reading]

    @classmethod
    def of(cls, model: Model, facts: Sequence[Fact], asked: Sequence[Asked]) -> Texts:
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
            kept.append(one)
            rows.append(alone.ids)
            readings.append(Reading.of_answer(whole))
        return cls(kept, rows, readings)

    def said(self, model: Model) -> list[Said]:
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
            Said(
                tuple(new),
                model.encoder.continuation(row, [t for t in new if t >= 0 and t not in ends]),
                _chance(one.nll, len(one.targets)),
                one.tokens == one.targets,
            )
            for row, new, one in zip(self.rows, answers, reads[:n], strict=True)
        ]

    def enough(self, before: Sequence[Said]) -> tuple[Texts, list[Said]]:
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
        return Texts(*parts), [before[u] for u in kept]


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
        stay = [one.prompt for one in mine if one.part in KEEP]
        whole.append(
            dataclasses.replace(
                fact,
                rephrasings=tuple(one.prompt for one in mine if one.part == "rephrase"),
                locality=tuple(given.get(p) or Probe(p, contradicts=False) for p in stay),
                portability=(),
            )
        )
    return settle_joints(model, whole)


def kept(model: Model, asked: Asked, old: Said, new: Said) -> bool:
    """Whether an answer is the one that was given before."""
    if not model.chat:
        return old.tokens == new.tokens
    was, now = (new_words(asked.prompt, one.text)[:_WORDS] for one in (old, new))
    return was == now


def stays(model: Model, asked: Asked, old: Said, new: Said, tie: float | None) -> bool:
    """Whether an answer is kept, or gave way to one that the model wavers between; not if that is
    the new answer. ``tie`` is that of :func:`ties`.
    """
    return kept(model, asked, old, new) or (tie is not None and tie >= TIE and not new.is_new)


def ties(
    model: Model, delta: WeightDelta, texts: Texts, before: Sequence[Said], after: Sequence[Said]
) -> dict[int, float]:
    """For each place that must stay and has another answer under the edit, how even the two are, at
    the first token that differs: how likely the one that came was before, as a share of the one
    that was said, and how likely this is under the edit, as a share of the one that came; the
    smaller of both shares. In a chat, where answers are compared by their words, of none.
    """
    moved, rows = [], []
    for u, one in enumerate(texts.asked):
        old, new = before[u].tokens, after[u].tokens
        if model.chat or one.part not in KEEP or old == new or min((*old, *new)) < 0:  # no number
            continue
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(old, new)))  # noqa: B905
        moved.append(u)
        rows += [(*texts.rows[u], *said[: same + 1]) for said in (old, new)]
    if not moved:
        return {}
    ends = [len(row) - 1 for row in rows]
    was = log_probs(model, rows, ends)
    with delta.applied(model):
        now = log_probs(model, rows, ends)
    shares = (min(0.0, was[i + 1] - was[i], now[i] - now[i + 1]) for i in range(0, len(rows), 2))
    return {u: round(math.exp(share), 6) for u, share in zip(moved, shares, strict=True)}
