"""Every command and example of the pages runs, on tiny stand-ins and with less of everything."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from doc_examples import ROOT, Block, Workshop, blocks_of, parsed, workshop

PAGES = [
    ROOT / "README.md",
    *(page for part in ("", "howto", "results") for page in sorted((ROOT / "docs" / part).glob("*.md"))),
    *sorted((ROOT / "docs/notebooks").glob("*.ipynb")),
]
# What the pages of results ran was of its day, and took hours.
RESULTS = [page for page in PAGES if page.parent.name == "results"]
# test_extending.py installs what that page describes, and runs it.
RUN = [page for page in PAGES if page not in RESULTS and page.name != "extending.md"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    with workshop(tmp_path_factory.mktemp("docs")) as found:
        yield found


@pytest.mark.parametrize("page", RUN, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_shows_runs(page: Path, place: Workshop) -> None:
    names: dict[str, Any] = {}
    for block in blocks_of(page):
        place.run(block, names)


@pytest.mark.parametrize("page", RESULTS, ids=lambda page: page.name)
def test_commands_of_results_are_understood(page: Path) -> None:
    for block in blocks_of(page):
        for arguments in block.commands():
            parsed(arguments)
