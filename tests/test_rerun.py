"""``golden run``: a record from anywhere decides on settings alone."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from families import save, tiny

from goldenlayers.cli import main
from goldenlayers.commands import COMMANDS, options_of
from goldenlayers.commands.options import Role, default_settings, roles, types_of
from goldenlayers.runfiles import FILES

FACT = {
    "id": "fr",
    "subject": "France",
    "prompt": "The capital of France is",
    "target_new": "Rome",
}
# Flags that only choose what is computed. A new flag has to be put here, or given a role.
PLAIN_FLAGS = {
    "skip_invalid", "known", "no_check", "evidence", "schema", "example",
    "all_probes", "chat",
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with code of its own, and one fact."""
    folder = tmp_path_factory.mktemp("rerun")
    save(tiny("llama"), folder / "model")
    (folder / "facts.jsonl").write_text(json.dumps(FACT) + "\n")
    return folder


def recorded(place: Path, run: Path, command: str = "locate", **settings: Any) -> Path:
    """A run folder as it might come from elsewhere: its record and no more."""
    run.mkdir()
    usual = {"model": str(place / "model"), "data": str(place / "facts.jsonl"), "method": "middle"}
    record = {"version": "0.1.0", "command": command, "settings": usual | settings}
    (run / "config.yaml").write_text(yaml.safe_dump(record))
    return run


def golden(*arguments: object) -> int:
    return main([str(a) for a in arguments])


def test_every_setting_that_could_harm_has_its_role_and_its_flag() -> None:
    kinds = {name: options_of(name) for name in COMMANDS}
    for name, kind in kinds.items():
        for setting, hint in types_of(kind).items():
            role = roles(kind).get(setting)
            where = f"golden {name}: {setting}"
            if "Path" in str(hint):
                assert role in (Role.PLACE, Role.SOURCE), where
            if "bool" in str(hint):
                assert (role is Role.CONSENT) != (setting in PLAIN_FLAGS), where
            if name in FILES and role in (Role.PLACE, Role.CONSENT):
                assert roles(kinds["run"]).get(setting) is role, where
                if setting != "out":
                    usual = default_settings(kinds["run"])[setting]
                    assert usual == default_settings(kind)[setting], where
    # The control: the names that were obeyed once.
    found = {name for kind in kinds.values() for name, role in roles(kind).items()
             if role is not Role.SOURCE}  # fmt: skip
    assert {"trust_remote_code", "overwrite", "force", "cache_dir", "out", "address"} <= found


def test_code_of_a_model_is_run_only_by_who_says_so_now(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "odd"
    model.mkdir()
    for file in (place / "model").iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    mark = tmp_path / "was-run"
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "odd", "auto_map": {"AutoConfig": "odd.OddConfig",
                                                "AutoModelForCausalLM": "odd.Odd"}}  # fmt: skip
    (model / "config.json").write_text(json.dumps(config))
    (model / "odd.py").write_text(
        f"from pathlib import Path\nPath({str(mark)!r}).touch()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OddConfig(LlamaConfig):\n    model_type = 'odd'\n"
        "class Odd(LlamaForCausalLM):\n    config_class = OddConfig\n"
    )
    run = recorded(place, tmp_path / "run", model=str(model), trust_remote_code=True)
    assert golden("run", run) == 2
    assert not mark.exists() and not (tmp_path / "run-again").exists()
    assert "add --trust-remote-code if you trust" in capsys.readouterr().err
    golden("run", run, "--trust-remote-code")
    assert mark.exists()  # the control: the code would have been run


def test_places_and_overwriting_are_not_taken_from_a_record(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = recorded(place, tmp_path / "run", out=None)
    assert golden("run", first, "--out", tmp_path / "mine") == 0
    before = (tmp_path / "mine" / "log.txt").read_bytes()
    hostile = {"overwrite": True, "out": str(tmp_path / "mine"), "cache_dir": str(tmp_path / "c")}
    evil = recorded(place, tmp_path / "evil", **hostile)
    assert golden("run", evil, "--out", tmp_path / "mine") == 2
    assert "add --overwrite" in capsys.readouterr().err
    assert golden("run", evil) == 0 and not (tmp_path / "c").exists()
    assert (tmp_path / "mine" / "log.txt").read_bytes() == before
    said = capsys.readouterr().err
    assert re.search("Note: .*--cache-dir", said) and "given again" in said
    assert golden("run", evil, "--out", tmp_path / "mine", "--overwrite") == 0  # the control
    # A link in the place of the default output leads nowhere.
    (tmp_path / "evil-again").rename(tmp_path / "kept")
    (tmp_path / "evil-again").symlink_to(tmp_path / "far")
    assert golden("run", evil) == 0
    assert (tmp_path / "evil-again-2").is_dir() and not (tmp_path / "far").exists()


def test_workers_of_a_record_are_not_started(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = recorded(
        place, tmp_path / "run", "sweep", method="ft-m", set={"steps": "1"}, layers="0",
        metrics=["rewrite"], workers=1000, engine="ray", address="far.example:6379",
    )  # fmt: skip
    assert golden("run", run) == 0
    assert "--workers, --engine, --address" in capsys.readouterr().err
    assert golden("run", run, "--allow-overlap") == 2
    assert "--allow-overlap means nothing to golden sweep" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["run", "ask", "models", "conjure", "", "__main__"])
def test_only_commands_that_make_runs_are_repeated(
    place: Path, tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert golden("run", recorded(place, tmp_path / "run", command, config=str(tmp_path))) == 2
    assert "records the command" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model": [1]}, "'model' is [1]. Expected text"),
        ({"top_k": "5"}, "'top_k' is '5'. Expected a whole number"),
        ({"top_k": True}, "'top_k' is True"),
        ({"limit": 1.5}, "'limit' is 1.5. Expected a whole number or nothing"),
        ({"kappa": float("nan")}, "not finite"),
        ({"scope": "all"}, "Expected 'mlp' or 'down' or 'attention' or 'block'"),
        ({"editor_set": {"steps": 3}}, "a mapping of text to text"),
        ({"apart_from": "x"}, "a list of a path"),
        ({"data": "a\0b"}, "'data' is 'a\\x00b'"),
        ({"data": "a" * 5000}, "too long"),
        ({"seed": 2**80}, "more than 64 bits"),
        ({"method": "magic"}, "unknown method 'magic'"),
    ],
)
def test_wrong_types_are_refused_before_any_work(
    place: Path, tmp_path: Path, settings: dict[str, Any], said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert golden("run", recorded(place, tmp_path / "run", **settings)) == 2
    error = capsys.readouterr().err
    assert said in error and len(error) < 600
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


def test_another_file_is_not_taken_for_the_record(place: Path, tmp_path: Path) -> None:
    run = recorded(place, tmp_path / "run")
    (run / "other.yaml").write_text("{}")
    assert golden("run", run / "other.yaml") == 2


def test_a_run_never_replaces_what_it_reads(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = tmp_path / "sweep"
    more = ("--method", "ft-m", "--set", "steps", 1, "--layers", "0", "--metrics", "rewrite")
    assert golden("sweep", place / "model", place / "facts.jsonl", *more, "--out", sweep) == 0
    before = {p.name: p.read_bytes() for p in sweep.iterdir()}
    link = tmp_path / "link"
    link.symlink_to(sweep)
    for out in (sweep, link, f"{sweep}/../sweep"):
        capsys.readouterr()
        assert golden("compare", sweep, "--out", out, "--overwrite") == 2
        assert "which the run reads itself (as its sweep)" in capsys.readouterr().err
    args = ("locate", place / "model", place / "facts.jsonl", "--method", "middle")
    assert golden(*args, "--apart-from", sweep, "--out", sweep, "--overwrite") == 2
    assert "as its apart_from" in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in sweep.iterdir()} == before
