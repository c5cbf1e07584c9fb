"""What the commands share: run folders whose recorded settings are good from any directory."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from families import tiny

from goldenlayers.cli import main
from goldenlayers.commands import options_of
from goldenlayers.commands.shared import with_absolute_paths
from goldenlayers.datasets import absolute_name as absolute_data
from goldenlayers.durable import absolute
from goldenlayers.evaluation.plan import EvaluationPlan
from goldenlayers.models import absolute_name as absolute_model
from goldenlayers.statistics.documents import absolute_name as absolute_text

ROWS = [
    {"id": "fr", "subject": "France", "prompt": "The capital of France is", "target_new": "Rome"},
    {"id": "it", "subject": "Italy", "prompt": "The capital of Italy is", "target_new": "Paris"},
]
TEXT = "The capital of Italy is Rome. The Eiffel Tower is located in the city of Paris. " * 20


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two models."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("llama", "gpt2"):
        model = tiny(name)
        model.hf.save_pretrained(folder / name)
        model.tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture
def here(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with ``model``, ``facts.jsonl`` and ``text.txt``."""
    place = tmp_path / "here"
    (place / "deeper").mkdir(parents=True)
    (place / "model").symlink_to(models / "llama")
    (place / "facts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (place / "text.txt").write_text(TEXT)
    monkeypatch.chdir(place)
    return place


def golden(*arguments: object) -> int:
    return main([str(a) for a in arguments])


def settings(run: Path) -> dict[str, Any]:
    return yaml.safe_load((run / "config.yaml").read_text())["settings"]


def scores(run: Path) -> list[str]:
    return sorted((run / "scores.jsonl").read_text("utf-8").splitlines())


def test_a_run_with_relative_paths_is_repeated_from_another_directory(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit = ("--facts", "facts.jsonl", "--layer", 1, "--set", "steps", 2, "prefixes", 0)
    cache = ("--cache-dir", "cache/models")
    assert golden("edit", "model", *edit, "--statistics", "none", "--mode", "sequential",
                  "--out", "edit") == 0  # fmt: skip
    assert golden("evaluate", "./model", "jsonl:facts.jsonl", "--delta", "edit", *cache, "--out",
                  "scores", "--metrics", "rewrite", "perplexity", "--text", "deeper/../text.txt",
                  "--statistics", "text.txt") == 0  # fmt: skip
    # What is a name stays one, also beside a file of that name.
    (here / "starter").write_text("no facts")
    assert golden("locate", "model", "starter", "--limit", 2, "--method", "middle", "--bootstrap",
                  0, "--out", "located") == 0  # fmt: skip
    assert settings(here / "edit")["facts"] == str(here / "facts.jsonl")
    assert settings(here / "edit")["statistics"] == "none"
    found = settings(here / "scores")
    assert found["model"] == str(here / "model") and found["data"] == f"jsonl:{here}/facts.jsonl"
    assert found["delta"] == str(here / "edit") and found["text"] == str(here / "text.txt")
    assert found["statistics"] == str(here / "text.txt")
    found = settings(here / "located")
    assert found["data"] == "starter" and found["statistics"] == "package"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    for run in ("edit", "scores", "located"):
        assert golden("run", here / run, "--out", run) == 0
    assert scores(elsewhere / "scores") == scores(here / "scores")
    assert settings(elsewhere / "edit") == {**settings(here / "edit"), "out": "edit"}
    old, new = (
        json.loads((place / "edit" / "delta.json").read_text())["parameters"]
        for place in (here, elsewhere)
    )
    assert old == new
    # The control: the paths as they were typed are nothing here.
    record = yaml.safe_load((here / "scores" / "config.yaml").read_text())
    record["settings"]["data"] = "jsonl:facts.jsonl"
    (here / "scores" / "config.yaml").write_text(yaml.safe_dump(record))
    assert golden("run", here / "scores", "--out", "again") == 2


def interrupted(monkeypatch: pytest.MonkeyPatch, *command: object) -> None:
    def dying(_self: EvaluationPlan, **_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(EvaluationPlan, "score_applied", dying)
        assert golden(*command) == 130


def test_an_unfinished_run_is_gone_on_with_however_its_files_are_named(
    here: Path, models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("evaluate", "model", "facts.jsonl", "--out")
    interrupted(monkeypatch, *command, "run")
    monkeypatch.chdir(here / "deeper")
    assert golden("evaluate", "../model", "facts.jsonl", "--out", "../run") == 2  # no such facts
    other = ("evaluate", models / "gpt2", "../facts.jsonl", "--out", "../run")
    assert golden(*other) == 2
    assert "other settings: settings.model" in capsys.readouterr().err
    assert golden("evaluate", "../model", here / "facts.jsonl", "--out", "../run") == 0
    assert "resumed" in (here / "run" / "log.txt").read_text("utf-8")


def test_an_unfinished_run_that_recorded_relative_paths_is_gone_on_with(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("evaluate", "model", "facts.jsonl", "--out", here / "run")
    interrupted(monkeypatch, *command)
    config = here / "run.part" / "config.yaml"
    record = yaml.safe_load(config.read_text())
    record["settings"] |= {"model": "model", "data": "facts.jsonl"}
    config.write_text(yaml.safe_dump(record))
    # Other facts of the same relative name are other facts.
    (here / "deeper" / "facts.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    monkeypatch.chdir(here / "deeper")
    assert golden("evaluate", "../model", "facts.jsonl", "--out", here / "run") == 2
    assert "data.sha256" in capsys.readouterr().err
    monkeypatch.chdir(here)
    assert golden(*command) == 0
    assert "resumed" in (here / "run" / "log.txt").read_text("utf-8")
    assert settings(here / "run")["data"] == str(here / "facts.jsonl")


def test_an_unfinished_run_is_not_gone_on_with_when_its_files_have_changed(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    edit = ("edit", "model", "--facts", "facts.jsonl", "--layer", 1, "--method", "ft-m", "--out",
            "edit", "--overwrite", "--set", "steps")  # fmt: skip
    assert golden(*edit, 1) == 0
    texts = ("--metrics", "rewrite", "perplexity", "--text", "text.txt")
    command = ("evaluate", "model", "facts.jsonl", "--delta", "edit", *texts, "--statistics",
               "text.txt", "--out", "run")  # fmt: skip
    interrupted(monkeypatch, *command)
    recorded = yaml.safe_load((here / "run.part" / "config.yaml").read_text())["inputs"]
    assert set(recorded) == {"delta", "text", "statistics"}
    assert recorded["text"] == hashlib.sha256(TEXT.encode()).hexdigest()

    def refused(what: str) -> None:
        capsys.readouterr()
        assert golden(*command) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert f"has other settings: inputs.{what}: {recorded[what][:57]}... -> " in said, said

    (here / "text.txt").write_text(TEXT + "More of it.")
    refused("text")
    (here / "text.txt").write_text(TEXT)
    assert golden(*edit, 2) == 0
    refused("delta")
    assert golden(*edit, 1) == 0  # the same again
    assert golden(*command) == 0
    assert "resumed" in (here / "run" / "log.txt").read_text("utf-8")
    # A repetition of the finished run says so.
    (here / "text.txt").write_text(TEXT + "More of it.")
    capsys.readouterr()
    assert golden("run", "run", "--out", "again") == 0
    said = capsys.readouterr().err
    assert "what --text names has changed" in said and "what --delta names" not in said


def test_an_unfinished_run_of_a_version_that_hashed_no_files_is_gone_on_with(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("evaluate", "model", "facts.jsonl", "--metrics", "rewrite", "perplexity", "--text",
               "text.txt", "--out", "run")  # fmt: skip
    interrupted(monkeypatch, *command)
    config = here / "run.part" / "config.yaml"
    record = yaml.safe_load(config.read_text())
    assert record.pop("inputs")
    config.write_text(yaml.safe_dump(record))
    assert golden(*command) == 0
    assert "resumed" in (here / "run" / "log.txt").read_text("utf-8")


def test_a_sweep_notices_other_statistics(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ("sweep", "model", "facts.jsonl", "--method", "ft-m", "--layers", "0", "--set",
               "steps", 1, "--statistics", "text.txt", "--out", "run")  # fmt: skip
    assert golden(*command) == 0
    (here / "text.txt").write_text(TEXT + "More of it.")
    assert golden(*command) == 2
    assert "other settings: content of statistics: " in " ".join(capsys.readouterr().err.split())
    (here / "run").rename(here / "run.part")
    assert golden(*command) == 2
    assert "inputs.statistics" in capsys.readouterr().err
    (here / "text.txt").write_text(TEXT)
    assert golden(*command) == 0


def test_a_finished_sweep_is_known_from_another_directory(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--method", "ft-m", "--layers", "0-1", "--set", "steps", 1, "--out")
    assert golden("sweep", "model", "facts.jsonl", *more, "run") == 0
    monkeypatch.chdir(here / "deeper")
    capsys.readouterr()
    assert golden("sweep", "../model", "../facts.jsonl", *more, "../run") == 0
    assert "is finished already" in capsys.readouterr().err
    # One of an earlier version, with the paths as they were typed.
    config = here / "run" / "config.yaml"
    record = yaml.safe_load(config.read_text())
    record["settings"] |= {"model": "model", "data": "facts.jsonl"}
    config.write_text(yaml.safe_dump(record))
    assert golden("sweep", "../model", "../facts.jsonl", *more, "../run") == 2
    assert "other settings: model: model ->" in capsys.readouterr().err
    monkeypatch.chdir(here)
    assert golden("sweep", "model", "facts.jsonl", *more, "run") == 0
    assert "is finished already" in capsys.readouterr().err


def test_absolute_paths_keep_names_and_what_is_not_there(here: Path, models: Path) -> None:
    # As the hub's cache has it: a link whose target's name says nothing.
    (here / "deeper" / "blob").write_bytes(b"x")
    (here / "m.gguf").symlink_to("deeper/blob")
    assert absolute("m.gguf") == str(here / "m.gguf")
    assert absolute("deeper/../text.txt") == absolute(here / "text.txt") == str(here / "text.txt")
    assert absolute(".") == str(here) and absolute("deeper/..") == str(here)
    assert absolute("nothing") == "nothing" and absolute("a\0b") == "a\0b"
    assert absolute_model("model") == str(here / "model")
    (here / "smollm2-135m").mkdir()
    (here / "owner").mkdir()
    for name in ("smollm2-135m", "SmolLM2_135M", "openai-community/gpt2", "owner/name", ""):
        assert absolute_model(name) == name
    (here / "owner" / "name").mkdir()  # found there before the hub is asked
    assert absolute_model("owner/name") == str(here / "owner" / "name")
    assert absolute_data("facts.jsonl") == str(here / "facts.jsonl")
    assert absolute_data("known:facts.jsonl") == f"known:{here / 'facts.jsonl'}"
    for name in ("starter", "hub:owner/name", "known:nothing.json", "nothing:facts.jsonl"):
        assert absolute_data(name) == name
    (here / "model.txt").write_text("x")
    assert absolute_text("text.txt") == str(here / "text.txt")
    for name in ("model", "none", "hub:wikitext"):
        assert absolute_text(name) == name


def test_every_path_of_a_recorded_config_is_made_absolute(here: Path) -> None:
    record = {"model": "model", "text": "text.txt", "delta": None, "set": {"steps": "text.txt"}}
    found = with_absolute_paths(options_of("evaluate"), record)
    assert found["text"] == str(here / "text.txt") and found["delta"] is None
    assert found["set"] == record["set"]
    assert "text" not in with_absolute_paths(options_of("locate"), {"method": "lga"})
    found = with_absolute_paths(
        options_of("compare"), {"sweep": Path("deeper"), "with_": [Path("text.txt")]}
    )
    assert found == {"sweep": str(here / "deeper"), "with_": [str(here / "text.txt")]}
