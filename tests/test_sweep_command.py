"""``golden sweep`` from the shell: its folder, its messages, and all that can cut it short."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from alike import alike
from families import save, tiny
from sweep_helpers import canonical, some_facts

from goldenlayers import durable
from goldenlayers.cli import main
from goldenlayers.commands.sweeps import layers_named
from goldenlayers.errors import UserError
from goldenlayers.store import RunFolder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and facts, and the rows of an undisturbed sweep in ``whole``."""
    folder = tmp_path_factory.mktemp("sweep")
    save(tiny("llama"), folder / "model")
    rows = [
        {
            "id": f.id,
            "subject": f.subject,
            "prompt": f.prompt,
            "target_new": f.target,
            "target_old": f.target_old,
            "rephrasings": list(f.rephrasings),
            "locality": [
                {"prompt": p.prompt, "answer": p.answer, "kind": p.kind} for p in f.locality
            ],
            "portability": [{"prompt": p.prompt, "answer": p.answer} for p in f.portability],
        }
        for f in some_facts(6)
    ]
    text = "".join(json.dumps({k: v for k, v in row.items() if v}) + "\n" for row in rows)
    (folder / "facts.jsonl").write_text(text)
    assert main(command(folder, "whole")) == 0
    return folder


def command(place: Path, out: str, *more: str, steps: int = 2) -> list[str]:
    settings = ["--set", "steps", str(steps), "prefixes", "1", "prefix_tokens", "4"]
    return [
        *("sweep", str(place / "model"), str(place / "facts.jsonl"), "--method", "rome"),
        *("--cache-dir", str(place / "cache" / "models"), "--chunk", "1"),
        *("--out", str(place / out), *settings, *more),
    ]


def rows_of(path: Path) -> list[dict[str, Any]]:
    return durable.read_rows(path / "scores.jsonl")


def test_the_folder_and_what_is_shown(place: Path, capsys: pytest.CaptureFixture[str]):
    assert main(command(place, "shown", "--layers", "0,2-3", "--workers", "1")) == 0
    shown = capsys.readouterr()
    for words in ("Golden", "golden", "oracle", "gap", "Best layers of single facts", "halves"):
        assert words in shown.out or words in shown.err or words == "Golden"
    folder = place / "shown"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["schema"] == 1 and summary["layers"] == [0, 2, 3] and summary["n_facts"] == 6
    assert summary["golden_layer"] in (0, 2, 3) and summary["seconds_per_cell"] > 0
    assert set(summary["golden_layers"]) == {
        "rewrite", "rephrase", "locality", "locality_neighbour", "portability", "overall", "gain",
    }  # fmt: skip
    for name in (
        "sweep.svg",
        "sweep.pdf",
        "sweep.png",
        "scores.jsonl",
        "times.jsonl",
        "config.yaml",
        "log.txt",
    ):
        assert (folder / name).stat().st_size > 0
    some = [row for row in rows_of(place / "whole") if row["layer"] != 1]
    assert canonical(rows_of(folder)) == alike(canonical(some))
    assert {"fact", "layer", "metric", "probe", "score"} <= rows_of(folder)[0].keys()


def test_a_finished_sweep_says_so_and_shows_itself(place: Path, capsys: Any):
    before = (place / "whole" / "scores.jsonl").stat().st_mtime_ns
    assert main(command(place, "whole", "--workers", "3")) == 0
    shown = capsys.readouterr()
    assert "is finished already" in shown.err and "Best layers by Overall" in shown.out
    assert (place / "whole" / "scores.jsonl").stat().st_mtime_ns == before
    assert main(command(place, "whole", steps=3)) == 2
    said = capsys.readouterr().err
    assert "other settings: set: {'steps': '2'" in said and "--overwrite" in said


@pytest.mark.parametrize("name", ["generation", "counterfact", "fluency", "kl"])
def test_a_sweep_without_overall(place: Path, name: str, capsys: Any):
    """What was scored is shown, and drawn where it can have a golden layer."""
    assert main(command(place, name, "--metrics", name, "--layers", "1-2")) == 0
    shown = capsys.readouterr()
    summary = json.loads((place / name / "summary.json").read_text())
    assert summary["golden_layer"] is None and summary["golden_layers"]["overall"] is None
    first = {"generation": "generation_rewrite", "counterfact": "efficacy_success"}.get(name, name)
    assert first in shown.out and "Overall" not in shown.out and "cells have no" not in shown.err
    if name == "kl":  # the edit that changes nothing would be the best
        assert "no golden layer" in shown.out and "Best layers" not in shown.out
        assert "sweep.svg" not in shown.err and not (place / name / "sweep.svg").exists()
    else:
        assert summary["golden_layers"][first] in (1, 2)
        assert f"Best layers by {first}" in shown.out and "sweep.svg" in shown.err
        figure = (place / name / "sweep.svg").read_text("utf-8")
        assert f"Golden layer {summary['golden_layers'][first]} by {first}" in figure
    # Shown again, and judged by.
    assert main(command(place, name, "--metrics", name, "--layers", "1-2")) == 0
    assert capsys.readouterr().out == shown.out
    assert main(["compare", str(place / name), "--repeats", "2"]) == 2
    said = capsys.readouterr().err
    if name != "kl":
        assert f"Add --metric {first}" in " ".join(said.split())
        judged = ["compare", str(place / name), "--repeats", "2", "--metric", first]
        assert main(judged) == 0


def test_a_sweep_of_which_nothing_was_scored(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    from goldenlayers.sweeping.cells import Runner

    real = Runner.run

    def unscored(self: Runner, task: Any) -> Any:
        batch = real(self, task)
        rows = [{**row, "score": None} for row in batch.rows]
        return dataclasses.replace(batch, rows=rows)

    monkeypatch.setattr(Runner, "run", unscored)
    assert main(command(place, "nothing", "--layers", "0", "--metrics", "rewrite", "kl")) == 2
    assert "no edit of the sweep could be scored" in capsys.readouterr().err


def test_compare_knows_how_deep_the_swept_model_is(place: Path, capsys: Any):
    """Of a sweep of the lower layers alone, too: the middle is the model's."""
    assert main(command(place, "lower", "--layers", "0-1", "--metrics", "rewrite")) == 0
    out = place / "lower-judged"
    assert main(["compare", str(place / "lower"), "--repeats", "2", "--out", str(out)]) == 0
    choices = {
        one["name"]: one for one in json.loads((out / "compare.json").read_text())["choices"]
    }
    assert json.loads((place / "lower" / "summary.json").read_text())["n_layers"] == 4
    assert choices["middle"]["layer"] == 2 and choices["middle"]["note"] == "layer 2 was not swept"


def disk_full(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """From the ``after``-th write to scores.jsonl on, the disk takes half and is full."""
    real, count = os.write, [0]

    def write(descriptor: int, data: Any) -> int:
        if b'"metric"' not in bytes(data):
            return real(descriptor, data)
        count[0] += 1
        if count[0] < after:
            return real(descriptor, data)
        if count[0] == after:
            return real(descriptor, bytes(data)[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(durable.os, "write", write)


def test_full_disk_changed_settings_and_resume(place: Path, capsys: Any):
    with pytest.MonkeyPatch.context() as patch:
        disk_full(patch, after=4)
        assert main(command(place, "full")) == 2
    assert "the disk is full" in capsys.readouterr().err
    part = place / "full.part"
    kept = rows_of(part)
    assert kept and {(row["fact"], row["layer"]) for row in kept} == {
        ("f0", 0), ("f0", 1), ("f0", 2),
    }  # fmt: skip
    assert main(command(place, "full", steps=3)) == 2
    said = capsys.readouterr().err
    assert "other settings: settings.set.steps: 2 -> 3" in said
    assert rows_of(part) == kept
    assert main(command(place, "full", "--chunk", "4")) == 0  # this may change
    assert "Going on with" in capsys.readouterr().err
    assert rows_of(place / "full")[: len(kept)] == kept
    assert canonical(rows_of(place / "full")) == alike(canonical(rows_of(place / "whole")))


@pytest.mark.parametrize("cut", ["row", "line", "cell"])
def test_a_torn_end(place: Path, cut: str):
    """Whatever of the last batch is there: its rows are completed, not doubled."""
    with pytest.MonkeyPatch.context() as patch:
        disk_full(patch, after=4)
        assert main(command(place, cut)) == 2
    path = place / f"{cut}.part" / "scores.jsonl"
    data = path.read_bytes()
    lines = data.splitlines(keepends=True)
    torn = {"row": data[:-20], "line": data[:-1], "cell": b"".join(lines[:-2])}[cut]
    path.write_bytes(torn)
    assert main(command(place, cut)) == 0
    assert canonical(rows_of(place / cut)) == alike(canonical(rows_of(place / "whole")))


def test_two_sweeps_on_one_folder(place: Path, capsys: Any):
    with RunFolder.create(place / "busy", {"command": "sweep"}):
        assert main(command(place, "busy")) == 2
    assert "is being written by another run (process" in capsys.readouterr().err


def test_what_loads_a_workers_model_travels(place: Path, monkeypatch: pytest.MonkeyPatch):
    given: dict[str, Any] = {}

    def caught(*_: Any, **options: Any) -> None:
        given.update(options)
        raise KeyboardInterrupt

    monkeypatch.setattr("goldenlayers.sweeping.sweep", caught)
    assert main(command(place, "travels", "--dtype", "bfloat16", "--device", "auto")) == 130
    model = pickle.loads(pickle.dumps(given["workers"].load))()
    # All workers are on the device that this process found.
    assert given["workers"].load.args[0].device == str(model.device) != "auto"
    assert str(model.dtype) == "torch.bfloat16" and model.name == str(place / "model")


def test_bad_input_is_one_message(place: Path, capsys: Any):
    for more, words in [
        (["--layers", "0-x"], "--layers is '0-x'"),
        (["--layers", "7"], "--layers names layer 7. Expected layers 0 to 3"),
        (["--method", "rom"], "unknown editor 'rom'"),
        (["--metrics", "perplexity"], "does not measure perplexity"),
        (["--chunk", "0"], "--chunk is 0"),
        (["--workers", "0"], "--workers is 0"),
        (["--address", "auto"], "--address is for Ray"),
        (["--set", "stepz", "3"], "rome has no setting 'stepz'"),
    ]:
        assert main(command(place, "bad", *more)) == 2, more
        assert words in " ".join(capsys.readouterr().err.split()), more
    assert not (place / "bad").exists() and not (place / "bad.part").exists()


def test_layers_in_words():
    assert layers_named(" 4-6, 0,5", 9) == [0, 4, 5, 6]
    for wrong in ("", "3-1", "-1", "1;2", "one"):
        with pytest.raises(UserError, match="--layers is"):
            layers_named(wrong, 9)


# A process that has everything imported forks a sweep that kills itself at a random tick. It
# ticks when a task begins and before every piece of a row that it writes: pieces of 40 bytes, so
# that it often dies within a line. No clock is in it: it does the same on a slow machine.
KILLER = """
import json, os, random, signal, sys
import goldenlayers.statistics, goldenlayers.report.pictures, goldenlayers.truth
import matplotlib.figure, matplotlib.backends.backend_svg, tyro
from goldenlayers import cli, durable, models
from goldenlayers.commands import shared, sweeps as _
from goldenlayers.sweeping import cells
loaded = models.load(sys.argv[1], device="cpu")
loaded.fingerprint()
models.load = lambda *_, **__: loaded  # else most of the time would go into loading
arguments, scores, rng = sys.argv[3:], sys.argv[2], random.Random(7)

def child(last):
    real_write, real_run, ticks = os.write, cells.Runner.run, iter(range(1, last))
    def tick():
        if next(ticks, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
    def write(descriptor, data):
        if b'"metric"' in bytes(data) or b'"score"' in bytes(data) or b'"fact"' in bytes(data):
            tick()
            return real_write(descriptor, bytes(data)[:40])
        return real_write(descriptor, data)
    def run(self, task):
        tick()
        return real_run(self, task)
    durable.os.write, cells.Runner.run = write, run
    sys.stdout = sys.stderr = open(os.devnull, "w")
    os._exit(cli.main(arguments))

history = []
for attempt in range(21):
    last = rng.randint(1, 30) if attempt < 20 else 10**9
    pid = os.fork()
    if pid == 0:
        child(last)
    status = os.waitpid(pid, 0)[1]
    whole = open(scores, "rb").read() if os.path.exists(scores) else b""
    history.append([os.waitstatus_to_exitcode(status), whole.count(b"\\n"),
                    bool(whole) and not whole.endswith(b"\\n")])
print(json.dumps(history))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_kill_9_at_20_random_moments(place: Path):
    arguments = command(place, "killed")
    scores = place / "killed.part" / "scores.jsonl"
    done = subprocess.run(
        [sys.executable, "-c", KILLER, str(place / "model"), str(scores), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    history = json.loads(done.stdout.splitlines()[-1])
    codes = [code for code, _, _ in history]
    assert codes == [-9] * 20 + [0], history
    lines = [count for _, count, _ in history[:-1]]
    torn = sum(cut for _, _, cut in history)
    assert torn >= 3 and len(set(lines)) >= 8, history  # the kills hit the work, also within lines
    assert lines == sorted(lines)  # nothing that was whole is ever lost
    assert canonical(rows_of(place / "killed")) == alike(canonical(rows_of(place / "whole")))
