"""Has a file still the bytes that were hashed? Hashed once, then again only when it was touched.

A file's stamp is its device, inode, size and the times of its last change in content and in
metadata. A record beside the file keeps the stamp at which it was last hashed. Writing to a file,
replacing, copying or restoring it changes the stamp. This finds damage and accidents; who can write
to the folder can also write the record. Bits that rot on the disk keep the stamp: for these there
is ``again=True``.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
import uuid
from pathlib import Path

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
    record = _read(path.parent / STAMPS)
    if not again and record.get(path.name) == [*before, sha256]:
        return True
    if sha256_file(path) != sha256:
        return False
    if _stamp(path) == before and time.time_ns() - max(before[3:]) > _SETTLED:
        _write(path.parent / STAMPS, {**record, path.name: [*before, sha256]})
    return True


def _stamp(path: Path) -> list[int]:
    """Device, inode, size, and the times of the last change of content and of metadata (ns)."""
    s = path.stat()
    return [s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns]


def _read(path: Path) -> dict[str, object]:
    """What the record says; nothing when it is not there or damaged: then files are hashed."""
    try:
        record = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _write(path: Path, record: dict[str, object]) -> None:
    """Replace the record, if the folder can be written; without it files are hashed each time."""
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    with contextlib.suppress(OSError):
        try:
            part.write_text(json.dumps(record), encoding="utf-8")
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
