"""``evaluate``: edit and score: each fact on the untouched model, all at once, or in turn."""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from goldenlayers.decoding import settle_joints
from goldenlayers.delta import WeightDelta
from goldenlayers.delta.apply import deltas_in_force, untouched
from goldenlayers.editors import EDITORS, EditSettings, editor, in_context_prefix, workbench
from goldenlayers.errors import UserError, check_seed, near_matches
from goldenlayers.evaluation.batch import run_batch, score_under
from goldenlayers.evaluation.heldout import HeldOut
from goldenlayers.evaluation.metrics import (
    DEFAULT_METRICS,
    Metric,
    metrics_of,
    need_text,
    questions,
)
from goldenlayers.evaluation.plan import Edit, EvaluationPlan, check_ids
from goldenlayers.evaluation.rows import Expected, each_once
from goldenlayers.evaluation.scoring import ScoreRow as Row
from goldenlayers.evaluation.sequential import run_sequence
from goldenlayers.evaluation.summary import Estimate, Summary, retention, summarise
from goldenlayers.facts import Fact, refuse_contradictions
from goldenlayers.memory import fitting, memory_told

if TYPE_CHECKING:
    from goldenlayers.covariance import Covariance
    from goldenlayers.editors import Editor, Workbench
    from goldenlayers.editors.values import Value
    from goldenlayers.models.model import Model

Mode = Literal["single", "batch", "sequential"]

NO_EDIT, IN_CONTEXT = "none", "in-context"
METHODS = (NO_EDIT, IN_CONTEXT, *EDITORS)
_LESS = "Use a smaller --dtype such as bfloat16, or edit fewer facts together (--limit)"


@dataclass(frozen=True)
class Evaluation:
    """What :func:`evaluate` found: rows and figures; ``found["rewrite"].mean`` is a metric's."""

    rows: tuple[Row, ...]
    summary: Summary
    method: str
    mode: str
    layer: int | None
    n_facts: int
    seconds: float
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, metric: str) -> Estimate:
        return self.summary[metric]

    def to_json(self) -> dict[str, Any]:
        """The content of ``summary.json``; in the mode "sequential" with the forgetting curve."""
        curve = {"retention": retention(self.rows)} if self.mode == "sequential" else {}
        return {
            "schema": 1,
            **self.summary.to_json(),
            **curve,
            "method": self.method,
            "mode": self.mode,
            "layer": self.layer,
            "n_facts": self.n_facts,
            "seconds": round(self.seconds, 3),
            "settings": dict(self.settings),
        }


def evaluate(
    model: Model,
    facts: Sequence[Fact],
    *,
    method: str = NO_EDIT,
    delta: WeightDelta | None = None,
    layer: int | None = None,
    mode: Mode = "single",
    metrics: Sequence[str | Metric] = DEFAULT_METRICS,
    settings: EditSettings | None = None,
    statistics: Mapping[int, Covariance] | None = None,
    value_cache: dict[tuple[Any, ...], Value] | None = None,
    others: Sequence[Fact] | None = None,
    text: str | None = None,
    text_tokens: int = 1024,
    seed: int = 0,
    batch_size: int | Literal["auto"] = "auto",
    chunk: int = 16,
    done: Iterable[Row] = (),
    work: Path | None = None,
    on_rows: Callable[[list[Row]], None] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Score ``facts`` under an edit; the model is left as it is.

    With neither ``method`` nor ``delta`` the model is scored as it is: the base rate, or inside
    ``with delta.applied(model)`` that delta. What locality compares with is always the model
    without any delta.

    Args:
        model: a loaded model.
        facts: the facts to be judged, with their probes.
        method: "none", "in-context", or an editor's name.
        delta: a saved change to be judged instead, on all facts.
        layer: where the method edits.
        mode: "single": each fact edited by itself on the untouched model. "batch": all edited
            together, then all scored. "sequential": edited one after another; each also scored
            right after its own edit (rewrite_at_once), all scored after the last.
        metrics: metrics, or their names in ``METRICS``; missing probes count as unscored.
        settings: of the editor.
        statistics: key statistics per layer; see :func:`goldenlayers.editors.edit`.
        value_cache: shared between calls, lets editors that differ in the solve alone share the
            value optimisation (see :class:`Workbench`).
        others: facts outside the judged ones: worked examples of in-context and kl's unrelated
            prompts come from them. Default: the judged facts, never a fact's own.
        text: held-out text of perplexity.
        text_tokens: how many tokens of it.
        seed: of editing, kl's draw, fluency's sampling and the bootstrap.
        batch_size: texts per forward pass; "auto" fits it to the device.
        chunk: facts per step of work; what is finished is reported after each.
        done: rows of an earlier, interrupted call with the same arguments: not scored again.
        work: a folder where batch and sequential keep the delta (and find it again).
        on_rows: told each step's new rows.
        on_progress: told (facts done, facts in all).

    Returns:
        The evaluation, rows in the order of the facts.

    Raises:
        UserError: unknown method, metric or mode; no layer; no facts; two facts with one id, or,
            but for the mode "single", with one prompt and different new answers; a method that
            cannot work in this mode; memory that runs out on a single fact. An edit that fails for
            some facts only is no error: their rows are unscored with the reason.
    """
    start = time.perf_counter()
    check_seed(seed)
    asked = metrics_of(metrics)
    _check(facts, method, delta, layer, mode)
    with untouched(model):
        facts = settle_joints(model, facts)
        others = None if others is None else settle_joints(model, others)
    job = Job(model, facts, asked, seed, on_rows, on_progress)
    job.options = {
        "others": others,
        "seed": seed,
        "batch_size": _batch_size(batch_size),
    }
    if need_text(asked):
        # One for all plans: every fact's perplexity is of this text.
        size = job.options["batch_size"]
        job.options["text"] = HeldOut(model, text, text_tokens, batch_size=size)
    job.resume(done, sequence=in_sequence(method, mode))
    settings = settings or EditSettings()
    if delta is not None:
        method, mode, layer = delta.method or "delta", "batch", _only(delta.layers)
    elif method == NO_EDIT and deltas_in_force(model):
        method = "applied"
    with memory_told(f"memory ran out in evaluating {model.name}", _LESS):
        if delta is not None:
            score_under(job, delta, chunk)
        elif method not in EDITORS:
            _without_weights(job, method, others, settings, chunk)
        else:
            assert layer is not None  # held by _check
            bench = workbench(
                model,
                method,
                layer,
                settings=settings,
                statistics=statistics,
                seed=seed,
                value_cache=value_cache,
            )
            _with_editor(job, bench, editor(method), layer, mode, work, chunk)
    rows = job.ordered()
    return Evaluation(
        tuple(rows),
        summarise(rows, seed=seed),
        method,
        mode,
        layer,
        len(job.facts),
        time.perf_counter() - start,
        {
            "model": model.name,
            "metrics": [metric.name for metric in asked],
            "seed": seed,
            "edit": dataclasses.asdict(settings) if method in EDITORS else {},
        },
    )


def in_sequence(method: str, mode: str) -> bool:
    """Whether facts are edited one after another, each also scored right after its own edit."""
    return mode == "sequential" and method in EDITORS


class Job:
    """The facts of one evaluation, the rows there are, and how to make a plan for some of them."""

    def __init__(
        self,
        model: Model,
        facts: list[Fact],
        metrics: tuple[Metric, ...],
        seed: int,
        on_rows: Callable[[list[Row]], None] | None,
        on_progress: Callable[[int, int], None] | None,
    ) -> None:
        self.model, self.facts, self.metrics, self.seed = model, facts, metrics, seed
        self.options: dict[str, Any] = {}
        self.rows: list[Row] = []
        self._keys: set[tuple[str, str, Any]] = set()
        self._on_rows, self._on_progress = on_rows, on_progress
        self._finished = 0

    def resume(self, rows: Iterable[Row], *, sequence: bool) -> None:
        """Take over the rows of an earlier call, each once; others that do not belong are left."""
        expected = Expected(
            self.facts,
            self.metrics,
            others=self.options["others"],
            seed=self.seed,
            sequence=sequence,
        )
        problem = each_once(expected.problem)
        for row in rows:
            if not problem(row):
                self._keys.add(_key(row))
                self.rows.append(row)

    def plan(self, places: Sequence[int], metrics: Sequence[str] | None = None) -> EvaluationPlan:
        """The plan for the facts at ``places``."""
        options = {**self.options, "others": self.options["others"] or self.facts}
        facts = [self.facts[i] for i in places]
        return EvaluationPlan(self.model, facts, metrics or self.metrics, **options)

    def todo(self, chunk: int) -> Iterator[list[int]]:
        """Places of the facts with rows missing, in chunks."""
        found = questions(self.facts, self.metrics, others=self.options["others"], seed=self.seed)
        left = sorted(
            {
                question.fact
                for question in found
                for metric in question.row_metrics
                if (self.facts[question.fact].id, metric, question.probe) not in self._keys
            }
        )
        self._finished = len(self.facts) - len(left)
        for start in range(0, len(left), max(1, chunk)):
            yield left[start : start + max(1, chunk)]

    def add(self, rows: Iterable[Row], n_facts: int) -> None:
        """Take new rows, report them, and count ``n_facts`` more as done."""
        new = [row for row in rows if _key(row) not in self._keys]
        self._keys.update(_key(row) for row in new)
        self.rows += new
        self._finished += n_facts
        if new and self._on_rows is not None:
            self._on_rows(new)
        if n_facts and self._on_progress is not None:
            self._on_progress(self._finished, len(self.facts))

    def any_scored(self) -> bool:
        """Whether some row has a score."""
        return any(row["score"] is not None for row in self.rows)

    def ordered(self) -> list[Row]:
        """All rows in the order of the facts."""
        place = {fact.id: i for i, fact in enumerate(self.facts)}
        return sorted(self.rows, key=lambda row: place[row["fact"]])


def edit_each_safely(
    bench: Workbench, chosen: Editor, facts: Sequence[Fact], layer: int
) -> list[WeightDelta | UserError]:
    """One delta per fact; where an edit fails for a fact, its error.

    Raises:
        UserError: every one of several facts fails, and all alike: the fault is not the facts'.
    """
    try:
        return list(chosen.each(bench, facts, layer))
    except UserError as error:
        if len(facts) == 1:
            return [error]
        results: list[WeightDelta | UserError] = []
        for fact in facts:
            results += edit_each_safely(bench, chosen, [fact], layer)
        failed = {str(one) for one in results if isinstance(one, UserError)}
        if len(failed) == 1 and all(isinstance(one, UserError) for one in results):
            raise
        return results


def _with_editor(
    job: Job,
    bench: Workbench,
    chosen: Editor,
    layer: int,
    mode: str,
    work: Path | None,
    chunk: int,
) -> None:
    if mode == "single":
        _score_each(job, bench, chosen, layer, chunk)
    elif mode == "batch":
        run_batch(job, bench, chosen, layer, work, chunk)
    else:
        run_sequence(job, bench, chosen, layer, work, chunk)


def _score_each(job: Job, bench: Workbench, chosen: Editor, layer: int, chunk: int) -> None:
    def rows(places: list[int]) -> list[Row]:
        try:
            edits: list[Edit] = list(
                edit_each_safely(bench, chosen, [job.facts[i] for i in places], layer)
            )
        except UserError as error:
            # Where others were edited and scored, the fault is these facts'.
            if not job.any_scored():
                raise
            edits = [error] * len(places)
        return job.plan(places).score(edits)

    def what(place: int) -> str:
        return f"fact '{job.facts[place].id}'"

    for places, found in fitting(job.todo(chunk), rows, what, for_good=True):
        job.add(found, len(places))


def _without_weights(
    job: Job, method: str, others: Sequence[Fact] | None, settings: EditSettings, chunk: int
) -> None:
    for places in job.todo(chunk):
        plan = job.plan(places)
        if method == IN_CONTEXT:
            pool = others or job.facts
            edits: list[Edit] = [
                prefix_for(job.facts[i], pool, settings.demonstrations, job.seed) for i in places
            ]
            job.add(plan.score(edits), len(places))
        else:
            job.add(plan.score_applied(), len(places))


def prefix_for(fact: Fact, pool: Sequence[Fact], count: int, seed: int) -> str:
    """The in-context prefix of a fact, its worked examples drawn from other subjects' facts."""
    subject = fact.subject.casefold()
    free = [other for other in pool if other.subject.casefold() != subject and other.id != fact.id]
    drawn = random.Random(f"{seed}/demonstrations/{fact.id}").sample(free, min(count, len(free)))
    return in_context_prefix(fact, drawn, seed=seed)


def _check(
    facts: Sequence[Fact], method: str, delta: WeightDelta | None, layer: int | None, mode: str
) -> None:
    if not facts:
        raise UserError("there are no facts to evaluate", expected="at least one fact")
    check_ids(facts)
    if mode not in get_args(Mode):
        raise UserError(f"unknown mode '{mode}'", fix=near_matches(mode, get_args(Mode)))
    if method not in METHODS:
        raise UserError(f"unknown method '{method}'", fix=near_matches(method, METHODS))
    if delta is not None and method != NO_EDIT:
        raise UserError("both a delta and a method are given", fix="Give one of them")
    if method == IN_CONTEXT and mode != "single":
        raise UserError("in-context changes no weights", fix="Use mode single")
    if method in EDITORS and layer is None:
        raise UserError(f"{method} needs to know where to edit", fix="Give a layer")
    if method in EDITORS and mode != "single":
        refuse_contradictions(facts)


def _batch_size(value: int | str) -> int | None:
    if value == "auto":
        return None
    if not isinstance(value, int) or value < 1:
        raise UserError(f"the batch size is {value}", expected="a number above 0, or auto")
    return value


def _only(layers: Sequence[int]) -> int | None:
    return layers[-1] if layers else None


def _key(row: Row) -> tuple[str, str, Any]:
    return row["fact"], row["metric"], row["probe"]
