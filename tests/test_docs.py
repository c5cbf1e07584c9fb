"""Every command and example of the pages runs, on tiny stand-ins and with less of everything."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from doc_examples import ROOT, Workshop, blocks_of, parsed, workshop

from goldenlayers.errors import UserError

PAGES = [
    ROOT / "README.md",
    *(
        page
        for part in ("*.md", "howto/*.md", "results/*.md", "notebooks/*.ipynb")
        for page in sorted((ROOT / "docs").glob(part))
    ),
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


def test_few_examples_are_not_run_and_each_says_why() -> None:
    left = [block for page in RUN for block in blocks_of(page) if block.mark == "not run"]
    assert len(left) <= 5
    assert all(re.match(r"needs (a GPU|the hub|a Ray cluster)$", block.said) for block in left)


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("    golden locate smollm2-135m --limmit 3\n", "limmit"),
        ("    golden ask smollm2-135m hello --delta runs/nowhere\n", "nowhere"),
        ("<!-- not run: needs the hub -->\n\n    golden locate smollm2-135m --kapa 1\n", "kapa"),
        ("```python\nimport goldenlayers as gl\ngl.load('no-model')\n```\n", "no-model"),
    ],
)
def test_control_a_wrong_example_is_noticed(
    text: str, wrong: str, place: Workshop, tmp_path: Path
) -> None:
    page = tmp_path / "page.md"
    page.write_text(text, "utf-8")
    (block,) = blocks_of(page)
    with pytest.raises((AssertionError, UserError), match=wrong):
        place.run(block, {})
