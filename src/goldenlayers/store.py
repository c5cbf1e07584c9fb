"""The folder a command leaves behind: whole, or marked as unfinished, never half and looking whole.

A run works in ``PATH.part`` and is renamed to ``PATH`` when it is finished. Rows are appended and
flushed to the disk batch by batch, so that a killed run loses at most the batch in flight.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import logging
import os
import shutil
import socket
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

from goldenlayers import durable
from goldenlayers.durable import disk_errors, plain
from goldenlayers.errors import UserError
from goldenlayers.shown import LogFormatter

CONFIG, LOG, LOCK = "config.yaml", "log.txt", ".lock"


class RunFolder:
    """One run's folder, made by ``create`` for writing or ``open`` for reading.

    As a context manager it is closed at the end of the block. Without ``finish()`` the work stays
    in ``PATH.part``, from where the same command can go on.

    ``path`` is where the files are now, ``target`` where they are when finished, ``config`` the
    resolved settings, ``resumed`` whether an unfinished run is gone on with.
    """

    def __init__(
        self, path: Path, target: Path, config: dict[str, Any], *, overwrite: bool = False
    ) -> None:
        self.path, self.target, self.config = path, target, config
        self.resumed = False
        self._overwrite = overwrite
        self._lock: int | None = None
        self._log: logging.FileHandler | None = None
        self._mended: set[str] = set()

    @property
    def kind(self) -> str:
        """The command that made the run."""
        return str(self.config.get("command", ""))

    @property
    def writable(self) -> bool:
        """Whether this process holds the folder for writing."""
        return self._lock is not None

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        config: Mapping[str, Any],
        *,
        resume: bool = False,
        overwrite: bool = False,
        ignore: Collection[str] = (),
    ) -> RunFolder:
        """Start (or go on with) the run that will stand at ``path``, and lock it.

        Args:
            path: where the finished run will be.
            config: the resolved settings, with "command"; "version" is added when it is missing.
            resume: go on with an unfinished run of the same settings, if there is one. Otherwise
                what an unfinished run left is removed.
            overwrite: a finished run at ``path`` is replaced once the new one is finished.
            ignore: settings, dotted ("evaluation.batch_size"), that may differ on resume.

        Raises:
            UserError: ``path`` is taken; another process works there; the unfinished run has other
                settings; the place cannot be written to.
        """
        target = Path(path).expanduser().resolve()
        if not target.name or target.name.endswith(".part"):
            raise UserError(f"'{path}' cannot be the name of a run", fix="Choose another --out")
        settings = plain({"version": _version(), **config})
        if not settings.get("command"):
            raise ValueError("the config of a run names its 'command'")
        run = cls(_part(target), target, settings, overwrite=overwrite)
        with disk_errors(run.path):
            run._acquire()
            try:
                run._check_target()
                run._start(resume=resume, ignore=ignore)
            except BaseException:
                run.close()
                with contextlib.suppress(OSError):
                    run.path.rmdir()  # goes only if it is empty, that is, made just now
                raise
        return run

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, part: bool = False) -> RunFolder:
        """A finished run, for reading; with ``part`` the unfinished one where none is finished.

        Raises:
            UserError: nothing there, not a run folder, or an unfinished run.
        """
        given = Path(path).expanduser().resolve()
        unfinished = given if given.name.endswith(".part") else _part(given)
        if given != unfinished and (given / CONFIG).is_file():
            return cls(given, given, _read_config(given / CONFIG))
        finished = Path(str(unfinished).removesuffix(".part"))
        if not (unfinished / CONFIG).is_file():
            raise UserError(
                f"{given} is not a run folder" if given.exists() else f"there is no {given}",
                expected=f"a folder that a golden command wrote, with its {CONFIG}",
            )
        if not part:
            raise UserError(
                f"the run {finished} is not finished (its files are in {unfinished})",
                fix="Run the same command again to go on with it",
            )
        return cls(unfinished, finished, _read_config(unfinished / CONFIG))

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None and self._log is not None:
            # What the user did or can mend needs no traceback; a defect does.
            expected = isinstance(error, UserError | KeyboardInterrupt)
            self.log(f"stopped: {type(error).__name__}: {error}", error=None if expected else error)
        self.close()

    def file(self, name: str) -> Path:
        """The path of a file in the folder (for a figure or tensors)."""
        if Path(name).name != name or name in ("", "..", LOCK):
            raise ValueError(f"'{name}' is not a plain file name")
        return self.path / name

    def log(self, message: str, *, error: BaseException | None = None) -> None:
        """Add a line with the time to ``log.txt``, and the traceback of ``error`` if there is one.

        Warnings of the package's loggers go there too while the folder is open for writing.
        """
        self._need_writable()
        trace = (type(error), error, error.__traceback__) if error is not None else None
        record = logging.LogRecord("goldenlayers", logging.INFO, "", 0, message, None, trace)
        if self._log is not None:
            self._log.handle(record)

    def write_json(self, name: str, value: Any) -> Path:
        """Write ``value`` as strict JSON, whole or not at all; NaN and infinities become null.

        Raises:
            UserError: the disk is full or cannot be written to.
        """
        self._need_writable()
        durable.write_text(self.file(name), durable.json_text(value, indent=1) + "\n")
        return self.file(name)

    def append_rows(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows to a JSON-lines file; when this returns they are on the disk.

        Raises:
            UserError: the disk is full; the file is as it was before this batch.
        """
        self._need_writable()
        path = self.file(name)
        if name not in self._mended:
            durable.mend_tail(path)
            self._mended.add(name)
        durable.append_rows(path, rows)

    def read_rows(self, name: str) -> list[dict[str, Any]]:
        """The rows of a JSON-lines file, without a torn last line; [] if there is no file yet.

        Raises:
            UserError: a broken line before the last one; with its number.
        """
        return durable.read_rows(self.file(name)) if self.file(name).exists() else []

    def rows(self, name: str) -> list[dict[str, Any]]:
        """As ``read_rows``, but a file that is not there is the user's error."""
        return durable.read_rows(self._existing(name))

    def json(self, name: str) -> Any:
        """The value of a JSON file.

        Raises:
            UserError: no such file, or broken JSON.
        """
        path = self._existing(name)
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path} is not valid JSON ({error})") from error

    def finish(self) -> Path:
        """Put everything on the disk, rename ``PATH.part`` to ``PATH``, and close. Returns PATH.

        Raises:
            UserError: something came to stand at PATH meanwhile; the work stays in ``PATH.part``.
        """
        self._need_writable()
        with disk_errors(self.target):
            self._check_target()
            self.log("finished")
            for path in self.path.rglob("*"):
                if path.is_file():
                    durable.sync(path)
            durable.sync(self.path)
            old = _aside(self.target)
            replacing = self.target.exists()
            if replacing:
                self.target.rename(old)
            try:
                self.path.rename(self.target)
            except OSError:
                if replacing:
                    old.rename(self.target)
                raise
            durable.sync(self.target.parent)
        self.path = self.target
        self.close()
        if replacing:
            shutil.rmtree(old, ignore_errors=True)
        return self.target

    def close(self) -> None:
        """Release the lock and the log; the files stay as they are."""
        if self._log is not None:
            logging.getLogger("goldenlayers").removeHandler(self._log)
            self._log.close()
            self._log = None
        if self._lock is not None:
            # Removed while still held: whoever opened it before sees that it is gone and retries.
            with contextlib.suppress(OSError):
                (self.path / LOCK).unlink()
            os.close(self._lock)
            self._lock = None

    def _need_writable(self) -> None:
        if not self.writable:
            raise ValueError("the run folder is not open for writing")

    def _existing(self, name: str) -> Path:
        path = self.file(name)
        if not path.is_file():
            there = sorted(p.name for p in self.path.iterdir() if not p.name.startswith("."))
            raise UserError(f"{self.path} has no {name} (it holds {', '.join(there)})")
        return path

    def _acquire(self) -> None:
        """Lock ``PATH.part``, making it if needed."""
        path = self.path / LOCK
        while True:
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            except FileNotFoundError:  # another process finished just now and moved the folder
                continue
            try:
                durable.lock(descriptor)
            except BlockingIOError:
                holder = os.read(descriptor, 200).decode(errors="replace").strip()
                os.close(descriptor)
                raise UserError(
                    f"{self.target} is being written by another run ({holder or 'just started'})",
                    fix="Wait until it is finished, or choose another --out",
                ) from None
            # Between opening and locking, the holder may have finished and removed this lock.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), path.stat()):
                    break
            os.close(descriptor)
        self._lock = descriptor
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())

    def _check_target(self) -> None:
        """The target is free or may be overwritten; a replacement that was cut short is undone."""
        old = _aside(self.target)
        if (old / CONFIG).is_file():
            if self.target.exists():
                shutil.rmtree(old)
            else:
                old.rename(self.target)
        if not self.target.exists():
            return
        fix = "Choose another --out"
        if not self.target.is_dir():
            raise UserError(f"{self.target} is a file", fix=fix)
        if not any(self.target.iterdir()):
            self.target.rmdir()
        elif not (self.target / CONFIG).is_file():
            raise UserError(f"{self.target} is a folder with other things in it", fix=fix)
        elif not self._overwrite:
            raise UserError(
                f"{self.target} already holds a finished run", fix=f"{fix}, or add --overwrite"
            )

    def _start(self, *, resume: bool, ignore: Collection[str]) -> None:
        """Go on with what lies in ``PATH.part`` or clear it; write the config; start the log."""
        there = [path for path in self.path.iterdir() if path.name != LOCK]
        config = self.path / CONFIG
        if not config.is_file() and not all(path.name.startswith(".") for path in there):
            raise UserError(
                f"{self.path} has files in it but is not an unfinished run",
                fix="Move it away, or choose another --out",
            )
        if resume and config.is_file():
            changes = _differences(_read_config(config), self.config, ignore)
            if changes:
                raise UserError(
                    f"the unfinished run {self.path} has other settings: {'; '.join(changes)}",
                    fix="Repeat the old settings, choose another --out, "
                    f"or remove {self.path} to begin anew",
                )
            self.resumed = True
        else:
            # The config goes last: a kill on the way leaves a folder that is still known as ours.
            for path in sorted(there, key=lambda path: path.name == CONFIG):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        text = yaml.safe_dump(self.config, sort_keys=False, allow_unicode=True, width=100)
        durable.write_text(config, text)
        self._log = _LogFile(self.path / LOG, encoding="utf-8")
        self._log.setFormatter(LogFormatter("%(asctime)s %(message)s"))
        logging.getLogger("goldenlayers").addHandler(self._log)
        self.log("resumed" if self.resumed else "started")


class _LogFile(logging.FileHandler):
    """A log that cannot be written (disk full) must not stop the run or print a traceback."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        pass


def _part(target: Path) -> Path:
    return Path(f"{target}.part")


def _aside(target: Path) -> Path:
    return Path(f"{target}.replaced")


def _version() -> str:
    try:
        return importlib.metadata.version("goldenlayers")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _read_config(path: Path) -> dict[str, Any]:
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a run's config", expected="a mapping of settings")
    return value


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Settings by their dotted names."""
    if not isinstance(value, dict) or not value:
        return {name: value}
    return {
        key: item
        for part, inner in value.items()
        for key, item in _flat(inner, f"{name}.{part}" if name else str(part)).items()
    }


def _differences(old: dict[str, Any], new: dict[str, Any], ignore: Collection[str]) -> list[str]:
    """Each setting that differs and is not to be ignored, as "name: old -> new"."""
    before, after = _flat(old), _flat(new)
    found = []
    for name in [*before, *(key for key in after if key not in before)]:
        left, right = before.get(name, "(not set)"), after.get(name, "(not set)")
        if left != right and not any(f"{name}.".startswith(f"{key}.") for key in ignore):
            found.append(f"{name}: {_short(left)} -> {_short(right)}")
    return found


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
