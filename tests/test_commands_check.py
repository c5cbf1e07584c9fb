"""``golden edit`` and the check of what it did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from families import build
from tokenizers_built import TOKENIZERS

from goldenlayers import checking
from goldenlayers.checking import Check
from goldenlayers.checking.probes import KEEP
from goldenlayers.cli import main
from goldenlayers.store import RunFolder

FLAGS = ("--subject", "Italy", "--prompt", "The capital of {} is", "--target", "Paris")
QUICK = ("--layer", 1, "--statistics", "none", "--set", "steps", 2, "prefixes", 1)
FACTS = [
    {"subject": "Italy", "prompt": "The capital of Italy is", "target_new": "Paris"},
    {"subject": "Toko", "prompt": "Toko plays the", "target_new": "piano"},
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT-2 in ``model``, facts in ``facts.jsonl`` and prompts to keep in ``keep.txt``."""
    folder = tmp_path_factory.mktemp("checked")
    build("gpt2").save_pretrained(folder / "model")
    TOKENIZERS["byte_level_bpe"]().save_pretrained(folder / "model")
    rows = "".join(json.dumps(row) + "\n" for row in FACTS)
    (folder / "facts.jsonl").write_text(rows, encoding="utf-8")
    (folder / "keep.txt").write_text("\ufeffBerlin lies in\n\n Anna sings the \n", "utf-8")
    return folder


def golden(place: Path, capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str]:
    capsys.readouterr()
    status = main([str(a) for a in ("edit", place / "model", *arguments, *QUICK)])
    printed = capsys.readouterr()
    return status, printed.out + printed.err


def prompts(found: Check, part: str) -> list[str]:
    return [one.prompt for one in found.probes if one.part == part]


def test_the_users_probes_are_asked_as_given_and_kept_with_the_run(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    own = ("--rephrase", "{} has the capital", "--rephrase", "Say the capital of Italy:")
    keep = ("--keep", "The capital of Spain is", "--keep-file", place / "keep.txt")
    status, said = golden(place, capsys, *FLAGS, *own, *keep, "--out", out)
    assert status == 0, said
    found = Check.load(out)
    assert prompts(found, "rephrase") == ["Italy has the capital", "Say the capital of Italy:"]
    kept = ["The capital of Spain is", "Berlin lies in", "Anna sings the"]
    assert prompts(found, "neighbours") == kept
    record = RunFolder.open(out).json("check.json")  # held to the hash in the run's record
    assert record == found.to_json() and not record["neighbours"]["made"]
    assert record["verdict"] == "did not take" and "Verdict: did not take" in said
    assert "neighbours " in said and "neighbours (made)" not in said and "prompts (made)" in said
    settings = yaml.safe_load((out / "config.yaml").read_text("utf-8"))["settings"]
    assert settings["keep"] == kept and settings["keep_file"] is None
    assert main(["run", str(out), "--out", str(tmp_path / "again")]) == 0
    assert Check.load(tmp_path / "again") == found
    (out / "check.json").write_text(json.dumps({**record, "verdict": "good"}), "utf-8")
    with pytest.raises(Exception, match="verdict"):
        Check.load(out)


def test_what_a_check_asked_is_scored_again(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = tmp_path / "run", tmp_path / "scores"
    facts = ("--facts", place / "facts.jsonl", "--method", "ft-m", "--set", "steps", "25")
    given = ["edit", place / "model", *facts, "ft_lr", "0.05", "--layer", 1, "--out", run]
    assert main(list(map(str, given))) == 0
    found = Check.load(run)
    again = ["evaluate", place / "model", run / "check.json", "--delta", run, "--out", out]
    assert main(list(map(str, again))) == 0, capsys.readouterr().err
    rows = [json.loads(line) for line in (out / "scores.jsonl").read_text("utf-8").splitlines()]
    names = {"rewrite": ("prompt",), "rephrase": ("rephrase",), "locality": KEEP}
    asked = 0
    for fact in found.edited:
        for metric, parts in names.items():
            mine = [r for r in rows if (r["fact"], r["metric"]) == (fact.id, metric)]
            probes = [p for p in found.probes if p.fact == fact.id and p.part in parts]
            kept = [p.ok and p.tie is None for p in probes]  # none that it wavers between
            assert [row["score"] == 100 for row in mine] == kept
            asked += len(mine)
    assert asked == len(found.probes) and 0 < sum(one.ok for one in found.probes) < asked


@pytest.mark.parametrize("mode", ["batch", "sequential"])
def test_every_fact_of_a_file_is_checked_under_the_whole_edit(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], mode: str
) -> None:
    out = tmp_path / "run"
    facts = ("--facts", place / "facts.jsonl", "--keep", "Berlin lies in", "--mode", mode)
    status, said = golden(place, capsys, *facts, "--method", "emmet", "--out", out)
    assert status == 0, said
    found = Check.load(out)
    assert found.n_edited == 2 == len({one.fact for one in found.probes})
    assert prompts(found, "neighbours") == ["Berlin lies in"] * 2
    first, second = (one for one in found.probes if one.prompt == "Berlin lies in")
    assert (first.before, first.after) == (second.before, second.after)  # one edit, one model
    assert found.share("rephrase").made and "rephrasings (made)" in said


def test_no_check_asks_nothing(
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError("it was checked")

    monkeypatch.setattr(checking, "check", never)
    out = tmp_path / "run"
    status, said = golden(place, capsys, *FLAGS, "--no-check", "--out", out)
    assert status == 0, said
    assert not (out / "check.json").exists() and "Verdict" not in said
    with pytest.raises(AssertionError, match="it was checked"):
        golden(place, capsys, *FLAGS)


def test_a_check_that_fails_leaves_the_edit(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    keep = ("--keep", "long " * 3000)
    status, said = golden(place, capsys, *FLAGS, *keep, "--out", out)
    assert status == 0 and "the edit was not checked: " in said and "Verdict" not in said
    assert (out / "delta.json").exists() and not (out / "check.json").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("no memory is left")])
def test_an_edit_whose_check_is_cut_short_is_kept(
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
) -> None:
    def cut(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(checking, "check", cut)
    out = tmp_path / "run"
    if isinstance(error, KeyboardInterrupt):
        status, said = golden(place, capsys, *FLAGS, "--out", out)
        assert status == 130 and "it is saved to" in said
    else:
        with pytest.raises(RuntimeError, match="no memory"):
            golden(place, capsys, *FLAGS, "--out", out)
    assert RunFolder.open(out).kind == "edit" and (out / "delta.json").exists()
    assert not (out / "check.json").exists()


def test_a_prompt_to_keep_counts_once_beside_many_facts(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    keep = ("--keep", "Berlin lies in", "--method", "memit")
    status, said = golden(place, capsys, "--facts", place / "facts.jsonl", *keep, "--out", out)
    assert status == 0, said
    found = Check.load(out)
    assert prompts(found, "neighbours") == ["Berlin lies in"] * 2
    assert found.share("neighbours").n == 1


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ((*FLAGS, "--keep", "The capital of Italy is"), "is edited"),
        ((*FLAGS, "--rephrase", "Say {}:", "--keep", "Say Italy:"), "is edited"),
        ((*FLAGS, "--keep", "The capital of Italy  is "), "is edited"),
        ((*FLAGS, "--keep", "The capital of {} is"), "is edited"),
        ((*FLAGS, "--keep", " "), "empty"),
        ((*FLAGS, "--limit", "5"), "--limit is for --facts"),
        ((*FLAGS, "--skip-invalid"), "--skip-invalid is for --facts"),
        ((*FLAGS, "--rephrase", ""), "empty"),
        ((*FLAGS, "--no-check", "--keep", "Berlin lies in"), "--no-check"),
        ((*FLAGS, "--keep-file", "nothing.txt"), "--keep-file"),
        (("--facts", "facts.jsonl", "--rephrase", "Say {}:"), "--rephrase"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    place: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], what: str
) -> None:
    given = [str(place / a) if a == "facts.jsonl" else a for a in arguments]
    status, said = golden(place, capsys, *given)
    assert status == 2 and what in said and "Traceback" not in said
