"""The plan of an evaluation: every probe tokenised once, the untouched model read once, then any
number of edits scored against that.

Shapes: D model width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from goldenlayers.delta import Selection, WeightDelta, applied_per_example
from goldenlayers.delta.apply import deltas_in_force, untouched
from goldenlayers.errors import UserError
from goldenlayers.evaluation.generation import free_answers, sampled
from goldenlayers.evaluation.heldout import HeldOut
from goldenlayers.evaluation.questions import DEFAULT_METRICS, FAILED, Question, questions
from goldenlayers.evaluation.reading import (
    Ids,
    Read,
    Reading,
    States,
    merge,
    read,
    states_hold,
)
from goldenlayers.evaluation.scorers import Outcome, Words, outcome_of, rows_of, unscored
from goldenlayers.evaluation.tokenised import Texts, reason_of
from goldenlayers.facts import Fact

if TYPE_CHECKING:
    from goldenlayers.models.model import Model

Row = dict[str, Any]
Edit = WeightDelta | str | UserError | None
"""A change of weights, a text put before every prompt, an edit that failed, or no edit."""

_DELTA_BYTES = 1 << 30  # of dense changes in one pass


class EvaluationPlan:
    """All probes of some facts under some metrics, ready to be run again and again.

    Args:
        model: a loaded model.
        facts: the facts to be judged; their ids must differ.
        metrics: names of ``questions.METRICS``.
        others: where kl takes its unrelated prompts from; default ``facts``.
        text: the held-out text of perplexity, or what other plans have read of it already.
        text_tokens: how many tokens of it.
        seed: of kl's draw and fluency's sampling.
        batch_size: rows per batch; None fits it to the device.
        on_progress: told (rows read, rows in all) of the running pass.

    Raises:
        UserError: unknown metric, two facts with one id, perplexity without a text.
    """

    def __init__(
        self,
        model: Model,
        facts: Sequence[Fact],
        metrics: Sequence[str] = DEFAULT_METRICS,
        *,
        others: Sequence[Fact] | None = None,
        text: str | HeldOut | None = None,
        text_tokens: int = 1024,
        seed: int = 0,
        batch_size: int | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.model, self.facts, self.seed = model, list(facts), seed
        self.batch_size, self.on_progress = batch_size, on_progress
        check_ids(facts)
        self.questions: list[Question] = questions(facts, metrics, others=others, seed=seed)
        if not isinstance(text, HeldOut) and any(u.rule == "perplexity" for u in self.questions):
            text = HeldOut(model, text, text_tokens, batch_size=batch_size)
        self._held_out = text if isinstance(text, HeldOut) else None
        self._texts = Texts(model, self.questions, self.facts)
        self._before: dict[int, Outcome] | None = None
        self._states: States | None = None
        self._words = Words(model.tokenizer)

    # --- what is scored --------------------------------------------------------------------

    def baseline(self) -> dict[int, Outcome]:
        """What the untouched model says to every question; read once and kept.

        Deltas in force on the model are lifted meanwhile.
        """
        if self._before is None:
            with untouched(self.model):
                self._texts.continue_open(self.batch_size or 32)
                self._before = self._run(self._texts.specs, keep=True)
        return self._before

    def score(
        self,
        edits: Sequence[Edit],
        *,
        facts: Sequence[int] | None = None,
        metrics: Collection[str] | None = None,
    ) -> list[Row]:
        """Each fact's rows under its own edit, all facts in the same passes.

        Args:
            edits: one per fact: a delta, a prompt prefix, the error of an edit that failed (its
                rows are unscored with that reason), or None for the untouched model.
            facts: places of the facts that the edits belong to; default all.
            metrics: keep to these question metrics; default all.

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
        chosen = [u for u in self._chosen(places, metrics) if u in self._texts.specs]
        after: dict[int, Outcome] = {}
        deltas = {f: e for f, e in of_fact.items() if isinstance(e, WeightDelta)}
        for group in _groups(deltas):
            after |= self._with_deltas(
                [u for u in chosen if self.questions[u].fact in group], group
            )
        prefixes = {f: e for f, e in of_fact.items() if isinstance(e, str)}
        told = [u for u in chosen if self.questions[u].fact in prefixes]
        after |= self._run(told, prefixes=prefixes) if told else {}
        after |= {u: before[u] for u in chosen if of_fact[self.questions[u].fact] is None}
        for u in chosen:
            error = of_fact[self.questions[u].fact]
            if isinstance(error, UserError):
                after[u] = Outcome(reason=FAILED + reason_of(error))
        return self._rows(places, metrics, after)

    def score_applied(
        self,
        *,
        facts: Sequence[int] | None = None,
        metrics: Collection[str] | None = None,
        first_layer: int = 0,
    ) -> list[Row]:
        """The rows under the deltas in force on the model now (none: the base rate).

        ``first_layer`` is the first block they change, if that is known: it saves the blocks above.
        """
        places = list(range(len(self.facts)) if facts is None else facts)
        before = self.baseline()
        chosen = [u for u in self._chosen(places, metrics) if u in self._texts.specs]
        if deltas_in_force(self.model):
            return self._rows(places, metrics, self._run(chosen, first_layer=first_layer))
        return self._rows(places, metrics, before)

    # --- how ----------------------------------------------------------------------------------

    def _chosen(self, places: Collection[int], metrics: Collection[str] | None) -> list[int]:
        wanted = set(places)
        return [
            u
            for u, question in enumerate(self.questions)
            if question.fact in wanted and (metrics is None or question.metric in metrics)
        ]

    def _rows(
        self, places: Sequence[int], metrics: Collection[str] | None, after: Mapping[int, Outcome]
    ) -> list[Row]:
        before = self.baseline()
        rows: list[Row] = []
        for u in self._chosen(places, metrics):
            question, fact = self.questions[u], self.facts[self.questions[u].fact]
            if u in self._texts.reasons:
                rows += unscored(fact, question, self._texts.reasons[u])
            else:
                rows += rows_of(fact, question, before[u], after[u], self._words)
        return rows

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
            return self._run(
                chosen,
                carriers=carriers,
                selection=selection,
                first_layer=first_block(model, distinct),
            )

    def _run(
        self,
        chosen: Collection[int],
        *,
        carriers: Mapping[int, int] | None = None,
        prefixes: Mapping[int, str] | None = None,
        selection: Selection | None = None,
        first_layer: int = 0,
        keep: bool = False,
    ) -> dict[int, Outcome]:
        """The outcome of each question, in one batched pass and one batched generation per kind."""
        chosen = list(chosen)
        carriers, prefixes = carriers or {}, prefixes or {}
        reasons: dict[int, str] = {}
        on_text: list[int] = []
        readings: list[Reading] = []
        owner: list[int] = []
        texts: dict[int, Ids] = {}
        for u in chosen:
            question = self.questions[u]
            carrier, prefix = carriers.get(question.fact, -1), prefixes.get(question.fact, "")
            try:
                if question.rule == "perplexity":
                    if prefix:
                        raise UserError("a prompt changes no weights")
                    on_text.append(u)
                    continue
                if question.rule in ("generate", "fluency"):
                    texts[u] = self._texts.open_prompt(u, prefix)
                    continue
                mine = self._texts.readings(u, prefix, self._reference(u))
            except UserError as error:
                reasons[u] = reason_of(error)
                continue
            readings += [dataclasses.replace(r, carrier=carrier) for r in mine]
            owner += [u] * len(mine)
        if keep and readings:
            rows, _ = merge(readings)
            self._states = States(self.model, sum(len(ids) for _, ids in rows))
        # An edit of one fact is never begun from another model's states.
        states = self._states if keep or first_layer > 0 else None
        reads = (
            read(
                self.model,
                readings,
                batch_size=self.batch_size,
                selection=selection,
                states=states,
                first_layer=first_layer,
                keep=keep,
                on_progress=self.on_progress,
            )
            if readings
            else []
        )
        if keep and self._states is not None:
            some = sorted({r.ids for r in readings}, key=lambda ids: (-len(ids), ids))[:2]
            if not states_hold(self.model, self._states, some):
                self._states = None
        parts: dict[int, list[Read]] = {}
        for u, one in zip(owner, reads, strict=True):
            parts.setdefault(u, []).append(one)
        outcomes = {u: Outcome(reason=reason) for u, reason in reasons.items()}
        outcomes |= {u: outcome_of(mine) for u, mine in parts.items()}
        outcomes |= self._perplexity(on_text, carriers, selection, first_layer, before=keep)
        return outcomes | self._generate(texts, carriers, selection)

    def _perplexity(
        self,
        chosen: Sequence[int],
        carriers: Mapping[int, int],
        selection: Selection | None,
        first_layer: int,
        *,
        before: bool,
    ) -> dict[int, Outcome]:
        """The questions of the held-out text: one outcome per state of the weights."""
        held_out, tell = self._held_out, self.on_progress
        if held_out is None or not chosen:
            return {}
        if selection is not None:
            of_question = {u: carriers.get(self.questions[u].fact, -1) for u in chosen}
            found = held_out.selected(of_question.values(), selection, first_layer, tell)
            return {u: found[carrier] for u, carrier in of_question.items()}
        one = held_out.before(tell) if before else held_out.applied(first_layer, tell)
        return dict.fromkeys(chosen, one)

    def _reference(self, u: int) -> Tensor | None:
        """The untouched model's state behind the prompt of a kl question."""
        if self.questions[u].rule != "kl" or self._before is None or not self._before[u].reads:
            return None
        return self._before[u].reads[0].hidden

    def _generate(
        self, texts: Mapping[int, Ids], carriers: Mapping[int, int], selection: Selection | None
    ) -> dict[int, Outcome]:
        outcomes: dict[int, Outcome] = {}
        for rule in ("generate", "fluency"):
            mine = [u for u in texts if self.questions[u].rule == rule]
            rows = [texts[u] for u in mine]
            of_row = [carriers.get(self.questions[u].fact, -1) for u in mine]

            def select(members: list[int], of_row: list[int] = of_row) -> None:
                if selection is not None:
                    selection.select([of_row[m] for m in members])

            size = self.batch_size or 32
            if not mine:
                continue
            if rule == "generate":
                limits = [self._texts.new_tokens(u) for u in mine]
                found = free_answers(self.model, rows, limits, batch_size=size, on_batch=select)
                outcomes |= {u: Outcome(text=text) for u, text in zip(mine, found, strict=True)}
            else:
                seeds = [
                    f"{self.seed}/{self.facts[self.questions[u].fact].id}/{self.questions[u].probe}"
                    for u in mine
                ]
                drawn = sampled(self.model, rows, seeds, batch_size=size, on_batch=select)
                outcomes |= {
                    u: Outcome(tokens=tuple(t), text=str(self.model.tokenizer.decode(t)))
                    for u, t in zip(mine, drawn, strict=True)
                }
        return outcomes


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
    return any("experts" in name.split(".") for name in delta.changes)
