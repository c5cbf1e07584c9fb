"""``golden sweep``: every layer × every fact, the truth to judge a layer by."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

from goldenlayers.commands import shared
from goldenlayers.commands.joints import settle
from goldenlayers.commands.options import (
    FACTS,
    RARE,
    ApartOptions,
    Consent,
    ModelOptions,
    Role,
    Statistics,
    Under,
    WorkerOptions,
    roles,
)
from goldenlayers.commands.which_editor import editor_of, statistics_of
from goldenlayers.errors import UserError
from goldenlayers.facts import plain_subject
from goldenlayers.shown import progress, say

if TYPE_CHECKING:
    from goldenlayers.datasets import FactSet
    from goldenlayers.models.model import Model
    from goldenlayers.store import RunFolder
    from goldenlayers.truth import Truth

ROWS, TIMES, SUMMARY, FIGURE = "scores.jsonl", "times.jsonl", "summary.json", "sweep"
# These change how fast the work is done, not what comes out.
_FREE = ("device", "chunk")


@dataclass(frozen=True, kw_only=True)
class SweepConfig(WorkerOptions, ApartOptions, ModelOptions):
    """Edit every fact at every layer and score: the truth. Run again after a kill to go on.

    golden sweep smollm2-135m facts.jsonl --limit 30 --out swept
    golden sweep smollm2-135m facts.jsonl --method memit --layers 3-8 --out swept
    """

    heading = "Method"

    method: str = "rome"
    """rome, r-rome, clear-rome, memit, emmet, alphaedit, pmet, ft-m or ft-l."""

    layers: str = "all"
    """all, or numbers and ranges: 0-11 or 0,3,5 or 0-4,8."""

    known: Annotated[bool, FACTS] = False
    """Keep only facts whose old answer the model gives by itself."""

    metrics: list[str] = dataclasses.field(default_factory=list)
    """As for `golden evaluate`; rewrite, rephrase, locality, portability if none is named."""

    preset: Annotated[str | None, RARE] = None
    """Published settings by name, such as rome/gpt2-xl; their layer is left aside."""

    set: dict[str, str] = dataclasses.field(default_factory=dict)
    """Settings of the editor, as NAME VALUE pairs (steps 30 clamp 2 ...); see `golden editors`."""

    statistics: Statistics = "model"
    """Text for the key statistics, as for `golden edit`; one pass serves all layers."""

    chunk: Annotated[str, RARE] = "auto"
    """Facts per batch, or auto; halved by itself when memory runs out."""

    evidence: Annotated[bool, RARE] = False
    """Also write what the model said before and after each edit (several times the size)."""

    out: Annotated[Path, arg(metavar="RUN"), Role.PLACE, Under("Output")]
    """Run folder to write: scores.jsonl, summary.json, pictures, config.yaml, log.txt."""

    overwrite: Annotated[Consent, Under("Output")] = False
    """Replace the run folder if it is there already."""


def run(config: SweepConfig) -> int:
    """Sweep (or go on with a sweep), print the truth, and write the run folder."""
    from goldenlayers.evaluation.metrics import DEFAULT_METRICS, check_metrics
    from goldenlayers.evaluation.rows import Expected, each_once

    editor_of(config)
    metrics = check_metrics(config.metrics) if config.metrics else DEFAULT_METRICS
    if "perplexity" in metrics:
        raise UserError("a sweep does not measure perplexity", fix="golden evaluate does")
    if not config.overwrite and (finished := _finished(config)) is not None:
        from goldenlayers.comparing.sweeps import truth_of

        say(f"{finished.path} is finished already; this is what it holds")
        from goldenlayers.report.tables import show_finished

        show_finished(truth_of(finished), finished.json(SUMMARY), finished.file(SUMMARY))
        return 0
    shared.refuse_out(config, "sweep", resume=True)
    source = shared.load_facts(config)
    model = shared.load_model(config)
    layers = layers_named(config.layers, len(model.layers))
    editor = editor_of(config, model)  # the layer that a preset names is left aside
    config, (settled,) = settle(config, model, source)
    source = replace(source, facts=tuple(settled))
    facts = _facts(config, model, source)
    with shared.run_folder(
        config, "sweep", model=model, facts=source, resume=True, ignore=_FREE
    ) as folder:
        assert folder is not None  # --out is no option here
        expected = Expected(facts, metrics, others=facts, seed=config.seed, layers=layers)
        done = shared.resumed(folder, ROWS, each_once(expected.problem))
        shared.resumed(folder, TIMES, _no_time)
        from goldenlayers.progress import Progress
        from goldenlayers.sweeping import Batch, Workers, sweep
        from goldenlayers.truth import Truth, to_json

        statistics = statistics_of(config, model, editor, layers)

        def keep_time(batch: Batch) -> None:
            row = {"layer": batch.task.layer, "facts": len(batch.task.places)}
            folder.append_rows(TIMES, [row | {"seconds": round(batch.seconds, 3)}])

        with progress(f"sweeping with {config.method}", "layer × fact") as bar:
            found = sweep(
                model,
                facts,
                editor,
                layers=layers,
                statistics=statistics,
                metrics=metrics,
                seed=config.seed,
                evidence=config.evidence,
                workers=Workers(
                    config.workers,
                    config.engine,
                    config.address,
                    partial(shared.load_model, replace(config, device=str(model.device))),
                ),
                progress=Progress(
                    done=done,
                    chunk=None if config.chunk == "auto" else int(config.chunk),
                    on_rows=partial(folder.append_rows, ROWS),
                    on_batch=keep_time,
                    on_progress=bar,
                ),
            )
        truth = Truth.from_rows(found.rows, seed=config.seed)
        times = folder.read_rows(TIMES)
        subjects = {fact.id: plain_subject(fact.subject) for fact in facts}
        summary: dict[str, Any] = {
            "schema": 1,
            "method": config.method,
            "model": model.name,
            "fingerprint": model.fingerprint(),
            "data": source.name,
            "n_layers": len(model.layers),
            **to_json(truth, groups=subjects),
            "seconds": round(sum(row["seconds"] for row in times), 3),
            "seconds_per_cell": _per_cell(times),
            "settings": dict(found.settings),
        }
        write(folder, truth, summary)
    from goldenlayers.report.tables import show_sweep

    show_sweep(truth, summary)
    names = (SUMMARY, ROWS, f"{FIGURE}.svg", f"{FIGURE}.png")
    there = ", ".join(name for name in names if folder.file(name).exists())
    say(f"Written to {folder.path}: {there}")
    return 0


def layers_named(text: str, n_layers: int) -> list[int]:
    """The layers that ``--layers`` names, ascending.

    Raises:
        UserError: not numbers and ranges, or layers that the model does not have.
    """
    if text.strip().lower() == "all":
        return list(range(n_layers))
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,18})\s*(?:-\s*([0-9]{1,18})\s*)?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first:
            raise UserError(f"--layers is '{text}'", expected="all, or such as 0-11 or 0,3,5-8")
        if last >= n_layers:  # before the range is made: it may be endless
            raise UserError(
                f"--layers names layer {last}",
                expected=f"layers 0 to {n_layers - 1} of this model",
            )
        found |= set(range(first, last + 1))
    return sorted(found)


def write(folder: RunFolder, truth: Truth, summary: dict[str, Any]) -> None:
    """Put the figures into the run folder and finish it."""
    from goldenlayers.report.sweeps import sweep_figure

    folder.write_json(SUMMARY, summary)
    if truth.leading is not None:
        from goldenlayers.report.tables import facts_of

        title = f"{summary['method']} on {summary['model']} · {facts_of(summary)}"
        sweep_figure(truth, folder.file(FIGURE), title=title, metric=truth.leading)
    folder.finish()


def _no_time(row: dict[str, Any]) -> str:
    """What is wrong with a row of ``times.jsonl``."""
    from goldenlayers.records import short

    kinds = {"layer": (int,), "facts": (int,), "seconds": (int, float)}
    for name, kind in kinds.items():
        value: Any = row.get(name)
        if type(value) not in kind or not 0 <= value < 1e12:
            return f"'{name}' is {short(value)}"
    return ""


def _per_cell(times: Sequence[dict[str, Any]]) -> float | None:
    cells = sum(row["facts"] for row in times)
    return round(sum(row["seconds"] for row in times) / cells, 4) if cells else None


def _finished(config: SweepConfig) -> RunFolder | None:
    """The finished sweep at --out, if there is one.

    Raises:
        UserError: it has other settings; with the difference.
    """
    from goldenlayers.runfiles import CONFIG, is_record
    from goldenlayers.store import RunFolder

    if not (config.out / CONFIG).is_file():
        return None
    folder = RunFolder.open(config.out)
    if not is_record(folder.config):  # what else lies there, refuse_out tells
        return None
    old = shared.recorded_settings(SweepConfig, folder.config)
    new = shared.settings_of(config)
    inputs = folder.config.get("inputs")
    if inputs is not None:  # a version that hashed no files cannot say that they have changed
        old |= {f"content of {name}": sha256 for name, sha256 in inputs.items()}
        now = shared.inputs_of(config)
        new |= {f"content of {name}": sha256 for name, sha256 in now.items()}
    here = [name for name, role in roles(SweepConfig).items() if role is not Role.SOURCE]
    changes = [
        f"{name}: {old.get(name, '(not set)')} -> {value}"
        for name, value in new.items()
        if name not in (*here, "joints", *_FREE) and old.get(name, "(not set)") != value
    ]
    if folder.kind != "sweep" or changes:
        other = "; ".join(changes) if folder.kind == "sweep" else f"it is a run of {folder.kind}"
        raise UserError(
            f"{folder.path} already holds a finished run with other settings: {other}",
            fix="Choose another --out, or add --overwrite",
        )
    return folder


def _facts(config: SweepConfig, model: Model, source: FactSet) -> list[Any]:
    if not config.known:
        return list(source)
    from goldenlayers.locating.known import known_facts

    known = known_facts(model, source)
    if not known:
        raise UserError(
            f"the model gives the old answer of none of the {len(source)} facts",
            fix="Use other facts, a larger model, or leave out --known",
        )
    say(f"The model knows {len(known)} of the {len(source)} facts")
    return known
