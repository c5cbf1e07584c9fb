"""Where a model's weights are: on one device, spread over several, or elsewhere until needed.

Accelerate's hooks do the spreading. Each module runs on a device of its own, and what it is given
is moved there. A weight that is kept in CPU memory or on disk is put into its module for the time
of a forward pass; between two passes it is a ``meta`` tensor, and its values are in the hook.
"""

from __future__ import annotations

import os
import shutil
import socket
import uuid
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from goldenlayers.errors import UserError
from goldenlayers.models.quantised import quantised_modules, stored_values

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Limits = Mapping[int | str, int | str]
# The share of a device's free memory that weights may take alone: the rest is for what is computed.
_SHARE = 0.8
_WHERE = {"memory": "in memory", "cpu": "in memory", "disk": "on disk"}


def is_spread(hf: nn.Module) -> bool:
    """Whether accelerate's hooks say where the model's modules run."""
    return hasattr(hf, "_hf_hook")


def runs_on(module: nn.Module) -> torch.device:
    """The device that a module computes on, wherever its weights are kept."""
    for hook in _hooks(module):
        if (device := getattr(hook, "execution_device", None)) is not None:
            return torch.device(device)
    weight = next(module.parameters(), getattr(module, "weight", None))  # a tap has no parameter
    return torch.device("cpu") if weight is None or weight.is_meta else weight.device


def _hooks(module: nn.Module) -> list[Any]:
    hook = getattr(module, "_hf_hook", None)
    return [] if hook is None else list(getattr(hook, "hooks", [hook]))


def _keeper(module: nn.Module) -> Any:
    """The hook that keeps the module's own weights elsewhere; None if none does."""
    for hook in _hooks(module):
        if getattr(hook, "offload", False) and hook.weights_map is not None:
            return hook
    return None


def is_elsewhere(module: nn.Module) -> bool:
    """Whether the module's own weights are kept elsewhere between two passes."""
    return _keeper(module) is not None


def not_loaded(hf: nn.Module) -> bool:
    """Whether a parameter has no values anywhere."""
    return any(
        parameter is not None and parameter.is_meta and not is_elsewhere(module)
        for module in hf.modules()
        for parameter in module._parameters.values()
    )


def kept(module: nn.Module) -> Mapping[str, Tensor]:
    """Where the values of a module's weights stand that are elsewhere, by their names in it."""
    return _keeper(module).weights_map


def keep(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Let a module whose weights are elsewhere read them in ``values`` from now on."""
    _keeper(module).weights_map = values


class Replaced(Mapping[str, Tensor]):
    """Weights kept elsewhere, with another ``weight`` in place of theirs."""

    def __init__(self, values: Mapping[str, Tensor], weight: Tensor) -> None:
        self._values, self._weight = values, weight

    def __getitem__(self, name: str) -> Tensor:
        return self._weight if name == "weight" else self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


def value_of(module: nn.Module, name: str) -> Tensor:
    """The values of a module's own parameter, read now if they are elsewhere; of a tap those of
    the matrix that it stands for.
    """
    parameter: Tensor = getattr(module, name)
    if parameter.is_meta and is_elsewhere(module):
        return kept(module)[name]
    return parameter.detach()


def named_values(hf: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All parameters with their values, in the order of their names; tied ones come once.

    What is elsewhere is read when its turn comes, and held no longer than the caller does. Of a
    quantised matrix come its packed values and its scales.
    """
    twins = tied_names(hf)
    packed = quantised_modules(hf)
    parameters = dict(hf.named_parameters())
    for name in sorted({*packed, *parameters}):
        parameter = parameters.get(name)
        if parameter is None:
            yield from ((f"{name}.{own}", value) for own, value in stored_values(packed[name]))
        elif name.rpartition(".")[0] in packed:
            continue
        elif not parameter.is_meta:
            yield name, parameter.detach()
        elif name not in twins:  # hooks make parameters anew, so twins no longer are one object
            path, _, own = name.rpartition(".")
            yield name, value_of(hf.get_submodule(path), own)


def tied_names(hf: nn.Module) -> Mapping[str, str]:
    """The names of parameters that are others' by the model's own word, and of those others."""
    return getattr(hf, "all_tied_weights_keys", None) or {}


@contextmanager
def read_again(hf: nn.Module) -> Iterator[None]:
    """Within it autograd holds no weight that is kept elsewhere: the backward pass reads it again.

    Otherwise all weights between the first gradient and the loss would be in memory at once.
    """
    if not (torch.is_grad_enabled() and is_spread(hf)):
        yield
        return
    modules = [module for module in hf.modules() if is_elsewhere(module)]
    running: list[nn.Module] = []

    def pack(tensor: Tensor) -> Any:
        whole = tensor if tensor._base is None else tensor._base
        for module in running[-1:]:
            for name, parameter in module._parameters.items():
                if parameter is whole:
                    view = tensor.size(), tensor.stride(), tensor.storage_offset()
                    return kept(module), name, tensor.device, view
        return tensor

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        values, name, device, view = packed
        return values[name].to(device).as_strided(*view)

    def begin(module: nn.Module, _args: Any) -> None:
        running.append(module)

    handles = [module.register_forward_pre_hook(begin) for module in modules]
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Placing:
    """Where a model is to go that is about to be loaded.

    Attributes:
        device: the device that was asked for, or the best that there is.
        spread: whether other devices may be used where its memory is too small.
        limits: memory to use at most, by device (GPU number, "mps", "cpu"): bytes, or such as
            "20GB". Devices left out are not used. None: what is free.
        root: where folders for weights on disk are made.
    """

    device: torch.device
    spread: bool
    limits: Limits | None = field(hash=False)
    root: Path

    def options(self, size: int) -> dict[str, Any]:
        """What ``from_pretrained`` is told to spread ``size`` bytes of weights; {} if they fit."""
        from accelerate.utils import get_max_memory

        if not self.spread:
            return {}
        limits = None if self.limits is None else dict(self.limits)
        name = self.device.index or 0 if self.device.type == "cuda" else self.device.type
        try:
            if limits is None and isinstance(name, int):  # without waking the other GPUs
                room = torch.cuda.mem_get_info(name)[0]
            else:
                room = get_max_memory(limits).get(name, 0)
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"max_memory is {limits}",
                expected='bytes or words per device, such as {0: "20GB", "cpu": "60GB"}',
            ) from error
        if size <= _SHARE * room:
            return {}
        _clear_left_over(self.root)
        folder = self.root / f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        options = {"device_map": "auto", "offload_folder": str(folder)}
        return options | ({"max_memory": limits} if limits is not None else {})


def _clear_left_over(root: Path) -> None:
    """Remove the folders of processes of this machine that are no more."""
    for folder in root.glob(f"{socket.gethostname()}-*-*"):
        number = folder.name.split("-")[-2]
        if number.isdigit() and int(number) > 1:
            with suppress(PermissionError):
                try:
                    os.kill(int(number), 0)
                except ProcessLookupError:
                    shutil.rmtree(folder, ignore_errors=True)


def settle(hf: PreTrainedModel, options: Mapping[str, Any]) -> None:
    """Finish what ``from_pretrained`` did by these options of :class:`Placing`."""
    if folder := options.get("offload_folder"):
        # Removed when the model is no more.
        weakref.finalize(hf, shutil.rmtree, folder, ignore_errors=True)
    # Transformers 5.23 writes tied weights to disk under one of their names, and reads both.
    for module in filter(is_elsewhere, hf.modules()):
        index = getattr(getattr(kept(module), "dataset", None), "index", {})
        for name, other in tied_names(hf).items():
            if other in index:
                index.setdefault(name, index[other])


def moved(hf_model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """The model on one device.

    Raises:
        UserError: its weights need more memory than is free there.
    """
    if getattr(hf_model, "is_quantized", False):  # loaded where it is to be
        return hf_model
    try:
        return hf_model.to(device)  # type: ignore[arg-type]  # transformers wraps the overloads
    except torch.OutOfMemoryError as error:
        size = sum(p.numel() * p.element_size() for p in hf_model.parameters())
        raise UserError(
            f"The weights need {size / 1e9:.1f} GB, more than is free on {device}",
            fix="Use --device auto, which spreads them, --dtype bfloat16, or a smaller model",
        ) from error


def places(hf: nn.Module) -> str:
    """How much of the weights is kept where, in words."""
    return ", ".join(
        f"{size / 1e9:.1f} GB {_WHERE.get(where, 'on ' + where)}"
        for where, size in sizes(hf).items()
    )


def sizes(hf: nn.Module) -> dict[str, int]:
    """Bytes of weights by where they are kept: devices, "memory" and "disk"."""
    found: dict[str, int] = {}
    device_map: Mapping[str, Any] = getattr(hf, "hf_device_map", {})
    main = runs_on(hf)
    twins = tied_names(hf)
    for name, parameter in hf.named_parameters():
        if parameter.is_meta and name in twins:
            continue
        parts = name.split(".")
        above = (".".join(parts[:n]) for n in range(len(parts), -1, -1))
        where = next((device_map[path] for path in above if path in device_map), parameter.device)
        if where == "cpu" and main.type != "cpu":
            where = "memory"
        elif isinstance(where, int):
            where = f"cuda:{where}"
        size = parameter.numel() * parameter.element_size()
        found[str(where)] = found.get(str(where), 0) + size
    return found
