"""Facts apart from those of other runs, so that a layer is never judged on what it was chosen with.

``--apart-from RUN`` leaves out the facts that a run worked on and all facts about their subjects.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from goldenlayers.errors import UserError
from goldenlayers.shown import say

if TYPE_CHECKING:
    from goldenlayers.datasets import FactSet
    from goldenlayers.store import RunFolder

# Where the runs of a command name the facts that they worked on.
_ROWS = {"locate": "per_fact.jsonl", "sweep": "scores.jsonl", "evaluate": "scores.jsonl"}


def apart_from(facts: FactSet, runs: Sequence[Path]) -> FactSet:
    """``facts`` without those of finished runs and without those about their subjects.

    Raises:
        UserError: no run of locate, sweep or evaluate; its facts cannot be loaded as they were;
            nothing is left.
    """
    ids: set[str] = set()
    subjects: set[str] = set()
    for path in runs:
        folder = _opened(path)
        own = _ids(folder)
        if not own:
            say(f"{folder.path} looked at no facts: there is nothing to leave out for it")
            continue
        ids |= own
        subjects |= {fact.subject for fact in _data(folder) if fact.id in own}
    left = facts.without(ids, subjects)
    names = ", ".join(str(path) for path in runs)
    if not left:
        raise UserError(
            f"all {len(facts)} facts of {facts.name} are facts of {names}, or about their subjects",
            expected="facts about other subjects",
            fix="Use other facts, or give that run fewer (--limit)",
        )
    say(f"{len(left)} of the {len(facts)} facts of {facts.name} are apart from {names}")
    return left


def digest(runs: Sequence[Path]) -> str:
    """Hash of which facts the runs worked on: other facts would leave others here."""
    from goldenlayers.studying.folders import ids_digest

    return ids_digest(one for path in runs for one in _ids(_opened(path)))


def _opened(path: Path) -> RunFolder:
    from goldenlayers.store import RunFolder

    folder = RunFolder.open(path)
    folder.require(*_ROWS, expected="a run of golden locate, sweep or evaluate")
    return folder


def _ids(folder: RunFolder) -> set[str]:
    return {str(row.get("fact")) for row in folder.read_rows(_ROWS[folder.kind])}


def _data(folder: RunFolder) -> FactSet:
    """The whole data that the run's facts were drawn from.

    Raises:
        UserError: it is not there any more, or not what it was.
    """
    from goldenlayers.datasets import load_facts

    name = str((folder.config.get("settings") or {}).get("data", ""))
    sha256 = (folder.config.get("data") or {}).get("sha256")
    fix = "Put the file back as it was, or make that run again"
    try:
        found = load_facts(name, skip_invalid=True)
    except UserError as error:
        raise UserError(
            f"the facts of {folder.path} cannot be loaded, so their subjects are not known "
            f"({error.found})",
            fix=fix,
        ) from error
    if found.sha256 != sha256:
        raise UserError(
            f"{name} has changed since {folder.path} took its facts from it "
            f"(sha256 {str(sha256)[:12]}, now {found.sha256[:12]})",
            fix=fix,
        )
    return found
