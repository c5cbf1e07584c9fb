"""Finished work is kept whatever happens to those who read the output: closed pipes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from families import save, tiny
from sweep_helpers import some_facts, write_plain

from goldenlayers.cli import main
from goldenlayers.shown import say, showing
from goldenlayers.store import RunFolder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, facts, and a finished sweep."""
    folder = tmp_path_factory.mktemp("showing")
    save(tiny("llama"), folder / "model")
    write_plain(folder / "facts.jsonl", some_facts(3))
    assert main([*COMMANDS["sweep"](folder), "--out", str(folder / "swept")]) == 0
    return folder


def on_facts(command: str, *more: str) -> Callable[[Path], list[str]]:
    def made(place: Path) -> list[str]:
        facts = [str(place / "facts.jsonl")]
        facts = ["--facts", *facts] if command == "edit" else facts
        return [command, str(place / "model"), *facts, *more]

    return made


QUICK = ("--method", "ft-m", "--set", "steps", "1")
COMMANDS: dict[str, Callable[[Path], list[str]]] = {
    "locate": on_facts("locate", "--bootstrap", "0"),
    "evaluate": on_facts("evaluate", "--metrics", "rewrite"),
    "edit": on_facts("edit", *QUICK, "--layer", "1"),
    "sweep": on_facts("sweep", *QUICK, "--layers", "0-1"),
    "compare": lambda place: ["compare", str(place / "swept"), "--repeats", "2"],
}


@contextmanager
def nobody_reads(monkeypatch: pytest.MonkeyPatch, name: str) -> Iterator[None]:
    """Standard output or error is a pipe whose reader is gone."""
    reader, writer = os.pipe()
    os.close(reader)
    stream = open(writer, "w", encoding="utf-8")  # noqa: SIM115
    with monkeypatch.context() as patch:
        patch.setattr(sys, name, stream)
        yield
    with suppress(BrokenPipeError):  # where the block left something in the buffer
        stream.close()


@pytest.mark.parametrize("name", COMMANDS)
def test_a_closed_pipe_loses_no_finished_work(
    place: Path,
    tmp_path: Path,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = [*COMMANDS[name](place), "--out", str(tmp_path / "run")]
    with nobody_reads(monkeypatch, "stdout"):
        assert main(command) == 0
    assert RunFolder.open(tmp_path / "run").kind == name
    said = capsys.readouterr().err
    assert str(tmp_path / "run") in said and "golden:" not in said


@pytest.mark.parametrize("name", ["locate", "sweep"])
def test_messages_that_nobody_reads_do_not_stop_the_work(
    place: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [*COMMANDS[name](place), "--out", str(tmp_path / "run")]
    with nobody_reads(monkeypatch, "stderr"), nobody_reads(monkeypatch, "stdout"):
        assert main(command) == 0
        say("still here")
    assert RunFolder.open(tmp_path / "run").kind == name


def test_the_pipe_of_the_tests_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    with nobody_reads(monkeypatch, "stdout"), pytest.raises(BrokenPipeError):
        print("x", flush=True)
    # Only a closed pipe is passed over: not what ends the program for another reason.
    for stop in (SystemExit(3), ValueError("a defect")):
        with pytest.raises(type(stop)), showing():
            raise stop


def test_an_exit_with_a_closed_pipe_is_quiet() -> None:
    code = "import sys; from goldenlayers.cli import main; sys.exit(main(sys.argv[1:]))"
    for arguments in (["datasets", "--schema"], ["datasets"], ["--help"]):
        reader, writer = os.pipe()
        os.close(reader)
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], stdout=writer, stderr=subprocess.PIPE
        )
        os.close(writer)
        assert (done.returncode, done.stderr) == (0, b""), arguments
