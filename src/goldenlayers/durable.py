"""Files that a kill, a full disk or a second process cannot leave half-written unnoticed."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from goldenlayers.errors import UserError
from goldenlayers.records import DEEPEST, json_text, no_constant, refuse_odd, said, text_of

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_LOCKS_HERE = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
_SAFELY = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
_NO_PLAIN_FILE = {errno.ELOOP, errno.EISDIR, errno.ENXIO, errno.ENODEV}

SMALL = 64 << 20
"""Bytes of the largest JSON file that a run writes."""
_LARGEST_ROWS = 2 << 30
_LONGEST_LINE = 16 << 20
_HUGE = re.compile(rb"[eE]\+?\d{3}|\d{20}")  # numbers that may not be finite, or of 64 bits
_CHECK = re.compile(rb', "check": "([0-9a-f]{8})"\}$')


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Within it, what the system refuses (disk full, no permission) becomes a ``UserError``."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise UserError(
                f"the disk is full: {path} could not be written ({error.strerror})",
                fix="Make room and run the same command again; what was finished before is kept",
            ) from error
        raise UserError(
            f"{path} could not be written ({error.strerror or error})",
            expected="a place that can be written to",
        ) from error


def sync(path: Path) -> None:
    """Make sure that a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_file(path: str | os.PathLike[str], flags: int = os.O_RDONLY) -> int:
    """Open a plain file (made anew with O_CREAT): the file itself, never one that a link points to.

    Use no O_TRUNC: what is no plain file is noticed only once it is open.

    Raises:
        UserError: a link, a folder, a pipe or a device; for writing also a file that has a second
            name elsewhere (a hard link).
        OSError: what the system refuses otherwise, such as a file that is not there.
    """
    try:
        descriptor = os.open(path, flags | _SAFELY, 0o644)
    except OSError as error:
        if error.errno in _NO_PLAIN_FILE or (error.errno is not None and Path(path).is_symlink()):
            raise _not_plain(path) from error
        raise
    except ValueError as error:  # NUL
        raise UserError(f"'{str(path)[:60]!a}' cannot be the name of a file") from error
    found = os.fstat(descriptor)
    writing = flags & (os.O_WRONLY | os.O_RDWR)
    if not stat.S_ISREG(found.st_mode) or (writing and found.st_nlink > 1):
        os.close(descriptor)
        raise _not_plain(path)
    return descriptor


def _not_plain(path: str | os.PathLike[str]) -> UserError:
    return UserError(
        f"{path} is no plain file of its own (but a link, a folder, a pipe or a device)",
        expected="a file that a golden command wrote",
        fix="Move it away",
    )


def read_text_file(path: Path, limit: int = SMALL) -> str:
    """The text of a plain file of at most ``limit`` bytes; links are not followed.

    Raises:
        UserError: no such file, no plain file, too large, or no UTF-8.
    """
    return text_of(read_bytes_file(path, limit), path)


def read_bytes_file(path: Path, limit: int = SMALL) -> bytes:
    """As :func:`read_text_file`, undecoded."""
    with reading(path) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise UserError(f"{path} is too large", expected=f"at most {limit >> 10} KiB")
    return data


@contextlib.contextmanager
def reading(path: Path) -> Iterator[BinaryIO]:
    """A file open for reading; one that the system does not let us read is a ``UserError``."""
    try:
        with os.fdopen(open_file(path), "rb") as file:
            yield file
    except OSError as error:
        raise UserError(f"{path} could not be read ({error.strerror or error})") from error


def write_text(path: Path, text: str) -> None:
    """Replace a file by ``text``: at any moment the old content or the new one is there, whole.

    Raises:
        UserError: the disk is full or cannot be written to; the old content stays.
    """
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """As :func:`write_text`, of bytes."""
    temporary = path.with_name(f".{path.name}.tmp")
    with disk_errors(path):
        try:
            temporary.unlink(missing_ok=True)  # a kill's leftover, or a link that was put there
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
            with os.fdopen(open_file(temporary, flags), "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        sync(path.parent)


def discard(path: Path) -> None:
    """Remove a file or a folder; nothing happens where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def in_place_of(path: Path) -> Iterator[Path]:
    """A free name beside ``path``: what is written there takes its place at the end of the block.

    If the block fails, it is removed and ``path`` stays as it was. A kill leaves ``NAME~*.part``.
    """
    part = path.with_name(f"{path.name}~{uuid.uuid4().hex[:8]}.part")
    try:
        yield part
        part.replace(path)
    finally:
        discard(part)


def append_rows(path: Path, rows: Iterable[Mapping[str, Any]], key: str = "") -> None:
    """Append JSON lines; when this returns they are on the disk.

    A failure or Ctrl-C takes the whole batch back; a kill can leave its first rows and a torn
    last line, which ``mend_tail`` must remove before the next append. With the ``key`` of a run
    each row carries a check of its text and the key (no row has a field "check" of its own).

    Raises:
        UserError: the disk is full or cannot be written to; the file is as it was.
    """
    append_bytes(path, b"".join(_line(row, key) for row in rows))


def append_bytes(path: Path, content: bytes) -> None:
    """Append to a file, all or (except after a kill) nothing; then it is on the disk.

    Raises:
        UserError: the disk is full or cannot be written to; the file is as it was.
    """
    data = memoryview(content)
    with disk_errors(path):
        new = not path.exists()
        descriptor = open_file(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        size = os.fstat(descriptor).st_size
        try:
            while data:
                data = data[os.write(descriptor, data) :]
            os.fsync(descriptor)
        except BaseException:
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, size)
            raise
        finally:
            os.close(descriptor)
        if new:
            sync(path.parent)


def _line(row: Mapping[str, Any], key: str) -> bytes:
    text = json_text(row).encode("utf-8", "backslashreplace")
    if key:
        text = text[:-1] + b', "check": "%s"}' % _check(text, key)
    return text + b"\n"


def _check(text: bytes, key: str) -> bytes:
    return hashlib.sha256(key.encode() + text).hexdigest()[:8].encode()


@dataclasses.dataclass(frozen=True, slots=True)
class Line:
    """One line of a JSON-lines file: its place, its text, and its row or what is wrong with it.

    ``end``: bytes of the file up to its end. ``torn``: a broken last line, as a kill leaves it.
    """

    number: int
    end: int
    text: bytes
    row: dict[str, Any]
    problem: str = ""
    torn: bool = False


def lines(path: Path, key: str = "", digest: Any = None) -> list[Line]:
    """The lines of a JSON-lines file that are not blank.

    With the ``key`` of a run a row without its check is a problem; ``digest`` is a hash object to
    be fed with the whole content.

    Raises:
        UserError: no plain file, or too large.
    """
    found: list[Line] = []
    place = number = 0
    with reading(path) as file:
        if os.fstat(file.fileno()).st_size > _LARGEST_ROWS:
            raise UserError(f"{path} is too large", expected=f"at most {_LARGEST_ROWS >> 30} GiB")
        while text := file.readline(_LONGEST_LINE):
            number, place = number + 1, place + len(text)
            if len(text) == _LONGEST_LINE:
                raise UserError(f"{path}, line {number}: a line of more than {len(text)} bytes")
            if digest is not None:
                digest.update(text)
            if text.strip():
                row, problem, broken = _row(text, key)
                found.append(Line(number, place, text, row, problem, broken))
    # Broken lines before the last one were not torn by a kill.
    return [dataclasses.replace(one, torn=False) for one in found[:-1]] + found[-1:]


def _row(text: bytes, key: str) -> tuple[dict[str, Any], str, bool]:
    """The row, what is wrong with it, and whether it is broken JSON."""
    try:
        row = json.loads(text.decode(), parse_constant=no_constant)
        if not isinstance(row, dict):
            raise ValueError("not a JSON object")
        # Looking into every value of every row takes as long as reading it.
        if text.count(b"[") + text.count(b"{") > DEEPEST or b"\\u" in text or _HUGE.search(text):
            refuse_odd(row)
    except (ValueError, RecursionError) as error:
        return {}, f"a broken row ({said(error)})", True
    text, check = text.rstrip(), row.pop("check", None)
    found = _CHECK.search(text) if key else None
    if key and not (
        found is not None
        and check == found[1].decode()
        and _check(text[: found.start()] + b"}", key) == found[1]
    ):
        return row, "a row that was changed, or is of another run (its check does not fit)", False
    return row, "", False


def read_rows(path: Path, key: str = "", digest: Any = None) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file without a last line that a kill has torn; see :func:`lines`.

    Raises:
        UserError: no such file, or a wrong line; with its number.
    """
    found = [line for line in lines(path, key, digest) if not line.torn]
    _refuse(path, found)
    return [line.row for line in found]


def _refuse(path: Path, found: Iterable[Line]) -> None:
    for line in found:
        if line.problem:
            raise UserError(
                f"{path}, line {line.number}: {line.problem}",
                expected="one JSON object per line, as the run wrote it",
                fix="Put the file back as it was, or make the run again",
            )


def mend_tail(path: Path) -> None:
    """Cut a torn last line off; give a whole one without its line break the line break."""
    if not path.exists():
        return
    whole = [line for line in lines(path) if not line.torn]
    _refuse(path, whole)
    end = whole[-1].end if whole else 0
    with disk_errors(path), os.fdopen(open_file(path, os.O_RDWR), "r+b") as file:
        size = os.fstat(file.fileno()).st_size
        file.truncate(end)
        if end:
            file.seek(end - 1)
            if file.read(1) != b"\n":
                file.write(b"\n")
        if end != size:
            os.fsync(file.fileno())


def absolute(path: str | Path) -> str:
    """The path as it is good from any working directory; as it was where nothing is there.

    A link keeps its own name, which may say what kind of file it is where its target's does not.
    """
    try:
        place = Path(path).expanduser()
        if not place.exists():
            return str(path)
        named = place.name not in ("", "..")
        return str(place.parent.resolve() / place.name if named else place.resolve())
    except (OSError, ValueError, RuntimeError):  # a name that cannot be a path
        return str(path)


def lock(descriptor: int) -> bool:
    """Lock an open file for this process; the system lets go of it however the process ends.

    False, and no lock, where the system or the file system knows no such locks.

    Raises:
        BlockingIOError: another process holds it.
    """
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS_HERE:
            raise
        return False
    return True


def is_abandoned(path: Path) -> bool:
    """Whether no process holds the lock of a file or folder; False where that cannot be known."""
    try:
        descriptor = os.open(path, os.O_RDONLY | _SAFELY)
    except OSError:
        return False
    try:
        return lock(descriptor)
    except OSError:
        return False
    finally:
        os.close(descriptor)
