"""Whatever stands in a run folder, reading it ends in a result or in a UserError."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from comparing import sweep_rows
from run_mutations import (
    as_of_an_earlier_version,
    compared,
    counted,
    rerun,
    resumed,
    scores,
    some_compared,
    some_runs,
    some_unfinished,
)

from goldenlayers.cli import main
from goldenlayers.store import RunFolder


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


def test_rows_that_are_not_in_the_plan_are_set_aside_and_not_counted(
    place: Path, runs: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    place = place / "plan"
    commands = some_unfinished(place)
    for name in ("sweep", "evaluate"):
        part = place / f"{name}.part"
        as_of_an_earlier_version(part)  # without checks: what is left is the plan
        file = part / "scores.jsonl"
        good = [json.loads(line) for line in file.read_text().splitlines()]
        odd = [
            {**good[0], "probe": 99},
            {**good[0], "fact": "nobody"},
            {**good[0], "metric": "portability"},
            {**good[0], "score": 100.5},
            {**good[0], "score": "100"},
            {**good[0], "kind": "other"},
            {**good[0], "layer": 7},
            good[1],
        ]
        file.write_text("".join(json.dumps(row) + "\n" for row in [*odd[:-1], *good, odd[-1]]))
        shutil.move(part, place / f"{name}-again.part")
        assert main([str(a) for a in (*commands[name], "--out", place / f"{name}-again")]) == 0
        assert scores(place / f"{name}-again") == scores(place / f"{name}-whole")
        said = capsys.readouterr().err
        assert said.count("were set aside") == 1 and f"{len(odd)} of the" in said


def test_rows_that_contradict_a_finished_run_are_an_error_with_file_and_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    some_compared(tmp_path)
    rows = sweep_rows(0, n_facts=4)
    cases: list[tuple[str, str, Any, str]] = [
        ("one", "scores.jsonl", [*rows, rows[0]], "row 57: it is there twice"),
        ("one", "scores.jsonl", [{**rows[0], "score": 101}, *rows[1:]], "row 1: 'score' is 101"),
        ("one", "scores.jsonl", [*rows[:-1], {**rows[-1], "layer": 40}], "rows for"),
        ("two", "scores.jsonl", rows[:-1], "55 rows for 8 probes at 7 layers"),
        ("two", "scores.jsonl", [{**rows[0], "layer": None}, *rows[1:]], "row 1: 'layer' is None"),
        ("lga", "per_fact.jsonl", [{"fact": "a", "phi": [1] * 6}], "row 1: 'phi' is not a list"),
        ("lga", "per_fact.jsonl", [{"fact": "a", "phi": ["1"] * 7}], "row 1: 'phi' holds '1'"),
    ]
    for run, file, value, said in cases:
        case = tmp_path / "case"
        shutil.rmtree(case, ignore_errors=True)
        for name in ("one", "two", "lga"):
            shutil.copytree(tmp_path / name, case / name)
            as_of_an_earlier_version(case / name)
        (case / run / file).write_text("".join(json.dumps(row) + "\n" for row in value))
        command = ("compare", case / "one", "--with", case / "two", case / "lga")
        assert main([str(a) for a in command]) == 2
        error = capsys.readouterr().err
        assert str(case / run / file) in error and said in error, error
    for name in ("one", "two", "lga"):  # the control
        as_of_an_earlier_version(tmp_path / name)
    command = ("compare", tmp_path / "one", "--with", tmp_path / "two", tmp_path / "lga")
    assert main([str(a) for a in command]) == 0


@pytest.mark.parametrize(
    "name", ["locate", "evaluate", "edit", "sweep", "compare", "ask", "export", "run"]
)
def test_ctrl_c_ends_a_command_with_status_130(
    place: Path, runs: list[Path], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    import transformers

    def stop(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    holder, call = {
        "export": (transformers.PreTrainedModel, "save_pretrained"),
        "compare": (RunFolder, "finish"),
        "run": (RunFolder, "finish"),
    }.get(name, (torch.nn.Module, "__call__"))
    monkeypatch.setattr(holder, call, stop)
    where = (place / "model", place / "facts.jsonl")
    short = ("--method", "ft-m", "--set", "steps", 1, "--layer", 1)
    arguments = {
        "locate": where,
        "evaluate": (*where, *short),
        "edit": (where[0], "--facts", where[1], *short),
        "sweep": (*where, *short[:5]),
        "compare": (place / "sweep", "--sizes", 2, "--repeats", 2),
        "ask": (where[0], "The capital of"),
        "export": (place / "edit", "--to", "merged"),
        "run": (place / "locate",),
    }[name]
    out = () if name == "ask" else ("--out", place / "stopped" / name)
    assert main([str(a) for a in (name, *arguments, *out)]) == 130
    assert not (place / "stopped" / name).exists()


def test_damaged_unfinished_runs_end_as_undamaged_ones_or_are_refused(
    place: Path, runs: list[Path]
) -> None:
    commands = some_unfinished(place / "unfinished")
    ends = counted(7, lambda rng: resumed(place / "unfinished", commands, rng), "gone on with")
    assert ends["done"] and ends["refused"] and ends.total() == ends["done"] + ends["refused"], ends
