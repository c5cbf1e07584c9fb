"""The work on a cell of a study: what is missing is swept, evaluated and located."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from goldenlayers.datasets import FactSet
from goldenlayers.decoding import joints_record, settle_joints
from goldenlayers.editors import Editor, InContext, needed_layers
from goldenlayers.evaluation import DEFAULT_METRICS, evaluate
from goldenlayers.evaluation.rows import Expected, each_once
from goldenlayers.locating import LayerMethod, locate
from goldenlayers.progress import Progress
from goldenlayers.shown import progress, say
from goldenlayers.statistics import key_statistics
from goldenlayers.statistics.corpus import absolute_name
from goldenlayers.studying.cell import Cell, TimeUp, others_of
from goldenlayers.studying.file import NO_EDIT
from goldenlayers.studying.folders import (
    PER_FACT,
    SCORES,
    SUMMARY,
    finish_choice,
    finish_sweep,
    resumed,
    sweep_progress,
)
from goldenlayers.sweeping import Sweep, sweep_together

if TYPE_CHECKING:
    from goldenlayers.covariance import Covariance
    from goldenlayers.models.model import Model


class Clock:
    """How long a study may go on; without ``minutes`` for ever."""

    def __init__(self, minutes: float | None) -> None:
        self._end = None if minutes is None else time.monotonic() + 60 * minutes

    def check(self, *_: Any) -> None:
        """Raise :class:`TimeUp` once the time is over."""
        if self._end is not None and time.monotonic() >= self._end:
            raise TimeUp("the minutes of the study are over")


class Work:
    """The work on one cell with its model.

    Args:
        cell: what is worked on.
        model: its model, loaded.
        clock: how long.
    """

    def __init__(self, cell: Cell, model: Model, clock: Clock) -> None:
        self.cell, self.model, self.clock = cell, model, clock
        self.seed = cell.study.seed
        self.metrics = cell.study.metrics or DEFAULT_METRICS
        self._joints = cell.recorded_joints()

    def run(self, todo: Sequence[str]) -> None:
        """Work off some runs of the cell; those that fail are in its ``failed``.

        Raises:
            TimeUp: the time is over; what is finished, and what can be gone on with, is kept.
            UserError: a folder that cannot be written; layers that the model does not have.
        """
        cell = self.cell
        layers = sorted(set(cell.layers(len(self.model.layers)).values()))
        editors = {run: cell.editor(run).editor for run in todo if run in cell.editors}
        sweeps = {run: one for run, one in editors.items() if isinstance(one, Editor)}
        methods = {run: one for run, one in cell.methods.items() if run in todo}
        asked = cell.study.counts(cell.model, cell.data)[0]
        fewer = f", {asked} were asked for" * (len(cell.test) < asked)
        say(f"{cell.name} ({len(cell.test)} test facts{fewer}): {', '.join(todo)}")
        test = self._settled(cell.test)
        statistics = self._statistics(sweeps.values(), methods.values(), layers)
        if sweeps:
            self._sweep(sweeps, test, layers, statistics)
        for run, one in editors.items():
            if not isinstance(one, Editor):
                with cell.noting(run):
                    self._evaluate(run, one, test)
        proxy = self._settled(cell.proxy) if methods else cell.proxy
        for run, method in methods.items():
            self.clock.check()
            with cell.noting(run):
                self._locate(run, method, proxy, statistics if method.needs_statistics else None)

    def _statistics(
        self, editors: Iterable[Editor], methods: Iterable[LayerMethod], layers: list[int]
    ) -> Mapping[int, Covariance] | None:
        """Key statistics of all layers that somebody reads, in one pass; None if nobody does."""
        needed = {one for e in editors if e.needs_statistics for one in needed_layers(e, layers)}
        if any(one.needs_statistics for one in methods):
            needed = set(range(len(self.model.layers)))
        if not needed:
            return None
        text, cache = absolute_name(self.cell.study.statistics), self.cell.cache_dir
        return key_statistics(
            self.model, sorted(needed), text=text, seed=self.seed, cache_dir=cache
        )

    def _sweep(
        self,
        editors: Mapping[str, Editor],
        facts: FactSet,
        layers: list[int],
        statistics: Mapping[int, Covariance] | None,
    ) -> None:
        cell, counts = self.cell, dict[str, tuple[int, int]]()
        extra = {
            "layers": cell.layers_text(len(self.model.layers)),
            "joints": joints_record(facts),
        }
        with (
            contextlib.ExitStack() as stack,
            progress(f"sweeping {cell.name}", "editor × layer × fact") as bar,
        ):

            def tell(run: str, done: int, total: int) -> None:
                counts[run] = done, total
                if len(counts) == len(editors):
                    bar(*map(sum, zip(*counts.values(), strict=True)))

            folders = {
                run: stack.enter_context(cell.place_with(run, extra).open(self.model, facts))
                for run in editors
            }
            reports = {
                run: sweep_progress(
                    folder,
                    facts,
                    self.metrics,
                    seed=self.seed,
                    layers=layers,
                    on_batch=self.clock.check,
                    on_progress=partial(tell, run),
                )
                for run, folder in folders.items()
            }
            found = sweep_together(
                self.model,
                facts,
                editors,
                layers=layers,
                metrics=self.metrics,
                seed=self.seed,
                statistics=statistics,
                progress=reports,
            )
            for run, result in found.items():
                if isinstance(result, Sweep):
                    finish_sweep(folders[run], result, self.model, facts, self.seed)
                else:
                    cell.fail(run, result, folders[run])

    def _evaluate(self, run: str, method: InContext | None, facts: FactSet) -> None:
        cell = self.cell
        limit = int(cell.places[run].settings["limit"])
        others = others_of(cell.source, facts, limit, self.seed)
        if others is not None:
            others = settle_joints(self.model, others, recorded=self._joints)
        extra = {"joints": joints_record(facts) | joints_record(others or [])}
        expected = Expected(facts, self.metrics, others=others, seed=self.seed)
        with (
            cell.place_with(run, extra).open(self.model, facts) as folder,
            progress(f"evaluating {cell.name}/{run}", "facts") as bar,
        ):

            def keep(rows: list[dict[str, Any]]) -> None:
                folder.append_rows(SCORES, rows)
                self.clock.check()

            found = evaluate(
                self.model,
                facts,
                method or NO_EDIT,
                metrics=self.metrics,
                others=others,
                seed=self.seed,
                progress=Progress(
                    done=resumed(folder, SCORES, each_once(expected.problem)),
                    on_rows=keep,
                    on_progress=bar,
                ),
            )
            folder.write_json(SUMMARY, found.to_json())
            folder.finish()

    def _locate(
        self,
        run: str,
        method: LayerMethod,
        facts: FactSet,
        statistics: Mapping[int, Covariance] | None,
    ) -> None:
        cell = self.cell
        judges = [name for name in cell.finished() if name in cell.editors]
        extra = {
            "joints": joints_record(facts),
            "apart_from": [str(cell.folder.resolve() / name) for name in judges[:1]],
        }
        with (
            cell.place_with(run, extra).open(self.model, facts, resume=False) as folder,
            progress(f"locating {cell.name}/{run}", "facts") as bar,
        ):
            ranking = locate(
                self.model,
                facts,
                method,
                seed=self.seed,
                statistics=statistics,
                progress=Progress(on_rows=partial(folder.append_rows, PER_FACT), on_progress=bar),
            )
            if ranking.interrupted:  # whoever stops the work wants no half choice
                raise KeyboardInterrupt
            finish_choice(folder, ranking)

    def _settled(self, facts: FactSet) -> FactSet:
        settled = settle_joints(self.model, facts, recorded=self._joints)
        return dataclasses.replace(facts, facts=tuple(settled))
