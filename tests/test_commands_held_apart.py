"""Proxy and test facts from one file: ``--apart-from``, from the sweep to the comparison."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from families import save, tiny

from goldenlayers.cli import main
from goldenlayers.store import RunFolder

PLACES = ("France", "Italy", "Brazil", "Japan", "China", "Spain", "Peru", "Norway")


def rows_of(places: tuple[str, ...] = PLACES) -> list[dict[str, Any]]:
    """Two facts about each place; the subject of the second is written otherwise."""
    return [
        row
        for i, place in enumerate(places)
        for row in (
            {"id": f"a{i}", "subject": place, "prompt": f"The capital of {place} is",
             "target_new": "Ulm"},
            {"id": f"b{i}", "subject": place.upper(), "prompt": f"The river of {place.upper()} is",
             "target_new": "Po"},
        )
    ]  # fmt: skip


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("apart") / "model"
    save(tiny("llama"), folder)
    return folder


@pytest.fixture
def place(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: facts, and a sweep ``s`` over three of them."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "facts.jsonl", rows_of())
    assert golden("sweep", model, "facts.jsonl", *SWEEP, "--limit", 3, "--out", "s") == 0
    return tmp_path


SWEEP = ("--method", "ft-m", "--set", "steps", 1, "--metrics", "rewrite", "--layers", "0-1")
LOCATE = ("--bootstrap", 0)


def golden(*arguments: object) -> int:
    return main([str(a) for a in arguments])


def facts_of(run: str, rows: str) -> set[str]:
    return {str(row["fact"]) for row in RunFolder.open(run).rows(rows)}


def test_from_the_sweep_to_the_comparison(
    place: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    test = facts_of("s", "scores.jsonl")
    assert len(test) == 3
    locate = ("locate", model, "facts.jsonl", *LOCATE, "--limit", 100)
    assert golden(*locate, "--apart-from", "s", "--out", "l") == 0
    proxy = facts_of("l", "per_fact.jsonl")
    both = {name for one in test for name in (f"a{one[1:]}", f"b{one[1:]}")}
    assert proxy == {row["id"] for row in rows_of()} - both and len(proxy) >= 10
    said = capsys.readouterr().err
    assert f"{len(proxy)} of the 16 facts of facts are apart from s" in said
    assert golden("compare", "s", "--with", "l", "--repeats", 2) == 0
    assert "too good" not in capsys.readouterr().err
    # The control: the whole file holds the sweep's facts.
    assert golden(*locate, "--out", "all") == 0
    assert golden("compare", "s", "--with", "all", "--repeats", 2) == 2
    # --limit draws from what is left, and a sweep can be apart from several runs.
    some = ("--apart-from", "s", "l", "--out", "rest")
    assert golden("sweep", model, "facts.jsonl", *SWEEP, *some) == 2
    said = capsys.readouterr().err
    assert "all 16 facts of facts are facts of s, l, or about their subjects" in said
    few = ("locate", model, "facts.jsonl", *LOCATE, "--limit", 4, "--apart-from", "s")
    assert golden(*few, "--out", "few") == 0
    four = facts_of("few", "per_fact.jsonl")
    assert len(four) == 4 and four < proxy
    some = ("--apart-from", "s", "few", "--out", "t")
    assert golden("sweep", model, "facts.jsonl", *SWEEP, *some) == 0
    assert not facts_of("t", "scores.jsonl") & (four | both)
    # A run is repeated with the same facts.
    assert golden("run", "few", "--out", "again") == 0
    assert facts_of("again", "per_fact.jsonl") == four


def test_other_data_about_the_same_subjects(place: Path, model: Path) -> None:
    taken = {PLACES[int(one[1:])] for one in facts_of("s", "scores.jsonl")}
    rows = [
        {"id": f"x{i}", "subject": name.lower(), "prompt": f"The sea of {name.lower()} is",
         "target_new": "Red"}
        for i, name in enumerate(PLACES)
    ]  # fmt: skip
    write(place / "other.jsonl", rows)
    locate = ("locate", model, "other.jsonl", *LOCATE, "--apart-from", "s", "--out", "l")
    assert golden(*locate) == 0
    left = {PLACES[int(one[1:])] for one in facts_of("l", "per_fact.jsonl")}
    assert left == set(PLACES) - taken and left


def test_facts_without_ids_are_no_others_of_the_same_number(place: Path, model: Path) -> None:
    rows = [{k: v for k, v in row.items() if k != "id"} for row in rows_of()]
    write(place / "first.jsonl", rows[:6])
    write(place / "second.jsonl", rows[6:])
    locate = ("locate", model, "second.jsonl", *LOCATE)
    assert golden("locate", model, "first.jsonl", *LOCATE, "--out", "one") == 0
    assert golden(*locate, "--apart-from", "one", "--out", "two") == 0
    assert len(facts_of("two", "per_fact.jsonl")) == 10
    assert facts_of("one", "per_fact.jsonl") < facts_of("two", "per_fact.jsonl")


def test_what_cannot_be_left_out_is_one_message(
    place: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    locate = ("locate", model, "facts.jsonl", *LOCATE, "--apart-from")
    edit = ("--facts", "facts.jsonl", "--limit", 1, "--method", "ft-m", "--layer", 1)
    assert golden("edit", model, *edit, "--set", "steps", 1, "--out", "e") == 0
    assert golden("locate", model, "facts.jsonl", "--method", "middle", "--out", "mid") == 0
    capsys.readouterr()
    for run, words in (
        ("nowhere", "there is no"),
        ("e", "is a run of 'edit'. Expected a run of golden locate, sweep or evaluate"),
    ):
        assert golden(*locate, run) == 2
        assert words in " ".join(capsys.readouterr().err.split())
    assert golden(*locate, "mid") == 0
    assert "looked at no facts" in capsys.readouterr().err
    write(place / "here.jsonl", rows_of())
    here = ("locate", model, "here.jsonl", *LOCATE, "--apart-from", "s")
    write(place / "facts.jsonl", rows_of()[2:])
    assert golden(*here) == 2
    assert "facts.jsonl has changed since" in capsys.readouterr().err
    (place / "facts.jsonl").unlink()
    assert golden(*here) == 2
    assert "cannot be loaded, so their subjects are not known" in capsys.readouterr().err


def test_a_sweep_goes_on_only_with_the_same_facts_left_out(
    place: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ("locate", model, "facts.jsonl", *LOCATE, "--out", "l", "--overwrite", "--limit")
    assert golden(*few, 2) == 0
    sweep = ("sweep", model, "facts.jsonl", *SWEEP, "--apart-from", "l", "--limit", 2, "--out", "t")

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("goldenlayers.sweeping.sweep", killed)
        assert golden(*sweep) == 130
    assert golden(*few, 4) == 0
    assert golden(*sweep) == 2
    assert "other settings: inputs.apart_from" in " ".join(capsys.readouterr().err.split())
    assert golden(*few, 2) == 0
    assert golden(*sweep) == 0
    # The finished one, too.
    assert golden(*sweep) == 0
    assert golden(*few, 4) == 0
    assert golden(*sweep) == 2
    assert "content of apart_from" in capsys.readouterr().err


def test_a_sweep_of_a_version_without_the_setting_is_known(
    place: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = place / "s" / "config.yaml"
    record = yaml.safe_load(config.read_text())
    assert record["settings"].pop("apart_from") == []
    config.write_text(yaml.safe_dump(record))
    sweep = ("sweep", model, "facts.jsonl", *SWEEP, "--limit", 3, "--out", "s")
    assert golden(*sweep) == 0
    assert "is finished already" in capsys.readouterr().err
    (place / "s").rename(place / "s.part")  # as if it had been cut short
    assert golden(*sweep) == 0
    assert "Going on with" in capsys.readouterr().err
    assert golden(*sweep, "--apart-from", "s") == 2  # but what is set counts
