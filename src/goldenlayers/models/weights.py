"""The weights of a model: their identity, and what is wrong with them where a result is no number.

The identity is the same for the same values, in whatever number format they come.

Values are hashed exactly, and in the narrowest format that holds them, so that a checkpoint has one
fingerprint in bfloat16 and saved again in float32, in one file or in twenty, with tied weights
stored once or twice. A model that works in a format too narrow for its checkpoint (float32 loaded
as float16) has the checkpoint's fingerprint: the values are then read from its files, and each
must round to what the model holds.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from goldenlayers.errors import UserError
from goldenlayers.models import KIND
from goldenlayers.models.offload import named_values

_LENGTH = 64
_CHUNK = 1 << 24  # elements hashed at a time: bounds the extra memory to some 200 MB
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

Named = tuple[str, Tensor]


def fingerprint(hf: nn.Module, folder: Path | None = None) -> str:
    """The fingerprint of a model's weights, or of the checkpoint in ``folder`` they came from.

    Args:
        hf: a transformers model with no delta applied.
        folder: the checkpoint it was loaded from. It is read only where the model's number format
            is too narrow for it, and not believed where its values are not those of the model.
    """
    checkpoint = Checkpoint.of(hf, folder)
    if checkpoint is not None and checkpoint.is_narrowed():
        try:
            return _exact_hash(checkpoint.values())
        except _OtherValuesError:
            pass
    return _exact_hash(named_values(hf))


def old_fingerprints(hf: nn.Module, folder: Path | None = None) -> Iterator[str]:
    """What versions up to 0.1 would have called these weights, in each number format.

    They rounded the loaded values to bfloat16 before hashing.
    """
    yield _rounded_hash(named_values(hf))
    checkpoint = Checkpoint.of(hf, folder)
    if checkpoint is None:
        return
    try:
        yield _rounded_hash(checkpoint.values())
        halves = ((name, value.to(torch.float16)) for name, value in checkpoint.values())
        yield _rounded_hash(halves)
    except _OtherValuesError:
        return


class _OtherValuesError(Exception):
    """The files hold other values than the model."""


class Checkpoint:
    """Where each parameter of a model stands in the safetensors files it was loaded from.

    Attributes:
        dtypes: parameter name → number format it is stored in.
    """

    def __init__(self, hf: nn.Module, folder: Path, stored: dict[str, _Stored]) -> None:
        self.hf, self.folder, self.stored = hf, folder, stored
        aliases: dict[int, list[str]] = defaultdict(list)
        for name, parameter in hf.named_parameters(remove_duplicate=False):
            aliases[id(parameter)].append(name)
        self._aliases = {name: aliases[id(parameter)] for name, parameter in hf.named_parameters()}
        self._by_end: dict[str, list[str]] = defaultdict(list)
        for name in sorted(stored):
            self._by_end[_end(name)].append(name)
        ends = {_end(name) for names in aliases.values() for name in names}
        self._others = [name for name in sorted(stored) if _end(name) not in ends]
        self.dtypes: dict[str, torch.dtype] = {}
        for name, parameter in hf.named_parameters():
            if found := self._candidates(name, parameter):
                for alias in self._aliases[name]:
                    self.dtypes[alias] = stored[found[0]].dtype

    @classmethod
    def of(cls, hf: nn.Module, folder: Path | None) -> Checkpoint | None:
        """The checkpoint in ``folder``; None if there is none that can be read."""
        if folder is None:
            return None
        try:
            stored = {
                name: one
                for file in sorted(folder.glob("*.safetensors"))
                if file.is_file()
                for name, one in _stored_in(file)
            }
        except (OSError, SafetensorError):
            return None
        return cls(hf, folder, stored) if stored else None

    def is_narrowed(self) -> bool:
        """Whether the model's number format cannot hold what is stored, for some parameter."""
        return any(
            torch.promote_types(parameter.dtype, self.dtypes[name]) != parameter.dtype
            for name, parameter in self.hf.named_parameters()
            if parameter.is_floating_point() and name in self.dtypes
        )

    def widest(self) -> torch.dtype:
        """The narrowest number format that holds every stored parameter exactly."""
        found = torch.bfloat16 if torch.bfloat16 in self.dtypes.values() else torch.float16
        for dtype in self.dtypes.values():
            found = torch.promote_types(found, dtype)
        return found

    def values(self) -> Iterator[Named]:
        """Every parameter with the values that are stored, on the CPU, in the order of the names.

        Raises:
            _OtherValuesError: a parameter is not in the files, or holds something else than what
                is stored there, rounded to its number format.
        """
        with ExitStack() as stack:
            files: dict[Path, Any] = {}
            for name, parameter in named_values(self.hf):
                held = parameter.cpu()
                for key in self._candidates(name, parameter):
                    file = self.stored[key].file
                    try:
                        if file not in files:
                            files[file] = stack.enter_context(safe_open(file, framework="pt"))
                        value = files[file].get_tensor(key)
                    except (OSError, SafetensorError) as error:
                        raise _OtherValuesError from error
                    if torch.equal(value.to(held.dtype), held):
                        yield name, value
                        break
                else:
                    raise _OtherValuesError

    def _candidates(self, name: str, parameter: Tensor) -> list[str]:
        """What in the files may be the parameter: of its shape, and named alike."""
        keys = dict.fromkeys(k for alias in self._aliases[name] for k in self._named_like(alias))
        return [key for key in keys if self.stored[key].shape == tuple(parameter.shape)]

    def _named_like(self, name: str) -> list[str]:
        """Stored names that a parameter's may stand for, the likeliest first.

        They may begin otherwise ("transformer.", "model."). What no parameter is named like
        (GPT-NeoX stores its head as "embed_out") may be any. A wrong match does no harm, as values
        are compared.
        """
        if name in self.stored:
            return [name]
        alike = self._by_end.get(_end(name), self._others)
        return sorted(alike, key=lambda one: -_shared_end(name, one))


class _Stored(NamedTuple):
    """A tensor in a file, unread."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]


def _end(name: str) -> str:
    """A parameter's name from its block's number on, or its last two parts."""
    parts = name.split(".")
    for place, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[place:])
    return ".".join(parts[-2:])


def _shared_end(one: str, other: str) -> int:
    """How many parts at their ends two names share."""
    pairs = zip(reversed(one.split(".")), reversed(other.split(".")), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


_STORED_TYPES: dict[str, torch.dtype] = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}


def _stored_in(file: Path) -> Iterator[tuple[str, _Stored]]:
    with safe_open(file, framework="pt") as stream:
        for key in stream.keys():  # noqa: SIM118 - not a mapping
            piece = stream.get_slice(key)
            dtype = _STORED_TYPES.get(piece.get_dtype())
            if dtype is not None:
                yield key, _Stored(file, dtype, tuple(piece.get_shape()))


def _exact_hash(weights: Iterable[Named]) -> str:
    """SHA-256 over names, shapes and exact values."""
    return KIND + _hash(weights, _narrowest)[: _LENGTH - len(KIND)]


def _rounded_hash(weights: Iterable[Named]) -> str:
    """SHA-256 over names, shapes and values rounded to bfloat16."""
    return _hash(weights, lambda piece: (b"", piece.to(torch.bfloat16).cpu().view(torch.int16)))


def _hash(weights: Iterable[Named], bits: Callable[[Tensor], tuple[bytes, Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, weight in weights:
        digest.update(f"{name} {tuple(weight.shape)}\n".encode())
        values = weight.reshape(-1)
        for start in range(0, values.numel(), _CHUNK):
            form, found = bits(values[start : start + _CHUNK].contiguous())
            digest.update(form)
            digest.update(found.numpy().data)  # numpy has no bfloat16, so these are integers
    return digest.hexdigest()


def _narrowest(piece: Tensor) -> tuple[bytes, Tensor]:
    """The bits of the values in the narrowest of bfloat16, float32 and float64 that holds all."""
    if not piece.is_floating_point():
        name = str(piece.dtype).encode()
        return name, piece.cpu().view(_INTEGERS[piece.element_size()])
    if piece.dtype == torch.bfloat16:
        return b"b", piece.cpu().view(torch.int16)
    single = piece.float()
    if piece.dtype == torch.float64 and not torch.equal(single.double(), piece):
        return b"d", piece.cpu().view(torch.int64)
    bits = single.view(torch.int32)
    if (bits & 0xFFFF).any():
        return b"s", bits.cpu()
    return b"b", (bits >> 16).to(torch.int16).cpu()


# Weights of real models stay below some thousands; a flipped bit of an exponent gives far more.
_LARGE = 1e6


def not_a_number(model: nn.Module, problem: str, *, otherwise: str = "") -> UserError:
    """The error for a result of ``model`` that is NaN or infinite.

    Looks through all weights, so it is called only when there is such a result. ``problem`` is what
    came out, and where; ``otherwise`` what to do if neither the weights nor their type explain it.
    """
    cause, fix = why_not_a_number(model)
    return UserError(f"{problem}: {cause}" if cause else problem, fix=fix or otherwise)


def why_not_a_number(model: nn.Module) -> tuple[str, str]:
    """(cause, what to do about it), both empty when the weights are whole and the type is wide."""
    largest, where = 0.0, ""
    half = False
    for name, weight in named_values(model):
        if not weight.is_floating_point():
            continue
        half |= weight.dtype == torch.float16
        values = weight
        if not bool(torch.isfinite(values).all()):
            return _broken(name, values)
        size = float(values.abs().max()) if values.numel() else 0.0
        if size > largest:
            largest, where = size, name
    if largest > _LARGE:
        return f"{_place(where)} holds {largest:.3g}, far more than a weight ever is", _FETCH
    if half:
        return (
            "its weights are finite, and float16 holds no number above 65504",
            "Load the model with --dtype bfloat16 or --dtype float32",
        )
    return "", ""


_FETCH = "The checkpoint itself is damaged: copy or download it again"


def _broken(name: str, values: Tensor) -> tuple[str, str]:
    nan, infinite = int(torch.isnan(values).sum()), int(torch.isinf(values).sum())
    kinds = [f"{nan} NaN"] * bool(nan) + [f"{infinite} infinite"] * bool(infinite)
    first = torch.nonzero(~torch.isfinite(values))[0].tolist()
    cause = (
        f"{_place(name)} holds {' and '.join(kinds)} of {values.numel()} values, the first at "
        f"{tuple(first)}"
    )
    if values.dtype == torch.float16 and not nan:
        return cause, (
            "They may be too large for float16 only: load the model with --dtype bfloat16 or "
            "--dtype float32. If it stays so, copy or download the checkpoint again"
        )
    return cause, _FETCH


def _place(name: str) -> str:
    """A weight's layer, where its name has one, and its name."""
    found = re.search(r"\.(\d+)\.", name)
    return f"layer {found[1]}, {name}" if found else name
