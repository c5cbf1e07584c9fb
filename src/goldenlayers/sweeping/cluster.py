"""Workers on a Ray cluster: one actor each, on whatever node has a place for it.

A node may have other software, other folders, or be lost at any time. So a worker first joins: it
is told what the caller runs and where, and says what does not agree. Then it loads the model.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from goldenlayers.errors import UserError
from goldenlayers.models.cache import CACHE_VARIABLE
from goldenlayers.statistics.cache import MANIFEST
from goldenlayers.sweeping.cells import Task
from goldenlayers.sweeping.workers import Message, Start, Worker, said_of, shared_out

if TYPE_CHECKING:
    from torch import Tensor

    from goldenlayers.models import Model
    from goldenlayers.statistics import KeyStatistics

_LOOK_SECONDS = 30.0  # how often it is looked whether workers wait for a place
_LATE_SECONDS = 300.0  # of a worker that has not begun although the cluster is large enough
_SETTLE_SECONDS = 2.0  # so that the cluster knows of a lost node before it is given the next worker
_KNOCK_SECONDS = 10.0


def software() -> dict[str, str]:
    """What the numbers depend on: versions by name, and a hash of this package's files."""
    import torch
    import transformers

    import goldenlayers

    package, content = Path(__file__).parents[1], hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        content.update(file.relative_to(package).as_posix().encode() + b"\0" + file.read_bytes())
    return {
        "goldenlayers": f"{goldenlayers.__version__} (files {content.hexdigest()[:8]})",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def gpus_of(model: Model) -> int:
    """How many GPUs the model is on."""
    devices = {weight.device for weight in model.hf.parameters()} | {model.device}
    return sum(device.type == "cuda" for device in devices)


class ClusterWorker(Worker):
    """A worker on a node of a cluster."""

    def join(self, here: dict[str, Any]) -> Message:
        """Take over the caller's folders; "joined" comes with this node's address, and whether it
        sees the caller's key statistics.

        ``here`` is what :func:`_here` gives: plain values, which any version of this package reads.
        """

        def run() -> Message:
            import ray

            node = ray.util.get_node_ip_address()
            mine, theirs = software(), here["software"]
            if other := [name for name in theirs if theirs[name] != mine.get(name)]:
                raise UserError(
                    "node {} has {}".format(node, ", ".join(f"{n} {mine.get(n)}" for n in other)),
                    expected=", ".join(f"{n} {theirs[n]}" for n in other)
                    + ", as where the sweep began",
                    fix="Install the same versions on every node; see docs/howto/cluster.md",
                )
            with contextlib.suppress(OSError):  # what is missed there, loading tells
                os.chdir(here["folder"])
            if here["cache"]:
                os.environ[CACHE_VARIABLE] = here["cache"]
            return Message("joined", (node, _sees(here["statistics"])))

        return said_of(run)


def _sees(statistics: tuple[str, bytes] | None) -> bool:
    if statistics is None:
        return False
    folder, manifest = statistics
    with contextlib.suppress(OSError):
        return (Path(folder) / MANIFEST).read_bytes() == manifest
    return False


class StoredMoments:
    """Second moments in Ray's object store, one object per layer, read by whoever needs one."""

    def __init__(self, references: dict[int, Any]) -> None:
        self._references = references

    def __call__(self, layer: int) -> Tensor:
        """C of a layer, (F, F)."""
        import ray
        import torch

        return torch.tensor(ray.get(self._references[layer]))


@dataclass(eq=False)
class _Actor:
    actor: Any
    pending: Any  # what it works on; None when it waits for a task
    node: str = ""  # its address; "" until it has joined


class RayEngine:
    """Actors of a Ray cluster: one per worker, each with one CPU and the GPUs that it needs.

    Args:
        workers: how many. Those that find no place wait for one; the others do the work.
        address: of a running cluster; None starts one here that ends with the sweep. A connection
            that the calling process has already is used and left as it is.
        gpus: how many GPUs each needs.
        note: told when workers wait for a place.

    Raises:
        UserError: Ray is not installed, or there is no cluster at ``address``.
    """

    def __init__(
        self,
        workers: int,
        address: str | None = None,
        *,
        gpus: int = 0,
        note: Callable[[str], None] | None = None,
    ) -> None:
        try:
            import ray
            from ray import exceptions as gone
        except ImportError:
            raise UserError(
                "the engine ray needs Ray, which is not installed",
                fix="pip install 'goldenlayers[ray]', or leave out --engine ray",
            ) from None
        self.workers, self._ray, self._gpus, self._note = workers, ray, gpus, note
        self._begins: dict[bool, Any] = {}
        self._here: dict[str, Any] = {}
        self._start: Start | None = None
        self._opened = time.monotonic()
        self._look, self._told = self._opened + _LOOK_SECONDS, 0
        self._any = gone.RayError
        # What an actor had found is lost, too, where the node's store is.
        self._deadly = (
            gone.RayActorError,
            gone.WorkerCrashedError,
            gone.OutOfMemoryError,
            gone.ObjectLostError,
        )
        self._ours = not ray.is_initialized()
        self._ours_alone = self._ours and address is None
        if self._ours:
            own: dict[str, Any] = {"num_cpus": workers} if address is None else {}
            try:
                _knock(address or "")
                ray.init(
                    address=address or "local",
                    include_dashboard=False if address is None else None,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    **own,
                )
            except (ConnectionError, RuntimeError, ValueError, OSError, OverflowError) as error:
                raise UserError(
                    f"there is no Ray cluster at '{address or 'this machine'}' that can be used "
                    f"({error})",
                    fix="Start one with `ray start --head`, with this Python; if it asks for a "
                    "token, set RAY_AUTH_MODE=token; or leave out --address",
                ) from error
        self._threads = max(1, int(ray.cluster_resources().get("CPU", 1)) // workers)

    def open(self, start: Start, number: int) -> _Actor:
        """Start an actor.

        Raises:
            UserError: the cluster that was started here has no place for it. (Others may grow.)
        """
        if self._gpus and self._ours_alone:
            gpus = int(self._ray.cluster_resources().get("GPU", 0))
            if (number + 1) * self._gpus > gpus:  # it would be waited for without an end
                raise UserError(
                    f"this machine has {gpus} GPUs, and each of {self.workers} workers needs "
                    f"{self._gpus}",
                    fix="Ask for fewer --workers" if gpus >= self._gpus else "Use --device cpu",
                )
        if self._start is None:
            self._start, self._here = start, _here(_statistics(start))
        self._opened = time.monotonic()
        # Spread: each loads the model and has a share of the threads of all nodes.
        actor = (
            self._ray.remote(ClusterWorker)
            .options(num_cpus=1, num_gpus=self._gpus, scheduling_strategy="SPREAD")
            .remote()
        )
        return _Actor(actor, actor.join.remote(self._here))

    def send(self, handle: _Actor, task: Task) -> None:
        """Hand a task over."""
        handle.pending = handle.actor.work.remote(task)

    def wait(self, handles: Sequence[_Actor]) -> list[tuple[_Actor, Message | str]]:
        """Messages and deaths."""
        found: list[tuple[_Actor, Message | str]] = []
        while not found:
            busy = {handle.pending: handle for handle in handles if handle.pending is not None}
            patience = max(0.1, self._look - time.monotonic())
            ready, _ = self._ray.wait(list(busy), num_returns=1, timeout=patience)
            if time.monotonic() >= self._look:
                self._tell_waiting(handles)
            for reference in ready:
                handle = busy[reference]
                handle.pending = None
                said = self._heard(handle, reference)
                if isinstance(said, Message) and said.kind == "joined":
                    handle.node, sees = said.value
                    begin = self._begin(sees)
                    handle.pending = handle.actor.begin.remote(begin, self._threads)
                else:
                    found.append((handle, said))
        return found

    def close(self, handles: Sequence[_Actor]) -> None:
        """End the actors, and the cluster if it was started for them."""
        for handle in handles:
            self._end(handle)
        if self._ours:
            self._ray.shutdown()

    def _end(self, handle: _Actor) -> None:
        with contextlib.suppress(Exception):  # it may be dead, and the cluster gone
            self._ray.kill(handle.actor)

    def _heard(self, handle: _Actor, reference: Any) -> Message | str:
        try:
            said: Message = self._ray.get(reference)
        except self._deadly as error:
            self._end(handle)
            time.sleep(_SETTLE_SECONDS)
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            missing = [line for line in lines if line.startswith("ModuleNotFoundError")]
            if missing and not handle.node:
                unfit = UserError(
                    f"a node of the cluster cannot run a worker ({missing[-1]})",
                    fix="Install this version of goldenlayers on every node, for the Python that "
                    "starts Ray there",
                )
                return Message("user", unfit)
            where = f"on node {handle.node} was lost" if handle.node else "was lost before it began"
            # What Ray says of an actor's end is long, and not why it ended.
            why = "" if isinstance(error, self._deadly[0]) else f": {lines[0]}"
            return f"{where} ({type(error).__name__}{why})"
        except self._any as error:  # it could not even begin
            return Message("defect", str(error))
        if said.kind == "user" and handle.node:
            wrong: UserError = said.value
            found = f"on node {handle.node}: {wrong.found}"
            return Message("user", UserError(found, expected=wrong.expected, fix=wrong.fix))
        return said

    def _tell_waiting(self, handles: Sequence[_Actor]) -> None:
        """Say it, once, where workers find no place."""
        self._look = time.monotonic() + _LOOK_SECONDS
        need = {"CPU": 1, "GPU": self._gpus}
        free, all_ = self._ray.available_resources(), self._ray.cluster_resources()
        waiting = sum(not handle.node for handle in handles)
        # Where there are places enough, other jobs may hold them, or the software loads slowly.
        few = any(all_.get(name, 0) < n * len(handles) for name, n in need.items())
        full = any(free.get(name, 0) < n for name, n in need.items())
        late = time.monotonic() - self._opened > _LATE_SECONDS
        if waiting == self._told or not (few or (full and late)):
            return
        self._told = waiting
        if waiting and self._note is not None:
            each = " and ".join(f"{n} {name}" for name, n in need.items() if n)
            there = ", ".join(
                f"{all_.get(name, 0):g} {name}, {free.get(name, 0):g} of them free"
                for name, n in need.items()
                if n
            )
            self._note(
                f"{waiting} of {len(handles)} workers have not begun: each needs {each}, and the "
                f"cluster has {there}. They begin as soon as there is a place"
            )

    def _begin(self, sees: bool) -> Any:
        """What a worker begins with: key statistics from the files that it sees, or from Ray."""
        assert self._start is not None
        if sees not in self._begins:
            begin = shared_out(self._start, self.workers) if sees else self._shipped(self._start)
            self._begins[sees] = self._ray.put(begin)
        return self._begins[sees]

    def _shipped(self, start: Start) -> Start:
        """``start`` with key statistics that other machines can read, layer by layer."""
        old = _statistics(start)
        if old is None:
            return start
        references = {layer: self._ray.put(old.read(layer).numpy()) for layer in old}
        read, keep = StoredMoments(references), old.keep_bytes // self.workers
        new = replace(old, read=read, folder=None, keep_bytes=keep)
        return replace(start, job=replace(start.job, statistics=new))


def _knock(address: str) -> None:
    """Fail at once where nobody listens at HOST:PORT: Ray itself would try for two minutes."""
    if match := re.fullmatch(r"([^:/]+):([0-9]{1,5})", address):
        with socket.create_connection((match[1], int(match[2])), _KNOCK_SECONDS):
            pass


def _statistics(start: Start) -> KeyStatistics | None:
    from goldenlayers.statistics import KeyStatistics

    found = start.job.statistics
    return found if isinstance(found, KeyStatistics) else None


def _here(statistics: KeyStatistics | None) -> dict[str, Any]:
    """What the caller runs, and where: versions, the working directory that relative paths begin
    at, the environment's cache, the folder of the key statistics and what its manifest holds.
    """
    kept: tuple[str, bytes] | None = None
    if statistics is not None and statistics.folder is not None:
        with contextlib.suppress(OSError):
            kept = str(statistics.folder), (statistics.folder / MANIFEST).read_bytes()
    return {
        "software": software(),
        "folder": str(Path.cwd()),
        "cache": os.environ.get(CACHE_VARIABLE),
        "statistics": kept,
    }
