"""The plan of an evaluation: every probe tokenised once, the untouched model read once, then any
number of edits scored against that.

Shapes: D model width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any

from goldenlayers.delta import Selection, WeightDelta, applied_per_example
from goldenlayers.delta.apply import deltas_in_force, untouched
from goldenlayers.delta.factors import of_expert
from goldenlayers.errors import UserError
from goldenlayers.evaluation.generation import free_answers, sampled
from goldenlayers.evaluation.metrics import DEFAULT_METRICS, Metric, Question, need_text, questions
from goldenlayers.evaluation.reading import (
    Ids,
    Pass,
    Read,
    Reading,
    States,
    merge,
    read,
    states_hold,
)
from goldenlayers.evaluation.scoring import (
    FAILED,
    Outcome,
    Scored,
    ScoreRow,
    Words,
    outcome_of,
    rows_of,
    unscored,
)
from goldenlayers.evaluation.tokenised import HeldOut, Texts, no_text, reason_of
from goldenlayers.facts import Fact

if TYPE_CHECKING:
    from goldenlayers.models import Model

Edit = WeightDelta | str | UserError | None
"""A change of weights, a text put before every prompt, an edit that failed, or no edit."""

_DELTA_BYTES = 1 << 30  # of dense changes in one pass


@dataclass(eq=False)
class EvaluationPlan:
    """All probes of some facts under some metrics, ready to be run again and again.

    Args:
        model: a loaded model.
        facts: the facts to be judged; their ids must differ.
        metrics: metrics, or their names in ``METRICS``.
        others: where kl takes its unrelated prompts from; default ``facts``.
        text: the held-out text of perplexity, which several plans may share.
        seed: of kl's draw and fluency's sampling.
        batch_size: rows per batch; None fits it to the device.

    Raises:
        UserError: unknown metric, two facts with one id, perplexity without a text.
    """

    model: Model
    facts: Sequence[Fact]
    metrics: Sequence[str | Metric] = DEFAULT_METRICS
    _: KW_ONLY
    others: Sequence[Fact] | None = None
    text: HeldOut | None = None
    seed: int = 0
    batch_size: int | None = None

    def __post_init__(self) -> None:
        self.facts = list(self.facts)
        check_ids(self.facts)
        self.questions: list[Question] = questions(
            self.facts, self.metrics, others=self.others, seed=self.seed
        )
        if self.text is None and need_text(self.metrics):
            raise no_text()
        self._texts = Texts(self.model, self.questions, self.facts)
        self._before: dict[int, Outcome] | None = None
        self._scores: dict[int, Scored] = {}  # of the untouched model
        self._states: States | None = None
        self._words = Words(self.model.tokenizer)

    # --- what is scored --------------------------------------------------------------------

    def baseline(self) -> dict[int, Outcome]:
        """What the untouched model says to every question; read once and kept.

        Deltas in force on the model are lifted meanwhile.
        """
        if self._before is None:
            with untouched(self.model):
                self._texts.continue_open(self.batch_size or 32)
                how = dataclasses.replace(self._pass(), keep=True)
                self._before = self._run(self._texts.specs, how)
        return self._before

    def score(self, edits: Sequence[Edit], *, facts: Sequence[int] | None = None) -> list[ScoreRow]:
        """Each fact's rows under its own edit, all facts in the same passes.

        Args:
            edits: one per fact: a delta, a prompt prefix, the error of an edit that failed (its
                rows are unscored with that reason), or None for the untouched model.
            facts: places of the facts that the edits belong to; default all.

        Raises:
            UserError: another number of edits than facts; a delta of another model; deltas in
                force on the model.
        """
        if deltas_in_force(self.model):
            raise UserError(
                "edits cannot be scored one by one while a delta is applied to the model",
                fix="Leave the 'applied' context, or use score_applied",
            )
        places = list(range(len(self.facts)) if facts is None else facts)
        if len(edits) != len(places):
            raise UserError(f"there are {len(edits)} edits for {len(places)} facts")
        before = self.baseline()
        of_fact = dict(zip(places, edits, strict=True))
        chosen = self._of(places, run=True)
        after: dict[int, Outcome] = {}
        deltas = {f: e for f, e in of_fact.items() if isinstance(e, WeightDelta)}
        for group in _groups(deltas):
            mine = [u for u in chosen if self.questions[u].fact in group]
            after |= self._with_deltas(mine, group)
        prefixes = {f: e for f, e in of_fact.items() if isinstance(e, str)}
        told = [u for u in chosen if self.questions[u].fact in prefixes]
        after |= self._run(told, prefixes=prefixes)
        for u in chosen:
            edit = of_fact[self.questions[u].fact]
            if edit is None:
                after[u] = before[u]
            elif isinstance(edit, UserError):
                after[u] = Outcome(reason=FAILED + reason_of(edit))
        return self._rows(places, after)

    def score_applied(
        self, *, facts: Sequence[int] | None = None, first_layer: int = 0
    ) -> list[ScoreRow]:
        """The rows under the deltas in force on the model now (none: the base rate).

        ``first_layer`` is the first block they change, if that is known: it saves the blocks above.
        """
        places = list(range(len(self.facts)) if facts is None else facts)
        after = self.baseline()
        if deltas_in_force(self.model):
            after = self._run(self._of(places, run=True), self._pass(first_layer))
        return self._rows(places, after)

    # --- how ----------------------------------------------------------------------------------

    def _of(self, places: Collection[int], *, run: bool = False) -> list[int]:
        """The questions about the facts at ``places``; with ``run`` those that can be run."""
        wanted = set(places)
        return [
            u
            for u, question in enumerate(self.questions)
            if question.fact in wanted and (not run or u in self._texts.specs)
        ]

    def _rows(self, places: Sequence[int], after: Mapping[int, Outcome]) -> list[ScoreRow]:
        before = self.baseline()
        rows: list[ScoreRow] = []
        for u in self._of(places):
            question, fact = self.questions[u], self.facts[self.questions[u].fact]
            if u in self._texts.reasons:
                rows += unscored(fact, question, self._texts.reasons[u])
            else:
                rows += rows_of(fact, question, before[u], after[u], self._words, self._was(u))
        return rows

    def _was(self, u: int) -> Scored:
        """What the untouched model scores on a question: found once, whatever is edited."""
        if u not in self._scores:
            one, question = self.baseline()[u], self.questions[u]
            scored = [] if one.reason else question.scoring.score(question, one, one, self._words)
            self._scores[u] = scored
        return self._scores[u]

    def _with_deltas(
        self, chosen: Sequence[int], deltas: Mapping[int, WeightDelta]
    ) -> dict[int, Outcome]:
        model = self.model
        if any(_routed(delta) for delta in deltas.values()):
            # Experts see single tokens in the router's order: no pass can be shared.
            found: dict[int, Outcome] = {}
            for fact, delta in deltas.items():
                with delta.applied(model):
                    found |= self._run([u for u in chosen if self.questions[u].fact == fact])
            return found
        distinct = list({id(delta): delta for delta in deltas.values()}.values())
        place = {id(delta): i for i, delta in enumerate(distinct)}
        carriers = {fact: place[id(delta)] for fact, delta in deltas.items()}
        with applied_per_example(model, distinct) as selection:
            how = self._pass(first_block(model, distinct), selection)
            return self._run(chosen, how, carriers=carriers)

    def _pass(self, first_layer: int = 0, selection: Selection | None = None) -> Pass:
        return Pass(self.batch_size, selection, first_layer, self._states)

    def _run(
        self,
        chosen: Iterable[int],
        how: Pass | None = None,
        *,
        carriers: Mapping[int, int] | None = None,
        prefixes: Mapping[int, str] | None = None,
    ) -> dict[int, Outcome]:
        """The outcome of each question, in one batched pass and one batched generation per kind.

        ``carriers`` and ``prefixes``: the edit's place in the selection, or the text before every
        prompt, of each fact (by place) that has one.
        """
        how, carriers, prefixes = how or self._pass(), carriers or {}, prefixes or {}
        outcomes: dict[int, Outcome] = {}
        carrier: dict[int, int] = {}
        readings: list[tuple[int, Reading]] = []
        prompts: dict[str, dict[int, Ids]] = {"generated": {}, "sampled": {}}
        on_text: list[int] = []
        for u in chosen:
            question = self.questions[u]
            prefix, carrier[u] = prefixes.get(question.fact, ""), carriers.get(question.fact, -1)
            try:
                if question.scoring.needs == "held-out":
                    if prefix:
                        raise UserError("a prompt changes no weights")
                    on_text.append(u)
                elif question.scoring.needs == "forced":
                    mine = self._texts.readings(u, prefix, self._read_before(u), carrier[u])
                    readings += [(u, one) for one in mine]
                else:
                    prompts[question.scoring.needs][u] = self._texts.open_prompt(u, prefix)
            except UserError as error:
                outcomes[u] = Outcome(reason=reason_of(error))
        outcomes |= self._forced(readings, how)
        outcomes |= self._on_text(on_text, carrier, how)
        outcomes |= self._written(prompts["generated"], carrier, how, sample=False)
        return outcomes | self._written(prompts["sampled"], carrier, how, sample=True)

    def _forced(self, asked: Sequence[tuple[int, Reading]], how: Pass) -> dict[int, Outcome]:
        readings = [one for _, one in asked]
        if not readings:
            return {}
        if how.keep:
            rows, _ = merge(readings)
            self._states = States(self.model, sum(len(ids) for _, ids in rows))
            how = dataclasses.replace(how, states=self._states)
        found: dict[int, list[Read]] = {}
        for (u, _), one in zip(asked, read(self.model, readings, how), strict=True):
            found.setdefault(u, []).append(one)
        if how.keep and self._states is not None:
            some = sorted({r.ids for r in readings}, key=lambda ids: (-len(ids), ids))[:2]
            if not states_hold(self.model, self._states, some):
                self._states = None
        return {u: outcome_of(mine) for u, mine in found.items()}

    def _read_before(self, u: int) -> Sequence[Read]:
        """What was read of the untouched model; nothing in its own pass."""
        return () if self._before is None else self._before[u].reads

    def _on_text(
        self, chosen: Sequence[int], carrier: Mapping[int, int], how: Pass
    ) -> dict[int, Outcome]:
        """The questions of the held-out text: one outcome per state of the weights."""
        text = self.text
        if text is None or not chosen:
            return {}
        if how.selection is not None:
            places = [carrier[u] for u in chosen]
            found = text.selected(places, how.selection, how.first_layer)
            return {u: found[carrier[u]] for u in chosen}
        return dict.fromkeys(chosen, text.before() if how.keep else text.applied(how.first_layer))

    def _written(
        self, prompts: Mapping[int, Ids], carrier: Mapping[int, int], how: Pass, *, sample: bool
    ) -> dict[int, Outcome]:
        """The questions that are answered by text: the greedy answer, or a sample of the model."""
        if not prompts:
            return {}
        of_row = [carrier[u] for u in prompts]

        def select(members: list[int]) -> None:
            if how.selection is not None:
                how.selection.select([of_row[m] for m in members])

        model, rows = self.model, list(prompts.values())
        more: dict[str, Any] = {"batch_size": self.batch_size or 32, "on_batch": select}
        if not sample:
            limits = [self._texts.new_tokens(u) for u in prompts]
            found = [Outcome(text=text) for text in free_answers(model, rows, limits, **more)]
        else:
            asked = [self.questions[u] for u in prompts]
            seeds = [f"{self.seed}/{self.facts[one.fact].id}/{one.probe}" for one in asked]
            found = [
                Outcome(tokens=tuple(tokens), text=str(model.tokenizer.decode(tokens)))
                for tokens in sampled(model, rows, seeds, **more)
            ]
        return dict(zip(prompts, found, strict=True))


def first_block(model: Model, deltas: Sequence[WeightDelta]) -> int:
    """The first block that any of the deltas changes; 0 where one changes something else."""
    paths = [(block.path + ".", block.index) for block in model.layers.blocks]
    first = len(paths)
    for name in dict.fromkeys(name for delta in deltas for name in delta.changes):
        first = min(first, next((i for path, i in paths if name.startswith(path)), 0))
    return first if first < len(paths) else 0


def check_ids(facts: Sequence[Fact]) -> None:
    """Raises UserError where two facts share an id: their rows could not be told apart."""
    seen: set[str] = set()
    for fact in facts:
        if fact.id in seen:
            raise UserError(f"two facts have the id '{fact.id}'", fix="Give every fact its own id")
        seen.add(fact.id)


def _groups(deltas: Mapping[int, WeightDelta]) -> Iterator[dict[int, WeightDelta]]:
    """The deltas in groups whose changes together fit in memory."""
    group: dict[int, WeightDelta] = {}
    size = 0
    for fact, delta in deltas.items():
        if group and size + delta.nbytes > _DELTA_BYTES:
            yield group
            group, size = {}, 0
        group[fact] = delta
        size += delta.nbytes
    if group:
        yield group


def _routed(delta: WeightDelta) -> bool:
    return any(map(of_expert, delta.changes))
