"""``golden report``: finished runs as one page to read, print and share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from goldenlayers.commands import shared
from goldenlayers.commands.options import Consent, Role, Under
from goldenlayers.errors import UserError
from goldenlayers.shown import result, say, warn


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Make one page of finished runs: which layer, how sure, what another costs; scores by layer,
    every fact, choices against the truth, edits and their checks. It opens without a network. No
    model is loaded.

    golden report runs/sweep runs/lga runs/compare --out report.html
    golden report runs/studied --out study.html
    """

    heading = "Output"

    run: Annotated[Positional[list[Path]], arg(metavar="RUN ..."), Role.SOURCE]
    """Run folders; a folder without a run of its own, such as that of `golden study`, stands for
    the finished runs below it."""

    out: Annotated[Path, arg(metavar="FILE"), Role.PLACE]
    """The page to write, NAME.html."""

    title: str = ""
    """Its title (default: the names of the runs)."""

    overwrite: Annotated[Consent, Under("Output")] = False
    """Replace an earlier report (nothing else is ever replaced)."""

    def __post_init__(self) -> None:
        if not self.run:
            raise UserError("there is no run to report on", expected="RUN, a run folder")
        if self.out.suffix.lower() not in (".html", ".htm"):
            raise UserError(f"--out is {self.out}", expected="a file NAME.html")


def run(config: ReportConfig) -> int:
    """Read the runs, and write the page."""
    from goldenlayers.report import page

    page.refuse_place(config.out, overwrite=config.overwrite)
    shared.refuse_unwritable(config.out)
    names = [one.resolve().name for one in config.run]
    title = config.title or ", ".join(names[:4]) + (" ..." if len(names) > 4 else "")
    found, made = page.write(config.run, config.out, title=title)
    for _, why in made.left_out:
        warn(f"left out: {why}")
    for card in made.cards:
        say(f"{card.title}: {card.layer}. {card.sure}")
    say(f"Page of {len(found.folders)} runs written to {config.out}")
    result(
        out=config.out,
        runs=[{"run": str(one.path), "command": one.kind} for one in found.folders],
        left_out=[{"run": where, "why": why} for where, why in made.left_out],
    )
    return 0
