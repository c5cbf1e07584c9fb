"""``golden sweep``, ``compare`` and ``study``: the truth about layers, and choices against it."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from goldenlayers.commands import shared
from goldenlayers.commands.deciding import editor_of, settle, statistics_of
from goldenlayers.commands.options import (
    FACTS,
    RARE,
    ApartOptions,
    Checked,
    Consent,
    LoadOptions,
    ModelOptions,
    Out,
    OutputOptions,
    Role,
    Sources,
    Statistics,
    Under,
    WorkerOptions,
    never_recorded,
)
from goldenlayers.errors import UserError
from goldenlayers.progress import progress
from goldenlayers.shown import put, result, say

if TYPE_CHECKING:
    from goldenlayers.comparing import LocateRun, SweepRun
    from goldenlayers.datasets import FactSet
    from goldenlayers.models import Model
    from goldenlayers.store import RunFolder

ROWS, SUMMARY, FIGURE = "scores.jsonl", "summary.json", "sweep"
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

    statistics: Statistics = "package"
    """Text for the key statistics, as for `golden edit`; one pass serves all layers."""

    chunk: Annotated[str, RARE] = "auto"
    """Facts per batch, or auto; halved by itself when memory runs out."""

    evidence: Annotated[bool, RARE] = False
    """Also write what the model said before and after each edit (several times the size)."""

    out: Annotated[Path, arg(metavar="RUN"), Role.PLACE, Under("Output")]
    """Run folder to write: scores.jsonl, summary.json, pictures, config.yaml, log.txt."""

    overwrite: Annotated[Consent, Under("Output")] = False
    """Replace the run folder if it is there already."""


def run_sweep(config: SweepConfig) -> int:
    """Sweep (or go on with a sweep), print the truth, and write the run folder."""
    from goldenlayers.evaluation.metrics import DEFAULT_METRICS, check_metrics
    from goldenlayers.report.figures import FORMATS
    from goldenlayers.report.tables import show_finished, show_sweep

    editor_of(config)
    metrics = check_metrics(config.metrics) if config.metrics else DEFAULT_METRICS
    if "perplexity" in metrics:
        raise UserError("a sweep does not measure perplexity", fix="golden evaluate does")
    if not config.overwrite and (finished := _finished(config)) is not None:
        from goldenlayers.comparing.runs import truth_of

        say(f"{finished.path} is finished already; this is what it holds")
        summary = finished.json(SUMMARY)
        show_finished(truth_of(finished), summary, finished.file(SUMMARY))
        result(out=finished.path, **summary)
        return 0
    shared.refuse_out(config, "sweep", resume=True)
    source = shared.load_facts(config)
    model = shared.load_model(config)
    every, n_layers = config.layers.strip().lower() == "all", len(model.layers)
    layers = model.layers.with_mlp if every else layers_named(config.layers, n_layers)
    editor = editor_of(config, model)  # the layer that a preset names is left aside
    config, (settled,) = settle(config, model, source)
    source = replace(source, facts=tuple(settled))
    facts = _facts(config, model, source)
    from goldenlayers.studying.folders import finish_sweep, sweep_progress
    from goldenlayers.sweeping import Workers, sweep

    with shared.run_folder(
        config, "sweep", model=model, facts=source, resume=True, ignore=_FREE
    ) as folder:
        assert folder is not None  # --out is no option here
        statistics = statistics_of(config, model, editor, layers)
        load = shared.loader(config, model, numbered=config.engine == "local")
        with progress(f"sweeping with {config.method}", "edits", estimate=False) as bar:
            found = sweep(
                model,
                facts,
                editor,
                layers=layers,
                statistics=statistics,
                metrics=metrics,
                seed=config.seed,
                evidence=config.evidence,
                workers=Workers(config.workers, config.engine, config.address, load),
                progress=sweep_progress(
                    folder,
                    facts,
                    metrics,
                    seed=config.seed,
                    layers=layers,
                    chunk=None if config.chunk == "auto" else int(config.chunk),
                    on_progress=bar,
                    on_note=say,
                ),
            )
        swept = replace(source, facts=tuple(facts))
        truth, summary = finish_sweep(folder, found, model, swept, config.seed)
    result(**summary)
    show_sweep(truth, summary)
    pictures = (f"{FIGURE}.{ending}" for ending in FORMATS)
    shared.tell_written(folder, SUMMARY, ROWS, *pictures)
    return 0


def layers_named(text: str, n_layers: int) -> list[int]:
    """The layers that ``--layers`` names, ascending.

    Raises:
        UserError: not numbers and ranges, or layers that the model does not have.
    """
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,18})\s*(?:-\s*([0-9]{1,18})\s*)?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first:
            raise UserError(f"--layers is '{text}'", expected="all, or such as 0-11 or 0,3,5-8")
        if last >= n_layers:  # before the range is made: it may be endless
            raise UserError(
                f"--layers names layer {last}", expected=f"layers 0 to {n_layers - 1} of this model"
            )
        found |= set(range(first, last + 1))
    return sorted(found)


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
    free = (*never_recorded(SweepConfig), "joints", *_FREE)
    changes = [
        f"{name}: {old.get(name, '(not set)')} -> {value}"
        for name, value in new.items()
        if name not in free and old.get(name, "(not set)") != value
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

    if not (known := known_facts(model, source)):
        raise UserError(
            f"the model gives the old answer of none of the {len(source)} facts",
            fix="Use other facts, a larger model, or leave out --known",
        )
    say(f"The model knows {len(known)} of the {len(source)} facts")
    return known


COMPARE = "compare.json"


@dataclass(frozen=True, kw_only=True)
class CompareConfig(OutputOptions):
    """Judge layer choices by a finished sweep: score, regret, hits, rank correlation, cost.

    golden compare swept --with located
    golden compare swept --with located other-located --metric rewrite --out compared
    """

    sweep: Annotated[Positional[Path], arg(metavar="SWEEP"), Role.SOURCE]
    """Run folder of `golden sweep`: the truth, on test facts."""

    with_: Annotated[Sources, arg(name="with", metavar="RUN ...")] = dataclasses.field(
        default_factory=list
    )
    """Run folders of `golden locate`, on other facts: the choices. Those of other sweeps, too: does
    their golden layer, of other data or another editor, serve here?"""

    metric: str = "overall"
    """What to judge by: overall, or a metric of the sweep."""

    sizes: list[int] = dataclasses.field(default_factory=lambda: [10, 20, 50, 100, 200, 300])
    """Numbers of proxy facts to try, by choosing again with random parts of each run's facts."""

    repeats: int = 200
    """Random parts per size."""

    seed: int = 0
    """Seed of the random parts."""

    allow_overlap: Consent = False
    """Go on, with a warning, where a run chose with facts of the sweep."""

    atlas: Annotated[Path | None, arg(metavar="FILE"), Role.PLACE, RARE] = None
    """Put the sweep's golden layer into this atlas; see docs/editing.md."""

    out: Out = None
    """Run folder to write: compare.json, config.yaml, log.txt."""


def run_compare(config: CompareConfig) -> int:
    """Compare, print the tables, and write the run folder if one is asked for."""
    from goldenlayers.comparing import (
        LocateRun,
        SweepRun,
        compare,
        overlap_warnings,
        transfer_warnings,
    )
    from goldenlayers.report.tables import show_comparison
    from goldenlayers.store import RunFolder

    shared.refuse_out(config, "compare")
    sweep = SweepRun.read(RunFolder.open(config.sweep))
    truth = sweep.truth
    if config.metric == "overall" and truth.leading not in ("overall", None):
        raise UserError(
            f"nothing that Overall is made of was scored in {config.sweep}",
            expected=f"a metric of this sweep: {', '.join(m for m in truth.metrics[:-1])}",
            fix=f"Add --metric {truth.leading}",
        )
    others = _choices(config)
    warnings = overlap_warnings(
        [one for one in others if isinstance(one, LocateRun)],
        sweep,
        allow_overlap=config.allow_overlap,
    )
    sweeps = [one for one in others if isinstance(one, SweepRun)]
    warnings += transfer_warnings(sweep, sweeps, config.metric)
    found = compare(
        sweep,
        others,
        metric=config.metric,
        sizes=config.sizes,
        repeats=config.repeats,
        seed=config.seed,
    )
    found = dataclasses.replace(found, warnings=(*warnings, *found.warnings))
    record = found.to_json() | {"sweep": sweep.to_json()}
    result(**record)
    with shared.run_folder(config, "compare") as folder:
        if folder is not None:
            folder.write_json(COMPARE, record)
            folder.finish()
    show_comparison(found, f"{sweep.editor} on {sweep.model}", sweep.data)
    if config.atlas is not None:
        from goldenlayers.commands.auto_layer import to_atlas

        to_atlas(config.atlas, config.sweep, sweep)
    shared.tell_written(folder, COMPARE)
    return 0


def _choices(config: CompareConfig) -> list[LocateRun | SweepRun]:
    """The locate runs and the other sweeps of ``--with``."""
    from goldenlayers.comparing import LocateRun, SweepRun
    from goldenlayers.store import RunFolder

    found: list[LocateRun | SweepRun] = []
    for path in config.with_:
        folder = RunFolder.open(path)
        folder.require("locate", "sweep", expected="a run of golden locate or golden sweep")
        if path.resolve() == config.sweep.resolve():
            raise UserError(
                f"{path} is the sweep that judges", expected="other sweeps behind --with"
            )
        kind = SweepRun if folder.kind == "sweep" else LocateRun
        found.append(kind.read(folder))
    return found


LEFT = 3
"""The exit status where something is left to do."""


@dataclass(frozen=True, kw_only=True)
class StudyConfig(LoadOptions, Checked):
    """Run a whole study, or what is missing of it: sweeps, layer choices, comparisons, one table.

    golden study --example
    golden study study.yaml --out studied --minutes 60
    """

    heading = "Study"

    file: Annotated[Positional[Path | None], arg(metavar="FILE"), Role.SOURCE] = None
    """YAML file: models, data, editors, layers, facts, methods; see --example."""

    out: Annotated[Path | None, arg(metavar="DIR"), Role.PLACE, Under("Output")] = None
    """Folder for all of it: MODEL/DATA/EDITOR and so on, and study/table.md."""

    minutes: float | None = None
    """Stop once this time is over, after the step at hand; the same command goes on."""

    only: str = ""
    """Work on those runs alone that have this in MODEL/DATA/EDITOR (or .../locate/METHOD)."""

    base: Annotated[Path | None, arg(metavar="DIR"), Role.SOURCE] = None
    """Folder that relative paths in the file begin at (default: the file's own)."""

    device: str = "auto"
    """cpu, cuda, cuda:N, mps, or auto (the best there is)."""

    example: bool = False
    """Print an example of a study's file, and end."""


def run_study(config: StudyConfig) -> int:
    """Study, print the table, say what is left; 0 when all is done, 3 when something is left."""
    from goldenlayers.studying import EXAMPLE, Study, study

    if config.example:
        put(*EXAMPLE.rstrip("\n").split("\n"))
        result(example=EXAMPLE)
        return 0
    if config.file is None or config.out is None:
        missing = "FILE" if config.file is None else "--out"
        raise UserError(f"{missing} is missing", fix="See golden study --help, or --example")
    names = ("minutes", "only", "cache_dir", "device", "trust_remote_code")
    how = {name: getattr(config, name) for name in names}
    found = study(Study.read(config.file, config.base), config.out, **how)
    from goldenlayers.report import show_study

    show_study(found.summary)
    result(out=found.folder, **found.summary)
    say(f"Written to {found.folder}: summary.json, table.md")
    return LEFT if found.left else 0
