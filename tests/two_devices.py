"""Two GPUs played by the CPU: tensors that say which device they are on, and refuse to mix.

Numbers are the CPU's. A tensor remembers the device it was sent to; an operation on tensors of two
devices is an error, as on real ones, save for single numbers and for CPU indices.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

CPU = torch.device("cpu")
_INDEXED = {"__getitem__", "__setitem__", "index_put", "index_put_"}
_PLACED: dict[int, torch.device] = {}


class OtherDeviceError(RuntimeError):
    """An operation had tensors of two devices."""


def _tag(tensor: Tensor, device: torch.device) -> Tensor:
    tensor._played = device  # type: ignore[attr-defined]
    return tensor


def played(tensor: Tensor) -> torch.device | None:
    """The device that a tensor plays to be on; None where that is not known."""
    return tensor.__dict__.get("_played")


class TwoDevices(TorchFunctionMode):
    """Within it ``.to("mtia:0")`` and the like only mark tensors, and mixed devices are errors."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.device] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        if func == torch.Tensor.device.__get__:  # type: ignore[attr-defined]
            return played(args[0]) or func(*args)
        goal = self._goal(name, args, kwargs)
        known = [d for x in tensors if x.dim() and (d := played(x)) is not None]
        if name in _INDEXED:
            known = [d for d in known[1:] if d != CPU] + known[:1]
        if name not in ("to", "cpu", "set_data", "copy_") and len(set(known)) > 1:
            raise OtherDeviceError(f"{name} of tensors on {sorted(map(str, set(known)))}")
        result = func(*self._without_devices(name, args), **self._on_cpu(kwargs))
        where = goal or (known[-1] if known else None)
        if where is None:
            return result
        self.seen.add(where)

        def mark(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            if goal is not None and any(x is one for one in tensors) and played(x) != where:
                x = x.view(x.shape) if not isinstance(x, torch.nn.Parameter) else x.detach()
            return _tag(x, where)

        return tree_map(mark, result)

    @staticmethod
    def _goal(name: str, args: Any, kwargs: dict[str, Any]) -> torch.device | None:
        """The device that a call sends its result to."""
        if name == "cpu":
            return CPU
        if (device := kwargs.get("device")) is not None:
            return torch.device(device)
        if name == "to":
            for one in args[1:]:
                if isinstance(one, torch.device | str):
                    return torch.device(one)
                if isinstance(one, Tensor):
                    return played(one)
        return None

    @staticmethod
    def _on_cpu(kwargs: dict[str, Any]) -> dict[str, Any]:
        return {**kwargs, "device": CPU} if "device" in kwargs else kwargs

    @staticmethod
    def _without_devices(name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(CPU if name == "to" and isinstance(a, torch.device | str) else a for a in args)


@contextmanager
def two_devices() -> Iterator[TwoDevices]:
    """See :class:`TwoDevices`."""
    with TwoDevices() as mode:
        yield mode


def spread_over_two(hf: Any, second: Any) -> None:
    """Have accelerate's hooks run the modules for which ``second(path)`` on "mtia:1", all others
    on "mtia:0". Within :func:`two_devices`.
    """
    for path, module in hf.named_modules():
        device = torch.device("mtia:1" if second(path) else "mtia:0")
        hook = AlignDevicesHook(
            device, io_same_device=not path, skip_keys=hf._skip_keys_device_placement
        )
        hook.init_hook = lambda module: module  # the weights only have to say where they are
        add_hook_to_module(module, hook)
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                _tag(tensor, device)
