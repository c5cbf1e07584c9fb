"""Which files a run writes, what proves that a folder is a run's (its own record), its lock.

Only files that a run wrote are ever removed. What else lies in a folder is left alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import socket
from collections.abc import Callable, Collection, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from goldenlayers.durable import append_bytes, lines, lock, open_file, read_text_file, write_bytes
from goldenlayers.errors import UserError
from goldenlayers.records import entry, json_text, parse_yaml

CONFIG, LOG, LOCK, ASIDE = "config.yaml", "log.txt", ".lock", "set-aside.txt"
REPLACED = ".replaced"
"""Within a run's folder: the run that it takes the place of, while it does."""

_DELTA = ("delta.safetensors", "delta.json")
FILES: dict[str, tuple[str, ...]] = {
    "locate": (
        "ranking.json",
        "per_fact.jsonl",
        "ranking.svg",
        "ranking.pdf",
        "ranking.png",
        "grid.json",
        "heatmap.svg",
        "heatmap.pdf",
        "heatmap.png",
    ),
    "edit": (*_DELTA, "check.json", "tries.json", "README.md"),
    "evaluate": ("scores.jsonl", "summary.json", *_DELTA, "previous_keys.[0-9]*.safetensors"),
    "sweep": ("scores.jsonl", "times.jsonl", "summary.json", "sweep.svg", "sweep.pdf", "sweep.png"),
    "compare": ("compare.json",),
    "study": ("summary.json", "table.md"),
}
"""Command → the names of what its runs write (with * for a number), beside ``EVERY``."""
EVERY = (CONFIG, LOG, LOCK, ASIDE)
# What a kill leaves of a file that was being written, and what file browsers put everywhere.
_LITTER = (".DS_Store", "Thumbs.db")
_LEFT_OVER = (".delta.*.part", "previous_keys.*.part", *_LITTER)
_FRESH = (LOCK, f".{CONFIG}.tmp", *_LITTER)

_CONFIG_BYTES = 256 << 10
_RECORD = {
    "version": str,
    "command": str,
    "settings": dict[str, Any],
    "model": dict[str, Any],
    "data": dict[str, Any],
    "inputs": dict[str, str],
    "key": str,
    "files": dict[str, str],
}


def read_record(path: Path) -> dict[str, Any]:
    """The record that a run keeps of itself, its ``config.yaml``.

    Raises:
        UserError: no plain file, too large, or no record of ours.
    """
    value = parse_yaml(read_text_file(path, _CONFIG_BYTES), path)
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a run's config", expected="a mapping of settings")
    for name, hint in _RECORD.items():
        if name in value:
            value[name] = entry(value, name, hint, path)
    return value


def is_record(record: Mapping[str, Any]) -> bool:
    """Whether a config is one of ours, of a command that makes runs."""
    proof = "settings" in record or "key" in record
    return record.get("command") in FILES and "version" in record and proof


def strangers(folder: Path, record: Mapping[str, Any]) -> list[str]:
    """Names in a run's folder that the run did not write, sorted.

    A finished run names its results in its record; of an unfinished one, and of one by an earlier
    version, those count that its command writes.
    """
    return sorted(item.name for item in os.scandir(folder) if not _own(item, record))


def _own(item: os.DirEntry[str], record: Mapping[str, Any]) -> bool:
    if item.name == REPLACED:
        return item.is_dir(follow_symlinks=False) and proven(Path(item.path))
    named, command = record.get("files"), str(record.get("command"))
    if named is not None and is_result(item.name, command) and item.name not in named:
        return False
    return item.is_file(follow_symlinks=False) and may_write(item.name, command)


def may_write(name: str, command: str) -> bool:
    """Whether a run of the command writes a file of this name, for good or in passing."""
    if name.startswith(".") and name.endswith(".tmp"):
        name = name[1:].removesuffix(".tmp")
    patterns = (*EVERY, *_LEFT_OVER)
    return is_result(name, command) or any(fnmatchcase(name, one) for one in patterns)


def result_files(folder: Path, command: str) -> dict[str, str]:
    """The results in a run's folder by name, sorted, each with its SHA-256."""
    there = [item.name for item in os.scandir(folder) if item.is_file(follow_symlinks=False)]
    names = sorted(name for name in there if is_result(name, command))
    return {name: sha256_of(folder / name) for name in names}


def is_result(name: str, command: str) -> bool:
    """Whether a file of this name is a result of the command."""
    return any(fnmatchcase(name, one) for one in FILES.get(command, ()))


def proven(folder: Path) -> bool:
    """Whether a folder is a run's, and holds nothing else."""
    if (folder / REPLACED).exists():  # at most one lies in a run, and none in that
        return False
    try:
        record = read_record(folder / CONFIG)
        return is_record(record) and not strangers(folder, record)
    except (UserError, OSError):
        return False


def remove(folder: Path, record: Mapping[str, Any], *, keep: tuple[str, ...] = ()) -> None:
    """Remove a run's own files, and the folder if nothing is left in it.

    The config goes last: a kill on the way leaves a folder that is still known as ours.
    """
    for item in sorted(os.scandir(folder), key=lambda item: item.name == CONFIG):
        if item.name in keep or not _own(item, record):
            continue
        if item.name == REPLACED:
            remove(Path(item.path), read_record(Path(item.path) / CONFIG))
        else:
            Path(item.path).unlink()
    if not keep:
        with contextlib.suppress(OSError):
            folder.rmdir()


def told(names: list[str]) -> str:
    """A few names in a message."""
    some = ", ".join(ascii(name)[1:-1][:60] for name in names[:3])
    return some if len(names) <= 3 else f"{some} and {len(names) - 3} more"


def place(path: str | os.PathLike[str]) -> Path:
    """Where a run is to stand, as an absolute path.

    Raises:
        UserError: no name for a run; the folder that the user is in or at home in, or one above.
    """
    wrong = UserError(f"{ascii(str(path))[:80]} cannot be a run folder", fix="Choose another --out")
    try:
        target = Path(path).expanduser().resolve()
        taken = {one for lived in (Path.cwd(), Path.home()) for one in (lived, *lived.parents)}
    except (OSError, RuntimeError, ValueError) as error:
        raise wrong from error
    if not target.name or target.name.endswith(".part") or target in taken:
        raise wrong
    return target


def refuse_taken(target: Path, *, overwrite: bool) -> None:
    """Refuse a place that is not free, unless it is a run's and may be overwritten.

    Raises:
        UserError: what stands there is no run; it holds more than its run wrote; it is a finished
            run and ``overwrite`` is not given.
        OSError: it cannot be looked into.
    """
    if not os.path.lexists(target):
        return
    fix = "Choose another --out"
    if not target.is_dir():
        raise UserError(f"{target} is a file", fix=fix)
    if not any(target.iterdir()):
        return
    try:
        record = read_record(target / CONFIG)
    except UserError:
        record = {}
    if not is_record(record):
        raise UserError(f"{target} is a folder with other things in it", fix=fix)
    if not overwrite:
        raise UserError(f"{target} already holds a finished run", fix=f"{fix}, or add --overwrite")
    if found := strangers(target, record):
        raise UserError(
            f"{target} holds what its run did not write: {told(found)}",
            expected="a run folder with nothing else in it",
            fix=f"Move that away, or {fix[0].lower()}{fix[1:]}",
        )


def undo_replacement(part: Path, target: Path) -> None:
    """Put a run back that a kill caught after it was moved aside, before another took its place.

    Raises:
        OSError: the folder cannot be changed.
    """
    old = part / REPLACED
    if not os.path.lexists(target) and not old.is_symlink() and proven(old):
        old.rename(target)


def unfinished(part: Path) -> dict[str, Any] | None:
    """The record of the run that lies there, unfinished; None if none does.

    Raises:
        UserError: something else lies there.
    """
    if not os.path.lexists(part):
        return None
    if part.is_symlink() or not part.is_dir():
        raise UserError(
            f"{part} is a link or a file, where an unfinished run would be",
            fix="Move it away, or choose another --out",
        )
    names = sorted(path.name for path in part.iterdir())
    if all(name in _FRESH for name in names):
        return None
    if CONFIG not in names:
        raise not_ours(part, told(names))
    record = read_record(part / CONFIG)
    if not is_record(record):
        raise not_ours(part, told(names))
    if found := strangers(part, record):
        raise not_ours(part, told(found))
    return record


def not_ours(part: Path, names: str) -> UserError:
    """What is said of a folder with things in it that no run wrote."""
    return UserError(
        f"{part} is not an unfinished run, or holds what no run wrote: {names}",
        fix="Move it away, or choose another --out",
    )


def set_aside(
    path: Path, key: str, problem: Callable[[dict[str, Any]], str]
) -> tuple[list[dict[str, Any]], str]:
    """Take the lines that do not belong there out of a file of rows; what is left, and a sentence.

    They are kept in ``set-aside.txt`` beside it. Nothing is written where nothing is wrong.
    ``problem`` says what is wrong with a row, or "".

    Raises:
        UserError: the file cannot be read or written.
    """
    kept, aside = [], []
    for line in lines(path, key):
        if line.torn:
            continue
        why = line.problem or problem(line.row)
        (aside if why else kept).append((line, why))
    rows = [line.row for line, _ in kept]
    if not aside:
        return rows, ""
    text = "".join(f"{path.name}, line {line.number}: {why}\n" for line, why in aside)
    raw = b"".join(line.text.rstrip() + b"\n" for line, _ in aside)
    append_bytes(path.with_name(ASIDE), text.encode("utf-8", "backslashreplace") + raw)
    write_bytes(path, b"".join(line.text.rstrip() + b"\n" for line, _ in kept))
    first, why = aside[0]
    return rows, (
        f"{len(aside)} of the {len(aside) + len(kept)} rows in {path} do not belong there and "
        f"were set aside in {ASIDE} (line {first.number}: {why}); what is missing is done again"
    )


def sha256_of(path: Path) -> str:
    """Hash of a plain file."""
    with os.fdopen(open_file(path), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def key_of(settings: dict[str, Any], ignore: Collection[str]) -> str:
    """What the rows of a run are known by: equal for runs of equal settings on equal inputs."""
    held = [pair for pair in sorted(_flat(settings).items()) if not _within(pair[0], ignore)]
    return hashlib.sha256(json_text(held).encode()).hexdigest()[:16]


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Settings by their dotted names."""
    if not isinstance(value, dict) or not value:
        return {name: value}
    return {
        key: item
        for part, inner in value.items()
        for key, item in _flat(inner, f"{name}.{part}" if name else str(part)).items()
    }


def differences(
    old: Mapping[str, Any], new: Mapping[str, Any], ignore: Collection[str]
) -> list[str]:
    """Each setting that differs and is not to be ignored, as "name: old -> new"."""
    before, after = _flat(dict(old)), _flat(dict(new))
    found = []
    for name in before | after:
        left, right = before.get(name, "(not set)"), after.get(name, "(not set)")
        if left != right and not _within(name, ignore):
            texts = [t if len(t) <= 60 else t[:57] + "..." for t in (str(left), str(right))]
            found.append(f"{name}: {texts[0]} -> {texts[1]}")
    return found


def _within(name: str, keys: Collection[str]) -> bool:
    return any(f"{name}.".startswith(f"{key}.") for key in keys)


def acquire(part: Path, target: Path) -> int:
    """Lock the folder that a run works in, making it if needed.

    Nothing in it is touched unless it is a run's. Returns the descriptor that holds the lock.

    Raises:
        UserError: it is not a run's; another process holds it.
    """
    path = part / LOCK
    while True:
        part.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            part.mkdir()
        try:
            unfinished(part)
            descriptor = open_file(path, os.O_RDWR | os.O_CREAT)
        except FileNotFoundError:  # another process finished just now and moved the folder
            continue
        except UserError:
            if os.path.lexists(part):
                raise
            continue
        holder = os.read(descriptor, 200).decode(errors="replace").strip()
        try:
            if holder and not holder.startswith("process "):
                raise not_ours(part, LOCK)
            lock(descriptor)
        except BaseException as error:
            os.close(descriptor)
            if not isinstance(error, BlockingIOError):
                raise
            raise UserError(
                f"{target} is being written by another run ({holder or 'just started'})",
                fix="Wait until it is finished, or choose another --out",
            ) from None
        # Between opening and locking, the holder may have finished and removed this lock.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                break
        os.close(descriptor)
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    except OSError:  # a full disk
        path.unlink()
        os.close(descriptor)
        raise
    return descriptor


class LogFile(logging.FileHandler):
    """A log that cannot be written (disk full) must not stop the run or print a traceback."""

    def _open(self) -> Any:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        descriptor = open_file(self.baseFilename, flags)
        return os.fdopen(descriptor, "a", encoding="utf-8", errors="backslashreplace")

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        pass

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what is still buffered finds no room
            super().close()
