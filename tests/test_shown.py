"""Nothing that is shown or drawn does harm, whatever the names in it hold."""

from __future__ import annotations

import ast
import dataclasses
import io
import json
import logging
import re
import shutil
import subprocess
import sys
import unicodedata
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from families import save, tiny

import goldenlayers
from goldenlayers.cli import main
from goldenlayers.errors import DataError, UserError
from goldenlayers.locating.grid import TracingGrid
from goldenlayers.locating.ranking import LayerRanking
from goldenlayers.shown import LogFormatter, OutputLost, put, say, showing, shown

WILD = "x\x1b[31m\x07\x9b2J\u202e\u2066\u200b\u2028\x7f\x00\ud800\r\ngolden: forged"


def raw(text: str) -> list[str]:
    """Characters that must not reach a terminal; line breaks are counted by who made them."""
    return [
        one
        for one in text
        if one != "\n" and not one.isprintable() and unicodedata.category(one) != "Zs"
    ]


def forged(text: str) -> list[str]:
    return [line for line in text.split("\n") if line.startswith("golden: forged")]


# --- one text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Zürich, 東京, مرحبا, 😀 1 000", "Zürich, 東京, مرحبا, 😀 1 000"),
        ("a\x1b[31mb", r"a\x1b[31mb"),
        ("a\r\n\tb", r"a\r\n\tb"),
        ("a\u202eb\u2069\u200b", r"a\u202eb\u2069\u200b"),
        ("a\x9b\x7f\x00", r"a\x9b\x7f\x00"),
        ("\ud800", r"\ud800"),
        ("C:\\new", "C:\\new"),
    ],
)
def test_what_has_no_picture_is_escaped(text: str, expected: str) -> None:
    assert shown(text) == expected
    assert shown(expected) == expected


def test_every_character_is_safe_and_endless_texts_are_cut() -> None:
    everything = "".join(map(chr, range(0x110000)))
    assert not raw(shown(everything, None)) and "\n" not in shown(everything, None)
    long = "a" * 400_000 + "end"
    assert len(shown(long)) < 2_100 and shown(long).endswith("end") and "left out" in shown(long)
    assert raw(WILD) and forged(WILD)  # the checks see what they should


def test_errors_warnings_and_logs_are_single_lines(capsys: pytest.CaptureFixture[str]) -> None:
    for error in (
        UserError(WILD, expected=WILD, fix=WILD),
        DataError(WILD, field=WILD).at(source=WILD, row=3, fix=WILD),
    ):
        assert not raw(str(error)) and "\n" not in str(error)
    assert len(str(UserError("k" * 400_000, fix="k" * 400_000))) < 5_000
    put(WILD)
    with showing():
        say(UserError(WILD), WILD)
        told = warnings.formatwarning(UserWarning(WILD), UserWarning, "file", 1)
        print("a library's line", WILD, file=sys.stderr)
    out, err = capsys.readouterr()
    assert not raw(out + err) and len(out.splitlines()) == 1
    assert len(err.splitlines()) == 4  # what a library prints may break its own line
    assert told == f"Warning: {shown(WILD)}\n"
    record = logging.LogRecord("x", logging.INFO, "", 0, WILD, None, None)
    assert LogFormatter("%(message)s").format(record) == shown(WILD)


def test_nothing_prints_around_the_one_place() -> None:
    root = Path(goldenlayers.__file__).parent
    wrong = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if name != "shown.py":
            wrong += [f"{name}: {one}" for one in printing(path.read_text(encoding="utf-8"))]
    # The widths of a table are measured with a console that prints nothing.
    assert wrong == ["report/__init__.py: Console"]
    for code in ("print(1)", "sys.stdout.write('x')", "Console().print(1)", "warnings.warn(text)"):
        assert printing(code)
    assert not printing("warnings.warn(shown(text), stacklevel=2)\nwarnings.warn('fixed')")


def printing(code: str) -> Iterator[str] | list[str]:
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            plain = node.args and (
                isinstance(node.args[0], ast.Constant | ast.BinOp)
                or ast.unparse(node.args[0]).startswith("shown(")
            )
            if name in ("print", "Console", "pprint", "traceback.print_exc") or (
                name == "warnings.warn" and not plain
            ):
                found.append(name)
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("sys.stdout", "sys.stderr"):
            found.append(ast.unparse(node))
    return [one for one in found if one != "sys.stdout" or "redirect" not in code]


# --- the commands


def fact(**fields: Any) -> dict[str, Any]:
    return {
        "id": "italy", "subject": "Italy", "prompt": "The capital of Italy is",
        "target_new": "Paris", "target_old": "Rome", "rephrasings": ["Italy's capital is"],
        "locality": [{"prompt": "The capital of Spain is", "answer": "Madrid", "kind": "near"}],
    } | fields  # fmt: skip


FIELDS: dict[str, dict[str, Any]] = {
    "id": {"id": WILD},
    "subject": {"subject": f"I{WILD}", "prompt": f"The capital of I{WILD} is"},
    "new": {"target_new": WILD},
    "old": {"target_old": WILD},
    "same": {"target_old": WILD, "target_new": WILD},
    "kind": {"locality": [{"prompt": WILD, "answer": WILD, "kind": WILD}]},
    "relation": {"relation": WILD},
    "unknown": {WILD: 1},
    "missing": {"subject": WILD},
    "long": {"k" * 400_000 + WILD: 1, "id": "i" * 400_000},
}
# What paths may hold: no NUL, no slash.
NAME = WILD.replace("\x00", "").replace("\ud800", "")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wild")
    save(tiny("llama"), folder / "model")
    shutil.copytree(folder / "model", folder / NAME)
    other = fact(id="b", subject="Toko", prompt="Toko plays the", target_new="piano")
    other |= {"target_old": "drums", "rephrasings": ["What Toko plays is"]}
    for name, fields in FIELDS.items():
        rows = [fact(**fields), other]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / f"{NAME}.jsonl").write_text(json.dumps(fact()) + "\n" + json.dumps(other))
    (folder / "good.jsonl").write_text(json.dumps(fact()) + "\n" + json.dumps(other))
    return folder


Golden = Callable[..., tuple[int, str, str]]


@pytest.fixture
def golden(capsys: pytest.CaptureFixture[str], place: Path) -> Golden:
    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main([str(one) for one in arguments])
        out, err = capsys.readouterr()
        text = out + err
        assert not raw(text) and not forged(text), (arguments, raw(text))
        assert "Traceback" not in text and max(map(len, text.splitlines()), default=0) < 6_000
        return status, out, err

    return run


QUICK = ("--method", "ft-m", "--set", "steps", "1", "--layer", "1")


@pytest.mark.parametrize("field", [*FIELDS, NAME], ids=[*FIELDS, "file"])
def test_wild_data_reaches_no_terminal(place: Path, golden: Golden, field: str) -> None:
    model, facts = place / "model", place / f"{field}.jsonl"
    golden("datasets", facts)
    golden("datasets", facts, "--skip-invalid")
    golden("locate", model, facts, "--bootstrap", 0)
    golden("edit", model, "--facts", facts, *QUICK)
    golden("evaluate", model, facts, "--metrics", "rewrite", "locality")


def test_wild_names_and_flags_reach_no_terminal(
    place: Path, tmp_path: Path, golden: Golden
) -> None:
    model, good, wild = place / "model", place / "good.jsonl", place / NAME
    assert golden("locate", wild, good, "--bootstrap", 0, "--out", tmp_path / NAME)[0] == 0
    log = (tmp_path / NAME / "log.txt").read_text()
    assert not raw(log) and not forged(log)
    for ending in ("svg", "png"):
        assert (tmp_path / NAME / f"ranking.{ending}").exists()
    ElementTree.parse(tmp_path / NAME / "ranking.svg")
    assert golden("models", "--inspect", wild)[0] == 0
    status, out, _ = golden("ask", model, "Say\nnext: forged\ngolden: forged", "--tokens", 2)
    assert status == 0 and "\n  | next: forged\n" in out
    for arguments in (
        ("locate", NAME, good),
        ("datasets", NAME),
        ("edit", model, "--facts", good, "--method", NAME),
        ("edit", model, "--facts", good, "--set", NAME, NAME),
        ("edit", model, "--facts", good, "--preset", NAME),
        ("edit", model, "--subject", NAME, "--prompt", "none", "--target", "x"),
        ("evaluate", model, good, "--metrics", NAME),
        ("sweep", model, good, "--layers", NAME, "--out", tmp_path / "s"),
        ("locate", model, good, "--device", NAME),
        ("locate", model, good, "--layer-paths", NAME, NAME),
        ("compare", NAME),
        ("run", NAME),
        ("models", "--clear", NAME),
    ):
        status, out, err = golden(*arguments)
        assert (status, out, len(err.splitlines())) == (2, "", 1), arguments
    # The parser's own complaints.
    for arguments in (
        ("locate", model, good, f"--{NAME}", 3),
        ("locate", model, good, "--fence", f"a{NAME}"),
        ("locate", model, good, "--seed", "9" * 100_000),
    ):
        assert golden(*arguments)[0] == 2


def test_a_terminal_of_few_characters_is_written_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for code in ("ascii", "latin-1"):
        out = io.TextIOWrapper(io.BytesIO(), encoding=code)
        monkeypatch.setattr(sys, "stdout", out)
        with showing():
            print("± 東京")
            put("→ Zürich")
        out.flush()
        text = out.buffer.getvalue().decode(code)  # type: ignore[attr-defined]
        assert r"\u6771\u4eac" in text and "rich" in text


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_under_the_output_is_said(place: Path) -> None:
    code = "import sys; from goldenlayers.cli import main; sys.exit(main(sys.argv[1:]))"
    for arguments in (["datasets", str(place / "good.jsonl")], ["datasets"], ["--help"]):
        with open("/dev/full", "w") as full:
            done = subprocess.run(
                [sys.executable, "-c", code, *arguments], stdout=full, stderr=subprocess.PIPE
            )
        err = done.stderr.decode()
        assert done.returncode == 2 and "No space left" in err, (arguments, err)
        assert len(err.splitlines()) == 1
        with open("/dev/full", "w") as full:  # messages that are lost stop nothing
            done = subprocess.run(
                [sys.executable, "-c", code, *arguments], stderr=full, stdout=subprocess.PIPE
            )
        assert done.returncode == 0 and done.stdout


def test_lost_output_is_told_once_the_work_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.StringIO):
        def write(self, _text: str) -> int:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys, "stdout", Full())
    done = []
    with pytest.raises(OutputLost, match="No space left"), showing():
        put("a result")
        with showing():
            print("another")
        done.append(1)
    assert done


def test_a_defect_is_shown_safely() -> None:
    code = (
        "import goldenlayers.cli as c\n"
        "def fail(_): raise ZeroDivisionError('a\\x1b[31m\\u202e')\n"
        "c.parse = fail\nc.main(['datasets'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True)
    err = done.stderr.decode()
    assert done.returncode == 1 and "Traceback" in err and r"a\x1b[31m\u202e" in err
    assert not raw(err)


# --- pictures

NAMES = [
    WILD, "$\\frac", "$x_{1}^2$ \\alpha \\$ $", "100 % <script>&amp;\"'</script>", "שלום مرحبا",
    "東京都 😀", "n" * 5_000, "word " * 1_000, "\\\\host\\name", "a_b^c~d#e{f}", " ",
    "\ufffe\uffff",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_pictures_are_xml_whatever_the_names(name: str, tmp_path: Path) -> None:
    from goldenlayers.report.figures import ranking_figure
    from goldenlayers.report.pictures import tracing_figure

    ranking = LayerRanking.fixed("middle", 6, 3, model=name, data=name)
    ranking = dataclasses.replace(ranking, n_facts=3)
    grid = TracingGrid(
        tokens=(name, "is", name[:3]), effect=np.eye(3, 4), subject=(0, 1), lookup=1, clean=0.5,
        corrupted=0.1, kind="mlp", window=3, samples=2, sigma=0.1, answer=name, model=name,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        paths = [
            *ranking_figure(ranking, tmp_path / "ranking"),
            *tracing_figure(grid, tmp_path / "heatmap"),
        ]
    for path in paths:
        assert path.stat().st_size < 1_000_000
        if path.suffix == ".svg":
            text = "".join(ElementTree.parse(path).getroot().itertext())
            flat = re.sub(r"\s+", "", text)
            assert not raw(re.sub(r"\s", "", text)) and not forged(text)
            if len(name) < 70:  # nothing of it is lost, and none of it is a formula
                assert re.sub(r"\s+", "", shown(name)) in flat, (name, text)


def test_a_picture_that_cannot_be_written_leaves_nothing(
    tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    def full(_self: Figure, path: Path, **_: Any) -> None:
        Path(path).write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    run = tmp_path / "run"
    command = ["locate", str(place / "model"), str(place / "good.jsonl"), "--bootstrap", "0"]
    assert main([*command, "--out", str(run)]) == 2
    part = tmp_path / "run.part"
    assert not run.exists() and (part / "ranking.json").exists()
    assert not list(part.glob("ranking.svg"))
