"""The race of layers: real edits of a few facts, more of them where the layers are good.

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
    MOST_FACTS,
    PRIOR,
    Raced,
    TimeUp,
    decide,
    race_on,
    replay,
)
from goldenlayers.racing.worth import Worth, table_of

if TYPE_CHECKING:
    from goldenlayers.facts import Fact
    from goldenlayers.models import Model
    from goldenlayers.statistics.moments import Covariance

__all__ = ["Contest", "Worth", "decide", "drawn", "race_on", "replay", "table_of"]

_SLACK = 1.2  # what a race may take of its time: edits are not all alike


@dataclass(eq=False)
class Contest:
    """A race of a model's layers with one editor; the model is left as it is.

    Attributes:
        model: a loaded model.
        facts: the proxy facts, never those that the choice is to be judged on. Those with the most
            kinds of probes are taken first, drawn with ``seed`` among equals.
        editor: that is to edit later, too.
        home: the published depth, which the choice is compared with.
        expected: the layer that is expected to be the best before any edit; by default the
            published depth.
        edits: that may be made.
        seconds: that they may take; None for as long as it takes.
        prior: see :func:`goldenlayers.racing.rule.believe`.
        worth: what an edit is worth.
        statistics: key statistics of all layers, where the editor reads them.
        seed: of the draw of facts, and of the editor's prefixes.
        on_progress: told (edits made, edits at most).
        on_note: told, in a sentence, how long it may take, once the first edits have been timed.
    """

    model: Model
    facts: Sequence[Fact]
    editor: Editor
    home: int
    expected: int | None = None
    edits: int = EDITS
    seconds: float | None = None
    prior: float = PRIOR
    worth: Worth = field(default_factory=Worth)
    statistics: Mapping[int, Covariance] | None = None
    seed: int = 0
    on_progress: Callable[[int, int], None] | None = None
    on_note: Callable[[str], None] | None = None

    def __post_init__(self) -> None:
        """Draw the facts.

        Raises:
            UserError: there are none, or no layer that could be edited.
        """
        if not self.facts:
            raise UserError("there are no facts to race with", expected="at least one fact")
        self.drawn = drawn(self.facts, self.seed)
        self.rows: list[dict[str, Any]] = []
        self.failures: list[UserError] = []
        self.said: list[str] = []  # what the reader is to know beside the result
        self.closed = frozenset(self.model.layers.without_mlp)
        if not self.model.layers.with_mlp:
            raise UserError("there is no layer to race", expected="a layer with an MLP")
        self.home = self.model.layers.nearest(self.home)
        self._first: dict[tuple[int, int], list[float]] = {}
        self._made, self._start = 0, time.monotonic()
        self._began = self._start
        self._work = Editing(
            self.model, self.editor, self.home, seed=self.seed, statistics=self.statistics
        )
        self._plan = EvaluationPlan(
            self.model, self.drawn, metrics_of(DEFAULT_METRICS), seed=self.seed
        )

    def run(self) -> Raced:
        """Race. Ctrl-C, once the first layers have been tried, ends it with what is known by then.

        Raises:
            UserError: no edit could be scored, or memory runs out on a single fact.
        """
        with memory_errors(f"memory ran out in racing the layers of {self.model.name}"):
            asked, edits = self.edits, self._timed()
            found = race_on(
                self._score,
                len(self.drawn),
                len(self.model.layers),
                self._start_at,
                edits=edits,
                also=self.home,
                closed=self.closed,
                prior=self.prior,
                left=self._left,
            )
        if edits < asked and found.why == "the edits are used up":
            found = dataclasses.replace(found, why="the time is over")
        if found.edits and np.isnan(found.table).all():
            if self.failures:
                raise self.failures[0]
            raise UserError("no edit could be scored, so no layer can be chosen")
        return found

    def layer_by(self, found: Raced, worth: Worth) -> int:
        """The layer that the same edits choose where an edit is worth something else."""
        table = np.full_like(found.table, math.nan)
        facts = {fact.id: i for i, fact in enumerate(self.drawn[: len(table)])}
        ids, layers, scores = table_of(self.rows, worth)
        for i, one in enumerate(ids):
            if one in facts:
                table[facts[one], layers] = scores[i]
        return decide(table, found.home, self.prior)

    @property
    def _start_at(self) -> int:
        return self.home if self.expected is None else self.expected

    def _timed(self) -> int:
        """How many edits the time allows, by the first few, which the race then need not make."""
        facts = range(min(FACTS, len(self.drawn), self.edits))
        self._plan.baseline()
        self._work.prepare()
        began = self._began = time.monotonic()
        self._first[self._start_at, 0] = self._edited(self._start_at, facts)
        each = (time.monotonic() - began) / len(facts)
        edits = self.edits
        if self.seconds is not None:
            left = self.seconds - (time.monotonic() - self._start)
            edits = min(edits, len(facts) + max(0, int(left / max(each, 1e-9))))
        if self.on_note is not None:
            self.on_note(
                f"Racing the layers with {self.editor.name}: about {in_words(each * edits)} for at "
                f"most {edits} edits of {len(self.drawn)} facts"
            )
        self.edits = edits
        return edits

    def _left(self) -> int:
        """How many edits there is time for, by what those so far have taken."""
        now = time.monotonic()
        if self.seconds is None or not self._made:
            return self.edits
        each = (now - self._began) / self._made
        return max(0, int((self.seconds - (now - self._start)) / max(each, 1e-9)))

    def _score(self, layer: int, facts: range) -> list[float]:
        found = self._first.pop((layer, facts.start), None)
        late = self.seconds is not None and time.monotonic() - self._start > _SLACK * self.seconds
        if late and found is None:
            raise TimeUp
        if found is None or len(found) != len(facts):
            found = self._edited(layer, facts)
        self._made += len(facts)
        if self.on_progress is not None:
            self.on_progress(self._made, self.edits)
        return found

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
