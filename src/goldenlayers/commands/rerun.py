"""``golden run``: repeat a finished run from the settings it left behind."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from goldenlayers.commands.shared import say
from goldenlayers.config import RunConfig, from_record
from goldenlayers.errors import UserError


def run(config: RunConfig) -> int:
    """Read config.yaml, and run its command again into another folder."""
    from goldenlayers.cli import COMMANDS, dispatch
    from goldenlayers.store import RunFolder

    folder = config.config.parent if config.config.is_file() else config.config
    record: dict[str, Any] = RunFolder.open(folder).config
    command = record.get("command")
    if command not in COMMANDS or "settings" not in record:
        raise UserError(
            f"{folder} records the command '{command}'",
            expected="the config.yaml that a golden command wrote",
        )
    settings = from_record(COMMANDS[command][0], record["settings"])
    out = config.out or _again(folder)
    status = dispatch(dataclasses.replace(settings, out=out))
    if status == 0:
        tell_differences(record, RunFolder.open(out).config)
    return status


def tell_differences(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Say it where the repetition had other weights, facts or code than the first run."""
    from goldenlayers.models.model import comparable

    for part, key, what in (
        ("model", "fingerprint", "the model's weights are"),
        ("data", "sha256", "the facts are"),
    ):
        old, new = (run.get(part, {}).get(key) for run in (before, after))
        if key == "fingerprint" and not comparable(str(old), str(new)):
            say("Note: the first run names its weights as older versions did: not compared.")
        elif old != new:
            say(f"Warning: {what} not those of the first run ({part} {key} {old}, now {new}).")
    old_inputs, new_inputs = (run.get("inputs") or {} for run in (before, after))
    for name, sha256 in old_inputs.items():
        if new_inputs.get(name) != sha256:
            say(f"Warning: what --{name.replace('_', '-')} names has changed since the first run.")
    if before.get("version") != after.get("version"):
        say(f"Note: the first run was made by version {before.get('version')}.")


def _again(folder: Path) -> Path:
    """The first free name behind the folder's: run-again, run-again-2, ..."""
    resolved = folder.resolve()
    for number in range(1, 1000):
        suffix = "-again" if number == 1 else f"-again-{number}"
        path = resolved.with_name(resolved.name + suffix)
        if not path.exists():
            return path
    raise UserError(f"{folder} has been repeated 999 times", fix="Give --out")
