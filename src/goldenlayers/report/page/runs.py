"""The runs that a page is of. They may come from anyone: what cannot be read is left out, and said.

No link is followed, and no path that a run names is opened.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from goldenlayers.comparing.runs import LocateRun, SweepRun
from goldenlayers.errors import UserError
from goldenlayers.records import entry
from goldenlayers.runfiles import CONFIG
from goldenlayers.store import RunFolder

MOST_RUNS = 300
_DEEPEST = 4  # a study's folder: MODEL/DATA/locate/METHOD


@dataclass
class Found:
    """What was found in some folders, by the command that made it.

    Attributes:
        folders: every run that could be opened.
        sweeps, choices: those of ``golden sweep`` and ``golden locate``, read.
        comparisons, edits, evaluations, studies: the content of their files.
        left_out: (place, why) of what could not be read.
    """

    folders: list[RunFolder] = field(default_factory=list)
    sweeps: list[tuple[RunFolder, SweepRun]] = field(default_factory=list)
    choices: list[tuple[RunFolder, LocateRun]] = field(default_factory=list)
    comparisons: list[tuple[RunFolder, dict[str, Any]]] = field(default_factory=list)
    edits: list[tuple[RunFolder, dict[str, Any]]] = field(default_factory=list)
    evaluations: list[tuple[RunFolder, dict[str, Any]]] = field(default_factory=list)
    studies: list[tuple[RunFolder, dict[str, Any]]] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)


def find(paths: Sequence[Path]) -> Found:
    """Open the runs at some paths; a folder without a run of its own stands for those below it.

    Raises:
        UserError: a path with no run at or below it; too many runs; nothing that could be read.
    """
    found = Found()
    for folder in _opened(paths, found):
        found.folders.append(folder)
        if len(found.folders) > MOST_RUNS:
            raise UserError(
                f"there are more than {MOST_RUNS} runs", fix="Name fewer, or the folders of some"
            )
        try:
            _read(folder, found)
        except UserError as error:
            found.left_out.append((str(folder.path), str(error)))
    if found.folders and len(found.left_out) >= len(found.folders):
        where, why = found.left_out[0]
        raise UserError(f"nothing could be read: {why}", fix=f"Look at {where}")
    return found


def _opened(paths: Sequence[Path], found: Found) -> Iterator[RunFolder]:
    seen: set[Path] = set()
    for given in paths:
        path = given.expanduser()
        inside = [] if os.path.lexists(path / CONFIG) or not path.is_dir() else list(_below(path))
        if path.is_dir() and not inside and not os.path.lexists(path / CONFIG):
            raise UserError(
                f"there is no finished run in {given}",
                expected="run folders of golden commands, or a folder of golden study",
            )
        for one in inside or [path]:
            try:
                folder = RunFolder.open(one)
            except UserError as error:
                if not inside:
                    raise
                found.left_out.append((str(one), str(error)))
                continue
            if folder.path not in seen:
                seen.add(folder.path)
                yield folder


def _below(path: Path, depth: int = 1) -> Iterator[Path]:
    """Finished run folders below a folder, in order of their names."""
    try:
        inside = sorted(os.scandir(path), key=lambda item: item.name)
    except OSError as error:
        raise UserError(f"{path} cannot be looked into ({error.strerror})") from error
    for item in inside:
        if not item.is_dir(follow_symlinks=False) or item.name.startswith("."):
            continue
        one = Path(item.path)
        if os.path.lexists(one / CONFIG):
            if not item.name.endswith(".part"):
                yield one
        elif depth < _DEEPEST:
            yield from _below(one, depth + 1)


def _read(folder: RunFolder, found: Found) -> None:
    kind = folder.kind
    if kind == "sweep":
        found.sweeps.append((folder, SweepRun.read(folder)))
    elif kind == "locate":
        found.choices.append((folder, LocateRun.read(folder)))
    elif kind == "compare":
        found.comparisons.append((folder, _object(folder, "compare.json")))
    elif kind == "evaluate":
        found.evaluations.append((folder, _object(folder, "summary.json")))
    elif kind == "study":
        found.studies.append((folder, _object(folder, "summary.json")))
    elif kind == "edit":
        found.edits.append((folder, _object(folder, "delta.json")))
    else:
        raise UserError(f"{folder.path} is a run of '{kind}'", expected="a golden command's run")


def _object(folder: RunFolder, name: str) -> dict[str, Any]:
    value = folder.json(name)
    if not isinstance(value, dict):
        raise UserError(f"{folder.file(name)} is no JSON object")
    return value


def guarded(found: Found, folder: RunFolder, make: Callable[[], Any]) -> Any:
    """What ``make`` makes of a run; None, with a word in ``left_out``, where the run is damaged.

    A record from elsewhere may lack anything, or hold anything in its place.
    """
    try:
        return make()
    except UserError as error:
        why = str(error)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        why = f"{folder.path} is damaged ({type(error).__name__}: {error})"
    found.left_out.append((str(folder.path), why))
    return None


def named(folder: RunFolder, part: str, key: str = "name") -> str:
    """What a run's record says of its model or its data; "" where it says nothing."""
    record = folder.config.get(part) or {}
    return str(entry(record, key, str, folder.file(CONFIG), ""))


def place(folder: RunFolder) -> str:
    """The last parts of a run's path, which tell it from others of the same name."""
    return "/".join(folder.path.parts[-3:]).lstrip("/")
