"""Finished runs as one page of HTML that opens anywhere and asks the network for nothing.

The page carries Plotly's script, packed, and forbids every other source: its policy names its
own two scripts by their hashes. What comes from runs is text and never markup.
"""

from __future__ import annotations

import base64
import functools
import gzip
import hashlib
import os
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from goldenlayers.durable import reading, write_text
from goldenlayers.errors import UserError
from goldenlayers.report.page.answers import choice_card, sweep_card
from goldenlayers.report.page.choices import choice_section, comparison_section
from goldenlayers.report.page.edits import edit_section, evaluation_section, study_section
from goldenlayers.report.page.layers import sweep_section, sweeps_section
from goldenlayers.report.page.parts import Card, Chart, Page, Section, Table
from goldenlayers.report.page.runs import Found, find, guarded, named, place
from goldenlayers.shown import shown

__all__ = ["Found", "Page", "build", "find", "html_of", "refuse_place", "write"]

_MARK = '<!doctype html>\n<html lang="en">\n<!-- golden report -->\n'


def build(found: Found) -> Page:
    """What is to be said of some runs: answers first, then a section for each."""
    page = Page()

    def add(folder: Any, make: Any) -> None:
        made = guarded(found, folder, make)
        if isinstance(made, Card):
            page.cards.append(made)
        elif isinstance(made, Section):
            page.sections.append(made)

    sweeps = [one for _, one in found.sweeps]
    for folder, one in found.sweeps:
        add(folder, lambda folder=folder, one=one: sweep_card(folder, one))
    for folder, one in found.choices:
        add(folder, lambda folder=folder, one=one: choice_card(folder, one, sweeps))
    if len(sweeps) > 1:
        add(found.sweeps[0][0], lambda: sweeps_section(found.sweeps))
    for folder, record in found.studies:
        add(folder, lambda folder=folder, record=record: study_section(folder, record))
    for folder, record in found.comparisons:
        add(folder, lambda f=folder, record=record: comparison_section(f, record, sweeps))
    for folder, one in found.sweeps:
        add(folder, lambda folder=folder, one=one: sweep_section(folder, one))
    for folder, one in found.choices:
        add(folder, lambda folder=folder, one=one: choice_section(folder, one))
    for folder, record in found.edits:
        add(folder, lambda folder=folder, record=record: edit_section(folder, record))
    for folder, record in found.evaluations:
        add(folder, lambda folder=folder, record=record: evaluation_section(folder, record))
    page.sections.append(_repeat(found))
    page.left_out = list(found.left_out)
    return page


def _repeat(found: Found) -> Section:
    """What every run was made with: enough to make it again, and to see that it is the same."""
    rows: list[list[Any]] = []
    tables = []
    for folder in found.folders:
        record = folder.config
        ids = [
            guarded(found, folder, lambda f=folder, p=part, k=key: named(f, p, k)) or None
            for part, key in (
                ("model", "name"), ("model", "fingerprint"), ("data", "name"), ("data", "sha256"))
        ]  # fmt: skip
        rows.append(
            [place(folder), folder.kind, *(i and i[:20] for i in ids), record.get("version")]
        )
        settings = record.get("settings") or {}
        lines = [[name, _flat(value)] for name, value in settings.items()]
        lines += [["fingerprint of the weights", ids[1]], ["sha256 of the data", ids[3]]]
        lines += [
            [f"sha256 of {name}", value] for name, value in (record.get("files") or {}).items()
        ]
        lines += [
            [f"sha256 of its {n}", value] for n, value in (record.get("inputs") or {}).items()
        ]
        tables.append(Table(f"Settings of {place(folder)}", ["setting", "value"], lines, True))
    columns = ["run", "command", "model", "weights", "data", "sha256 of the data", "version"]
    words = ["golden run RUN makes a run again from its settings. Hashes are SHA-256."]
    return Section("To repeat it", words, [Table("The runs", columns, rows), *tables])


def _flat(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value[:50])) + (" ..." if len(value) > 50 else "")
    if isinstance(value, Mapping):
        some = [f"{name} {one}" for name, one in list(value.items())[:50]]
        return ", ".join(some) + (" ..." if len(value) > 50 else "")
    return str(value)


def html_of(page: Page, title: str = "") -> str:
    """The page as a file. The same runs give the same text.

    Raises:
        UserError: Plotly is not installed.
    """
    import jinja2

    figures: list[Mapping[str, Any]] = []
    places: dict[int, int] = {}
    for section in page.sections:
        for part in section.parts:
            if isinstance(part, Chart):
                places[id(part)] = len(figures)
                figures.append(dict(part.views))
    around = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    around.filters["shown"] = functools.partial(shown, limit=3000)
    (plotly, its_hash), drawing = _plotly(), _own("page.js")
    return _MARK + around.from_string(_own("page.html")).render(
        title=shown(title or "Layers and edits", 200),
        page=page,
        figures=figures,
        number_of=lambda chart: places[id(chart)],
        is_chart=lambda part: isinstance(part, Chart),
        style=_own("page.css"),
        drawing=drawing,
        plotly=plotly,
        hashes=[_hash(drawing.encode()), its_hash],
    )


def _own(name: str) -> str:
    return resources.files(__name__).joinpath(name).read_text(encoding="utf-8").rstrip("\n")


@functools.cache
def _plotly() -> tuple[str, str]:
    """Plotly's script from its Python package, packed (gzip, base64), and its hash.

    Raises:
        UserError: it is not installed.
    """
    try:
        file = resources.files("plotly").joinpath("package_data", "plotly.min.js")
        script = file.read_bytes()
    except (ModuleNotFoundError, FileNotFoundError) as error:
        raise UserError("plotly is not installed", fix="pip install plotly") from error
    return base64.b64encode(gzip.compress(script, 9, mtime=0)).decode(), _hash(script)


def _hash(script: bytes) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(script).digest()).decode()


def refuse_place(path: Path, *, overwrite: bool) -> None:
    """Refuse a place that is taken, unless it is an earlier report that may be replaced.

    Raises:
        UserError: something stands there.
    """
    fix = "Choose another --out"
    try:
        if not os.path.lexists(path):
            return
        if path.is_symlink() or not path.is_file():
            raise UserError(f"{path} is no file, or a link", fix=fix)
        with reading(path) as file:
            ours = file.read(len(_MARK)) == _MARK.encode()
    except ValueError as error:
        raise UserError(f"{path} cannot be written to ({error})", fix=fix) from error
    if not ours:
        raise UserError(f"{path} is there already, and is no report", fix=fix)
    if not overwrite:
        raise UserError(f"{path} is there already", fix=f"{fix}, or add --overwrite")


def write(paths: Sequence[Path], out: Path, *, title: str = "") -> tuple[Found, Page]:
    """Read the runs at some paths and write the page; returns both.

    Raises:
        UserError: see :func:`find`; the disk is full or cannot be written to.
    """
    found = find(paths)
    page = build(found)
    write_text(out, html_of(page, title))
    return found, page
