"""``golden study``: models × data sets × editors from one file, resumable, with one table."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from goldenlayers.commands.options import Checked, LoadOptions, Role, Under
from goldenlayers.errors import UserError
from goldenlayers.shown import put, say

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


def run(config: StudyConfig) -> int:
    """Study, print the table, say what is left; 0 when all is done, 3 when something is left."""
    from goldenlayers.studying import EXAMPLE, Study, study

    if config.example:
        put(*EXAMPLE.rstrip("\n").split("\n"))
        return 0
    if config.file is None or config.out is None:
        missing = "FILE" if config.file is None else "--out"
        raise UserError(f"{missing} is missing", fix="See golden study --help, or --example")
    found = study(
        Study.read(config.file, config.base),
        config.out,
        minutes=config.minutes,
        only=config.only,
        cache_dir=config.cache_dir,
        device=config.device,
        trust_remote_code=config.trust_remote_code,
    )
    from goldenlayers.report.studies import show_study

    show_study(found.summary)
    say(f"Written to {found.folder}: summary.json, table.md")
    return LEFT if found.left else 0
