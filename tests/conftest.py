"""Fixtures shared by all tests: tiny models of every family, and the project's shared data."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from goldenlayers.models.model import Model


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that asks for ``family``, and names none itself, runs once for every tiny model."""
    named = any(
        "family" in mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")
    )
    if "family" in metafunc.fixturenames and not named:
        from families import FAMILIES

        metafunc.parametrize("family", list(FAMILIES))


@pytest.fixture
def tiny_model() -> Callable[..., Model]:
    """``tiny_model(name, tokenizer=..., dtype=...)``: a private tiny model with its tokenizer."""
    from families import tiny

    return tiny


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of shared data beside the repository; tests that need it skip without it."""
    given = os.environ.get("GOLDENLAYERS_SHARED")
    root = Path(given) if given else Path(__file__).resolve().parents[2] / "shared"
    for folder in (root / "data", root):
        if (folder / "counterfact").is_dir():
            return folder
    pytest.skip("shared data not present (set GOLDENLAYERS_SHARED to its folder)")
