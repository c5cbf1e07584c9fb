"""Evaluation: rows per fact and probe with their evidence, and the figures made of them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

from goldenlayers.decoding import settle_joints
from goldenlayers.delta import WeightDelta
from goldenlayers.delta.apply import deltas_in_force, untouched
from goldenlayers.editors import (
    EDITORS,
    Editing,
    Editor,
    InContext,
    Options,
    check_step,
    make_editor,
    with_settings,
)
from goldenlayers.errors import UserError, near_matches
from goldenlayers.evaluation.batch import run_batch, run_sequence, score_under
from goldenlayers.evaluation.metrics import (
    DEFAULT_METRICS,
    METRICS,
    Metric,
    Question,
    metrics_of,
    need_text,
    questions,
)
from goldenlayers.evaluation.plan import Edit, EvaluationPlan, check_ids
from goldenlayers.evaluation.rows import Expected, each_once
from goldenlayers.evaluation.scoring import ScoreRow as Row
from goldenlayers.evaluation.scoring import Scoring
from goldenlayers.evaluation.summary import Estimate, Summary, retention, summarise
from goldenlayers.evaluation.tokenised import HeldOut
from goldenlayers.facts import Fact, refuse_contradictions
from goldenlayers.models import check_model
from goldenlayers.progress import Progress, in_smaller_batches, memory_errors

if TYPE_CHECKING:
    from goldenlayers.models import Model


__all__ = [
    "DEFAULT_METRICS",
    "METRICS",
    "Estimate",
    "Evaluation",
    "EvaluationPlan",
    "Metric",
    "Question",
    "Scoring",
    "Summary",
    "evaluate",
    "retention",
    "summarise",
]


Mode = Literal["single", "batch", "sequential"]
Method = WeightDelta | Editor | InContext | None
"""What is judged; None: the model as it is."""

NO_EDIT = "none"
CHUNK = 16
_LESS = "Use a smaller --dtype such as bfloat16, or edit fewer facts together (--limit)"


def methods() -> tuple[str, ...]:
    """The names that ``evaluate`` knows."""
    return NO_EDIT, InContext.name, *EDITORS


@dataclass(frozen=True, kw_only=True)
class Judging(Options):
    """What few evaluations have to say.

    Attributes:
        step: in the mode "sequential", how many facts are edited at a time.
        others: facts outside the judged ones: worked examples of in-context and kl's unrelated
            prompts come from them. Default: the judged facts, never a fact's own.
        text: held-out text of perplexity.
        text_tokens: how many tokens of it.
        batch_size: texts per forward pass; "auto" fits it to the device.
    """

    step: int = 1
    others: Sequence[Fact] | None = None
    text: str | None = None
    text_tokens: int = 1024
    batch_size: int | Literal["auto"] = "auto"


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
    method: str | Editor | InContext | WeightDelta = NO_EDIT,
    *,
    layer: int | None = None,
    mode: Mode = "single",
    metrics: Sequence[str | Metric] = DEFAULT_METRICS,
    progress: Progress | None = None,
    **more: Any,
) -> Evaluation:
    """Score ``facts`` under an edit; the model is left as it is.

    Without a ``method`` the model is scored as it is: the base rate, or inside
    ``with delta.applied(model)`` that delta. What locality compares with is always the model
    without any delta.

    Args:
        model: a loaded model.
        facts: the facts to be judged, with their probes.
        method: "none", "in-context", an editor or its name; or a saved delta, which is then judged
            on all facts.
        layer: where the method edits, from the end if negative.
        mode: "single": each fact edited by itself on the untouched model. "batch": all edited
            together, then all scored. "sequential": edited one after another; each also scored
            right after its own edit (rewrite_at_once), all scored after the last.
        metrics: metrics, or their names in ``METRICS``; missing probes count as unscored.
        progress: reports, and an interrupted call to go on with. In its folder ``work`` batch and
            sequential keep the delta.
        more: fields of :class:`Judging` (``seed``, ``statistics``, ``step``, ``others``, ``text``,
            ...; ``seed`` is that of editing, kl's draw, fluency's sampling and the bootstrap), and
            settings of the editor, ``steps=30``.

    Returns:
        The evaluation, rows in the order of the facts.

    Raises:
        UserError: unknown method, setting, metric or mode; no layer; no facts; two facts with one
            id, or, but for the mode "single", with one prompt and different new answers; a method
            that cannot work in this mode; memory that runs out on a single fact. An edit that fails
            for some facts only is no error: their rows are unscored with the reason.
    """
    start = time.perf_counter()
    options, settings = Judging.split(more)
    asked = metrics_of(metrics)
    chosen = _method(method, settings)
    check_model(model)
    _check(facts, chosen, layer, mode, options)
    with untouched(model):
        facts = settle_joints(model, facts)
        others = None if options.others is None else settle_joints(model, options.others)
    job = Job(model, facts, asked, options.seed, progress or Progress())
    size = _batch_size(options.batch_size)
    job.options = {"others": others, "seed": options.seed, "batch_size": size}
    if need_text(asked):
        # One for all plans: every fact's perplexity is of this text.
        job.options["text"] = HeldOut(model, options.text, options.text_tokens, batch_size=size)
    job.resume(step=options.step if _in_turn(chosen, mode) else 0)
    name = chosen.name if isinstance(chosen, Editor | InContext) else NO_EDIT
    with memory_errors(f"memory ran out in evaluating {model.name}", _LESS):
        if isinstance(chosen, WeightDelta):
            name, mode = chosen.method or "delta", "batch"
            layer = chosen.layers[-1] if chosen.layers else None
            score_under(job, chosen)
        elif isinstance(chosen, Editor):
            assert layer is not None  # held by _check
            work = options.editing(model, chosen, layer)
            layer = work.layer
            if mode == "single":
                _score_each(job, work)
            elif mode == "batch":
                run_batch(job, work)
            else:
                run_sequence(job, work, options.step)
        else:
            if chosen is None and deltas_in_force(model):
                name = "applied"
            _without_weights(job, chosen, others or job.facts)
    rows = job.ordered()
    return Evaluation(
        tuple(rows),
        summarise(rows, seed=options.seed),
        name,
        mode,
        layer,
        len(job.facts),
        time.perf_counter() - start,
        {
            "model": model.name,
            "metrics": [metric.name for metric in asked],
            "seed": options.seed,
            "edit": chosen.to_json() if isinstance(chosen, Editor) else {},
        },
    )


def _in_turn(chosen: Method, mode: str) -> bool:
    return mode == "sequential" and isinstance(chosen, Editor)


class Job:
    """The facts of one evaluation, the rows there are, and how to make a plan for some of them."""

    def __init__(
        self,
        model: Model,
        facts: list[Fact],
        metrics: tuple[Metric, ...],
        seed: int,
        progress: Progress,
    ) -> None:
        self.model, self.facts, self.metrics, self.seed = model, facts, metrics, seed
        self.progress, self.folder = progress, progress.work
        self.options: dict[str, Any] = {}
        self.rows: list[Row] = []
        self._keys: set[tuple[str, str, Any]] = set()
        self._finished = 0

    def resume(self, *, step: int) -> None:
        """Take over the rows of an earlier call, each once; others that do not belong are left.

        ``step``: facts edited at a time, 0 where they are not edited in turn.
        """
        expected = Expected(
            self.facts, self.metrics, others=self.options["others"], seed=self.seed, step=step
        )
        problem = each_once(expected.problem)
        for row in self.progress.done:
            if not problem(row):
                self._keys.add(_key(row))
                self.rows.append(row)

    def plan(self, places: Sequence[int], metrics: Sequence[str] | None = None) -> EvaluationPlan:
        """The plan for the facts at ``places``."""
        options = {**self.options, "others": self.options["others"] or self.facts}
        facts = [self.facts[i] for i in places]
        return EvaluationPlan(self.model, facts, metrics or self.metrics, **options)

    def todo(self) -> Iterator[list[int]]:
        """Places of the facts with rows missing, in chunks."""
        chunk = max(1, self.progress.chunk or CHUNK)
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
        self.progress.tell(self._finished, len(self.facts))
        for start in range(0, len(left), chunk):
            yield left[start : start + chunk]

    def add(self, rows: Iterable[Row], n_facts: int) -> None:
        """Take new rows, report them, and count ``n_facts`` more as done."""
        new = [row for row in rows if _key(row) not in self._keys]
        self._keys.update(_key(row) for row in new)
        self.rows += new
        self._finished += n_facts
        self.progress.rows(new)
        if n_facts:
            self.progress.tell(self._finished, len(self.facts))

    def any_scored(self) -> bool:
        """Whether some row has a score."""
        return any(row["score"] is not None for row in self.rows)

    def ordered(self) -> list[Row]:
        """All rows in the order of the facts."""
        place = {fact.id: i for i, fact in enumerate(self.facts)}
        return sorted(self.rows, key=lambda row: place[row["fact"]])


def _score_each(job: Job, work: Editing) -> None:
    def rows(places: Sequence[int]) -> list[Row]:
        try:
            edits: list[Edit] = list(work.each_safely([job.facts[i] for i in places]))
        except UserError as error:
            # Where others were edited and scored, the fault is these facts'.
            if not job.any_scored():
                raise
            edits = [error] * len(places)
        return job.plan(places).score(edits)

    def what(place: int) -> str:
        return f"fact '{job.facts[place].id}'"

    for places, found in in_smaller_batches(job.todo(), rows, what, for_good=True):
        job.add(found, len(places))


def _without_weights(job: Job, chosen: InContext | None, pool: Sequence[Fact]) -> None:
    for places in job.todo():
        plan = job.plan(places)
        if chosen is None:
            job.add(plan.score_applied(), len(places))
        else:
            edits: list[Edit] = [chosen.prefix(job.facts[i], pool, job.seed) for i in places]
            job.add(plan.score(edits), len(places))


def _method(method: str | Method, settings: Mapping[str, Any]) -> Method:
    """What a name stands for, with its settings.

    Raises:
        UserError: an unknown name, or a setting that it does not have.
    """
    if isinstance(method, str) and method not in (known := methods()):
        raise UserError(f"unknown method '{method}'", fix=near_matches(method, known))
    if method == InContext.name:
        method = InContext()
    if isinstance(method, InContext):
        return with_settings(method, settings)
    if isinstance(method, WeightDelta) or method in (NO_EDIT, None):
        if settings:
            raise UserError(
                f"there is no option '{next(iter(settings))}'",
                fix="Settings are an editor's: name one as the method",
            )
        return method if isinstance(method, WeightDelta) else None
    return make_editor(method, **settings)  # type: ignore[arg-type]  # an editor or its name


def _check(
    facts: Sequence[Fact], chosen: Method, layer: int | None, mode: str, options: Judging
) -> None:
    if not facts:
        raise UserError("there are no facts to evaluate", expected="at least one fact")
    check_ids(facts)
    if mode not in get_args(Mode):
        raise UserError(f"unknown mode '{mode}'", fix=near_matches(mode, get_args(Mode)))
    if isinstance(chosen, InContext) and mode != "single":
        raise UserError("in-context changes no weights", fix="Use mode single")
    if options.step != 1 and not _in_turn(chosen, mode):
        raise UserError(
            f"the step is {options.step}, and nothing is edited in turn",
            fix="Use an editor in the mode sequential",
        )
    if isinstance(chosen, Editor):
        if layer is None:
            raise UserError(f"{chosen.name} needs to know where to edit", fix="Give a layer")
        if mode != "single":
            refuse_contradictions(facts)
        check_step(chosen, options.step)


def _batch_size(value: int | str) -> int | None:
    if value == "auto":
        return None
    if not isinstance(value, int) or value < 1:
        raise UserError(f"the batch size is {value}", expected="a number above 0, or auto")
    return value


def _key(row: Row) -> tuple[str, str, Any]:
    return row["fact"], row["metric"], row["probe"]
