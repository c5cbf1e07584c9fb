"""A whole study, models × data sets × editors, as ordinary run folders, with one table.

It can be stopped at any time and goes on where it was: what is finished is never done again.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from goldenlayers import runfiles
from goldenlayers.datasets import load_facts
from goldenlayers.durable import write_text
from goldenlayers.errors import UserError, check_number
from goldenlayers.records import plain
from goldenlayers.shown import say
from goldenlayers.studying.cell import Cell, TimeUp, cells_of
from goldenlayers.studying.figures import figures_of
from goldenlayers.studying.file import EXAMPLE, Study, StudyModel
from goldenlayers.studying.folders import SUMMARY, Place
from goldenlayers.studying.work import Clock, Work

if TYPE_CHECKING:
    from goldenlayers.models.model import Model

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
        from goldenlayers.report.studies import markdown

        folder.write_json(SUMMARY, summary)
        write_text(folder.file(TABLE), markdown(summary))
        folder.finish()
    return StudyResult(summary, left, failed, folder.path)


def check_depth(study: Study, model: StudyModel, **loading: Any) -> None:
    """Refuse a model that cannot be found, and layers that it does not have, without loading it.

    Raises:
        UserError: one of them.
    """
    from goldenlayers.models.checks import read_config
    from goldenlayers.models.sources import locate

    names = ("cache_dir", "trust_remote_code")
    folder = locate(model.source, **{n: loading[n] for n in names if n in loading})
    config = read_config(folder)
    for part in (config, config.get("text_config")):
        for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers"):
            depth = part.get(name) if isinstance(part, dict) else None
            if type(depth) is int and depth > 0:
                study.layers_of(model, depth)
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
                model = load(cell.model.source, **loading)
            Work(cell, model, clock).run(todo)
            cell.compare()
        except TimeUp:
            raise
        except UserError as error:
            say(f"{cell.name} failed: {error}")
            cell.failed |= dict.fromkeys(cell.todo(only), str(error))
    del model
    gc.collect()
