"""Sweep: every layer × every fact edited singly and scored, resumable, on one or many workers.

It gives the truth that a layer choice is judged by (:mod:`goldenlayers.truth`).
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from goldenlayers.decoding import settle_joints
from goldenlayers.editors import Editor, Options, make_editor, needed_layers, statistics_for
from goldenlayers.editors.routing import layer_statistics
from goldenlayers.errors import UserError, check_number
from goldenlayers.evaluation.metrics import DEFAULT_METRICS, Metric, metrics_of
from goldenlayers.evaluation.plan import EvaluationPlan, check_ids
from goldenlayers.facts import Fact
from goldenlayers.models import check_model
from goldenlayers.progress import Progress
from goldenlayers.sweeping.cells import Batch, Course, Job, Runner, Sweep, Task, chunk_size
from goldenlayers.sweeping.workers import LocalEngine, Start, loader_of, run_tasks

if TYPE_CHECKING:
    from goldenlayers.models import Model


__all__ = ["Batch", "Sweep", "Workers", "sweep", "sweep_together"]

EngineName = Literal["local", "ray"]
Take = Callable[[Batch], None]
Note = Callable[[str], None] | None


@dataclass(frozen=True)
class Workers:
    """Who works off a sweep.

    Attributes:
        count: processes (or Ray actors) that each load the model once and work side by side. The
            caller's model serves only one worker on the local engine.
        engine: "local" (processes of this machine) or "ray".
        address: of a running Ray cluster; default one started here.
        load: how a worker loads its model; default by the model's name, dtype and device. It must
            be picklable, and give the same weights. On Ray a worker sees only the GPUs that it was
            given, counted from 0.

    Raises:
        UserError: a count out of range, or an unknown engine.
    """

    count: int = 1
    engine: EngineName = "local"
    address: str | None = None
    load: Callable[[], Model] | None = None

    def __post_init__(self) -> None:
        check_number("the number of workers", self.count, 1, 256)
        if self.engine not in ("local", "ray"):
            raise UserError(f"unknown engine '{self.engine}'", expected="local or ray")

    def run(
        self, model: Model, job: Job, tasks: Sequence[Task], take: Take, note: Note = None
    ) -> None:
        """Have the tasks worked off by processes or actors; ``note`` is told what befalls them.

        Raises:
            UserError: see :func:`sweep`; an editor whose class other processes cannot import.
        """
        try:
            pickle.dumps(job.editor)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise UserError(
                f"the editor '{job.editor.name}' cannot be sent to workers ({error})",
                fix="Define its class at the top of a module that can be imported, or use 1 worker",
            ) from error
        from goldenlayers.models.offload import is_spread
        from goldenlayers.sweeping.cluster import RayEngine, gpus_of

        if is_spread(model.hf) and self.engine == "local":
            raise UserError(
                f"{model.name} does not fit on one device, and each of {self.count} workers would "
                "load it",
                fix="Use 1 worker, or --engine ray with a machine for each",
            )
        on_ray = self.engine == "ray"
        load = self.load or loader_of(model, numbered=not on_ray)
        start = Start(load, model.fingerprint(), job)
        if on_ray:
            engine = RayEngine(self.count, self.address, gpus=gpus_of(model), note=note)
            run_tasks(tasks, start, engine, take, note)
        else:
            run_tasks(tasks, start, LocalEngine(self.count), take, note)


@dataclass(frozen=True, kw_only=True)
class Sweeping(Options):
    """What else a sweep can be told.

    Attributes:
        metrics: metrics, or their names in ``METRICS``; missing probes count as unscored.
        evidence: let rows carry what the model said before and after (several times the size).
    """

    metrics: Sequence[str | Metric] = DEFAULT_METRICS
    evidence: bool = False


def sweep(
    model: Model,
    facts: Sequence[Fact],
    method: str | Editor,
    *,
    layers: Sequence[int] | None = None,
    workers: int | Workers = 1,
    progress: Progress | None = None,
    **more: Any,
) -> Sweep:
    """Edit every fact by itself at every layer, and score each edit; the model is left as it is.

    Args:
        model: a loaded model.
        facts: the facts, with their probes.
        method: an editor or its name.
        layers: where to edit, from the end if negative; default wherever there is an MLP.
        workers: how many processes, or :class:`Workers`.
        progress: reports (of cells, one per layer and fact), and rows of an interrupted call with
            the same arguments: cells that are whole are not worked off again, others are completed.
            ``chunk`` is the number of facts per batch, halved by itself when memory runs out;
            ``on_batch`` is called with each :class:`Batch`, ``on_note`` after the first one with
            how long it will take, where that is a minute or more.
        more: fields of :class:`Sweeping` (``metrics``, by default rewrite, rephrase, locality and
            portability; ``seed``, of prefixes, statistics, kl's draw and fluency's sampling;
            ``statistics`` of all layers, collected in one pass when left out; ``evidence``;
            ``value_cache``, with one worker only: editors that differ in the solve
            alone share the value search, nearly all of the time), and settings of the editor.

    Raises:
        UserError: unknown editor, setting, metric or engine; no facts, or two with one id; a layer
            out of range; memory that does not suffice for one fact; workers that keep dying; every
            edit fails in the same way from the start. An edit that fails for one fact, or at one
            layer, is no error: its rows are unscored with the reason.
    """
    tell = progress or Progress()
    if not facts:
        raise UserError("there are no facts to sweep over", expected="at least one fact")
    check_ids(facts)
    options, settings = Sweeping.split(more)
    editor = make_editor(method, **settings)
    where = swept_layers(check_model(model), layers)
    crew = workers if isinstance(workers, Workers) else Workers(workers)
    size = chunk_size(tell.chunk, model.device.type)
    facts = settle_joints(model, facts)
    job = Job(tuple(facts), editor, metrics_of(options.metrics), options.seed, options.evidence)
    course = Course(job, where, tell)
    tasks = course.ledger.tasks(size)
    if tasks and editor.needs_statistics:
        found = options.statistics
        if found is None:
            found = statistics_for(model, editor, where, seed=options.seed)
        job = replace(job, statistics=found)

    def take(batch: Batch) -> None:
        course.refuse_failure(batch)
        course.foretell(batch, tasks, len(model.layers), crew.count)
        course.take(batch)

    if tasks and crew.engine == "local" and crew.count == 1:
        runner = Runner(model, job, options.value_cache)
        for task in tasks:
            take(runner.run(task))
    elif tasks:
        crew.run(model, job, tasks, take, tell.on_note)
    return course.result(model)


def sweep_together(
    model: Model,
    facts: Sequence[Fact],
    editors: Mapping[str, str | Editor],
    *,
    layers: Sequence[int] | None = None,
    progress: Mapping[str, Progress] | None = None,
    **more: Any,
) -> dict[str, Sweep | Exception]:
    """:func:`sweep` with several editors at once, which share the value search where they can.

    Chunk by chunk and layer by layer every editor has its turn, so what is shared is kept for one
    chunk at one layer alone. The rows are those that each editor's own sweep has.

    Args:
        model: a loaded model.
        facts: the facts, with their probes.
        editors: editors or their names, by a name of yours.
        layers: where to edit, from the end if negative; default everywhere.
        progress: of each editor, as for :func:`sweep`.
        more: fields of :class:`Sweeping`, among them ``statistics`` of all layers that are read.

    Returns:
        By the same names the sweeps, or the error of an editor that fails in the same way at every
        fact from the start, or by a defect of its own: the others go on.

    Raises:
        UserError: as for :func:`sweep`, where it is no single editor's. What the reports raise goes
            through, too, and so ends all sweeps after a finished step.
    """
    if not facts:
        raise UserError("there are no facts to sweep over", expected="at least one fact")
    check_ids(facts)
    options = Sweeping(**more)
    where = swept_layers(check_model(model), layers)
    facts = settle_joints(model, facts)
    asked, tells = metrics_of(options.metrics), progress or {}
    courses: dict[str, Course] = {}
    todo: list[tuple[Task, str]] = []
    for name, method in editors.items():
        job = Job(tuple(facts), make_editor(method), asked, options.seed, options.evidence)
        tell = tells.get(name, Progress())
        courses[name] = Course(job, where, tell)
        size = chunk_size(tell.chunk, model.device.type)
        todo += [(task, name) for task in courses[name].ledger.tasks(size)]
    todo.sort(key=lambda one: (one[0].places[0], one[0].layer))  # stable: editors in their order
    statistics = options.statistics
    if statistics is None:
        reading = [courses[n].job.editor for n in {n for _, n in todo}]
        needed = {one for e in reading for one in needed_layers(e, where)}
        if needed:
            statistics = layer_statistics(model, sorted(needed), seed=options.seed)
    values: dict[tuple[Any, ...], Any] = {}
    plans: dict[tuple[int, ...], EvaluationPlan] = {}
    runners = {
        name: Runner(model, replace(course.job, statistics=statistics), values, plans)
        for name, course in courses.items()
    }
    failed: dict[str, Sweep | Exception] = {}
    at: tuple[int, int] | None = None
    for task, name in todo:
        if name in failed:
            continue
        if at != (task.places[0], task.layer):
            at = task.places[0], task.layer
            values.clear()
        try:
            batch = runners[name].run(task)
            courses[name].refuse_failure(batch)
        except Exception as error:
            failed[name] = error
        else:
            courses[name].take(batch)
    return {name: course.result(model) for name, course in courses.items()} | failed


def swept_layers(model: Model, layers: Sequence[int] | None) -> tuple[int, ...]:
    """The layers in ascending order, each once.

    Raises:
        UserError: none, or one out of range.
    """
    if layers is None:
        return tuple(model.layers.with_mlp)
    if not layers:
        raise UserError("there are no layers to sweep over", expected="at least one layer")
    return tuple(sorted({model.layers[layer].index for layer in layers}))
