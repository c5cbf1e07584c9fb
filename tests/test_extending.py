"""The package on the page docs/extending.md, installed; each of its four things used by name."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluation_slow import forced
from families import tiny

import goldenlayers
from goldenlayers.hooks import capture, final_hidden

PAGE = (Path(__file__).resolve().parents[1] / "docs/extending.md").read_text("utf-8")
BLOCK = re.compile(
    r"`([\w./]+\.(?:py|toml))`[^\n]*\n(?:(?!```)[^\n]*\n)*?```\w+\n(.*?)^```", re.M | re.S
)
RECORDS = [
    {"who": who, "question": f"The capital of {who} is", "was": was, "now": now, "also": [also]}
    for who, was, now, also in [
        ("Italy", "Rome", "Ulm", "Italy has as its capital"),
        ("France", "Paris", "Rome", "The capital city of France is"),
        ("Japan", "Tokyo", "Paris", "The seat of Japan is"),
    ]
]


def files() -> dict[str, str]:
    return dict(BLOCK.findall(PAGE))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package installed in ``site``, a tiny model and a data file."""
    folder = tmp_path_factory.mktemp("extending")
    for name, text in files().items():
        file = folder / "source" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, "utf-8")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-input"]
    offline = ["--no-build-isolation", "--no-deps", "--no-index", "--disable-pip-version-check"]
    target = ["--target", str(folder / "site"), str(folder / "source")]
    subprocess.run([*pip, *offline, *target], check=True, capture_output=True, timeout=300)
    model = tiny("llama", "sentencepiece_bpe")
    for part in (model.hf, model.tokenizer):
        part.save_pretrained(folder / "model")
    (folder / "questions.json").write_text(json.dumps(RECORDS), "utf-8")
    return folder


def golden(place: Path, *arguments: Any) -> subprocess.CompletedProcess[str]:
    source = Path(goldenlayers.__file__).parents[1]
    paths = os.pathsep.join([str(place / "site"), str(source)])
    env = {**os.environ, "PYTHONPATH": paths, "COLUMNS": "200"}
    command = [sys.executable, "-m", "goldenlayers.cli", *map(str, arguments)]
    return subprocess.run(
        command, cwd=place, env=env, capture_output=True, text=True, check=False, timeout=300
    )


def done(place: Path, *arguments: Any) -> str:
    found = golden(place, *arguments)
    assert found.returncode == 0, found.stderr
    assert "cannot be imported" not in found.stderr, found.stderr
    return found.stdout


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def test_each_thing_takes_at_most_40_lines() -> None:
    names = ["pyproject.toml", *(f"quiz_layers/{n}.py" for n in ("quiz", "belief", "point"))]
    assert list(files()) == [*names, "quiz_layers/loudness.py"]
    assert all(len(text.splitlines()) <= 40 for text in files().values())


def test_the_format_is_listed_recognised_and_read_by_name(place: Path) -> None:
    assert re.search(r"quiz +.*questions of our quiz", done(place, "datasets"))
    for data in ("questions.json", "quiz:questions.json"):
        said = done(place, "datasets", data)
        assert "questions: 3 facts" in said and "(quiz, sha256" in said
        assert "quiz-2: The capital of France is … Paris → Rome" in said
    bad = [RECORDS[0], {**RECORDS[1], "now": "Paris"}]
    (place / "bad.json").write_text(json.dumps(bad), "utf-8")
    found = golden(place, "datasets", "bad.json")
    assert found.returncode == 2 and "bad.json, row 2, field 'now'" in found.stderr
    found = golden(place, "datasets", "quizz:bad.json")
    assert found.returncode == 2 and "Did you mean 'quiz'" in found.stderr


def test_ours_go_before_a_format_that_is_no_more_particular(place: Path) -> None:
    ours = [{"subject": "Ada", "prompt": "Ada is", "target_new": "x", **RECORDS[0]}]
    (place / "both.json").write_text(json.dumps(ours), "utf-8")
    assert "(jsonl, sha256" in done(place, "datasets", "both.json")
    assert "(quiz, sha256" in done(place, "datasets", "quiz:both.json")


def test_the_metric_is_scored_by_name(place: Path) -> None:
    what = ("--metrics", "belief", "rewrite", "--out", place / "scores")
    assert "belief" in done(place, "evaluate", "model", "quiz:questions.json", *what)
    found = [row for row in rows(place / "scores/scores.jsonl") if row["metric"] == "belief"]
    assert [(row["fact"], row["probe"]) for row in found] == [
        (f"quiz-{n}", probe) for n in (1, 2, 3) for probe in (0, 1)
    ]
    model = tiny("llama", "sentencepiece_bpe")
    for row in found:
        record = RECORDS[int(row["fact"].removeprefix("quiz-")) - 1]
        prompt = (record["question"], *record["also"])[row["probe"]]
        wanted = 100 * math.exp(-forced(model, str(prompt), str(record["now"]))[2])
        assert row["score"] == pytest.approx(wanted, abs=1e-3) and row["score"] > 0
        assert row["evidence"]["before"] == row["score"]
    summary = json.loads((place / "scores/summary.json").read_text("utf-8"))
    mean = sum(row["score"] for row in found) / 6
    assert summary["metrics"]["belief"]["mean"] == pytest.approx(mean)
    # The finished run is read again, and repeated from its folder.
    done(place, "run", place / "scores", "--out", place / "again")
    assert rows(place / "again/scores.jsonl") == rows(place / "scores/scores.jsonl")
    found = golden(place, "evaluate", "model", "questions.json", "--metrics", "beleif")
    assert found.returncode == 2 and "Did you mean 'belief'" in found.stderr


def test_the_editor_edits_by_name_and_in_the_workers_of_a_sweep(place: Path) -> None:
    how = ("--method", "point", "--layer", 1)
    one = ("--facts", "quiz:questions.json", "--limit", 1)
    edited = golden(place, "edit", "model", *one, *how, "--set", "size", 3, "--out", place / "edit")
    # Whether so simple an edit takes is another matter: golden edit says if it did not.
    assert edited.returncode == 0 and "Traceback" not in edited.stderr, edited.stderr
    record = json.loads((place / "edit/delta.json").read_text("utf-8"))
    assert record["method"] == "point" and record["settings"]["size"] == 3
    found = golden(place, "edit", "model", *one, *how, "--set", "sizes", 3, "--out", place / "no")
    assert found.returncode == 2 and "'size'" in found.stderr
    what = ("--metrics", "rewrite", "belief")
    done(place, "evaluate", "model", "questions.json", *how, *what, "--out", place / "edited")
    beliefs = [r for r in rows(place / "edited/scores.jsonl") if r["metric"] == "belief"]
    assert any(row["score"] != row["evidence"]["before"] for row in beliefs)
    for workers in (1, 2):
        more = ("--layers", "1,2", "--workers", workers, "--out", place / f"sweep{workers}")
        done(place, "sweep", "model", "questions.json", "--method", "point", *what, *more)
    assert len(rows(place / "sweep1/scores.jsonl")) == 2 * (3 + 6)
    # Two workers finish their layers in either order.
    one, two = (
        sorted(
            rows(place / f"sweep{workers}/scores.jsonl"),
            key=lambda row: (row["fact"], row["layer"], row["metric"], row["probe"]),
        )
        for workers in (1, 2)
    )
    assert one == two


def test_the_layer_method_locates_by_name(place: Path) -> None:
    how = ("--method", "loudness", "--out", place / "located")
    done(place, "locate", "model", "quiz:questions.json", *how)
    ranking = json.loads((place / "located/ranking.json").read_text("utf-8"))
    model = tiny("llama", "sentencepiece_bpe")
    sizes = torch.zeros(len(model.layers))
    for record in RECORDS:
        text = model.encoder.encode(record["question"], record["now"], record["who"])
        for layer in range(len(model.layers)):
            with torch.no_grad(), capture({0: model.layers[layer].down.module}) as added:
                final_hidden(model, torch.tensor([text.ids]))
            sizes[layer] += added[0][0, text.lookup].norm() / len(RECORDS)
    assert ranking["method"] == "loudness" and ranking["golden_layer"] == int(sizes.argmax())
    scores = [one["score"] for one in ranking["layers"]]
    assert scores == pytest.approx(sizes.tolist(), rel=1e-4)


def test_what_the_page_shows_runs(place: Path) -> None:
    """Its commands as they stand, and its last block, in one process; the model is a tiny one."""
    lines = re.findall(r"^    golden (.+)$", PAGE, re.M)
    commands = [shlex.split(line.replace("smollm2-135m", "model")) for line in lines]
    last = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)[-1]
    assert len(commands) == 5
    shutil.copytree(place / "source/quiz_layers", place / "bare/quiz_layers")
    # The names are free for the last block as long as the installed package is not on the path.
    code = f"""
import sys
sys.path.insert(0, "bare")
from quiz_layers.belief import BELIEF
from quiz_layers.quiz import QUIZ
{last}
FORMATS.unregister("quiz")
METRICS.unregister("belief")
sys.path.insert(0, "site")
from goldenlayers.cli import main
from goldenlayers.editors import EDITORS
from goldenlayers.locating import METHODS
for registry in (FORMATS, METRICS, EDITORS, METHODS):
    registry.refresh()
for command in {commands!r}:
    assert main(command) == 0, command
"""
    env = {**os.environ, "PYTHONPATH": str(Path(goldenlayers.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=place, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_package_that_cannot_be_imported_is_one_line_and_the_others_work(
    place: Path, tmp_path: Path
) -> None:
    about = tmp_path / "site/broken-1.0.dist-info"
    about.mkdir(parents=True)
    about.joinpath("METADATA").write_text("Name: broken\nVersion: 1.0\n", "utf-8")
    groups = ("datasets", "metrics", "editors", "methods")
    about.joinpath("entry_points.txt").write_text(
        "".join(f"[goldenlayers.{group}]\nbroken = nowhere_at_all:X\n" for group in groups), "utf-8"
    )
    (tmp_path / "questions.json").write_text(
        '{"subject": "Ada", "prompt": "Ada is", "target_new": "x"}\n', "utf-8"
    )
    found = golden(tmp_path, "datasets", "questions.json")
    assert found.returncode == 0 and "1 facts" in found.stdout
    (line,) = found.stderr.strip().splitlines()
    assert "the format 'broken' of the package 'broken' cannot be imported" in line
    model = place / "model"
    found = golden(tmp_path, "evaluate", model, "questions.json", "--metrics", "rewrite")
    assert found.returncode == 0, found.stderr
    found = golden(tmp_path, "evaluate", model, "questions.json", "--metrics", "broken")
    assert found.returncode == 2 and "Mend or remove the package broken" in found.stderr
