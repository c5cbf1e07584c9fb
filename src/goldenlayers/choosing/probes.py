"""What tries of an edit are compared by: prompts of the chooser's own.

The judge (``goldenlayers.checking``) never asks them. Of the check's names the chooser has those
whose SHA-256 begins with an even number, of two question forms the second, and it has neutral texts
of its own. Prompts that come with a fact, its rephrasings and locality probes, are left to the
judge: none is asked here, and no name that stands in one.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from goldenlayers.checking.probes import filled_form, form_of, in_other_words, neighbours
from goldenlayers.editors.name_keys import template
from goldenlayers.facts import Fact, Probe

if TYPE_CHECKING:
    from goldenlayers.models import Model

NEIGHBOURS = 6
"""Names asked about of each fact, the nearest."""

NEUTRAL = (
    "This is from a book for schools. ",
    "Someone asked me about this yesterday. ",
    "Now the next sentence of the text. ",
)
"""Text that says nothing, before a prompt; not the check's."""


class _Judges:
    """The names that are the check's: "in" tells."""

    def __contains__(self, name: object) -> bool:
        return bool(hashlib.sha256(str(name).encode()).digest()[0] % 2)


@dataclass(frozen=True)
class Own:
    """A fact with the chooser's prompts as its probes, and the names that stand in them."""

    fact: Fact
    names: tuple[str, ...]

    @property
    def told(self) -> list[str]:
        """What the check must not ask any more: the names and the rephrasings."""
        return [*self.names, *self.fact.rephrasings]


def own_probes(model: Model, facts: Sequence[Fact], layer: int) -> list[Own]:
    """Each fact with prompts of the chooser's own; names nearest by their keys at ``layer``."""
    near = neighbours(model, facts, facts, layer, _Judges())
    found = []
    for fact, listed in zip(facts, near, strict=True):
        names = tuple(listed[:NEIGHBOURS])
        before, behind = template(fact)
        stay = (before.replace("\0", name) + name + behind for name in names)
        asked = dataclasses.replace(
            fact,
            rephrasings=_rephrasings(fact),
            locality=tuple(Probe(prompt, contradicts=False) for prompt in stay),
            portability=(),
            generation_prompts=(),
        )
        found.append(Own(asked, names))
    return found


def _rephrasings(fact: Fact) -> tuple[str, ...]:
    """The second question form, if there is one, and the prompt behind neutral text."""
    forms = in_other_words(form_of(fact))[1:]
    texts = [filled_form(form, fact.subject) for form in forms]
    texts += [text + fact.prompt for text in NEUTRAL]
    given = (fact.prompt, *fact.rephrasings)
    return tuple(text for text in dict.fromkeys(texts) if text not in given)
