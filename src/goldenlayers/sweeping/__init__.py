"""Sweep: every layer × every fact edited singly and scored, resumable, on one or many workers.

It gives the truth that a layer choice is judged by (:mod:`goldenlayers.truth`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from goldenlayers.decoding import settle_joints
from goldenlayers.editors import EditSettings, edited_layers, editor
from goldenlayers.errors import UserError, check_number, check_seed
from goldenlayers.evaluation.metrics import DEFAULT_METRICS, Metric, metrics_of
from goldenlayers.evaluation.plan import check_ids
from goldenlayers.facts import Fact
from goldenlayers.sweeping.cells import Batch, Job, Ledger, Row, Runner, chunk_size

if TYPE_CHECKING:
    from goldenlayers.covariance import Covariance
    from goldenlayers.editors.values import Value
    from goldenlayers.models.model import Model

__all__ = ["Batch", "Sweep", "sweep"]

EngineName = Literal["local", "ray"]


@dataclass(frozen=True)
class Sweep:
    """What :func:`sweep` found.

    Attributes:
        rows: one per fact, layer and probe, facts in their order, layers ascending.
        layers: the swept layers.
        facts: ids of the facts.
        seconds: time spent on the cells worked off in this call, added up over the workers.
        cells: how many cells that were.
    """

    rows: tuple[Row, ...]
    layers: tuple[int, ...]
    facts: tuple[str, ...]
    method: str
    seconds: float
    cells: int
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def seconds_per_cell(self) -> float:
        """Worker-seconds per layer and fact; NaN when nothing was left to do."""
        return self.seconds / self.cells if self.cells else float("nan")


def sweep(
    model: Model,
    facts: Sequence[Fact],
    method: str,
    *,
    layers: Sequence[int] | None = None,
    settings: EditSettings | None = None,
    statistics: Mapping[int, Covariance] | None = None,
    value_cache: dict[tuple[Any, ...], Value] | None = None,
    metrics: Sequence[str | Metric] = DEFAULT_METRICS,
    seed: int = 0,
    chunk: str | int = "auto",
    evidence: bool = False,
    workers: int = 1,
    engine: EngineName = "local",
    address: str | None = None,
    load: Callable[[], Model] | None = None,
    done: Iterable[Row] = (),
    on_rows: Callable[[list[Row]], None] | None = None,
    on_batch: Callable[[Batch], None] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Sweep:
    """Edit every fact by itself at every layer, and score each edit; the model is left as it is.

    Args:
        model: a loaded model.
        facts: the facts, with their probes.
        method: an editor's name.
        layers: where to edit; default everywhere.
        settings: of the editor.
        statistics: key statistics of all these layers; collected in one pass when left out.
        value_cache: shared between calls, lets editors that differ in the solve alone share the
            value optimisation, nearly all of the time (one worker only; see :class:`Workbench`).
        metrics: metrics, or their names in ``METRICS``; missing probes count as unscored.
        seed: of the sampled prefixes and statistics, of kl's draw and fluency's sampling.
        chunk: facts per batch; halved by itself when memory runs out.
        evidence: let rows carry what the model said before and after (several times the size).
        workers: processes (or Ray actors) that each load the model once and work side by side.
            The caller's model serves only one worker on the local engine.
        engine: "local" (processes of this machine) or "ray".
        address: of a running Ray cluster; default one started here.
        load: how a worker loads its model; default by the model's name, dtype and device. It must
            be picklable, and give the same weights.
        done: rows of an earlier, interrupted call with the same arguments: cells that are whole
            are not worked off again, others are completed.
        on_rows: told the new rows of each batch, never one twice.
        on_batch: told each batch when its rows have been handed over.
        on_progress: told (cells done, cells in all).

    Raises:
        UserError: unknown editor, metric or engine; no facts, or two with one id; a layer out of
            range; memory that does not suffice for one fact; workers that keep dying; every edit
            fails in the same way from the start. An edit that fails for one fact, or at one layer,
            is no error: its rows are unscored with the reason.
    """
    if not facts:
        raise UserError("there are no facts to sweep over", expected="at least one fact")
    check_ids(facts)
    chosen = editor(method)
    where = swept_layers(model, layers)
    settings = settings or EditSettings()
    check_number("the number of workers", workers, 1, 256)
    check_seed(seed)
    if engine not in ("local", "ray"):
        raise UserError(f"unknown engine '{engine}'", expected="local or ray")
    size = chunk_size(chunk, model.device.type)
    facts = settle_joints(model, facts)
    asked = metrics_of(metrics)
    plain = Job(tuple(facts), method, asked, settings, seed, evidence)
    ledger = Ledger(plain, where, done)
    tasks = ledger.tasks(size)
    if tasks and statistics is None and chosen.needs_statistics:
        from goldenlayers.statistics import key_statistics

        statistics = key_statistics(model, needed_layers(where, settings), seed=seed)
    job = replace(plain, statistics=statistics if chosen.needs_statistics else None)
    finished, total = ledger.n_done, ledger.n_cells
    seconds, cells, proven = 0.0, 0, ledger.any_scored()
    if on_progress is not None:
        on_progress(finished, total)

    def take(batch: Batch) -> None:
        nonlocal finished, seconds, cells, proven
        if batch.failure is not None and not proven:
            raise batch.failure
        proven = proven or batch.failure is None
        count = ledger.missing(batch.task)
        new = ledger.take(batch.rows)
        if new and on_rows is not None:
            on_rows(new)
        if on_batch is not None:
            on_batch(batch)
        finished, cells, seconds = finished + count, cells + count, seconds + batch.seconds
        if on_progress is not None:
            on_progress(finished, total)

    if tasks and engine == "local" and workers == 1:
        runner = Runner(model, job, value_cache)
        for task in tasks:
            take(runner.run(task))
    elif tasks:
        from goldenlayers.sweeping.workers import Start, loader_of, run_tasks

        start = Start(load or loader_of(model), model.fingerprint(), job)
        run_tasks(tasks, start, _engine(engine, address, workers, model), take)
    return Sweep(
        tuple(ledger.rows()),
        where,
        tuple(fact.id for fact in facts),
        method,
        seconds,
        cells,
        {
            "model": model.name,
            "metrics": [metric.name for metric in asked],
            "seed": seed,
            "edit": asdict(settings),
        },
    )


def swept_layers(model: Model, layers: Sequence[int] | None) -> tuple[int, ...]:
    """The layers in ascending order, each once.

    Raises:
        UserError: none, or one out of range.
    """
    if layers is None:
        return tuple(range(len(model.layers)))
    if not layers:
        raise UserError("there are no layers to sweep over", expected="at least one layer")
    return tuple(sorted({model.layers[layer].index for layer in layers}))


def needed_layers(layers: Sequence[int], settings: EditSettings) -> list[int]:
    """The layers whose key statistics the edits at ``layers`` need."""
    return sorted({one for layer in layers for one in edited_layers(layer, settings)})


def _engine(name: str, address: str | None, workers: int, model: Model) -> Any:
    if name == "ray":
        from goldenlayers.sweeping.cluster import RayEngine

        return RayEngine(workers, address, gpu=model.device.type == "cuda")
    from goldenlayers.sweeping.workers import LocalEngine

    return LocalEngine(workers)
