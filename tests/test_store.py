"""Run folders under kills, second processes, changed settings and replaced runs."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import yaml

from goldenlayers.errors import UserError
from goldenlayers.store import RunFolder

CONFIG = {"command": "sweep", "seed": 0, "editor": {"method": "rome", "steps": 20}}


def finished(path: Path, value: int = 1, **options) -> Path:
    with RunFolder.create(path, CONFIG, **options) as run:
        run.write_json("summary.json", {"value": value})
        return run.finish()


def names(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir())


def test_a_run_is_part_until_it_is_finished(tmp_path):
    out = tmp_path / "runs" / "one"
    with RunFolder.create(out, CONFIG) as run:
        assert run.path == tmp_path / "runs" / "one.part" and not out.exists()
        run.write_json("summary.json", {"mean": float("nan"), "layers": (1, 2)})
        run.append_rows("scores.jsonl", [{"fact": "é", "score": 0.5}])
        run.append_rows("scores.jsonl", [{"fact": "b", "score": float("inf")}])
        run.file("sweep.svg").write_text("<svg/>")
        with pytest.raises(UserError, match="not finished"):
            RunFolder.open(out)
        assert RunFolder.open(out, part=True).rows("scores.jsonl")[0]["score"] == 0.5
        assert run.finish() == out
    assert names(tmp_path / "runs") == ["one"]
    assert names(out) == ["config.yaml", "log.txt", "scores.jsonl", "summary.json", "sweep.svg"]
    done = RunFolder.open(out)
    assert done.kind == "sweep" and not done.writable
    assert done.config["editor"] == {"method": "rome", "steps": 20} and done.config["version"]
    assert done.json("summary.json") == {"mean": None, "layers": [1, 2]}
    assert done.rows("scores.jsonl") == [{"fact": "é", "score": 0.5}, {"fact": "b", "score": None}]
    assert done.read_rows("none.jsonl") == []
    for call in (done.rows, done.json):
        with pytest.raises(UserError, match=r"has no absent \(it holds config.yaml"):
            call("absent")
    with pytest.raises(ValueError, match="not open for writing"):
        done.append_rows("scores.jsonl", [{}])


def test_config_is_readable_and_comes_back_equal(tmp_path):
    config = {
        "command": "locate",
        "rate": 1e-05,
        "note": "yes",
        "text": "1e5",
        "file": Path("a/ü.json"),
        "layers": (1, 2),
        "none": None,
        "nested": {"deep": {"x": True}},
    }
    with RunFolder.create(tmp_path / "r", config) as run:
        text = (run.path / "config.yaml").read_text(encoding="utf-8")
    expected = {**config, "file": "a/ü.json", "layers": [1, 2]}
    loaded = yaml.safe_load(text)
    assert loaded.pop("version") and loaded.pop("key")
    assert loaded == expected and "ü" in text
    assert list(yaml.safe_load(text))[1] == "command"
    # The same settings, tuples and paths included, are no difference on resume.
    with RunFolder.create(tmp_path / "r", config, resume=True) as run:
        assert run.resumed
    with pytest.raises(ValueError, match="'command'"):
        RunFolder.create(tmp_path / "s", {"seed": 0})


def test_a_taken_path_is_refused_and_overwrite_replaces_it_only_at_the_end(tmp_path):
    out = finished(tmp_path / "out", 1)
    with pytest.raises(UserError, match="--overwrite"):
        RunFolder.create(out, CONFIG)
    assert names(tmp_path) == ["out"]
    with pytest.raises(RuntimeError), RunFolder.create(out, CONFIG, overwrite=True) as run:
        run.write_json("summary.json", {"value": 2})
        assert RunFolder.open(out).json("summary.json") == {"value": 1}
        raise RuntimeError
    assert RunFolder.open(out).json("summary.json") == {"value": 1}
    finished(out, 3, overwrite=True)
    assert RunFolder.open(out).json("summary.json") == {"value": 3}
    assert names(tmp_path) == ["out"]


def test_nothing_but_a_run_is_ever_replaced(tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="other things in it"):
        RunFolder.create(home, CONFIG, overwrite=True)
    other = tmp_path / "x.part"
    other.mkdir()
    (other / "notes").write_text("mine")
    with pytest.raises(UserError, match=r"not an unfinished run.*: notes"):
        RunFolder.create(tmp_path / "x", CONFIG, overwrite=True)
    assert (home / "thesis.tex").exists() and (other / "notes").exists()
    with pytest.raises(UserError, match="is a file"):
        RunFolder.create(home / "thesis.tex", CONFIG, overwrite=True)
    for bad in ("/", tmp_path / "y.part"):
        with pytest.raises(UserError, match="cannot be a run folder"):
            RunFolder.create(bad, CONFIG)
    with pytest.raises(UserError, match="could not be written"):
        RunFolder.create(home / "thesis.tex" / "run", CONFIG)
    (tmp_path / "empty").mkdir()
    finished(tmp_path / "empty")  # an empty folder is free
    for bad in (tmp_path / "nowhere", home, "/"):
        with pytest.raises(UserError):
            RunFolder.open(bad)


def test_a_path_taken_meanwhile_keeps_the_work(tmp_path):
    with RunFolder.create(tmp_path / "out", CONFIG) as run:
        run.append_rows("scores.jsonl", [{"a": 1}])
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "config.yaml").write_text("command: other")
        with pytest.raises(UserError, match="other things in it"):
            run.finish()
    assert RunFolder.open(tmp_path / "out.part", part=True).rows("scores.jsonl") == [{"a": 1}]
    with pytest.raises(UserError, match="not finished"):
        RunFolder.open(tmp_path / "out.part")


def test_a_replacement_cut_short_is_put_right(tmp_path):
    out = finished(tmp_path / "out", 1)
    RunFolder.create(out, CONFIG, overwrite=True).close()
    out.rename(tmp_path / "out.part" / ".replaced")  # as a kill between the two renames leaves it
    with pytest.raises(UserError, match="already holds"):
        RunFolder.create(out, CONFIG)
    assert RunFolder.open(out).json("summary.json") == {"value": 1}
    # A kill after both leaves the old run within the new one, until that is replaced itself.
    shutil.copytree(out, tmp_path / "old")
    finished(out, 2, overwrite=True)
    (tmp_path / "old").rename(out / ".replaced")
    assert RunFolder.open(out).json("summary.json") == {"value": 2}
    finished(out, 3, overwrite=True)
    assert RunFolder.open(out).json("summary.json") == {"value": 3}
    assert names(tmp_path) == ["out"] and ".replaced" not in names(out)


def test_resume_goes_on_and_a_fresh_start_clears(tmp_path):
    out = tmp_path / "out"
    with RunFolder.create(out, CONFIG, resume=True) as run:
        assert not run.resumed
        run.append_rows("scores.jsonl", [{"a": 1}])
    with (tmp_path / "out.part" / "scores.jsonl").open("ab") as file:
        file.write(b'{"a": 2')  # torn
    with RunFolder.create(out, CONFIG, resume=True) as run:
        assert run.resumed and run.read_rows("scores.jsonl") == [{"a": 1}]
        run.append_rows("scores.jsonl", [{"a": 3}])
        assert run.read_rows("scores.jsonl") == [{"a": 1}, {"a": 3}]
    with RunFolder.create(out, CONFIG) as run:
        assert not run.resumed and run.read_rows("scores.jsonl") == []


def test_resume_with_other_settings_shows_the_differences(tmp_path):
    out = tmp_path / "out"
    with RunFolder.create(out, CONFIG) as run:
        run.append_rows("scores.jsonl", [{"a": 1}])
    other = {"command": "sweep", "seed": 1, "editor": {"method": "rome", "lr": 0.5}}
    with pytest.raises(UserError) as caught:
        RunFolder.create(out, other, resume=True)
    text = str(caught.value)
    assert "seed: 0 -> 1" in text and "editor.steps: 20 -> (not set)" in text
    assert "editor.lr: (not set) -> 0.5" in text and "method" not in text
    with RunFolder.create(out, other, resume=True, ignore=("seed", "editor")) as run:
        assert run.read_rows("scores.jsonl") == [{"a": 1}]
    (tmp_path / "out.part" / "config.yaml").write_text("[")
    with pytest.raises(UserError, match="no YAML of plain settings"):
        RunFolder.create(out, other, resume=True)


def test_two_runs_on_one_folder_are_refused_also_within_a_process(tmp_path):
    with RunFolder.create(tmp_path / "out", CONFIG) as run:
        run.append_rows("scores.jsonl", [{"a": 1}])
        for resume in (True, False):
            with pytest.raises(UserError, match=f"another run \\(process {os.getpid()} on"):
                RunFolder.create(tmp_path / "out", CONFIG, resume=resume, overwrite=True)
        run.append_rows("scores.jsonl", [{"a": 2}])
        assert len(run.read_rows("scores.jsonl")) == 2
    RunFolder.create(tmp_path / "out", CONFIG, resume=True).close()


def test_log_has_the_story_and_the_packages_warnings(tmp_path):
    logger = logging.getLogger("goldenlayers.somewhere")
    with pytest.raises(ZeroDivisionError), RunFolder.create(tmp_path / "out", CONFIG) as run:
        run.log("batch 1 of 3")
        logger.warning("a layer was skipped")
        raise ZeroDivisionError
    logger.warning("after the run")
    text = (tmp_path / "out.part" / "log.txt").read_text("utf-8")
    for part in ("started", "batch 1 of 3", "a layer was skipped", "Traceback", "ZeroDivision"):
        assert part in text
    assert "after the run" not in text
    with pytest.raises(UserError), RunFolder.create(tmp_path / "out", CONFIG, resume=True):
        raise UserError("an empty answer")
    text = (tmp_path / "out.part" / "log.txt").read_text("utf-8")
    assert "stopped: UserError: an empty answer" in text and text.count("Traceback") == 1


def test_file_names_stay_inside(tmp_path):
    with RunFolder.create(tmp_path / "out", CONFIG) as run:
        for bad in ("../x", "a/b", "", "..", ".lock"):
            with pytest.raises(ValueError, match="plain file name"):
                run.file(bad)


WRITER = """
    import itertools, sys
    from goldenlayers.store import RunFolder
    out, total = sys.argv[1], int(sys.argv[2])
    with RunFolder.create(out, {"command": "sweep"}, resume=True) as run:
        done = {row["item"] for row in run.read_rows("scores.jsonl")}
        print("ready", flush=True)
        todo = (i for i in range(total) if i not in done)
        while batch := list(itertools.islice(todo, 3)):
            run.append_rows("scores.jsonl", [{"item": i, "pad": "x" * 3000} for i in batch])
        run.finish()
"""


def has_a_row(path):
    return path.exists() and b"\n" in path.read_bytes()


def test_kill_9_at_any_moment_loses_and_doubles_nothing(tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-c", textwrap.dedent(WRITER), str(out)]
    seen = 0
    for kills, wait in enumerate((0.0, 0.02, 0.05, 0.09, 0.03, 0.01)):
        # It has no end, so that it is killed at work on any machine.
        process = subprocess.Popen([*command, "1000000000"], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        if kills == 0:
            with pytest.raises(UserError, match=f"process {process.pid}"):
                RunFolder.create(out, {"command": "sweep"}, resume=True)
        time.sleep(wait)
        file = tmp_path / "out.part" / "scores.jsonl"
        deadline = time.monotonic() + 60
        # Once a row has to be there, however long a busy disk takes to sync the first.
        while kills == 2 and not has_a_row(file) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        process.stdout.close()
        rows = RunFolder.open(out, part=True).read_rows("scores.jsonl")
        assert len(rows) >= seen  # what was there is still there
        seen = len(rows)
        with (tmp_path / "out.part" / "scores.jsonl").open("ab") as file:
            file.write(b'{"item": 7, "pa')  # a kill within a write is too rare to wait for
    assert seen > 0
    total = seen + 50
    subprocess.run([*command, str(total)], check=True, stdout=subprocess.DEVNULL)
    rows = RunFolder.open(out).rows("scores.jsonl")
    assert sorted(row["item"] for row in rows) == list(range(total))
