"""What is a run's and what is not: nothing else is removed, followed or written to."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from disks import room_for

from goldenlayers.errors import UserError
from goldenlayers.runfiles import CONFIG, FILES, place
from goldenlayers.store import RunFolder

SETTINGS = {"command": "sweep", "settings": {"seed": 0}}


def finished(path: Path, value: int = 1, **options: Any) -> Path:
    with RunFolder.create(path, SETTINGS, **options) as run:
        run.append_rows("scores.jsonl", [{"a": value}])
        run.write_json("summary.json", {"value": value})
        return run.finish()


def unfinished(path: Path, config: Any = SETTINGS) -> Path:
    with RunFolder.create(path, config) as run:
        run.append_rows("scores.jsonl", [{"a": 1}])
    return path.with_name(path.name + ".part")


def snapshot(folder: Path) -> dict[str, bytes | str | None]:
    """Everything below a folder: contents, and where links lead."""
    found: dict[str, bytes | str | None] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = os.readlink(path)
        else:
            found[name] = path.read_bytes() if path.is_file() else None
    return found


# --- what may be overwritten ----------------------------------------------------------------------


def test_a_run_names_its_files_and_only_those_are_removed(tmp_path: Path) -> None:
    out = finished(tmp_path / "out")
    record = yaml.safe_load((out / CONFIG).read_text())
    assert sorted(record["files"]) == ["scores.jsonl", "summary.json"]
    finished(out, 2, overwrite=True)
    assert RunFolder.open(out).json("summary.json") == {"value": 2}


@pytest.mark.parametrize(
    "add",
    [
        lambda out: (out / "notes.md").write_text("mine"),
        lambda out: (out / "sweep.svg").write_text("a name that a sweep uses, but mine"),
        lambda out: (out / "ranking.json").write_text("of another command"),
        lambda out: (out / "sub").mkdir(),
        lambda out: (out / ".git").mkdir(),
        lambda out: (out / "times.jsonl").symlink_to("/etc/hostname"),
        lambda out: os.mkfifo(out / "set-aside.txt"),
        lambda out: shutil.copytree(out, out.parent / "c") and shutil.move(out.parent / "c", out),
        lambda out: (out / ".replaced").mkdir(),
        lambda out: (out / ".replaced").symlink_to("/"),
    ],
)
def test_a_run_folder_with_more_in_it_is_not_overwritten(
    tmp_path: Path, add: Callable[[Path], Any]
) -> None:
    out = finished(tmp_path / "out")
    add(out)
    before = {p.name for p in out.iterdir()}
    with pytest.raises(UserError, match="what its run did not write"):
        finished(out, 2, overwrite=True)
    assert {p.name for p in out.iterdir()} == before
    assert RunFolder.open(out).json("summary.json") == {"value": 1}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "command: sweep\n",
        "command: sweep\nversion: 0.1.0\n",
        "command: train\nversion: 0.1.0\nsettings: {}\n",
        "command: [python, train.py]\nmethod: grid\n",
        "command: sweep\nversion: 1\nsettings: {}\n",
        "[" * 3000,
        "a: &a [x, x]\nb: [*a, *a]\n",
        "x: " + "y" * 300_000,
    ],
)
def test_a_config_of_another_program_is_no_proof(tmp_path: Path, text: str) -> None:
    project = tmp_path / "project"
    project.mkdir()
    (project / CONFIG).write_text(text)
    (project / "summary.json").write_text("{}")
    before = snapshot(tmp_path)
    for target in (project, tmp_path / "x"):
        if target.name == "x":
            project.rename(tmp_path / "x.part")
            before = snapshot(tmp_path)
        with pytest.raises(UserError):
            RunFolder.create(target, SETTINGS, overwrite=True)
        assert snapshot(tmp_path) == before


def test_runs_of_earlier_versions_are_known_by_the_names_of_their_files(tmp_path: Path) -> None:
    out = finished(tmp_path / "out")
    record = yaml.safe_load((out / CONFIG).read_text())
    old = {name: record[name] for name in ("version", "command", "settings")}
    (out / CONFIG).write_text(yaml.safe_dump(old))
    assert RunFolder.open(out).rows("scores.jsonl") == [{"a": 1}]
    (out / "grid.json").write_text("no sweep's")
    with pytest.raises(UserError, match=r"did not write: grid\.json"):
        finished(out, 2, overwrite=True)
    (out / "grid.json").unlink()
    finished(out, 2, overwrite=True)


def test_folders_beside_the_run_are_nobodys_business(tmp_path: Path) -> None:
    out = finished(tmp_path / "out")
    for name in ("out.replaced", "out.old", ".out.replaced"):
        shutil.copytree(out, tmp_path / name)
        (tmp_path / name / "thesis.tex").write_text("years of work")
    before = {n: snapshot(tmp_path / n) for n in ("out.replaced", "out.old", ".out.replaced")}
    finished(out, 2, overwrite=True)
    assert {name: snapshot(tmp_path / name) for name in before} == before


def test_an_unfinished_run_of_other_work_is_kept(tmp_path: Path) -> None:
    part = unfinished(tmp_path / "out")
    before = snapshot(part)
    others = [
        {"command": "locate", "settings": {"seed": 0}},
        {"command": "sweep", "settings": {"seed": 1}},
    ]
    for other in others:
        for resume in (True, False):
            with pytest.raises(UserError, match="--overwrite"):
                RunFolder.create(tmp_path / "out", other, resume=resume)
        with pytest.raises(UserError, match="--overwrite"):
            RunFolder.refuse(tmp_path / "out", other)
        assert snapshot(part) == before
    # The same settings on other weights: not to be gone on with, but the same piece of work.
    RunFolder.refuse(tmp_path / "out", SETTINGS | {"model": {"name": "m", "fingerprint": "f"}})
    with RunFolder.create(tmp_path / "out", others[0], overwrite=True) as run:
        assert not run.resumed and run.read_rows("scores.jsonl") == []


@pytest.mark.parametrize("where", ["/", ".", "..", "~", "x.part", "", "a\0b", "b" * 300])
def test_places_that_are_no_run_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    with pytest.raises(UserError):
        RunFolder.create(where, SETTINGS, overwrite=True)
    assert snapshot(tmp_path) == {"here": None, "home": None}


def test_a_link_to_a_run_stays_and_its_target_is_replaced(tmp_path: Path) -> None:
    out = finished(tmp_path / "run-7")
    (tmp_path / "latest").symlink_to("run-7")
    finished(tmp_path / "latest", 2, overwrite=True)
    assert os.readlink(tmp_path / "latest") == "run-7"
    assert RunFolder.open(out).json("summary.json") == {"value": 2}
    assert place(tmp_path / "latest") == out


# --- links, pipes and devices ---------------------------------------------------------------------

ODD_FILES: dict[str, Callable[[Path, Path], Any]] = {
    "link": lambda path, victim: path.symlink_to(victim),
    "dangling link": lambda path, victim: path.symlink_to(victim.parent / "made"),
    "hard link": lambda path, victim: path.hardlink_to(victim),
    "pipe": lambda path, _: os.mkfifo(path),
    "device": lambda path, _: path.symlink_to("/dev/zero"),
    "folder": lambda path, _: path.mkdir(),
}


@pytest.mark.parametrize("odd", ODD_FILES)
def test_odd_files_in_an_unfinished_run_are_refused(tmp_path: Path, odd: str) -> None:
    (tmp_path / "far").mkdir()
    victim = tmp_path / "far" / "victim"
    victim.write_text("precious")
    part = unfinished(tmp_path / "out")
    names = ["scores.jsonl", "log.txt", ".lock", CONFIG, "summary.json", ".config.yaml.tmp"]
    for name in [*names, "times.jsonl", "sweep.png", "set-aside.txt"]:
        kept = part.with_name("kept")
        shutil.copytree(part, kept)
        (part / name).unlink(missing_ok=True)
        ODD_FILES[odd](part / name, victim)
        with pytest.raises(UserError):
            RunFolder.create(tmp_path / "out", SETTINGS, resume=True)
        if odd != "hard link":  # as a file it is the run's own: its name here goes, no more
            with pytest.raises(UserError):
                RunFolder.create(tmp_path / "out", SETTINGS, overwrite=True)
        assert victim.read_text() == "precious" and sorted(p.name for p in victim.parent.iterdir())
        assert [p.name for p in victim.parent.iterdir()] == ["victim"]
        shutil.rmtree(part)
        kept.rename(part)
    with RunFolder.create(tmp_path / "out", SETTINGS, resume=True) as run:  # the control
        assert run.read_rows("scores.jsonl") == [{"a": 1}]


def test_a_file_of_an_unfinished_run_that_became_a_link_is_not_written_to(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    with RunFolder.create(tmp_path / "out", SETTINGS) as run:
        run.append_rows("scores.jsonl", [{"a": 1}])
        (run.path / "scores.jsonl").unlink()
        for name in ("scores.jsonl", ".summary.json.tmp", "summary.json"):
            (run.path / name).symlink_to(victim)
        with pytest.raises(UserError, match="no plain file"):
            run.append_rows("scores.jsonl", [{"a": 2}])
        run.write_json("summary.json", {"value": 1})
        assert victim.read_text() == "precious" and not (run.path / "summary.json").is_symlink()


def test_a_link_in_place_of_the_unfinished_folder(tmp_path: Path) -> None:
    far = tmp_path / "far"
    far.mkdir()
    for target in (far, tmp_path / "nowhere", Path("/dev/zero")):
        part = tmp_path / "out.part"
        part.symlink_to(target)
        for resume, overwrite in ((False, False), (True, False), (False, True)):
            with pytest.raises(UserError, match="a link or a file"):
                RunFolder.create(tmp_path / "out", SETTINGS, resume=resume, overwrite=overwrite)
        assert part.is_symlink() and not list(far.iterdir())
        part.unlink()


@pytest.mark.parametrize("odd", [name for name in ODD_FILES if name != "hard link"])
def test_odd_files_in_a_finished_run_do_not_hang_its_reader(tmp_path: Path, odd: str) -> None:
    victim = tmp_path / "victim"
    victim.write_text('{"value": 1}')
    out = finished(tmp_path / "out")

    def read() -> None:
        for name, how in (("scores.jsonl", "rows"), ("summary.json", "json"), (CONFIG, "open")):
            (out / name).unlink()
            ODD_FILES[odd](out / name, victim)
            with pytest.raises(UserError):
                getattr(RunFolder.open(out), how)(name)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()


def test_huge_files_are_refused_unread(tmp_path: Path) -> None:
    out = finished(tmp_path / "out")
    run = RunFolder.open(out)
    for name, how in (("scores.jsonl", run.rows), ("summary.json", run.json)):
        os.truncate(out / name, 10 << 30)  # sparse
        with pytest.raises(UserError, match="too large"):
            how(name)
    os.truncate(out / "scores.jsonl", 1 << 30)
    with pytest.raises(UserError, match="a line of more than"):
        run.rows("scores.jsonl")


# --- what was changed -----------------------------------------------------------------------------


def test_a_finished_file_that_was_changed_is_noticed(tmp_path: Path) -> None:
    out = finished(tmp_path / "out")
    (out / "summary.json").write_text('{"value": 7}\n')
    with pytest.raises(UserError, match=r"summary\.json is not as its run left it"):
        RunFolder.open(out).json("summary.json")
    scores = out / "scores.jsonl"
    whole = scores.read_text()
    scores.write_text(whole.replace('"a": 1', '"a": 2'))
    with pytest.raises(UserError, match=r"scores\.jsonl, line 1: a row that was changed"):
        RunFolder.open(out).rows("scores.jsonl")
    scores.write_text("")  # each row that is left has its check
    with pytest.raises(UserError, match="not as its run left it"):
        RunFolder.open(out).rows("scores.jsonl")
    scores.write_text(whole)
    assert RunFolder.open(out).rows("scores.jsonl") == [{"a": 1}]


def test_rows_that_do_not_belong_are_set_aside_and_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with RunFolder.create(out, SETTINGS) as run:
        run.append_rows("scores.jsonl", [{"a": i} for i in range(5)])
    with RunFolder.create(tmp_path / "other", {"command": "sweep", "settings": {"seed": 1}}) as run:
        run.append_rows("scores.jsonl", [{"a": 9}])
    scores = tmp_path / "out.part" / "scores.jsonl"
    lines = scores.read_text().splitlines()
    foreign = (tmp_path / "other.part" / "scores.jsonl").read_text().strip()
    lines[1] = lines[1].replace('"a": 1', '"a": 7')
    scores.write_text("\n".join([*lines[:3], "[]", foreign, '{"a": 8}', *lines[3:], '{"a": 3']))
    with RunFolder.create(out, SETTINGS, resume=True) as run:
        rows, note = run.resume_rows("scores.jsonl", lambda row: "four" if row["a"] == 4 else "")
        assert [row["a"] for row in rows] == [0, 2, 3]
        assert note.startswith("5 of the 8 rows") and "line 2: a row that was changed" in note
        assert run.resume_rows("scores.jsonl", lambda _: "") == (rows, "")
        aside = (run.path / "set-aside.txt").read_text()
        assert foreign in aside and "line 8: four" in aside
        assert note in (run.path / "log.txt").read_text()
        run.append_rows("scores.jsonl", [{"a": 1}])
        run.finish()
    assert [row["a"] for row in RunFolder.open(out).rows("scores.jsonl")] == [0, 2, 3, 1]


# --- full disks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("room", [0, 10, 60, 100, 150])
def test_a_full_disk_is_one_message_wherever_it_strikes(tmp_path: Path, room: int) -> None:
    whole = finished(tmp_path / "out")
    with room_for(room), pytest.raises(UserError, match="disk is full"):
        finished(tmp_path / "out", 2, overwrite=True)
    assert RunFolder.open(whole).json("summary.json") == {"value": 1}
    finished(tmp_path / "out", 2, overwrite=True)
    assert RunFolder.open(whole).json("summary.json") == {"value": 2}


def test_a_log_that_finds_no_room_does_not_stop_the_run(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "out", SETTINGS)
    with room_for((run.path / "log.txt").stat().st_size + 5):
        run.log("x" * 100)
        run.close()


def test_every_command_that_makes_runs_is_on_the_list() -> None:
    from goldenlayers.commands import COMMANDS, options_of
    from goldenlayers.commands.options import types_of

    making = {name for name in COMMANDS if "overwrite" in types_of(options_of(name))}
    # A study's table is made anew each time, without asking; an export or a report is no run.
    assert making - {"run", "export", "report"} | {"study"} == set(FILES)
