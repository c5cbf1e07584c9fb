"""The folder a command leaves behind: whole, or marked as unfinished, never half and looking whole.

A run works in ``PATH.part`` and is renamed to ``PATH`` when it is finished. Rows are appended and
flushed to the disk batch by batch, so that a killed run loses at most the batch in flight.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

import goldenlayers
from goldenlayers import durable, runfiles
from goldenlayers.durable import disk_errors
from goldenlayers.errors import UserError
from goldenlayers.records import json_text, parse_json, plain, short, text_of
from goldenlayers.runfiles import CONFIG, LOCK, LOG, REPLACED, read_record
from goldenlayers.shown import LogFormatter

# Of the record: what says nothing about whether two runs are the same work.
_FREE = ("key", "files")
# And where the run cannot be gone on with, so that its command and settings are all that counts:
_FREE_AFRESH = ("version", "model", "data", "inputs")


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

    def require(self, *kinds: str, expected: str = "") -> None:
        """Refuse the run of another command than those of ``kinds``."""
        if self.kind not in kinds:
            found = f"{self.path} is a run of '{self.kind}'"
            raise UserError(found, expected=expected or f"a run of golden {kinds[0]}")

    @property
    def key(self) -> str:
        """What the rows' checks are made with; "" in runs of earlier versions, which had none."""
        return str(self.config.get("key", ""))

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
                it is removed.
            overwrite: a finished run at ``path`` is replaced once the new one is finished, and an
                unfinished one of other settings is removed.
            ignore: settings, dotted ("evaluation.batch_size"), that may differ between an
                unfinished run and this one.

        Raises:
            UserError: ``path`` is taken; another process works there; the unfinished run has other
                settings; something lies there that no run wrote; the place cannot be written to.
        """
        target = runfiles.place(path)
        settings = plain({"version": goldenlayers.__version__, **config})
        if not settings.get("command"):
            raise ValueError("the config of a run names its 'command'")
        free = (*ignore, *_FREE, *(() if resume else _FREE_AFRESH))
        settings["key"] = runfiles.key_of(settings, (*ignore, "version"))
        run = cls(_part(target), target, settings, overwrite=overwrite)
        with disk_errors(run.path):
            try:
                run._lock = runfiles.acquire(run.path, target)
                runfiles.undo_replacement(run.path, target)
                runfiles.refuse_taken(target, overwrite=overwrite)
                run._start(resume=resume, ignore=free)
            except BaseException:
                run.close()
                with contextlib.suppress(OSError):
                    run.path.rmdir()  # goes only if it is empty, that is, made just now
                raise
        return run

    @classmethod
    def refuse(
        cls,
        path: str | os.PathLike[str],
        config: Mapping[str, Any],
        *,
        resume: bool = False,
        overwrite: bool = False,
        ignore: Collection[str] = (),
    ) -> None:
        """Refuse what ``create`` would refuse, as far as it can be told before the work.

        Raises:
            UserError: as for ``create``.
        """
        target = runfiles.place(path)
        run = cls(_part(target), target, plain(config), overwrite=overwrite)
        with disk_errors(target):
            runfiles.refuse_taken(target, overwrite=overwrite)
            old = runfiles.unfinished(run.path)
            if not resume:  # what it is resumed with is not all known yet
                run._refuse_other(old, (*ignore, *_FREE, *_FREE_AFRESH))

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, part: bool = False) -> RunFolder:
        """A finished run, for reading; with ``part`` the unfinished one where none is finished.

        Raises:
            UserError: nothing there, not a run folder, or an unfinished run.
        """
        try:
            given = Path(path).expanduser().resolve()
            unfinished = given if given.name.endswith(".part") else _part(given)
            done = given != unfinished and os.path.lexists(given / CONFIG)
            begun = os.path.lexists(unfinished / CONFIG)
            there = os.path.lexists(given)
        except (OSError, RuntimeError, ValueError) as error:
            raise UserError(f"{short(str(path))} cannot be a run folder") from error
        if done:
            return cls(given, given, read_record(given / CONFIG))
        finished = Path(str(unfinished).removesuffix(".part"))
        if not begun:
            raise UserError(
                f"{given} is not a run folder" if there else f"there is no {given}",
                expected=f"a folder that a golden command wrote, with its {CONFIG}",
            )
        if not part:
            raise UserError(
                f"the run {finished} is not finished (its files are in {unfinished})",
                fix="Run the same command again to go on with it",
            )
        return cls(unfinished, finished, read_record(unfinished / CONFIG))

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
        durable.write_text(self.file(name), json_text(value, indent=1) + "\n")
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
        durable.append_rows(path, rows, self.key)

    def read_rows(self, name: str) -> list[dict[str, Any]]:
        """The rows of a JSON-lines file, without a torn last line; [] if there is no file yet.

        Raises:
            UserError: a line that is broken, was changed, or is of another run; with its number.
        """
        return self.rows(name) if os.path.lexists(self.file(name)) else []

    def rows(self, name: str) -> list[dict[str, Any]]:
        """As ``read_rows``, but a file that is not there is the user's error."""
        digest = hashlib.sha256()
        found = durable.read_rows(self._existing(name), self.key, digest)
        self._compare(name, digest.hexdigest())
        return found

    def resume_rows(
        self, name: str, problem: Callable[[dict[str, Any]], str]
    ) -> tuple[list[dict[str, Any]], str]:
        """The rows to go on with, and a sentence on what was set aside ("" if nothing was).

        Lines that are broken, were changed, or are of another run, and rows that ``problem`` says
        something about, are moved to ``set-aside.txt``: what they stood for is done again.

        Raises:
            UserError: the file cannot be read or written.
        """
        self._need_writable()
        if not os.path.lexists(self.file(name)):
            return [], ""
        rows, note = runfiles.set_aside(self.file(name), self.key, problem)
        if note:
            self.log(note)
        return rows, note

    def json(self, name: str) -> Any:
        """The value of a JSON file.

        Raises:
            UserError: no such file, broken JSON, or not as the run left it.
        """
        path = self._existing(name)
        data = durable.read_bytes_file(path)
        value = parse_json(text_of(data, path), path)
        self._compare(name, hashlib.sha256(data).hexdigest())
        return value

    def finish(self) -> Path:
        """Put everything on the disk, rename ``PATH.part`` to ``PATH``, and close. Returns PATH.

        Raises:
            UserError: something came to stand at PATH meanwhile; the work stays in ``PATH.part``.
        """
        self._need_writable()
        old: dict[str, Any] | None = None
        aside = self.path / REPLACED
        with disk_errors(self.target):
            runfiles.refuse_taken(self.target, overwrite=self._overwrite)
            self.log("finished")
            self.config["files"] = runfiles.result_files(self.path, self.kind)
            self._write_config()
            for path in self.path.iterdir():
                if path.is_file():
                    durable.sync(path)
            durable.sync(self.path)
            if self.target.exists():
                if any(self.target.iterdir()):
                    old = read_record(self.target / CONFIG)
                    if (before := self.target / REPLACED).exists():
                        runfiles.remove(before, read_record(before / CONFIG))
                    self.target.rename(aside)
                else:
                    self.target.rmdir()
            try:
                self.path.rename(self.target)
            except OSError:
                if old is not None:
                    aside.rename(self.target)
                raise
            durable.sync(self.target.parent)
        self.path = self.target
        self.close()
        if old is not None:
            with contextlib.suppress(OSError, UserError):
                runfiles.remove(self.path / REPLACED, old)
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
        if not os.path.lexists(path):
            there = sorted(p.name for p in self.path.iterdir() if not p.name.startswith("."))
            raise UserError(f"{self.path} has no {name} (it holds {', '.join(there)})")
        return path

    def _compare(self, name: str, sha256: str) -> None:
        """Hold a finished run's file to the hash that the run recorded (earlier versions did not).

        Raises:
            UserError: it is another file.
        """
        files = self.config.get("files")
        if files is not None and self.path == self.target and files.get(name) != sha256:
            raise UserError(
                f"{self.path / name} is not as its run left it",
                expected=f"the file whose sha256 stands in {CONFIG}",
                fix="Put it back as it was, or make the run again",
            )

    def _refuse_other(self, old: dict[str, Any] | None, ignore: Collection[str]) -> bool:
        """Whether the unfinished run is of other settings and is to be overwritten.

        Raises:
            UserError: it is of other settings and is not to be.
        """
        changes = runfiles.differences(old, self.config, ignore) if old is not None else []
        if not changes or self._overwrite or old is None:
            return bool(changes)
        what = f"the unfinished run {self.path} has other settings: {'; '.join(changes)}"
        if old["command"] != self.kind:
            what = f"{self.path} is an unfinished run of golden {old['command']}"
        raise UserError(
            what,
            fix="Repeat the old settings, choose another --out, or add --overwrite to begin anew",
        )

    def _start(self, *, resume: bool, ignore: Collection[str]) -> None:
        """Go on with what lies in ``PATH.part`` or clear it; write the config; start the log."""
        old = runfiles.unfinished(self.path)
        other = self._refuse_other(old, ignore)
        if old is not None and resume and not other:
            self.resumed = True
            for file in self.path.iterdir():  # nothing that is also a file elsewhere is written to
                os.close(durable.open_file(file, os.O_RDWR))
            del self.config["key"]
            self.config |= {"key": old["key"]} if "key" in old else {}
        elif old is not None:
            runfiles.remove(self.path, old, keep=(LOCK,))
        self._write_config()
        self._log = runfiles.LogFile(self.path / LOG)
        self._log.setFormatter(LogFormatter("%(asctime)s %(message)s"))
        self._log.setLevel(logging.WARNING)  # what others say, not what this folder logs
        logging.getLogger("goldenlayers").addHandler(self._log)
        self.log("resumed" if self.resumed else "started")

    def _write_config(self) -> None:
        text = yaml.safe_dump(self.config, sort_keys=False, allow_unicode=True, width=100)
        durable.write_text(self.path / CONFIG, text)


def _part(target: Path) -> Path:
    return Path(f"{target}.part")
