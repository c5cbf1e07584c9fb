"""The command line from end to end on a tiny model directory and a few facts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from families import build
from tokenizers_built import TOKENIZERS

from goldenlayers import __version__
from goldenlayers.cli import main
from goldenlayers.commands import COMMANDS, options_of
from goldenlayers.commands.options import from_record, to_record
from goldenlayers.errors import UserError

ROWS = [
    {
        "id": "italy", "subject": "Italy", "prompt": "The capital of Italy is",
        "target_new": "Paris", "target_old": "Rome",
    },
    {"id": "toko", "subject": "Toko", "prompt": "Toko plays the", "target_new": "piano"},
    {
        "id": "gold", "subject": "gold", "prompt": "The symbol of gold is",
        "target_new": "Fe", "target_old": "Au",
    },
]  # fmt: skip


def write_facts(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Llama in ``model`` and three facts in ``facts.jsonl``."""
    folder = tmp_path_factory.mktemp("cli")
    build("llama").save_pretrained(folder / "model")
    TOKENIZERS["byte_level_bpe"]().save_pretrained(folder / "model")
    write_facts(folder / "facts.jsonl", ROWS)
    return folder


Golden = Callable[..., tuple[int, str, str]]


@pytest.fixture
def golden(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Golden:
    """``golden(*arguments)``: exit status, standard output, standard error."""
    monkeypatch.setenv("COLUMNS", "120")

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            status = main([str(a) for a in arguments])
        except SystemExit as stop:
            status = int(stop.code or 0)
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return status, out, err

    return run


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No time for drawing: the pictures' files, with nothing in them."""
    from goldenlayers.report import figures

    def draw(_ranking: Any, path: Path) -> None:
        for ending in (".svg", ".pdf", ".png"):
            path.with_suffix(ending).touch()

    monkeypatch.setattr(figures, "ranking_figure", draw)


@pytest.fixture
def located(place: Path, tmp_path: Path, golden: Golden, quick: None) -> Path:
    run = tmp_path / "run"
    status, *_ = golden("locate", place / "model", place / "facts.jsonl", "--out", run)
    assert status == 0
    return run


def files(run: Path) -> set[str]:
    return {p.name for p in run.iterdir()}


WHOLE = {"config.yaml", "log.txt", "ranking.json", "per_fact.jsonl"}
WHOLE |= {f"ranking.{ending}" for ending in ("svg", "pdf", "png")}


def test_locate_writes_the_run_folder(place: Path, tmp_path: Path, golden: Golden) -> None:
    run = tmp_path / "a" / "run"
    status, out, err = golden(
        "locate", place / "model", place / "facts.jsonl", "--out", run, "--batch-size", 2
    )
    assert status == 0
    assert files(run) == WHOLE and not run.with_name("run.part").exists()
    ranking = json.loads((run / "ranking.json").read_text())
    expected = {"schema", "method", "golden_layer", "candidates", "n_facts", "seconds",
                "peak_memory_bytes", "layers"}  # fmt: skip
    assert expected <= set(ranking)
    assert ranking["schema"] == 1 and ranking["method"] == "lga"
    assert ranking["n_facts"] == 3 and ranking["n_generated"] == 1
    assert len(ranking["layers"]) == 4
    assert {"layer", "score", "kept", "cosine", "wins"} <= set(ranking["layers"][0])
    rows = [json.loads(line) for line in (run / "per_fact.jsonl").read_text("utf-8").splitlines()]
    assert {row["fact"] for row in rows} == {"italy", "toko", "gold"}
    for row in rows:
        assert {"fact", "phi", "cosine", "old", "new", "old_is_generated"} <= set(row)
        assert len(row["phi"]) == len(row["cosine"]) == 4
        assert row["old_is_generated"] == (row["fact"] == "toko") and row["old"]
    for layer in range(4):
        total = sum(row["phi"][layer] for row in rows)
        assert ranking["layers"][layer]["score"] == pytest.approx(total)
    record = yaml.safe_load((run / "config.yaml").read_text())
    assert record["command"] == "locate" and record["version"]
    assert record["settings"]["batch_size"] == 2 and record["settings"]["seed"] == 0
    assert len(record["model"]["fingerprint"]) == 64 and len(record["data"]["sha256"]) == 64
    assert (run / "ranking.svg").read_text("utf-8").lstrip().startswith("<?xml")
    # The table goes to standard output, what happens to standard error.
    assert f"olden layer {ranking['golden_layer']} of 4" in out and "golden" in out
    assert str(run) in err and "Written" not in out
    assert "per_fact.jsonl" in err


def numbers(run: Path) -> dict[str, Any]:
    ranking = json.loads((run / "ranking.json").read_text())
    return {k: v for k, v in ranking.items() if k not in ("seconds", "peak_memory_bytes")}


def test_a_run_is_repeated_from_its_folder(located: Path, golden: Golden) -> None:
    status, _, err = golden("run", located)
    again = located.with_name("run-again")
    assert status == 0 and files(again) == WHOLE
    assert numbers(again) == numbers(located)
    assert "Warning: the" not in err
    # Also from its config.yaml, to a named place, and a second time.
    assert golden("run", located / "config.yaml", "--out", located.with_name("third"))[0] == 0
    assert numbers(located.with_name("third")) == numbers(located)
    assert golden("run", located)[0] == 0
    assert numbers(located.with_name("run-again-2")) == numbers(located)


def test_settings_are_repeated_and_differences_told(
    place: Path, tmp_path: Path, golden: Golden, quick: None
) -> None:
    facts = write_facts(tmp_path / "facts.jsonl", ROWS)
    run = tmp_path / "run"
    options = ["--scope", "down", "--loss", "answer", "--fence", "none", "--top-k", 2,
               "--bootstrap", 7, "--seed", 3, "--limit", 2, "--dtype", "float64"]  # fmt: skip
    assert golden("locate", place / "model", facts, *options, "--out", run)[0] == 0
    assert numbers(run)["bootstrap"] == 7 and len(numbers(run)["candidates"]) == 2
    assert numbers(run)["n_facts"] == 2
    assert golden("run", run, "--out", tmp_path / "same")[0] == 0
    assert numbers(tmp_path / "same") == numbers(run)
    write_facts(facts, [ROWS[0], {**ROWS[1], "target_new": "drums"}, ROWS[2]])
    status, _, err = golden("run", run, "--out", tmp_path / "other")
    assert status == 0 and "the facts are not those of the first run" in err
    assert "weights" not in err


@pytest.mark.parametrize("method", ["saliency", "middle", "published"])
def test_other_methods(
    place: Path, tmp_path: Path, golden: Golden, method: str, quick: None
) -> None:
    run = tmp_path / "run"
    status, out, err = golden(
        "locate", place / "model", place / "facts.jsonl", "--method", method, "--out", run
    )
    assert status == 0 and method in out
    per_fact = {"per_fact.jsonl"} if method == "saliency" else set()
    assert files(run) == WHOLE - {"per_fact.jsonl"} | per_fact
    assert ("per_fact.jsonl" in err) == bool(per_fact)
    assert numbers(run)["method"] == method


def test_without_out_nothing_is_written(
    place: Path, tmp_path: Path, golden: Golden, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert golden("locate", place / "model", place / "facts.jsonl", "--bootstrap", 0)[0] == 0
    assert list(tmp_path.iterdir()) == []


# --- what is wrong is said in one message


def test_errors_exit_2_with_one_message(place: Path, tmp_path: Path, golden: Golden) -> None:
    model, facts = place / "model", place / "facts.jsonl"
    broken = tmp_path / "broken.jsonl"
    broken.write_text(json.dumps(ROWS[0]) + '\n{"subject": "x", "prompt"\n', encoding="utf-8")
    wrong = write_facts(tmp_path / "wrong.jsonl", [ROWS[0], {**ROWS[1], "subject": "Nobody"}])
    cases: list[tuple[list[object], tuple[str, ...]]] = [
        (["locate", "smollm-135m", facts], ("smollm-135m", "smollm2-135m")),
        (["locate", tmp_path / "nothing", facts], ("nothing",)),
        (["locate", tmp_path, facts], (str(tmp_path),)),
        (["locate", model, tmp_path / "none.jsonl"], ("none.jsonl",)),
        (["locate", model, "startr"], ("startr", "starter")),
        (["locate", model, broken], ("broken.jsonl", "2")),
        (["locate", model, wrong], ("wrong.jsonl", "row 2", "Nobody")),
        (["locate", model, facts, "--limit", 0], ("--limit is 0",)),
        (["locate", model, facts, "--batch-size", 0], ("--batch-size is 0",)),
        (["locate", model, facts, "--kappa", -1], ("--kappa is -1",)),
        (["locate", model, facts, "--known"], ("none of the 3 facts", "--known")),
        (["locate", model, facts, "--device", "cuda:77"], ("cuda",)),
        (["locate", model, facts, "--layer-paths", "hed", "x"], ("hed", "head")),
        (["locate", model, facts, "--method", "lgb"], ("unknown method 'lgb'", "'lga'")),
        (["run", tmp_path / "norun"], ("norun",)),
        (["datasets", tmp_path / "none.jsonl"], ("none.jsonl",)),
        (["models", "--inspect", "smollm-135m"], ("smollm-135m",)),
        (["models", "--clear", "nothing"], ("nothing",)),
        (["models", "--verify", "nothing"], ("nothing",)),
        (["models", "--verify", "a", "--clear", "a"], ("--clear and --verify",)),
    ]
    for arguments, parts in cases:
        status, out, err = golden(*arguments)
        assert status == 2, arguments
        assert out == "" and err.startswith("golden: "), (arguments, err)
        assert len(err.strip().splitlines()) == 1, err
        for part in parts:
            assert part in err, (arguments, err)


def test_bad_flags_exit_2(place: Path, golden: Golden) -> None:
    model, facts = place / "model", place / "facts.jsonl"
    for arguments, part in (
        (["locate", model, facts, "--methd", "lga"], "--methd"),
        (["locate", model, facts, "--seed", "x"], "seed"),
        (["locate"], "MODEL"),
        (["nonsense"], "nonsense"),
    ):
        status, out, err = golden(*arguments)
        assert status == 2 and out == "" and part in err, (arguments, out + err)
        where = f"golden {arguments[0]} --help" if arguments[0] in COMMANDS else "golden --help"
        assert err.startswith("golden: ") and len(err.splitlines()) == 1 and where in err


def test_a_taken_folder_is_refused_before_the_work(
    place: Path, located: Path, golden: Golden, monkeypatch: pytest.MonkeyPatch
) -> None:
    import goldenlayers.models

    before = {p.name: p.read_bytes() for p in located.iterdir()}
    asked: list[object] = []
    with monkeypatch.context() as patch:
        patch.setattr(goldenlayers.models, "load", lambda *a, **k: asked.append(a))
        status, _, err = golden("locate", place / "model", place / "facts.jsonl", "--out", located)
    assert status == 2 and "--overwrite" in err and not asked
    assert {p.name: p.read_bytes() for p in located.iterdir()} == before
    again = ("locate", place / "model", place / "facts.jsonl", "--out", located, "--limit", 1)
    assert golden(*again, "--overwrite")[0] == 0
    assert numbers(located)["n_facts"] == 1 and files(located) == WHOLE


# --- an end in the middle


def spoil(monkeypatch: pytest.MonkeyPatch, error: BaseException, after: int) -> None:
    from goldenlayers.locating import lga

    whole, calls = lga.pair_products, []

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) > after:
            raise error
        return whole(*args, **kwargs)

    monkeypatch.setattr(lga, "pair_products", failing)


def test_an_error_in_the_middle_leaves_nothing_that_looks_whole(
    place: Path, tmp_path: Path, golden: Golden, monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    run = tmp_path / "run"
    command = ("locate", place / "model", place / "facts.jsonl", "--batch-size", 1, "--out", run)
    with monkeypatch.context() as patch:
        spoil(patch, UserError("the disk of wonders is empty"), 2)
        status, out, err = golden(*command)
    assert status == 2 and "disk of wonders" in err and out == ""
    assert not run.exists()
    part = tmp_path / "run.part"
    assert "ranking.json" not in files(part)
    assert len((part / "per_fact.jsonl").read_text("utf-8").splitlines()) == 2
    log = (part / "log.txt").read_text("utf-8")
    assert "stopped: UserError" in log and "Traceback" not in log
    status, _, err = golden("run", run)
    assert status == 2 and "not finished" in err
    # A defect passes through with its traceback, and leaves no whole run either.
    with monkeypatch.context() as patch:
        spoil(patch, ZeroDivisionError("a defect"), 1)
        with pytest.raises(ZeroDivisionError):
            main([str(a) for a in command])
    assert not run.exists() and "Traceback" in (part / "log.txt").read_text("utf-8")
    # The same command starts anew and finishes, with every row once.
    assert golden(*command)[0] == 0
    assert files(run) == WHOLE and not part.exists()
    assert len((run / "per_fact.jsonl").read_text("utf-8").splitlines()) == 3


def test_a_failing_picture_leaves_no_whole_run(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from goldenlayers.report import figures

    def fail(*_args: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(figures, "ranking_figure", fail)
    run = tmp_path / "run"
    with pytest.raises(ZeroDivisionError):
        main(["locate", str(place / "model"), str(place / "facts.jsonl"), "--out", str(run)])
    assert not run.exists() and (tmp_path / "run.part").exists()


def test_interruption(
    place: Path, tmp_path: Path, golden: Golden, monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    run = tmp_path / "run"
    command = ("locate", place / "model", place / "facts.jsonl", "--batch-size", 1, "--out", run)
    with monkeypatch.context() as patch:
        spoil(patch, KeyboardInterrupt(), 0)
        status, _, err = golden(*command)
    assert status == 130 and "interrupted" in err and not run.exists()
    with monkeypatch.context() as patch:
        spoil(patch, KeyboardInterrupt(), 2)
        status, out, _ = golden(*command)
    assert status == 130 and "Interrupted after 2 of 3 facts" in " ".join(out.split())
    assert files(run) == WHOLE and numbers(run)["n_facts"] == 2
    assert len((run / "per_fact.jsonl").read_text("utf-8").splitlines()) == 2


# --- the small commands


def test_models(place: Path, tmp_path: Path, golden: Golden) -> None:
    status, out, _ = golden("models", "--cache-dir", tmp_path)
    assert status == 0 and "smollm2-135m" in out and "gemma3-270m" in out
    status, out, _ = golden("models", "--inspect", place / "model")
    assert status == 0 and "mlp.down_proj" in out and "4 decoder layers" in out
    elsewhere = ("models", "--inspect", place / "model", "--layer-paths", "blocks", "model.nothing")
    status, _, err = golden(*elsewhere)
    assert status == 2 and "model.nothing" in err


def test_datasets(place: Path, tmp_path: Path, golden: Golden) -> None:
    status, out, _ = golden("datasets")
    assert status == 0 and "starter" in out and "jsonl" in out and "mquake" in out
    status, out, _ = golden("datasets", "--schema")
    assert status == 0 and "target_new" in out and '"subject": "France"' in out
    status, out, _ = golden("datasets", place / "facts.jsonl")
    assert status == 0 and "3 facts" in out and "italy: The capital of Italy is" in out
    half = write_facts(tmp_path / "half.jsonl", [ROWS[0], {**ROWS[1], "target_new": " "}])
    assert golden("datasets", half)[0] == 2
    status, out, _ = golden("datasets", half, "--skip-invalid")
    assert status == 0 and "1 fact" in out and "target_new is empty" in out
    table = tmp_path / "mine.csv"
    table.write_text("subject,prompt,target,colour\nItaly,The capital of {} is,Paris,blue\n")
    status, out, _ = golden("datasets", table)
    assert status == 0 and "The capital of Italy is … (the model's own answer) → Paris" in out
    assert "warning: fields that are not read: 'colour' (1 row)" in out and "None" not in out


def test_fields_that_are_not_read_are_told_by_every_command(
    place: Path, tmp_path: Path, golden: Golden
) -> None:
    table = write_facts(tmp_path / "more.jsonl", [{**row, "colour": "blue"} for row in ROWS])
    status, _, err = golden("locate", place / "model", table, "--method", "lga")
    assert status == 0 and f"fields that are not read: 'colour' ({len(ROWS)} rows)" in err


def test_skipped_rows_are_told(place: Path, tmp_path: Path, golden: Golden) -> None:
    half = write_facts(tmp_path / "half.jsonl", [*ROWS, {**ROWS[1], "id": "x", "target_new": " "}])
    command = ("locate", place / "model", half, "--bootstrap", 0)
    assert golden(*command)[0] == 2
    status, out, err = golden(*command, "--skip-invalid")
    assert status == 0 and "3 facts" in out and "target_new is empty" in err


def test_help_and_version(golden: Golden) -> None:
    assert golden("--version")[:2] == (0, f"goldenlayers {__version__}\n")
    status, out, _ = golden("--help")
    assert status == 0 and all(name in out for name in COMMANDS)
    assert golden()[1] == out  # no command: the help
    status, out, _ = golden("locate", "--help-all")
    assert status == 0 and "--kappa" in out and "interquartile" in out


def test_a_saved_config_comes_back() -> None:
    kind = options_of("locate")
    config = kind(model="m", data="d", out=Path("x"), layer_paths={"head": "h"}, limit=3)
    assert from_record(kind, to_record(config), {"out": Path("x")}) == config
    assert from_record(kind, to_record(config), {}).out is None
    with pytest.raises(UserError, match=r"kapa.*kappa"):
        from_record(kind, {**to_record(config), "kapa": 2}, {})


def test_a_damaged_record_is_refused(located: Path, golden: Golden) -> None:
    damaged = located.with_name("damaged")
    shutil.copytree(located, damaged)
    record = yaml.safe_load((damaged / "config.yaml").read_text())
    (damaged / "config.yaml").write_text(yaml.safe_dump({**record, "command": "conjure"}))
    status, _, err = golden("run", damaged)
    assert status == 2 and "conjure" in err
    record["settings"]["methd"] = "lga"
    (damaged / "config.yaml").write_text(yaml.safe_dump(record))
    status, _, err = golden("run", damaged)
    assert status == 2 and "methd" in err and "method" in err
    assert not damaged.with_name("damaged-again").exists()
