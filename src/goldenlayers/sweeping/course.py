"""One editor's way through the cells of a sweep: what is done, what is left, what is reported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from goldenlayers.progress import Progress
from goldenlayers.sweeping.cells import Batch, Job, Ledger, Row

if TYPE_CHECKING:
    from goldenlayers.models.model import Model


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
    """The cells of one editor, and what becomes of them.

    Args:
        job: what is swept.
        layers: the swept layers.
        tell: reports, and the rows of an earlier call.
    """

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
