"""Commands with something that goes wrong at a chosen moment.

A server process imports everything once and forks a child per command, so a case costs a fraction
of a second in place of several. In the child an audit hook counts the operations on files below a
folder; at a chosen one the child is killed, or the operation fails as on a full disk.

Run as a script this module is the server: one JSON request per line in, one answer per line out.
"""

from __future__ import annotations

import errno
import fcntl
import importlib
import json
import os
import pkgutil
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TIMEOUT = 120.0  # seconds; no command here takes more than a few
HANGS = "hangs"
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = {
    *("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link", "os.symlink"),
    *("shutil.rmtree", "shutil.move", "shutil.copyfile"),
}
_REMOVALS = ("os.remove", "os.rmdir", "shutil.rmtree")
_ERRORS = {name: getattr(errno, name) for name in ("ENOSPC", "EACCES", "EIO")}


@dataclass(frozen=True)
class End:
    """How a command ended: ``status`` its exit status, negative for a signal, or "hangs".

    ``operations`` counts what it did to files, if it came to its end by itself.
    """

    status: int | str
    out: str
    err: str
    operations: int | None

    @property
    def crashed(self) -> bool:
        """Whether it ended in a traceback, or not at all."""
        return self.status in (1, HANGS) or "Traceback (most recent call last)" in self.err


class Server:
    """Runs commands in forked children of one process that has imported everything."""

    def __init__(self, watched: Path) -> None:
        self.watched = watched
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "140"}
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=TIMEOUT)

    def run(self, *argv: object, fault: Mapping[str, Any] | None = None) -> End:
        """Run one command.

        ``fault`` is {"at": n, "do": D}: at the n-th operation on a file, where D is a signal
        ("KILL", "TERM", "INT") or an error ("ENOSPC", ...); {"after": seconds, "do": signal}; or
        {"file_bytes": n}: no file can grow larger.
        """
        return self.together([argv], fault)[0]

    def together(
        self, commands: Sequence[Sequence[object]], fault: Mapping[str, Any] | None = None
    ) -> list[End]:
        """Run commands at the same time."""
        request = {
            "commands": [[str(a) for a in argv] for argv in commands],
            "fault": fault,
            "watched": str(self.watched),
        }
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return [End(**end) for end in json.loads(self._process.stdout.readline())]


def _watch(folder: str, fault: Mapping[str, Any], counter: list[int]) -> None:
    """Count operations on files below ``folder``, and let one of them go wrong."""
    at, what = fault.get("at", 0), fault.get("do", "")
    root = os.path.realpath(folder) + os.sep
    pulled = not at

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal pulled
        if event == "open":
            path, _mode, flags = args
            if not isinstance(flags, int) or not flags & _WRITING:
                return
        elif event in _CHANGES:
            path = args[0]
        else:
            return
        if not isinstance(path, str | bytes | os.PathLike):
            return
        if not os.path.abspath(os.fsdecode(path)).startswith(root):
            return
        counter[0] += 1
        # Nothing takes room by going, so a removal does not fail: the next operation does.
        if pulled or counter[0] < at or (what in _ERRORS and event in _REMOVALS):
            return
        pulled = True
        if what in _ERRORS:
            code = _ERRORS[what]
            raise OSError(code, os.strerror(code), os.fsdecode(path))
        os.kill(os.getpid(), getattr(signal, f"SIG{what}"))

    sys.addaudithook(hook)


def _child(argv: list[str], request: Mapping[str, Any], pipes: Sequence[int]) -> None:
    """The forked child: it never returns. ``pipes`` take standard output, error and the count."""
    fault = request["fault"] or {}
    status, counter = 1, [0]
    out, err, count = pipes
    try:
        os.dup2(out, 1)
        os.dup2(err, 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if "file_bytes" in fault:
            most = int(fault["file_bytes"])
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
        _watch(request["watched"], fault, counter)
        from goldenlayers.cli import main

        try:
            status = main(argv)
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else 1
        sys.stdout.flush()
        sys.stderr.flush()
        os.write(count, str(counter[0]).encode())
    except BaseException:
        import traceback

        os.write(2, traceback.format_exc().encode(errors="replace"))
        status = 1
    finally:
        os._exit(status)


def _pipe() -> tuple[int, int]:
    """A pipe that holds a megabyte, more than any command here prints."""
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 1 << 20)
    return reader, writer


def _run(request: Mapping[str, Any]) -> list[dict[str, Any]]:
    fault = request["fault"] or {}
    children: dict[int, int] = {}
    readers: list[list[int]] = []
    for i, argv in enumerate(request["commands"]):
        # Pipes, not files: what is printed must not meet the limit of a file's size.
        pipes = [_pipe() for _ in range(3)]
        pid = os.fork()
        if pid == 0:
            _child(argv, request, [writer for _, writer in pipes])
        for _, writer in pipes:
            os.close(writer)
        readers.append([reader for reader, _ in pipes])
        children[pid] = i
    # What is still to be sent to the children, by the second.
    due = [(TIMEOUT, signal.SIGKILL)]
    if "after" in fault:
        due.append((fault["after"], getattr(signal, f"SIG{fault['do']}")))
    start, hangs = time.monotonic(), False
    ends: dict[int, int | str] = {}
    while children:
        pid, code = os.waitpid(-1, os.WNOHANG)
        if pid:
            ends[children.pop(pid)] = HANGS if hangs else os.waitstatus_to_exitcode(code)
            continue
        if due and time.monotonic() - start >= due[-1][0]:
            hangs = len(due) == 1
            for child in children:
                os.kill(child, due[-1][1])
            due.pop()
        time.sleep(0.005)
    return [_end(ends[i], *readers[i]) for i in range(len(readers))]


def _end(status: int | str, *readers: int) -> dict[str, Any]:
    texts = []
    for reader in readers:
        with open(reader, "rb") as pipe:
            texts.append(pipe.read().decode(errors="replace"))
    out, err, count = texts
    return {"status": status, "out": out, "err": err, "operations": int(count) if count else None}


def _serve() -> None:
    import torch

    torch.set_num_threads(1)
    # Everything a command could import, so that a child starts at once: importing takes seconds,
    # the commands' own work here a fraction of one.
    import matplotlib.pyplot  # noqa: F401
    import peft  # noqa: F401
    import transformers.models.llama.modeling_llama
    import transformers.models.llama.tokenization_llama  # noqa: F401

    import goldenlayers

    for module in pkgutil.walk_packages(goldenlayers.__path__, "goldenlayers."):
        importlib.import_module(module.name)

    for line in sys.stdin:
        answer = json.dumps(_run(json.loads(line)))
        print(answer, flush=True)


if __name__ == "__main__":
    _serve()
