"""What tries of an edit are compared by: prompts that the check then leaves out.

Of a fact's own rephrasings and locality probes, where it has two or more, every other one is the
chooser's, from the first on; the rest are left to the judge (``goldenlayers.checking``). Where it
has fewer they are made, apart from those of the check: of the check's names the chooser has those
whose SHA-256 begins with an even number, of two question forms the second, and it has neutral texts
of its own. No name is asked about that stands in a probe of the fact.
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
    """A fact with the chooser's prompts as its probes, and the names that made ones ask about."""

    fact: Fact
    names: tuple[str, ...]

    @property
    def told(self) -> list[str]:
        """What the check must not ask any more: names and prompts."""
        stay = (probe.prompt for probe in self.fact.locality)
        return [*self.names, *self.fact.rephrasings, *stay]


def own_probes(model: Model, facts: Sequence[Fact], layer: int, *, given: bool = True) -> list[Own]:
    """Each fact with the chooser's prompts; names nearest by their keys at ``layer``.

    Without ``given`` all of a fact's own probes are left to the judge.
    """
    bare = [i for i, fact in enumerate(facts) if not given or len(fact.must_stay) < 2]
    near = neighbours(model, [facts[i] for i in bare], facts, layer, _Judges())
    of_fact = dict(zip(bare, near, strict=True))
    found = []
    for i, fact in enumerate(facts):
        names = tuple(of_fact.get(i, ())[:NEIGHBOURS])
        before, behind = template(fact)
        made = (before.replace("\0", name) + name + behind for name in names)
        stay = tuple(Probe(prompt, contradicts=False) for prompt in made)
        texts = fact.rephrasings[::2] if given and len(fact.rephrasings) > 1 else ()
        asked = dataclasses.replace(
            fact,
            rephrasings=texts or _rephrasings(fact),
            locality=stay if i in of_fact else fact.must_stay[::2],
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
