"""A whole study, models × data sets × editors, as ordinary run folders, with one table.

It can be stopped at any time and goes on where it was: what is finished is never done again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from goldenlayers import runfiles
from goldenlayers.datasets import FactSet, load_facts
from goldenlayers.decoding import joints_record, settle_joints
from goldenlayers.durable import write_text
from goldenlayers.editors import Editor, InContext, needed_layers
from goldenlayers.editors.routing import layer_statistics
from goldenlayers.errors import UserError, check_number
from goldenlayers.evaluation import DEFAULT_METRICS, evaluate
from goldenlayers.evaluation.rows import Expected, each_once
from goldenlayers.locating import LayerMethod, locate
from goldenlayers.progress import Progress, progress
from goldenlayers.records import plain
from goldenlayers.shown import say
from goldenlayers.statistics.documents import absolute_name
from goldenlayers.studying.cell import Cell, TimeUp, cells_of, layers_named, others_of
from goldenlayers.studying.figures import figures_of
from goldenlayers.studying.file import EXAMPLE, NO_EDIT, Study, StudyModel
from goldenlayers.studying.folders import (
    PER_FACT,
    SCORES,
    SUMMARY,
    Place,
    finish_choice,
    finish_sweep,
    resumed,
    sweep_progress,
)
from goldenlayers.sweeping import Sweep, sweep_together

if TYPE_CHECKING:
    from goldenlayers.models import Model
    from goldenlayers.statistics.moments import Covariance


__all__ = ["EXAMPLE", "Study", "StudyResult", "study"]

TABLE = "table.md"


@dataclass(frozen=True)
class StudyResult:
    """What there is of a study.

    Attributes:
        summary: its figures, the content of ``summary.json``.
        left: the runs that are still to be made, as "model/data/run".
        failed: the runs that failed in this call, with the error.
        folder: where ``summary.json`` and ``table.md`` stand.
    """

    summary: Mapping[str, Any]
    left: tuple[str, ...]
    failed: Mapping[str, str]
    folder: Path


def study(
    what: Study | str | Path,
    out: str | Path,
    *,
    minutes: float | None = None,
    only: str = "",
    cache_dir: str | Path | None = None,
    **loading: Any,
) -> StudyResult:
    """Run what is missing of a study, and make the table of all that is there.

    Models and data sets are worked off in their order. A model is loaded once, and key statistics
    are collected once for all its layers. In ``OUT/MODEL/DATA`` are run folders ``EDITOR``, as
    ``golden sweep`` writes them (of in-context and none: ``golden evaluate``), ``locate/METHOD``
    and ``compare/EDITOR``; the table is in ``OUT/study``.

    Args:
        what: the study, or its file.
        out: the folder for all of it.
        minutes: begin nothing more once so much time is over; a step at hand is ended first.
        only: work on the runs with this in "model/data/run" alone.
        cache_dir: as for loading models and for key statistics.
        loading: further options of :func:`goldenlayers.models.load`, such as ``device``.

    Raises:
        UserError: something of the study cannot be (before any model is loaded); a finished run
            with other settings stands in a folder; another study is at work in ``out``; nothing can
            be written. What fails for one run alone is recorded, and the others go on.
    """
    found = what if isinstance(what, Study) else Study.read(what)
    if minutes is not None:
        check_number("the minutes", minutes, 0, 1e7, whole=False)
    clock, place = Clock(minutes), runfiles.place(out)
    if (place / runfiles.CONFIG).exists():
        raise UserError(f"{place} is itself a run", fix="Choose another folder for the study")
    cache = None if cache_dir is None else Path(cache_dir)
    sources = {one.name: load_facts(one.source, skip_invalid=True) for one in found.data}
    for name, facts in sources.items():
        if facts.skipped:
            say(f"{name}: {len(facts.skipped)} rows are left out, such as: {facts.skipped[0]}")
    cells = list(cells_of(found, sources, place, cache_dir=cache))
    if not any(only in f"{cell.name}/{run}" for cell in cells for run in cell.places):
        names = [f"{cell.name}/{run}" for cell in cells[:1] for run in cell.places]
        raise UserError(f"no run of the study has '{only}' in its name", expected=", ".join(names))
    record = Place(place / "study", "study", plain(found))
    with record.open(resume=False, overwrite=True) as folder:
        open_models = [m for m in found.models if any(c.todo(only) for c in cells if c.model == m)]
        for model in open_models:
            check_depth(found, model, cache_dir=cache_dir, **loading)
        try:
            for model in open_models:
                mine = [cell for cell in cells if cell.model == model]
                _work(mine, only, clock, cache_dir=cache_dir, dtype=found.dtype, **loading)
        except TimeUp:
            say("The time is over; the same command goes on.")
        for cell in cells:
            cell.compare()
        summary = figures_of(found, cells)
        left = tuple(f"{cell.name}/{run}" for cell in cells for run in cell.todo())
        failed = {f"{c.name}/{run}": error for c in cells for run, error in c.failed.items()}
        summary |= {"left": list(left), "failed": failed}
        from goldenlayers.report import markdown

        folder.write_json(SUMMARY, summary)
        write_text(folder.file(TABLE), markdown(summary))
        folder.finish()
    return StudyResult(summary, left, failed, folder.path)


def check_depth(study: Study, model: StudyModel, **loading: Any) -> None:
    """Refuse a model that cannot be found, and layers that it does not have, without loading it.

    Raises:
        UserError: one of them.
    """
    from goldenlayers.models import locate
    from goldenlayers.models.checks import read_config

    names = ("cache_dir", "trust_remote_code")
    folder = locate(model.source, **{n: loading[n] for n in names if n in loading})
    config = read_config(folder)
    for part in (config, config.get("text_config")):
        for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers"):
            depth = part.get(name) if isinstance(part, dict) else None
            if type(depth) is int and depth > 0:
                layers_named(model.layers or study.layers, depth)
                return


def _work(cells: list[Cell], only: str, clock: Clock, **loading: Any) -> None:
    """Work off the cells of one model, which is loaded once."""
    from goldenlayers.models import load

    model: Model | None = None
    for cell in cells:
        todo = cell.todo(only)
        if not todo:
            continue
        clock.check()
        try:
            if model is None:
                model = load(cell.model.source, chat=cell.chat, **loading)
            Work(cell, model, clock).run(todo)
            cell.compare()
        except TimeUp:
            raise
        except UserError as error:
            say(f"{cell.name} failed: {error}")
            cell.failed |= dict.fromkeys(cell.todo(only), str(error))
    del model
    gc.collect()


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
        named = set(cell.layers(len(self.model.layers)).values())
        if cell.all_layers:
            named -= set(self.model.layers.without_mlp)
        layers = sorted(named)
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
                self._locate(run, method, proxy, statistics)

    def _statistics(
        self, editors: Iterable[Editor], methods: Iterable[LayerMethod], layers: list[int]
    ) -> Mapping[int, Covariance] | None:
        """Key statistics of all layers that somebody reads, in one pass; None if nobody does."""
        needed = {one for e in editors for one in needed_layers(e, layers)}
        needed |= {one for how in methods for one in how.statistics_layers(self.model)}
        if not needed:
            return None
        text, cache = absolute_name(self.cell.study.statistics), self.cell.cache_dir
        return layer_statistics(
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
        extra = {"layers": cell.layers_text(len(self.model.layers)), "joints": joints_record(facts)}
        with (
            contextlib.ExitStack() as stack,
            progress(f"sweeping {cell.name}", "edits", estimate=False) as bar,
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
