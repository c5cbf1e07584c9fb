"""The help: grouped, free of noise, in any terminal, with examples that are right."""

from __future__ import annotations

import ast
import dataclasses
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from goldenlayers.cli import main, parse
from goldenlayers.commands import COMMANDS, GROUPS, options_of
from goldenlayers.commands.listings import field_texts
from goldenlayers.commands.options import ModelOptions, flag, marks_of

NOISE = ("{None}", "None", "(default: )", "False", "True", "STR", "INT", "\x1b", "dataclass")


def help_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out.splitlines()


@pytest.mark.parametrize("width", [80, 100, 200])
@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_all_there_is_without_noise(
    command: str, width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    short = help_of(capsys, command, "--help")
    whole = help_of(capsys, command, "--help-all")
    assert help_of(capsys, command, "somewhere", "-h") == short
    assert set(short) - set(whole) <= {f"More options: golden {command} --help-all"}
    for line in whole:
        assert line.isascii() and not [noise for noise in NOISE if noise in line], line
        # An example is one line, to be copied.
        assert len(line) <= min(width, 100) or line.startswith("  golden "), line
    text = "\n".join(whole)
    for f in dataclasses.fields(options_of(command)):
        shown = re.search(rf"^  {flag(f.name.rstrip('_'))}( |$)", text, re.M) is not None
        marks = [str(mark) for mark in marks_of(options_of(command))[f.name]]
        assert shown != ("Positional" in marks or "Suppress" in marks), f.name
    assert len(short) < 72


def test_options_stand_under_headings_the_common_ones_first(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = help_of(capsys, "locate", "--help-all")
    headings = [line for line in lines if re.fullmatch(r"[A-Z].*:", line)]
    assert [one.split()[0].strip(":") for one in headings] == [
        "Method", "Facts", "Output", "Race", "Model", "More", "Examples"
    ]  # fmt: skip

    def place(text: str) -> int:
        (found,) = [i for i, line in enumerate(lines) if line.startswith(text)]
        return found

    order = ["  MODEL", "Method:", "  --method", "Facts:", "  --limit", "Output:", "  --out"]
    order += ["Race", "Model:", "  --dtype", "More options:", "  --cache-dir", "Examples:"]
    assert sorted(map(place, order)) == list(map(place, order))
    short = "\n".join(help_of(capsys, "locate", "--help"))
    assert "--cache-dir" not in short and "--kappa" not in short and "--limit N " in short
    assert lines[0] == "usage: golden locate MODEL [DATA] [OPTIONS]"
    usage = "usage: golden export RUN ... --out PATH [OPTIONS]"
    assert help_of(capsys, "export", "-h")[0] == usage


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_are_understood(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    lines = help_of(capsys, command, "--help")
    examples = lines[lines.index("Examples:") + 1 :]
    assert len(examples) == 2 and f"golden {command}" in examples[0]
    for line in examples:
        golden, *arguments = shlex.split(line)
        assert golden == "golden" and parse(arguments) is not None


def test_the_overview_has_a_line_for_every_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = help_of(capsys, "--help")
    assert lines == help_of(capsys) and max(map(len, lines)) <= 80
    for heading, commands in GROUPS.items():
        start = lines.index(f"{heading}:") + 1
        there = [line.split()[0] for line in lines[start : start + len(commands)]]
        assert there == list(commands)


def test_completion_knows_commands_options_and_values(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["--completion", "csh"]) == 2
    assert "bash, zsh, fish" in capsys.readouterr().err
    script = "\n".join(help_of(capsys, "--completion", "bash"))
    (line,) = [one for one in script.split("\n") if one.startswith("COMPLETION_SPEC = ")]
    spec = ast.literal_eval(line.removeprefix("COMPLETION_SPEC = "))
    assert set(spec["subcommands"]) == set(COMMANDS)
    options = {flag: one for one in spec["subcommands"]["edit"]["options"] for flag in one["flags"]}
    assert {"--subject", "--layer", "--json", "--quiet"} <= set(options)
    assert options["--mode"]["choices"] == ["auto", "batch", "sequential"]
    if bash := shutil.which("bash"):
        (tmp_path / "golden").write_text(script, "utf-8")
        asked = "source golden; COMP_WORDS=(golden edit --meth); COMP_CWORD=2; _tyro_golden; "
        ask = [bash, "-c", asked + 'echo "${COMPREPLY[@]}"']
        done = subprocess.run(ask, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert done.stdout.split() == ["--method"]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["locate", "m", "--limmit", "3"], ["--limmit", "Did you mean --limit?"]),
        (["locate", "m", "--scope", "mpl"], ["mpl", "--scope", "'down'"]),
        (["locate", "m", "--seed", "x"], ["--seed", "'x'"]),
        (["locate", "m", "--seed"], ["--seed", "Missing value"]),
        (["locate", "m", "facts", "more"], ["more"]),
        (["ask"], ["MODEL"]),
        (["export", "run"], ["--out"]),
        (["edit", "m", "--set", "steps"], ["--set", "pairs"]),
        (["ask", "m", "x", "--tokens", "\x1b[31m\n──── │"], ["--tokens"]),
    ],
)
@pytest.mark.parametrize("width", ["30", "200"])
def test_a_wrong_flag_is_one_line_that_names_the_help(
    arguments: list[str],
    parts: list[str],
    width: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", width)
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("golden: ") and err.count("\n") == 1
    assert err.endswith(f"See golden {arguments[0]} --help.\n")
    assert all(part in err for part in parts) and "Seed of every" not in err, err


def test_help_in_a_terminal_that_knows_only_ascii() -> None:
    env = {**os.environ, "LC_ALL": "C", "PYTHONIOENCODING": "ascii", "COLUMNS": "80"}
    code = "import sys; from goldenlayers.cli import main; sys.exit(main(sys.argv[1:]))"
    for arguments, status in (["--help"], 0), (["locate", "--help-all"], 0), (["locate"], 2):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, env=env
        )
        assert done.returncode == status
        assert (done.stdout + done.stderr).isascii() and b"\\x" not in done.stdout + done.stderr


def test_texts_of_fields_come_from_the_source() -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Mine(ModelOptions):
        depth: int = 1
        """How
        deep."""

        bare: int = 2

        def method(self) -> None:
            """No field."""

    assert field_texts(Mine)["depth"] == "How deep."
    assert field_texts(Mine)["device"].startswith("cpu, cuda")
    assert "bare" not in field_texts(Mine) and "method" not in field_texts(Mine)
