"""What all tests share: tiny models of every family, one environment, a line on what is skipped."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from goldenlayers.models import Model

# Whatever terminal and user run the tests: what is printed does not depend on them.
TERMINAL = {"COLUMNS": "120", "LINES": "40", "TERM": "xterm"}
UNSET = (
    "CLICOLOR",
    "CLICOLOR_FORCE",
    "COLORTERM",
    "FORCE_COLOR",
    "NO_COLOR",
    "PY_COLORS",
    "TTY_COMPATIBLE",
    "TTY_INTERACTIVE",
)


def pytest_configure(config: pytest.Config) -> None:
    """The caches that libraries look for when they are imported: new ones, gone at the end."""
    if not hasattr(config, "workerinput"):  # xdist's workers inherit them
        place = tempfile.TemporaryDirectory(prefix="goldenlayers-", ignore_cleanup_errors=True)
        config.add_cleanup(place.cleanup)
        os.environ.update(HF_HOME=place.name, MPLCONFIGDIR=place.name)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that asks for ``family``, and names none itself, runs once for every tiny model."""
    named = any(
        "family" in mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")
    )
    if "family" in metafunc.fixturenames and not named:
        from families import FAMILIES

        metafunc.parametrize("family", list(FAMILIES))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line names the skipped tests: how many of which file, and why."""
    why: dict[str, Counter[str]] = {}
    for report in terminalreporter.stats.get("skipped", []):
        reason = str(report.longrepr[2]).removeprefix("Skipped: ")
        file, _, test = report.nodeid.partition("::")
        why.setdefault(reason, Counter())[Path(file).stem] += 1 if test else 0
    parts = [
        ", ".join(f"{file} {n or 'whole'}" for file, n in sorted(files.items())) + f" ({reason})"
        for reason, files in why.items()
    ]
    if parts:
        terminalreporter.write_line("Skipped: " + "; ".join(parts))


@pytest.fixture(scope="session", autouse=True)
def _environment(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """The same terminal everywhere, and a cache of our own; real weights lie in the user's."""
    with pytest.MonkeyPatch.context() as patch:
        for name in UNSET:
            patch.delenv(name, raising=False)
        for name, value in TERMINAL.items():
            patch.setenv(name, value)
        if not any(item.get_closest_marker("real") for item in request.session.items):
            patch.setenv("GOLDENLAYERS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def tiny_model() -> Callable[..., Model]:
    """``tiny_model(name, tokenizer=..., dtype=...)``: a private tiny model with its tokenizer."""
    from families import tiny

    return tiny
