"""The no-weights baseline: the fact is told in the prompt, behind a few worked examples.

Source: IKE, Zheng et al. 2023 (arXiv 2305.12740), section 3: demonstrations that copy the new fact,
that use it for a rephrasing, and that leave an unrelated question alone.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from goldenlayers.editors.base import Settings
from goldenlayers.facts import Fact
from goldenlayers.prompts import join


@dataclass(frozen=True, kw_only=True)
class InContext(Settings):
    """The baseline that changes no weights."""

    name: ClassVar[str] = "in-context"

    demonstrations: int = 8
    """Worked examples put before the prompt."""

    def prefix(self, fact: Fact, pool: Sequence[Fact], seed: int) -> str:
        """What to put before a fact's probes, its examples drawn from other subjects' facts."""
        subject = fact.subject.casefold()
        free = [one for one in pool if one.subject.casefold() != subject and one.id != fact.id]
        count = min(self.demonstrations, len(free))
        drawn = random.Random(f"{seed}/demonstrations/{fact.id}").sample(free, count)
        return in_context_prefix(fact, drawn, seed=seed)


def in_context_prefix(fact: Fact, demonstrations: Sequence[Fact], *, seed: int = 0) -> str:
    """What to put before a probe's prompt so that the model knows ``fact``.

    Args:
        fact: the edit.
        demonstrations: other facts, whose new answers, rephrasings and locality probes make the
            worked examples; the fact itself is passed over.
        seed: of the order of the examples.
    """
    examples: list[str] = []
    for i, other in enumerate(d for d in demonstrations if d.id != fact.id):
        told = _told(other, other.prompt, other.target)
        keeps = [p for p in other.must_stay if p.answer]
        if i % 3 == 1 and other.rephrasings:
            asked, answer = other.rephrasings[0], other.target
        elif i % 3 == 2 and keeps:
            asked, answer = keeps[0].prompt, keeps[0].answer or ""
        else:
            asked, answer = other.prompt, other.target
        examples.append(f"New fact: {told}.\n{_told(other, asked, answer)}.\n\n")
    random.Random(f"{seed}/{fact.id}").shuffle(examples)
    told = _told(fact, fact.prompt, fact.target)
    return "".join(examples) + f"New fact: {told}.\n"


def _told(fact: Fact, prompt: str, answer: str) -> str:
    return join(prompt, answer, fact.joint_of(prompt, answer))[0]
