"""Ray actors as workers of a sweep, on a cluster or started here (extra ``ray``)."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from goldenlayers.errors import UserError
from goldenlayers.sweeping.cells import Task
from goldenlayers.sweeping.workers import Message, Start, Worker

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(eq=False)
class _Actor:
    actor: Any
    pending: Any  # what it works on; None when it waits for a task


class StoredMoments:
    """Second moments in Ray's object store, one object per layer, read by whoever needs one."""

    def __init__(self, references: dict[int, Any]) -> None:
        self._references = references

    def __call__(self, layer: int) -> Tensor:
        """C of a layer, (F, F)."""
        import ray
        import torch

        return torch.tensor(ray.get(self._references[layer]))


class RayEngine:
    """Actors of a Ray cluster: one per worker, each with one CPU (and one GPU where asked for).

    Args:
        workers: how many.
        address: of a running cluster; None starts one here that ends with the sweep. A connection
            that the calling process has already is used and left as it is.
        gpu: whether each needs a GPU.

    Raises:
        UserError: Ray is not installed, or there is no cluster at ``address``.
    """

    def __init__(self, workers: int, address: str | None = None, *, gpu: bool = False) -> None:
        try:
            import ray
            from ray import exceptions as gone
        except ImportError:
            raise UserError(
                "the engine ray needs Ray, which is not installed",
                fix="pip install 'goldenlayers[ray]', or leave out --engine ray",
            ) from None
        self.workers, self._ray, self._gpu = workers, ray, gpu
        self._started: Any = None
        self._any = gone.RayError
        self._deadly = (gone.RayActorError, gone.WorkerCrashedError, gone.OutOfMemoryError)
        self._ours = not ray.is_initialized()
        self._ours_alone = self._ours and address is None
        if self._ours:
            own: dict[str, Any] = {"num_cpus": workers} if address is None else {}
            try:
                ray.init(
                    address=address or "local",
                    include_dashboard=False if address is None else None,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    **own,
                )
            except (ConnectionError, RuntimeError, ValueError, OSError) as error:
                raise UserError(
                    f"there is no Ray cluster at '{address or 'this machine'}' ({error})",
                    fix="Start one with `ray start --head`, or leave out --address",
                ) from error
        self._threads = max(1, int(ray.cluster_resources().get("CPU", 1)) // workers)

    def open(self, start: Start, number: int) -> _Actor:
        """Start an actor.

        Raises:
            UserError: the cluster that was started here has no place for it. (Others may grow.)
        """
        if self._gpu and self._ours_alone:
            gpus = int(self._ray.cluster_resources().get("GPU", 0))
            if number >= gpus:  # it would be waited for without an end
                raise UserError(
                    f"this machine has {gpus} GPUs, and each of {self.workers} workers needs one",
                    fix="Ask for fewer --workers" if gpus else "Use --device cpu",
                )
        if self._started is None:
            self._started = self._ray.put(self._shipped(start))
        options: dict[str, Any] = {"num_cpus": 1, "num_gpus": 1 if self._gpu else 0}
        actor = self._ray.remote(Worker).options(**options).remote()
        return _Actor(actor, actor.begin.remote(self._started, self._threads))

    def send(self, handle: _Actor, task: Task) -> None:
        """Hand a task over."""
        handle.pending = handle.actor.work.remote(task)

    def wait(self, handles: Sequence[_Actor]) -> list[tuple[_Actor, Message | str]]:
        """Messages and deaths."""
        busy = {handle.pending: handle for handle in handles if handle.pending is not None}
        ready, _ = self._ray.wait(list(busy), num_returns=1)
        found: list[tuple[_Actor, Message | str]] = []
        for reference in ready:
            handle = busy[reference]
            handle.pending = None
            try:
                found.append((handle, self._ray.get(reference)))
            except self._deadly as error:
                first = str(error).strip().splitlines()[0]
                found.append((handle, f"was lost ({type(error).__name__}: {first})"))
            except self._any as error:  # it could not even begin
                found.append((handle, Message("defect", str(error))))
        return found

    def close(self, handles: Sequence[_Actor]) -> None:
        """End the actors, and the cluster if it was started for them."""
        for handle in handles:
            with contextlib.suppress(Exception):  # it may be dead, and the cluster gone
                self._ray.kill(handle.actor)
        if self._ours:
            self._ray.shutdown()

    def _shipped(self, start: Start) -> Start:
        """``start`` with key statistics that other machines can read, layer by layer."""
        from goldenlayers.statistics import KeyStatistics

        old = start.job.statistics
        if not isinstance(old, KeyStatistics):
            return start
        references = {layer: self._ray.put(old.read(layer).numpy()) for layer in old}
        read, keep = StoredMoments(references), old.keep_bytes // self.workers
        new = replace(old, read=read, folder=None, keep_bytes=keep)
        return replace(start, job=replace(start.job, statistics=new))
