"""The cells of a sweep, one per layer and fact: which are missing, and how a batch is worked off.

A batch is one chunk of facts at one layer. The chunks are the same on every call and for any
number of workers, and a batch that was cut short is done again whole, so the numbers of a cell do
not depend on what was interrupted when or on who worked it off.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from goldenlayers.editors import Editing, Editor
from goldenlayers.errors import UserError, check_number
from goldenlayers.evaluation.metrics import Metric
from goldenlayers.evaluation.plan import Edit, EvaluationPlan
from goldenlayers.evaluation.rows import Expected, Key
from goldenlayers.evaluation.scoring import ScoreRow as Row
from goldenlayers.facts import Fact
from goldenlayers.progress import (
    WORTH_SAYING,
    Progress,
    in_smaller_batches,
    in_words,
    out_of_memory,
)

if TYPE_CHECKING:
    from goldenlayers.editors.values import Value
    from goldenlayers.models import Model
    from goldenlayers.statistics.moments import Covariance


AUTO_CHUNK = {"cpu": 16}
_AUTO_CHUNK_ELSEWHERE = 32
_PLANS_KEPT = 2  # each may hold half a gigabyte of states of the untouched model


@dataclass(frozen=True)
class Job:
    """What is swept: everything a worker needs beside its model.

    ``evidence``: whether rows carry what the model said before and after.
    """

    facts: tuple[Fact, ...]
    editor: Editor
    metrics: tuple[Metric, ...]
    seed: int = 0
    evidence: bool = False
    statistics: Mapping[int, Covariance] | None = None


@dataclass(frozen=True)
class Task:
    """One batch: the facts at ``places`` at ``layer``. ``chunk`` numbers the chunk of facts."""

    chunk: int
    places: tuple[int, ...]
    layer: int


@dataclass(frozen=True)
class Batch:
    """The rows of a task.

    ``failure`` is the error if every edit failed in the same way; ``seconds`` is wall-clock time.
    """

    task: Task
    rows: list[Row] = field(default_factory=list)
    failure: UserError | None = None
    seconds: float = 0.0


class Ledger:
    """Which rows of a sweep are there, and which tasks are left.

    ``done`` are rows of an earlier, interrupted call; those that do not belong here are left out.
    """

    def __init__(self, job: Job, layers: Sequence[int], done: Iterable[Row] = ()) -> None:
        self.job, self.layers = job, tuple(layers)
        self._expected = Expected(
            job.facts, job.metrics, others=job.facts, seed=job.seed, layers=self.layers
        )
        self._cells: dict[tuple[int, int], dict[Key, Row]] = {
            (layer, i): {} for layer in self.layers for i in range(len(job.facts))
        }
        self.take(done)

    @property
    def n_cells(self) -> int:
        """Cells in all."""
        return len(self._cells)

    @property
    def n_done(self) -> int:
        """Cells with all their rows."""
        return sum(self._whole(*cell) for cell in self._cells)

    def take(self, rows: Iterable[Row]) -> list[Row]:
        """Take rows over; returns those that are new, each belonging to a cell and there once."""
        new = []
        for row in rows:
            if self._expected.problem(row):
                continue
            cell = self._cells[row["layer"], self._expected.place[row["fact"]]]
            if cell.setdefault((row["metric"], row["probe"]), row) is row:
                new.append(row)
        return new

    def tasks(self, chunk: int) -> list[Task]:
        """The batches with rows missing, chunk by chunk, so that a chunk's baseline serves all."""
        found = []
        for number, start in enumerate(range(0, len(self.job.facts), chunk)):
            places = tuple(range(start, min(start + chunk, len(self.job.facts))))
            found += [
                Task(number, places, layer)
                for layer in self.layers
                if not all(self._whole(layer, i) for i in places)
            ]
        return found

    def missing(self, task: Task) -> int:
        """Cells of a task that are not whole."""
        return sum(not self._whole(task.layer, i) for i in task.places)

    def rows(self) -> Iterator[Row]:
        """All rows, fact by fact and layer by layer."""
        for i in range(len(self.job.facts)):
            for layer in self.layers:
                yield from self._cells[layer, i].values()

    def any_scored(self) -> bool:
        """Whether some row has a score."""
        return any(
            row.get("score") is not None for cell in self._cells.values() for row in cell.values()
        )

    def _whole(self, layer: int, place: int) -> bool:
        return len(self._cells[layer, place]) == len(self._expected.keys[place])


class Runner:
    """Works off tasks with one loaded model; what a chunk's layers share is kept between them."""

    def __init__(
        self,
        model: Model,
        job: Job,
        value_cache: dict[tuple[Any, ...], Value] | None = None,
        plans: dict[tuple[int, ...], EvaluationPlan] | None = None,
    ) -> None:
        self.model, self.job = model, job
        self._work = Editing(
            model,
            job.editor,
            model.layers.with_mlp[0],
            seed=job.seed,
            statistics=job.statistics,
            value_cache=value_cache,
        )
        # Runners of one model, facts and metrics may share them.
        self._plans = {} if plans is None else plans
        self._most: int | None = None  # facts at once, since memory ran out

    def run(self, task: Task) -> Batch:
        """Edit and score every cell of a task.

        Raises:
            UserError: memory runs out on a single fact.
        """
        start = time.perf_counter()
        rows: list[Row] = []
        failures: list[UserError | None] = []
        size = self._most or len(task.places)
        batches = [task.places[i : i + size] for i in range(0, len(task.places), size)]

        def part(places: Sequence[int]) -> tuple[list[Row], UserError | None]:
            try:
                return self._part(tuple(places), task.layer)
            except (MemoryError, RuntimeError) as error:
                if out_of_memory(error):
                    self._most = max(1, len(places) // 2)
                    self._plans.clear()
                raise

        def what(place: int) -> str:
            return f"fact '{self.job.facts[place].id}' at layer {task.layer}"

        for _, (found, failure) in in_smaller_batches(batches, part, what, for_good=True):
            rows += found
            failures.append(failure)
        alike = {str(one) for one in failures}
        failure = failures[0] if len(alike) == 1 else None
        return Batch(task, rows, failure, time.perf_counter() - start)

    def _part(self, places: tuple[int, ...], layer: int) -> tuple[list[Row], UserError | None]:
        facts = [self.job.facts[i] for i in places]
        failure: UserError | None = None
        try:
            edits: list[Edit] = list(self._work.at(layer).each_safely(facts))
        except UserError as error:
            # The fault may be this layer's: the sweep decides, which knows the other layers.
            failure, edits = error, [error] * len(facts)
        rows = self._plan(places).score(edits)
        return [self._finished(row, layer) for row in rows], failure

    def _plan(self, places: tuple[int, ...]) -> EvaluationPlan:
        if places not in self._plans:
            while len(self._plans) >= _PLANS_KEPT:
                del self._plans[next(iter(self._plans))]
            self._plans[places] = EvaluationPlan(
                self.model,
                [self.job.facts[i] for i in places],
                self.job.metrics,
                others=self.job.facts,
                seed=self.job.seed,
            )
        return self._plans[places]

    def _finished(self, row: Row, layer: int) -> Row:
        rest = {k: v for k, v in row.items() if self.job.evidence or k != "evidence"}
        return {"fact": rest.pop("fact"), "layer": layer, **rest}


def chunk_size(chunk: int | None, device: str) -> int:
    """Facts per batch; None goes by the kind of device.

    Raises:
        UserError: not a number above 0.
    """
    if chunk is None:
        return AUTO_CHUNK.get(device, _AUTO_CHUNK_ELSEWHERE)
    check_number("the chunk", chunk, 1, 1_000_000_000)
    return chunk


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


class Course:
    """The cells of one editor, and what becomes of them; ``tell`` has an earlier call's rows."""

    def __init__(self, job: Job, layers: Sequence[int], tell: Progress) -> None:
        self.job, self.layers, self.tell = job, tuple(layers), tell
        self.ledger = Ledger(job, layers, tell.done)
        self._finished, self._proven = self.ledger.n_done, self.ledger.any_scored()
        self._cells, self._seconds = 0, 0.0
        tell.tell(self._finished, self.ledger.n_cells)

    def refuse_failure(self, batch: Batch) -> None:
        """Refuse a batch of which every edit failed alike, where no edit ever went well.

        Raises:
            UserError: that of the edits.
        """
        if batch.failure is not None and not self._proven:
            raise batch.failure
        self._proven = self._proven or batch.failure is None

    def foretell(self, batch: Batch, tasks: Sequence[Task], n_layers: int, workers: int) -> None:
        """Say how long all tasks will take, by the first batch of them.

        The lower the layer the longer the way back to it: the time of a cell goes by the number of
        layers above, and a fifth of all for the scores (measured with ROME: within a tenth).
        """
        if self._cells or self.tell.on_note is None:
            return

        def work(task: Task) -> float:
            return len(task.places) * (1.2 * n_layers - task.layer)

        seconds = batch.seconds * sum(map(work, tasks)) / work(batch.task) / workers
        if seconds >= WORTH_SAYING:
            edits, first = sum(len(task.places) for task in tasks), len(batch.task.places)
            self.tell.on_note(
                f"Sweeping with {self.job.editor.name}: about {in_words(seconds)} on this machine "
                f"for {edits:,} edits, by the first {first}"
            )

    def take(self, batch: Batch) -> None:
        """Take a finished batch over, and report it."""
        count = self.ledger.missing(batch.task)
        self.tell.rows(self.ledger.take(batch.rows))
        if self.tell.on_batch is not None:
            self.tell.on_batch(batch)
        self._finished += count
        self._cells += count
        self._seconds += batch.seconds
        self.tell.tell(self._finished, self.ledger.n_cells)

    def result(self, model: Model) -> Sweep:
        """The sweep as far as it has come."""
        editor = self.job.editor
        return Sweep(
            tuple(self.ledger.rows()),
            self.layers,
            tuple(fact.id for fact in self.job.facts),
            editor.name,
            self._seconds,
            self._cells,
            {
                "model": model.name,
                "metrics": [metric.name for metric in self.job.metrics],
                "seed": self.job.seed,
                "edit": editor.to_json(),
            },
        )
