"""``golden study``: whole studies as ordinary run folders, resumable, with one table."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from alike import alike
from families import save, tiny
from sweep_helpers import canonical, some_facts
from tokenizers_built import chatting

import goldenlayers as gl
from goldenlayers import durable
from goldenlayers.cli import main
from goldenlayers.editors import EDITORS, Rome
from goldenlayers.errors import UserError
from goldenlayers.evaluation.summary import fact_scores, overall_by_fact
from goldenlayers.store import RunFolder
from goldenlayers.studying import EXAMPLE, Study, study
from goldenlayers.studying.cell import layers_named
from goldenlayers.sweeping import cells
from goldenlayers.truth import Truth, noise_floor

FILE: dict[str, Any] = {
    "models": ["model"],
    "data": ["facts.jsonl"],
    "editors": ["rome", "r-rome", "in-context"],
    "settings": {"steps": 2, "prefixes": 1, "prefix_tokens": 4},
    "facts": {"test": 4, "proxy": 2},
    "methods": ["lga"],
}
RUNS = ("rome", "r-rome", "in-context", "locate/lga", "compare/rome", "compare/r-rome")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and facts, and a whole study in ``whole``."""
    folder = tmp_path_factory.mktemp("study")
    save(tiny("llama"), folder / "model")
    rows = [
        {
            "id": f.id, "subject": f.subject, "prompt": f.prompt, "target_new": f.target,
            "target_old": f.target_old, "rephrasings": list(f.rephrasings),
            "locality": [{"prompt": p.prompt, "answer": p.answer} for p in f.locality],
        }
        for f in some_facts(6)
    ]  # fmt: skip
    (folder / "facts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert golden(folder, "whole") == 0
    return folder


def golden(place: Path, out: str, *more: str, **changes: Any) -> int:
    """``golden study`` of ``FILE`` with some of its keys changed."""
    (place / "study.yaml").write_text(json.dumps(FILE | changes))  # which is YAML, too
    cache = ("--cache-dir", str(place / "cache"))
    return main(["study", str(place / "study.yaml"), "--out", str(place / out), *cache, *more])


def rows_of(place: Path, out: str, run: str) -> list[dict[str, Any]]:
    return durable.read_rows(place / out / "model" / "facts" / run / "scores.jsonl")


def summary_of(place: Path, out: str) -> dict[str, Any]:
    return json.loads((place / out / "study" / "summary.json").read_text())


def no_loading(*_: Any, **__: Any) -> Any:
    raise AssertionError("a model is loaded")


# --- what comes out


def test_ordinary_run_folders_and_a_table(place: Path, capsys: pytest.CaptureFixture[str]):
    cell = place / "whole" / "model" / "facts"
    for run in RUNS:
        command = {"in-context": "evaluate"}.get(run, run.split("/")[0] if "/" in run else "sweep")
        assert RunFolder.open(cell / run).kind == command
    test = {row["fact"] for row in rows_of(place, "whole", "rome")}
    proxy = {row["fact"] for row in durable.read_rows(cell / "locate/lga/per_fact.jsonl")}
    assert len(test) == 4 and len(proxy) == 2 and not test & proxy
    page = (place / "whole" / "study" / "table.md").read_text()
    for words in ("| rome | golden |", "| in-context | – |", "noise floor", "random layer"):
        assert words in page

    # The commands take them for their own.
    common = ["--cache-dir", str(place / "cache"), "--limit", "4", "--skip-invalid"]
    common += ["--set", "steps", "2", "prefixes", "1", "prefix_tokens", "4"]
    names = [str(place / "model"), str(place / "facts.jsonl")]
    assert main(["sweep", *names, *common, "--out", str(cell / "rome")]) == 0
    assert "is finished already" in capsys.readouterr().err
    own = place / "whole" / "own"
    assert main(["sweep", *names, *common, "--out", str(own), "--method", "r-rome"]) == 0
    assert canonical(durable.read_rows(own / "scores.jsonl")) == alike(
        canonical(rows_of(place, "whole", "r-rome"))
    )
    assert main(["compare", str(cell / "rome"), "--with", str(cell / "locate/lga")]) == 0
    capsys.readouterr()
    assert main(["run", str(place / "whole" / "study")]) == 2
    assert "golden study FILE repeats" in capsys.readouterr().err


def test_the_figures_are_those_of_the_rows(place: Path):
    found = summary_of(place, "whole")
    truth = Truth.from_rows(rows_of(place, "whole", "rome"))
    golden_layer = truth.golden_layer()
    (rome,) = [one for one in found["means"] if (one["editor"], one["at"]) == ("rome", "golden")]
    at = [row for row in rows_of(place, "whole", "rome") if row["layer"] == golden_layer]
    for metric in ("rewrite", "locality"):
        mean = np.nanmean(list(fact_scores(at, metric).values()))
        assert rome["metrics"][metric]["value"] == pytest.approx(mean)
    means = [truth.means(metric)[truth.layers.index(golden_layer)] for metric in truth.harmonic_of]
    harmonic = rome["metrics"]["harmonic"]
    assert harmonic["value"] == pytest.approx(len(means) / sum(1 / mean for mean in means))
    assert harmonic["low"] <= harmonic["value"] <= harmonic["high"]
    assert "harmonic" not in found["means_against_first"][0]["metrics"]
    bare = overall_by_fact(rows_of(place, "whole", "in-context"))
    edited = overall_by_fact(at)
    (apart,) = [
        one
        for one in found["means_against_first"]
        if (one["editor"], one["at"]) == ("in-context", "golden")
    ]
    wanted = np.mean([bare[fact] - edited[fact] for fact in edited])
    assert apart["metrics"]["overall"]["value"] == pytest.approx(wanted)
    assert wanted != 0 and apart["metrics"]["overall"]["low"] <= wanted
    (row,) = [one for one in found["choices"]["rows"] if one["editor"] == "rome"]
    for name in ("oracle", "random layer", "published", "middle", "lga mlp sequence tukey"):
        one = row["choices"][name]
        if one["layer"] is not None:
            regret = truth.regret(one["layer"]).value
            assert one["regret"]["value"] == pytest.approx(regret)
    random = np.mean([truth.regret(layer).value for layer in truth.layers])
    assert row["choices"]["random layer"]["regret"]["value"] == pytest.approx(random)
    assert found["left"] == [] and found["failed"] == {}


def test_the_noise_floor_is_what_luck_alone_makes():
    """Against a plain loop; and it is nothing where one layer is better for every fact."""
    rng = np.random.default_rng(0)
    table = rng.normal(50, 20, (12, 5))
    truth = Truth(tuple(f"f{i}" for i in range(12)), tuple(range(5)), {"overall": table})
    best, lost = truth.layers.index(truth.golden_layer()), []
    for _ in range(4000):
        means = table[rng.integers(12, size=12)].mean(0)
        lost.append(means.max() - means[best])
    assert noise_floor(truth) == pytest.approx(np.mean(lost), rel=0.1) and np.mean(lost) > 0.5
    table[:, 3] = 200
    assert noise_floor(truth) == 0


# --- going on


def test_what_is_finished_is_not_done_again(place: Path, monkeypatch: pytest.MonkeyPatch):
    files = [place / "whole/model/facts" / run / "config.yaml" for run in RUNS]
    before = [file.stat().st_mtime_ns for file in files]
    monkeypatch.setattr("goldenlayers.models.load", no_loading)
    old = summary_of(place, "whole")
    assert golden(place, "whole") == 0
    assert [file.stat().st_mtime_ns for file in files] == before
    assert summary_of(place, "whole") == old


@pytest.mark.parametrize("last", [1, 6])
def test_interrupted_and_gone_on_with(place: Path, last: int, monkeypatch: Any, capsys: Any):
    out = f"interrupted-{last}"
    real, done = cells.Runner.run, []

    def run(self: Any, task: Any) -> Any:
        if len(done) == last:
            raise KeyboardInterrupt
        done.append((self.job.editor.name, task))
        return real(self, task)

    with monkeypatch.context() as patch:
        patch.setattr(cells.Runner, "run", run)
        assert golden(place, out) == 130
    assert rows_of(place, out, "rome.part") and not (place / out / "model/facts/rome").exists()
    again = []

    def count(self: Any, task: Any) -> Any:
        again.append((self.job.editor.name, task))
        return real(self, task)

    monkeypatch.setattr(cells.Runner, "run", count)
    assert golden(place, out) == 0
    assert not set(done) & set(again) and len(done) + len(again) == 8
    for name in ("rome", "r-rome"):
        rows = rows_of(place, out, name)
        assert canonical(rows) == alike(canonical(rows_of(place, "whole", name)))
    for part in ("means", "means_against_first", "choices"):
        assert summary_of(place, out)[part] == alike(summary_of(place, "whole")[part])


def test_minutes(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    with monkeypatch.context() as patch:
        patch.setattr("goldenlayers.models.load", no_loading)
        assert golden(place, "timed", "--minutes", "0") == 3
    said = capsys.readouterr()
    assert "The time is over" in said.err and "Left: 4 runs: model/facts/rome" in said.out
    ticks = iter(range(100))
    monkeypatch.setattr("goldenlayers.studying.time.monotonic", lambda: 60.0 * next(ticks))
    assert golden(place, "timed", "--minutes", "4") == 3
    rows = rows_of(place, "timed", "rome.part")
    assert {row["layer"] for row in rows} and len({row["layer"] for row in rows}) < 4
    assert summary_of(place, "timed")["left"][0] == "model/facts/rome"
    monkeypatch.undo()
    assert golden(place, "timed", "--only", "/in-context") == 3  # the others are left
    assert summary_of(place, "timed")["left"] == [
        f"model/facts/{run}" for run in ("rome", "r-rome", "locate/lga")
    ]
    assert golden(place, "timed") == 0
    assert canonical(rows_of(place, "timed", "rome")) == alike(
        canonical(rows_of(place, "whole", "rome"))
    )


def test_an_editor_that_fails_is_told_and_the_others_go_on(place: Path, capsys: Any):
    class Failing(Rome):
        name = "failing"

        def together(self, work: Any, facts: Any) -> Any:
            raise UserError("it never works")

        def each(self, work: Any, facts: Any) -> Any:
            raise UserError("it never works")

    class Broken(Failing):
        name = "broken"

        def each(self, work: Any, facts: Any) -> Any:
            raise ZeroDivisionError("a defect")

    EDITORS.register("failing", Failing)
    EDITORS.register("broken", Broken)
    try:
        some: dict[str, Any] = {"editors": ["rome", "failing", "broken"], "methods": []}
        assert golden(place, "failing", layers=[1], **some) == 3
        found = summary_of(place, "failing")
        assert found["left"] == ["model/facts/failing", "model/facts/broken"]
        assert "it never works" in found["failed"]["model/facts/failing"]
        assert "ZeroDivisionError" in found["failed"]["model/facts/broken"]
        assert [one["editor"] for one in found["means"]] == ["rome"]
        assert "failed: it never works" in capsys.readouterr().err
        log = (place / "failing/model/facts/broken.part/log.txt").read_text()
        assert "a defect" in log and "Traceback" in log
    finally:
        EDITORS.unregister("failing")
        EDITORS.unregister("broken")


def test_two_studies_in_one_folder(place: Path, capsys: pytest.CaptureFixture[str]):
    with RunFolder.create(place / "busy" / "study", {"command": "study"}):
        assert golden(place, "busy") == 2
    assert "is being written by another run (process" in capsys.readouterr().err


def test_in_a_chat(place: Path, capsys: pytest.CaptureFixture[str]):
    save(tiny("llama"), place / "talker")
    chatting().save_pretrained(place / "talker")
    both = [{"model": "talker", "chat": True}, {"model": "talker", "name": "plain"}]
    some: dict[str, Any] = {"editors": ["rome", "in-context"], "layers": [1], "methods": []}
    some["facts"] = {"test": 2}
    assert golden(place, "chats", models=both, **some) == 0
    for model, chat in (("talker", True), ("plain", False)):
        for run in some["editors"]:
            record = RunFolder.open(place / "chats" / model / "facts" / run).config["settings"]
            assert record.get("chat", False) is chat
    scores = [(place / "chats" / m / "facts/rome/scores.jsonl") for m in ("talker", "plain")]
    assert scores[0].read_text("utf-8") != scores[1].read_text("utf-8")
    capsys.readouterr()
    sweep = ["sweep", place / "talker", place / "facts.jsonl", "--limit", 2, "--skip-invalid"]
    sweep += ["--set", "steps", 2, "prefixes", 1, "prefix_tokens", 4, "--layers", 1, "--chat"]
    sweep += ["--cache-dir", place / "cache", "--out", place / "chats/talker/facts/rome"]
    assert main(list(map(str, sweep))) == 0
    assert "is finished already" in capsys.readouterr().err
    both[0]["chat"] = False
    assert golden(place, "chats", models=both, chat=True, **some) == 2
    assert "other settings: chat: True -> False" in capsys.readouterr().err


# --- what is refused, before any model is loaded


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"editor": ["rome"]}, "unknown key 'editor'. Did you mean 'editors'"),
        ({"models": []}, "names no models"),
        ({"editors": ["rom"]}, "unknown editor 'rom'. Did you mean"),
        ({"editors": [{"editor": "rome", "setting": {}}]}, "Did you mean 'settings'"),
        ({"editors": ["rome", "Rome"]}, "unknown editor 'Rome'"),
        ({"editors": ["rome", "rome"]}, "two editors are called 'rome'"),
        ({"editors": [{"editor": "rome", "settings": {"stepz": 1}}]}, "no setting 'stepz'"),
        ({"editors": [{"editor": "rome", "name": "study"}]}, "'study' cannot name a folder"),
        ({"settings": {"stepz": 1}}, "no editor of the study has 'stepz'"),
        ({"settings": {"steps": 0}}, "steps is 0"),
        ({"methods": ["lgb"]}, "unknown method 'lgb'"),
        ({"methods": [{"method": "lga", "settings": {"reach": True}}]}, "reach is for the method"),
        ({"layers": [9]}, "the layer is 9, and the model has 4 layers"),
        ({"layers": ["1/0"]}, "'1/0' is no layer"),
        ({"layers": ["3/2"]}, "'3/2' is no layer"),
        ({"layers": []}, "there are none"),
        ({"facts": {"test": 0}}, "test is 0"),
        ({"facts": {"tests": 1}}, "Did you mean 'test'"),
        ({"facts": {"test": 6}}, "none about other subjects"),
        ({"data": ["nothing.jsonl"]}, "nothing.jsonl"),
        ({"models": [{"model": "model", "data": ["fact"]}]}, "no data 'fact'. Did you mean"),
        ({"models": ["smollm2-135n"]}, "Unknown model 'smollm2-135n'. Expected"),
        ({"statistics": "nothing.txt"}, "no text nothing.txt for the statistics"),
        ({"dtype": "float31"}, "unknown dtype 'float31'"),
        ({"metrics": ["rewrit"]}, "rewrit"),
        ({"chat": "yes"}, "'chat' is 'yes'. Expected true or false"),
        ({"seed": "x"}, "'seed' is 'x'. Expected a whole number"),
    ],
)
def test_bad_files(place: Path, changes: Any, words: str, monkeypatch: Any, capsys: Any):
    monkeypatch.setattr("goldenlayers.models.load", no_loading)
    assert golden(place, "bad", **changes) == 2
    assert words in " ".join(capsys.readouterr().err.split())
    assert not any((place / "bad").glob("model/**/*"))


def test_what_else_is_refused(place: Path, monkeypatch: Any, capsys: Any):
    monkeypatch.setattr("goldenlayers.models.load", no_loading)
    assert golden(place, "whole", settings={"steps": 3, "prefixes": 1, "prefix_tokens": 4}) == 2
    assert "holds a run with other settings: set:" in capsys.readouterr().err
    assert golden(place, "whole", layers=[0, 1]) == 2
    assert "holds a finished sweep of other layers: all" in capsys.readouterr().err
    assert golden(place, "whole", "--only", "nowhere") == 2
    assert "no run of the study has 'nowhere'" in capsys.readouterr().err
    assert golden(place, "whole/model/facts/rome") == 2
    assert "is itself a run" in capsys.readouterr().err
    assert main(["study", "--out", "x"]) == 2
    assert "FILE is missing" in capsys.readouterr().err
    before = os.listdir(place / "whole")
    assert golden(place, "whole", data=[]) == 2 and os.listdir(place / "whole") == before


# --- the file


def test_names_never_leave_the_folder(place: Path):
    record = FILE | {
        "models": [{"model": "model", "name": "../../a b"}],
        "data": [{"data": "facts.jsonl", "name": "/etc/passwd"}],
        "editors": [{"editor": "rome", "name": "x.part"}],
    }
    found = Study.of(record, place)
    assert found.models[0].name == "a-b" and found.data[0].name == "etc-passwd"
    assert found.editors[0].name == "x-part"
    assert found.models[0].source == str(place / "model")
    with pytest.raises(UserError, match="cannot name a folder"):
        Study.of(record | {"models": [{"model": "model", "name": ".."}]}, place)


def test_the_example_and_the_studies_of_the_repository(tmp_path: Path, capsys: Any):
    assert main(["study", "--example"]) == 0
    assert capsys.readouterr().out == EXAMPLE
    (tmp_path / "study.yaml").write_text(EXAMPLE)
    found = Study.read(tmp_path / "study.yaml")
    rome, memit, told = found.editors
    assert rome.editor == Rome(steps=10, prefixes=2) and memit.name == "memit-3"
    assert getattr(memit.editor, "layers_before", 0) == 3 and told.settings == {}
    assert found.counts(found.models[0], found.data[0]) == (40, 100)
    assert found.counts(found.models[1], found.data[0]) == (12, 100)
    assert [one.name for one in found.data_of(found.models[1])] == ["starter"]
    assert [one.name for one in found.methods] == ["lga", "transfer-align"]


def test_layers_by_words():
    words = ("1/6", "1/3", "1/2", "-1")
    assert layers_named(words, 18) == {"1/6": 3, "1/3": 6, "1/2": 9, "-1": 17}
    assert layers_named(words, 30) == {"1/6": 5, "1/3": 10, "1/2": 15, "-1": 29}
    for n_layers in range(1, 48):  # a share is rounded as the published depth is
        named = layers_named(("1/6",), n_layers)
        assert named["1/6"] == layers_named(("published",), n_layers)["published"]
    assert layers_named(("every 3",), 7) == {"0": 0, "3": 3, "6": 6}
    assert layers_named(("1/2", "middle", "2"), 4) == {"1/2": 2}  # one layer, named once
    with pytest.raises(UserError, match="the layer is -5"):
        layers_named(("-5",), 4)


def test_from_python(place: Path):
    found = gl.study(Study.of(FILE, place), place / "whole", cache_dir=place / "cache")
    assert found.left == () and found.failed == {} and found.folder == place / "whole" / "study"
    assert found.summary["editors"] == ["rome", "r-rome", "in-context"]
    assert study is gl.study
