"""The lock and the log of a folder that a run works in."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from pathlib import Path
from typing import Any

from goldenlayers.durable import lock, open_file
from goldenlayers.errors import UserError
from goldenlayers.runfiles import LOCK, not_ours, unfinished


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
        text = f"process {os.getpid()} on {socket.gethostname()}\n"
        os.pwrite(descriptor, text.encode(), 0)
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
