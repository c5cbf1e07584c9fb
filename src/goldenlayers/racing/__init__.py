"""The race of layers: real edits of some facts at a few layers, all on the same facts.

:mod:`goldenlayers.racing.rule` says which layers are tried on which facts, and which one is chosen,
:mod:`goldenlayers.racing.worth` what an edit is worth; here the edits are made and scored.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from goldenlayers.editors import Editing, Editor
from goldenlayers.errors import UserError
from goldenlayers.evaluation.metrics import DEFAULT_METRICS, metrics_of
from goldenlayers.evaluation.plan import EvaluationPlan
from goldenlayers.progress import OutOfMemory, in_smaller_batches, in_words, memory_errors
from goldenlayers.racing.rule import (
    EDITS,
    FACTS,
    Raced,
    decide,
    few_layers,
    race_on,
    replay,
)
from goldenlayers.racing.worth import Worth, table_of

if TYPE_CHECKING:
    from goldenlayers.facts import Fact
    from goldenlayers.models import Model
    from goldenlayers.statistics.moments import Covariance

__all__ = ["Contest", "Worth", "decide", "drawn", "few_layers", "race_on", "replay", "table_of"]

MOST_FACTS = 32  # that a race may use


@dataclass(eq=False)
class Contest:
    """A race of a model's layers with one editor; the model is left as it is.

    Attributes:
        model: a loaded model.
        facts: the proxy facts, never those that the choice is to be judged on. Those with the most
            kinds of probes are taken first, drawn with ``seed`` among equals.
        editor: that is to edit later, too.
        layers: that race; the first, the published depth, is left only for one that is clearly
            better.
        edits: that may be made.
        seconds: that they may take; None for as long as it takes.
        worth: what an edit is worth.
        statistics: key statistics of these layers, where the editor reads them.
        seed: of the draw of facts, and of the editor's prefixes.
        on_progress: told (edits made, edits at most).
        on_note: told, in a sentence, how long it may take, once the first edits have been timed.
    """

    model: Model
    facts: Sequence[Fact]
    editor: Editor
    layers: Sequence[int]
    edits: int = EDITS
    seconds: float | None = None
    worth: Worth = field(default_factory=lambda: Worth(by="both"))
    statistics: Mapping[int, Covariance] | None = None
    seed: int = 0
    on_progress: Callable[[int, int], None] | None = None
    on_note: Callable[[str], None] | None = None

    def __post_init__(self) -> None:
        """Draw the facts.

        Raises:
            UserError: there are none.
        """
        if not self.facts:
            raise UserError("there are no facts to race with", expected="at least one fact")
        self.drawn = drawn(self.facts, self.seed)
        self.rows: list[dict[str, Any]] = []
        self.failures: list[UserError] = []
        self.home = self.layers[0]
        self._first: list[float] | None = None
        self._made, self._start = 0, time.monotonic()
        self._began = self._start
        self._work = Editing(
            self.model, self.editor, self.home, seed=self.seed, statistics=self.statistics
        )
        self._plan = EvaluationPlan(
            self.model, self.drawn, metrics_of(DEFAULT_METRICS), seed=self.seed
        )

    def run(self) -> Raced:
        """Race. Ctrl-C, once all layers have been tried, ends it with what is known by then.

        Raises:
            UserError: no edit could be scored, or memory runs out on a single fact.
        """
        with memory_errors(f"memory ran out in racing the layers of {self.model.name}"):
            asked, edits = self.edits, self._timed()
            found = race_on(
                self._score,
                len(self.drawn),
                len(self.model.layers),
                self.layers,
                self.home,
                edits=edits,
                left=None if self.seconds is None else self._left,
            )
        if edits < asked and found.why == "the edits are used up":
            found = dataclasses.replace(found, why="the time is over")
        if not len(found.table):
            if self.failures:
                raise self.failures[0]
            raise UserError("no edit could be scored, so no layer can be chosen")
        return dataclasses.replace(found, edits=self._made)

    def layer_by(self, found: Raced, worth: Worth) -> int:
        """The layer that the same edits choose where an edit is worth something else."""
        table = np.full_like(found.table, math.nan)
        facts = {fact.id: i for i, fact in enumerate(self.drawn[: len(table)])}
        ids, layers, scores = table_of(self.rows, worth)
        for i, one in enumerate(ids):
            if one in facts:
                table[facts[one], layers] = scores[i]
        return decide(table, found.home)

    def _timed(self) -> int:
        """How many edits the time allows, by the first few, which the race then need not make."""
        facts = range(min(FACTS, len(self.drawn), self.edits))
        self._plan.baseline()
        self._work.prepare()
        began = self._began = time.monotonic()
        self._first = self._edited(self.home, facts)
        each = (time.monotonic() - began) / len(facts)
        if self.seconds is not None:
            left = self.seconds - (time.monotonic() - self._start)
            self.edits = min(self.edits, len(facts) + max(0, int(left / max(each, 1e-9))))
        racing = len(set(self.layers))
        self.edits = min(self.edits, racing * len(self.drawn))
        if self.on_note is not None:
            self.on_note(
                f"Racing {racing} layers with {self.editor.name}: about "
                f"{in_words(each * self.edits)} for at most {self.edits} edits"
            )
        return self.edits

    def _left(self) -> int:
        """How many edits there is time for, by what those so far have taken."""
        assert self.seconds is not None
        now = time.monotonic()
        each = (now - self._began) / self._made
        left = max(0, int((self.seconds - (now - self._start)) / max(each, 1e-9)))
        return left if self._first is None else left + len(self._first)

    def _score(self, layer: int, facts: range) -> list[float]:
        first, self._first = self._first, None
        if first is not None and len(first) == len(facts):  # the race begins with the same edits
            return first
        return self._edited(layer, facts)

    def _edited(self, layer: int, places: Sequence[int]) -> list[float]:
        """Facts edited at a layer, each by itself on the untouched model, and scored."""
        some = [self.drawn[i] for i in places]

        def edit(members: Sequence[int]) -> list[Any]:
            part = [some[m] for m in members]
            try:
                return list(self._work.at(layer).each_safely(part))
            except OutOfMemory:
                raise
            except UserError as error:  # every fact fails alike: the layer's fault
                return [error] * len(part)

        def what(member: int) -> str:
            return f"fact '{some[member].id}' at layer {layer}"

        batches = in_smaller_batches([list(range(len(some)))], edit, what)
        edits = [one for _, part in batches for one in part]
        self.failures += [one for one in edits if isinstance(one, UserError)]
        rows = self._plan.score(edits, facts=list(places))
        self.rows += [{"layer": layer} | row for row in rows]
        self._made += len(places)
        if self.on_progress is not None:
            self.on_progress(self._made, self.edits)
        found = self.worth.by_fact(rows)
        return [found.get(fact.id, math.nan) for fact in some]


def drawn(facts: Sequence[Fact], seed: int = 0) -> list[Fact]:
    """The facts to race on: most kinds of probes first, drawn among equals, ids once.

    Whether one is drawn does not depend on how many others there are: leaving out a fact that was
    not drawn changes nothing.
    """

    def lot(fact: Fact) -> tuple[int, str]:
        drawn = hashlib.sha256(f"{seed} {fact.id}".encode()).hexdigest()
        return -sum(_kinds(fact)), drawn

    return sorted({fact.id: fact for fact in facts}.values(), key=lot)[:MOST_FACTS]


def _kinds(fact: Fact) -> tuple[bool, bool, bool]:
    return bool(fact.rephrasings), bool(fact.must_stay), bool(fact.portability)
