"""Run folders as the commands write them: of a sweep, an evaluation, a choice, a comparison."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from goldenlayers.durable import disk_errors
from goldenlayers.errors import UserError
from goldenlayers.evaluation.metrics import Metric
from goldenlayers.evaluation.rows import Expected, each_once
from goldenlayers.progress import Progress
from goldenlayers.prompts import plain_subject
from goldenlayers.records import entry, short
from goldenlayers.runfiles import CONFIG
from goldenlayers.shown import say, warn
from goldenlayers.store import RunFolder
from goldenlayers.truth import Truth, to_json

if TYPE_CHECKING:
    from goldenlayers.datasets import FactSet
    from goldenlayers.locating.ranking import LayerRanking
    from goldenlayers.models import Model
    from goldenlayers.sweeping import Batch, Sweep

SCORES, TIMES, SUMMARY, FIGURE = "scores.jsonl", "times.jsonl", "summary.json", "sweep"
RANKING, PER_FACT, COMPARE = "ranking.json", "per_fact.jsonl", "compare.json"


# --- what any run records of itself


def origin(model: Model | None, facts: FactSet | None) -> dict[str, Any]:
    """What a run records of the model it works on and of its facts."""
    found: dict[str, Any] = {}
    if model is not None:
        found["model"] = {
            "name": model.name,
            "fingerprint": model.fingerprint(),
            "dtype": str(model.dtype).removeprefix("torch."),
        }
    if facts is not None:
        found["data"] = {"name": facts.name, "sha256": facts.sha256, "facts": len(facts)}
    return found


def ids_digest(ids: Iterable[str]) -> str:
    """Hash of which facts some runs worked on."""
    return hashlib.sha256(json.dumps(sorted(set(ids))).encode()).hexdigest()


def resumed(
    folder: RunFolder | None, name: str, problem: Callable[[dict[str, Any]], str]
) -> list[dict[str, Any]]:
    """The rows that an unfinished run has in a file; says what is gone on with, and what not."""
    if folder is None or not folder.resumed:
        return []
    rows, note = folder.resume_rows(name, problem)
    if note:
        warn(f"{note}.")
    if rows and name == SCORES:
        say(f"Going on with {folder.path}: {len(rows)} rows are there")
    return rows


# --- a sweep


def sweep_progress(
    folder: RunFolder, facts: Sequence[Any], metrics: Sequence[str | Metric], **more: Any
) -> Progress:
    """What a sweep reports to its run folder (open for writing), and the rows that it goes on with.

    ``more``: ``seed`` and ``layers`` of the sweep; further fields of :class:`Progress`, of which
    ``on_batch`` is called once a batch's rows and time are on the disk.
    """
    seed, layers, on_batch = more.pop("seed"), more.pop("layers"), more.pop("on_batch", None)
    expected = Expected(facts, metrics, others=facts, seed=seed, layers=layers)
    done = resumed(folder, SCORES, each_once(expected.problem))
    resumed(folder, TIMES, _no_time)

    def keep_time(batch: Batch) -> None:
        row = {"layer": batch.task.layer, "facts": len(batch.task.places)}
        folder.append_rows(TIMES, [row | {"seconds": round(batch.seconds, 3)}])
        if on_batch is not None:
            on_batch(batch)

    rows = partial(folder.append_rows, SCORES)
    return Progress(done=done, on_rows=rows, on_batch=keep_time, **more)


def finish_sweep(
    folder: RunFolder, found: Sweep, model: Model, facts: FactSet, seed: int
) -> tuple[Truth, dict[str, Any]]:
    """Put a sweep's figures and picture into its run folder and finish it."""
    from goldenlayers.report.pictures import sweep_figure
    from goldenlayers.report.tables import facts_of

    truth = Truth.from_rows(found.rows, seed=seed)
    times = folder.read_rows(TIMES)
    seconds, cells = (sum(row[name] for row in times) for name in ("seconds", "facts"))
    summary: dict[str, Any] = {
        "schema": 1,
        "method": found.method,
        "model": model.name,
        "fingerprint": model.fingerprint(),
        "data": facts.name,
        "n_layers": len(model.layers),
        **to_json(truth, groups={fact.id: plain_subject(fact.subject) for fact in facts}),
        "seconds": round(seconds, 3),
        "seconds_per_cell": round(seconds / cells, 4) if cells else None,
        "settings": dict(found.settings),
    }
    folder.write_json(SUMMARY, summary)
    if truth.leading is not None:
        title = f"{found.method} on {model.name} · {facts_of(summary)}"
        sweep_figure(truth, folder.file(FIGURE), heading=title, metric=truth.leading)
    folder.finish()
    return truth, summary


def _no_time(row: dict[str, Any]) -> str:
    """What is wrong with a row of ``times.jsonl``."""
    kinds = {"layer": (int,), "facts": (int,), "seconds": (int, float)}
    for name, kind in kinds.items():
        value: Any = row.get(name)
        if type(value) not in kind or not 0 <= value < 1e12:
            return f"'{name}' is {short(value)}"
    return ""


# --- a choice of a layer


def finish_choice(folder: RunFolder, ranking: LayerRanking) -> None:
    """Put a ranking and its pictures into its run folder and finish it."""
    from goldenlayers.report.figures import ranking_figure

    folder.write_json(RANKING, ranking.to_json())
    with disk_errors(folder.file("ranking")):
        ranking_figure(ranking, folder.file("ranking"))
    folder.finish()


# --- the folders of a study


@dataclasses.dataclass(frozen=True)
class Place:
    """Where one run of a study stands, and what it is.

    Attributes:
        path: its folder.
        command: whose run it is.
        settings: those that decide what comes out, as the command records them.
        data_sha256: of the facts' source; "" for runs that read other runs.
        inputs: hashes of what else is read.
    """

    path: Path
    command: str
    settings: Mapping[str, Any]
    data_sha256: str = ""
    inputs: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def finished(self) -> RunFolder | None:
        """The finished run, if it is there; also an unfinished one is looked at.

        Raises:
            UserError: a run of another kind, of other settings or of other facts stands there.
        """
        try:
            folder = RunFolder.open(self.path, part=True)
        except UserError:  # nothing is there, or what no run can be written over: told when it is
            return None
        folder.require(self.command)
        old = entry(folder.config, "settings", dict[str, Any], folder.path / CONFIG, {})
        plain = {"chat": False}  # what a record without it means
        old = plain | old
        changes = [
            f"{name}: {short(old.get(name))} -> {short(value)}"
            for name, value in (plain | dict(self.settings)).items()
            if name not in _BY_CONTENT and old.get(name) != value
        ]
        sha256 = (folder.config.get("data") or {}).get("sha256", "")
        changes += ["other facts"] * (sha256 != self.data_sha256)
        inputs = folder.config.get("inputs") or {}
        changes += [f"other {n}" for n, value in self.inputs.items() if inputs.get(n) != value]
        if changes:
            raise UserError(
                f"{folder.path} holds a run with other settings: {'; '.join(changes)}",
                fix="Take the study's old settings, or choose another --out",
            )
        return folder if folder.path == folder.target else None

    def open(
        self,
        model: Model | None = None,
        facts: FactSet | None = None,
        *,
        resume: bool = True,
        overwrite: bool = False,
    ) -> RunFolder:
        """The run folder for writing: begun, or gone on with.

        Raises:
            UserError: see :meth:`RunFolder.create`.
        """
        record = {"command": self.command, "settings": dict(self.settings)}
        record |= origin(model, facts)
        if self.inputs:
            record["inputs"] = dict(self.inputs)
        free = [f"settings.{name}" for name in (*_BY_CONTENT, "device")]
        return RunFolder.create(
            self.path, record, resume=resume, overwrite=overwrite, ignore=[*free, "model.name"]
        )


# Known by what they hold, wherever it lies; the metric of a comparison by the sweep.
_BY_CONTENT = ("data", "statistics", "apart_from", "joints", "sweep", "with_", "metric")
