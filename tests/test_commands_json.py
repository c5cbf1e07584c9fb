"""Every command with ``--json`` and ``--quiet``: one strict object, and nothing else shown."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import yaml
from families import save, tiny
from sweep_helpers import some_facts, write_plain

import goldenlayers as gl
from goldenlayers.cli import main, parse
from goldenlayers.commands import COMMANDS, listings
from goldenlayers.records import json_line
from goldenlayers.shown import put, result, say, showing, warn

FAST = ("--method", "ft-m", "--set", "steps", "60", "ft_lr", "0.1")
STUDY: dict[str, Any] = {
    "models": ["model"],
    "data": ["facts.jsonl"],
    "editors": ["ft-m"],
    "settings": {"steps": 1},
    "facts": {"test": 3, "proxy": 1},
    "methods": ["middle"],
    "layers": [1],
}
# Command → its arguments, and the keys that docs/json.md promises.
CALLS: dict[str, tuple[Callable[[Path], list[Any]], set[str]]] = {
    "locate": (
        lambda p: [p / "model", p / "facts.jsonl", "--bootstrap", 0],
        {"golden_layer", "candidates", "layers", "method", "n_facts", "out"},
    ),
    "sweep": (
        lambda p: [p / "model", p / "facts.jsonl", *FAST, "--layers", "0-1", "--out", p / "new"],
        {"metrics", "layers", "method", "n_facts", "seconds_per_cell", "out"},
    ),
    "compare": (
        lambda p: [p / "swept", "--repeats", 2, "--sizes", 1],
        {"golden_layer", "choices", "metric", "sweep", "out"},
    ),
    "study": (lambda p: [p / "study.yaml", "--out", p / "studied"], {"means", "left", "out"}),
    "edit": (
        lambda p: [p / "model", "--facts", p / "facts.jsonl", *FAST, "--layer", 1],
        {"model", "method", "layer", "facts", "took", "dropped", "changes", "out", "tried"},
    ),
    "ask": (
        lambda p: [p / "model", "The capital of Italy is", "--delta", p / "edited"],
        {"model", "prompts"},
    ),
    "export": (lambda p: [p / "edited", "--rank", 2, "--out", p / "peft"], {"to", "out", "rank"}),
    "evaluate": (
        lambda p: [p / "model", p / "facts.jsonl", "--metrics", "rewrite"],
        {"metrics", "method", "mode", "layer", "n_facts", "data", "out"},
    ),
    "report": (lambda p: [p / "swept", "--out", p / "a.html"], {"out", "runs", "left_out"}),
    "run": (lambda p: [p / "edited", "--out", p / "again"], {"repeats", "facts", "took", "out"}),
    "models": (lambda p: ["--inspect", p / "model"], {"model", "fingerprint", "layers", "atlas"}),
    "datasets": (lambda p: [p / "facts.jsonl"], {"name", "sha256", "n_facts", "skipped", "facts"}),
    "editors": (lambda _: [], {"editors", "settings", "presets"}),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, facts, a study's file, and the runs ``edited`` and ``swept``."""
    folder = tmp_path_factory.mktemp("json")
    save(tiny("llama"), folder / "model")
    write_plain(folder / "facts.jsonl", some_facts(4))
    (folder / "study.yaml").write_text(yaml.safe_dump(STUDY))
    facts = ("--facts", folder / "facts.jsonl")
    quiet("edit", folder / "model", *facts, *FAST, "--layer", 1, "--out", folder / "edited")
    swept = ("--layers", "0-1", "--out", folder / "swept")
    quiet("sweep", folder / "model", folder / "facts.jsonl", *FAST, *swept)
    return folder


def quiet(*arguments: object) -> None:
    assert main([*map(str, arguments), "--quiet"]) == 0


def strict(text: str) -> Any:
    """The one object that a text is: no NaN, nothing before it or behind, no half characters."""

    def refuse(name: str) -> NoReturn:
        raise ValueError(name)

    assert text.count("\n") == 1 and text.endswith("\n") and text.isascii() and "\x7f" not in text
    found = json.loads(text, parse_constant=refuse)
    json.dumps(found, ensure_ascii=False).encode()
    return found


def test_every_command_is_called() -> None:
    assert set(CALLS) == set(COMMANDS) - {"studio"}  # which serves until Ctrl-C


@pytest.mark.parametrize("command", CALLS)
def test_json_is_one_object_with_the_documented_keys(
    place: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, keys = CALLS[command]
    words = [command, *map(str, arguments(place)), *(["--overwrite"] * (command == "sweep"))]
    status = main([*words, "--json"])
    out, err = capsys.readouterr()
    found = strict(out)
    assert status == 0, err
    assert found["command"] == command and keys <= set(found), keys - set(found)
    assert isinstance(found["warnings"], list)
    documented = Path("docs/json.md").read_text(encoding="utf-8")
    assert all(f"`{key}`" in documented for key in keys)
    if "out" in keys and found["out"] is not None:
        assert Path(found["out"]).exists()


@pytest.mark.parametrize("command", CALLS)
def test_quiet_says_nothing_where_all_goes_well(
    place: Path, tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(word) for word in CALLS[command][0](place)]
    if "--out" in words:
        out_of = words.index("--out") + 1
        words[out_of] = str(tmp_path / "out") + Path(words[out_of]).suffix
    status = main([command, "--quiet", *words])
    out, err = capsys.readouterr()
    assert (status, err) == (0, "")
    # These write files and have nothing to show.
    assert bool(out) == (command not in ("export", "report"))


def test_errors_are_objects_too_and_still_told(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.jsonl"
    row = {"subject": "Italy", "prompt": "The capital of Italy is", "target_new": "Ulm"}
    bad.write_text(json.dumps(row) + "\n" + json.dumps(row | {"target_new": ""}) + "\n")
    calls: list[tuple[list[str], Any]] = [
        (["datasets", str(bad)], {"source": str(bad), "row": 2, "field": "target_new"}),
        (["edit", str(place / "model")], None),
        (["conjure"], None),
        (["ask", "--tokns", "3"], None),
    ]
    for arguments, where in calls:
        for more in (["--json"], ["--json", "--quiet"]):
            status = main([*arguments, *more])
            out, err = capsys.readouterr()
            found = strict(out)
            assert status == 2 and set(found["error"]) == {"message", "expected", "fix", "where"}
            assert found["error"]["where"] == where and found["command"] == arguments[0]
            assert err.startswith("golden: ") and err.count("\n") == 1
            assert found["error"]["message"].split()[0] in err
        status = main([*arguments, "--quiet"])
        assert capsys.readouterr() == ("", err) and status == 2


@pytest.mark.parametrize(("stop", "status"), [(KeyboardInterrupt(), 130), (OSError("x"), None)])
def test_what_is_stopped_or_defect_has_its_object(
    stop: BaseException,
    status: int | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def stopped(_: listings.EditorsConfig) -> int:
        result(half="a result")
        raise stop

    monkeypatch.setattr(listings, "run_editors", stopped)
    if status is None:
        with pytest.raises(OSError, match="x"):
            main(["editors", "--json"])
    else:
        assert main(["editors", "--json"]) == status
    found = strict(capsys.readouterr().out)
    assert found["error"]["message"] and "half" not in found


def test_all_that_is_printed_leaves_standard_output_to_the_object(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with showing(json=True) as call:
        print("a library's line")
        put("a table")
        say("news")
        warn("a warning")
        warnings.warn("another", stacklevel=1)
        result(a=1)
        call.write(json_line(call.found))
    out, err = capsys.readouterr()
    assert strict(out) == {"a": 1} and call.warnings[0] == "a warning"
    for line in ("a library's line", "a table", "news", "Warning: a warning"):
        assert f"{line}\n" in err
    with showing(json=True, quiet=True) as call:
        print("a library's line")
        say("news")
        warn("a warning")
        call.write(json_line(call.found))
    assert capsys.readouterr() == ("{}\n", "") and call.warnings == ["a warning"]
    result(b=2)  # outside a command it goes nowhere
    assert call.found == {}


def test_wild_values_make_plain_json() -> None:
    wild = {"a": "\x1b[31m\x7f\x9b\u202e\ud800\n😀ü", "b": float("nan"), "c": [float("inf")]}
    found = strict(json_line(wild) + "\n")
    assert found == {"a": "\x1b[31m\x7f\x9b\u202e\ufffd\n😀ü", "b": None, "c": [None]}


def test_the_flags_are_of_the_call_and_of_no_run(place: Path) -> None:
    record = yaml.safe_load((place / "edited" / "config.yaml").read_text())
    assert not {"json", "quiet"} & set(record["settings"])
    # Behind "--" all is the command's own.
    out = subprocess.run(
        [sys.executable, "-m", "goldenlayers.cli", "models", "--json", "--", "--quiet"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert out.returncode == 2 and "--quiet" in strict(out.stdout)["error"]["message"]
    with pytest.raises(gl.UserError):
        parse(["models", "--json"])


def test_in_python_it_is_the_logger_that_is_told(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    say("news")
    warn("a warning")
    assert capsys.readouterr() == ("", "")  # nothing is set up, so nothing is shown
    with caplog.at_level(logging.INFO, "goldenlayers"):
        say("more news", "in two lines")
    told = [(one.levelname, one.getMessage()) for one in caplog.records]
    assert told[-2:] == [("INFO", "more news"), ("INFO", "in two lines")]
    assert ("WARNING", "a warning") in told and ("INFO", "news") not in told
    # Where the program has its own handlers, a command leaves them and the level alone.
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logger = logging.getLogger("goldenlayers")
    logger.addHandler(handler)
    before = list(logger.handlers), logger.level
    try:
        assert main(["editors"]) == 0
        assert (list(logger.handlers), logger.level) == before
    finally:
        logger.removeHandler(handler)
