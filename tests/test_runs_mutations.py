"""Whatever stands in a run folder, reading it ends in a result or in a UserError."""

from __future__ import annotations

from pathlib import Path

import pytest
from run_mutations import (
    compared,
    counted,
    rerun,
    resumed,
    some_compared,
    some_runs,
    some_unfinished,
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mutations")


@pytest.fixture(scope="module")
def runs(place: Path) -> list[Path]:
    return some_runs(place)


def test_damaged_configs_are_repeated_or_refused(place: Path, runs: list[Path]) -> None:
    ends = counted(25, lambda rng: rerun(place, runs, rng), "golden run")
    assert ends["done"] and ends["refused"] and ends.total() == ends["done"] + ends["refused"], ends


def test_damaged_folders_are_compared_or_refused(place: Path) -> None:
    some_compared(place / "compared")
    ends = counted(40, lambda rng: compared(place / "compared", rng), "golden compare")
    assert ends["done"] and ends["refused"] and ends.total() == ends["done"] + ends["refused"], ends


def test_damaged_unfinished_runs_end_as_undamaged_ones_or_are_refused(
    place: Path, runs: list[Path]
) -> None:
    commands = some_unfinished(place)
    ends = counted(7, lambda rng: resumed(place, commands, rng), "gone on with")
    assert ends["done"] and ends["refused"] and ends.total() == ends["done"] + ends["refused"], ends
