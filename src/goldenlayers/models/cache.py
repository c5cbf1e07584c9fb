"""The cache of converted models: one folder per model, whole or not there at all.

A folder is written under a temporary name ending in ``.part`` and renamed when it is complete. Its
manifest records where the weights came from and the size and SHA-256 of every file, so that a
folder that was cut short, changed or made by an older converter is recognised and built anew.

Files are hashed once, then again only when they were touched. A file's stamp is its device, inode,
size and the times of its last change in content and in metadata; a record beside the file keeps the
stamp at which it was last hashed. This finds damage and accidents; who can write to the folder can
also write the record. Bits that rot on the disk keep the stamp: for these there is ``again=True``.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from goldenlayers.durable import in_place_of
from goldenlayers.errors import UserError
from goldenlayers.shown import say

MANIFEST = "golden-manifest.json"
CACHE_VARIABLE = "GOLDENLAYERS_CACHE"
_ELSEWHERE = f"choose another folder with --cache-dir or ${CACHE_VARIABLE}"
CONVERTER_VERSION = 1  # raise it when a conversion would now give other files

Progress = Callable[[str], None]


def models_root(cache_dir: str | Path | None = None) -> Path:
    """Folder of the converted models: ``cache_dir``, else $GOLDENLAYERS_CACHE, else the user's.

    Raises:
        UserError: no folder can have that name.
    """
    chosen = cache_dir if cache_dir is not None else os.environ.get(CACHE_VARIABLE)
    if not chosen:
        import platformdirs

        chosen = platformdirs.user_cache_dir("goldenlayers", appauthor=False)
    try:
        if "\0" in str(chosen):
            raise RuntimeError("it has a NUL character")
        return Path(chosen).expanduser() / "models"
    except RuntimeError as error:  # "~name" of nobody
        raise UserError(
            f"The cache folder {str(chosen)!r:.200} cannot be: {error}", fix=f"C{_ELSEWHERE[1:]}"
        ) from error


def json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file of ours; {} where there is none, or it is damaged."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


Check = Literal["sizes", "touched", "all"]


def fault(
    folder: Path, source: dict[str, Any] | None = None, *, check: Check = "touched"
) -> str | None:
    """What is wrong with a cached folder, or None if it can be used.

    Args:
        folder: the cache entry.
        source: what the weights must have been made from; None accepts any source.
        check: which files are hashed (a second or so per gigabyte): none, where their sizes are
            right; those that were touched since they were last hashed; or all.
    """
    manifest = json_object(folder / MANIFEST)
    if not manifest:
        return "its manifest is missing or unreadable"
    if manifest.get("converter") != CONVERTER_VERSION:
        return "it was made by another version of the converter"
    if source is not None and manifest.get("source") != source:
        return "it was made from other weights"
    if manifest.get("schema") != 1 and manifest.get("sha256") != _own_hash(manifest):
        return "its manifest is damaged"
    files = manifest.get("files")
    if not isinstance(files, dict) or not files:
        return "its manifest lists no files"
    try:
        for name, record in files.items():
            if found := _file_fault(folder, name, record, check):
                return found
        more = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    except OSError as error:
        return f"a file of it cannot be read ({error.strerror or error})"
    added = sorted(name for name in more - files.keys() if not name.startswith((MANIFEST, STAMPS)))
    return f"{added[0]} was added to it" if added else None


def _file_fault(folder: Path, name: str, record: Any, check: Check) -> str | None:
    if not isinstance(record, dict) or not {"size", "sha256"} <= record.keys():
        return "its manifest is damaged"
    path = folder / name
    if not path.is_file():
        return f"{name} is missing"
    if path.stat().st_size != record["size"]:
        return f"{name} has {path.stat().st_size} bytes, not {record['size']}"
    if check != "sizes" and not has_sha256(path, record["sha256"], again=check == "all"):
        return f"{name} has changed (SHA-256 differs)"
    return None


def _own_hash(manifest: dict[str, Any]) -> str:
    """SHA-256 over all that a manifest says but this."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _seal(folder: Path, source: dict[str, Any], about: dict[str, Any]) -> None:
    files = {
        path.relative_to(folder).as_posix(): {
            "size": path.stat().st_size,
            "sha256": sha256_file(path),
        }
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    manifest = {"schema": 2, "converter": CONVERTER_VERSION, "source": source, "about": about}
    manifest["files"] = files
    manifest["sha256"] = _own_hash(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")


@contextmanager
def _locked(root: Path, key: str, progress: Progress) -> Iterator[None]:
    """Hold the lock of one cache entry, so that two processes do not convert the same model."""
    from filelock import FileLock, Timeout

    lock = FileLock(root / f".{key}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        progress(f"Another process is preparing {key}; waiting for it.")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def obtain(
    root: Path,
    key: str,
    source: dict[str, Any],
    build: Callable[[Path], dict[str, Any]],
    *,
    progress: Progress = say,
) -> Path:
    """The folder of cache entry ``key``, built by ``build(empty folder)`` if it is not there whole.

    ``build`` returns what the manifest shall say about the model. When it fails, nothing is left.

    Raises:
        UserError: the cache folder cannot be written.
    """
    folder = root / key
    if fault(folder, source) is None:
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _locked(root, key, progress):
            found = fault(folder, source)
            if found is None:  # another process finished it meanwhile
                return folder
            if folder.exists():
                progress(f"The cached copy of {key} cannot be used: {found}. Building it anew.")
            # Whoever holds the lock is the only one at work on this key, so these are left-overs
            # of processes that were killed.
            for left_over in root.glob(f"{key}~*.part"):
                shutil.rmtree(left_over, ignore_errors=True)
            with in_place_of(folder) as part:
                part.mkdir()
                _seal(part, source, build(part))
                if folder.exists():
                    shutil.rmtree(folder)
    except OSError as error:
        raise UserError(
            f"The model cache {root} cannot be written: {error.strerror or error}",
            fix=f"Free some space, or {_ELSEWHERE}",
        ) from error
    return folder


def require_space(root: Path, needed: int, what: str) -> None:
    """Refuse early when the disk cannot hold ``needed`` bytes more."""
    place = root
    while not place.exists() and place != place.parent:
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise UserError(
            f"{what} needs {needed / 1e9:.1f} GB of disk under {root}, "
            f"and {free / 1e9:.1f} GB are free",
            fix=f"Free some space, or {_ELSEWHERE}",
        )


STAMPS = ".golden-stamps.json"
_SETTLED = 2_000_000_000  # nanoseconds: a write within the clock's tick would leave no trace


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, as hexadecimal text."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def has_sha256(path: Path, sha256: str, *, again: bool = False) -> bool:
    """Whether the file's bytes have that SHA-256.

    Args:
        path: a file; the record is kept in its folder, where that can be written.
        sha256: what its bytes must have, as hexadecimal text.
        again: hash it whatever the record says.

    Raises:
        OSError: the file cannot be read.
    """
    before = _stamp(path)
    record = json_object(path.parent / STAMPS)
    if not again and record.get(path.name) == [*before, sha256]:
        return True
    if sha256_file(path) != sha256:
        return False
    if _stamp(path) == before and time.time_ns() - max(before[3:]) > _SETTLED:
        record[path.name] = [*before, sha256]
        # Where the folder cannot be written, files are hashed each time.
        with contextlib.suppress(OSError), in_place_of(path.parent / STAMPS) as part:
            part.write_text(json.dumps(record), encoding="utf-8")
    return True


def _stamp(path: Path) -> list[int]:
    """Device, inode, size, and the times of the last change of content and of metadata (ns)."""
    s = path.stat()
    return [s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns]
