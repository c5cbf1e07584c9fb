"""``golden compare``: layer choices against a sweep's truth."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from goldenlayers.commands import shared
from goldenlayers.commands.options import (
    RARE,
    Consent,
    Out,
    OutputOptions,
    Role,
    Sources,
    default_settings,
    flag,
    never_recorded,
)
from goldenlayers.errors import UserError
from goldenlayers.shown import say

if TYPE_CHECKING:
    from goldenlayers.comparing import LocateRun, SweepRun

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


def run(config: CompareConfig) -> int:
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
    with shared.run_folder(config, "compare") as folder:
        if folder is not None:
            folder.write_json(COMPARE, found.to_json() | {"sweep": sweep.to_json()})
            folder.finish()
    show_comparison(found, f"{sweep.editor} on {sweep.model}", sweep.data)
    if config.atlas is not None:
        _to_atlas(config.atlas, config.sweep, sweep)
    if folder is not None:
        say(f"Written to {folder.path}: {COMPARE}")
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


def _to_atlas(path: Path, run: Path, sweep: SweepRun) -> None:
    """Put the sweep's golden layer into an atlas, with the command that measured it."""
    from goldenlayers.atlas import add_entry, entry_of
    from goldenlayers.commands import options_of
    from goldenlayers.commands.which_editor import editor_of
    from goldenlayers.store import RunFolder

    settings = shared.recorded_settings(options_of("sweep"), RunFolder.open(run).config)
    recorded = argparse.Namespace(**settings)
    entry = entry_of(sweep, editor_of(recorded), _command(settings))
    add_entry(path, entry)
    say(f"{path}: layer {entry.layer} for {entry.editor} on {entry.model}, {entry.kind}")


def _command(settings: Mapping[str, Any]) -> str:
    """The ``golden sweep`` that has these settings; files by their names alone."""
    from goldenlayers.commands import options_of

    kind = options_of("sweep")
    usual, here = default_settings(kind), (*never_recorded(kind), "joints", "model", "data")
    words = ["golden sweep", *(Path(settings[name]).name for name in ("model", "data"))]
    for name, value in settings.items():
        if name in here or value in (usual.get(name), None, [], {}):
            continue
        many = [x for pair in value.items() for x in pair] if isinstance(value, dict) else value
        many = many if isinstance(many, list) else [] if many is True else [many]
        words += [flag(name), *(Path(str(one)).name for one in many)]
    return " ".join(words)
