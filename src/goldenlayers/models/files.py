"""Reading a model folder that comes from elsewhere: only its own files, only of sane size.

Names that a file of the folder gives (a shard index) are plain names. Links may lead to where the
hub's cache keeps its files, and nowhere else outside the folder. Nothing here runs or unpickles.
"""

from __future__ import annotations

import json
import os
import stat
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from goldenlayers.errors import UserError

CONFIG_BYTES = 1 << 24  # 16 MB; real ones have some kilobytes
INDEX_BYTES = 1 << 26
_AGAIN = "Copy or download the model again"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack")


def kind_of(path: Path) -> str:
    """What stands at a path: "file", "directory", "nothing", or words for what else is there.

    Raises:
        UserError: the system does not let us look.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: NUL in the name
        return "nothing"
    except PermissionError as error:
        raise UserError(
            f"{path} cannot be read: {error.strerror}", fix="Check its permissions"
        ) from error
    except OSError:  # a name too long, links in a circle
        return "nothing"
    if stat.S_ISREG(mode):
        return "file"
    if stat.S_ISDIR(mode):
        return "directory"
    return "a pipe" if stat.S_ISFIFO(mode) else "a device or socket"


def own_file(folder: Path, name: str) -> Path | None:
    """The regular file ``name`` of a model folder; None when there is nothing of that name.

    Raises:
        UserError: the name is no plain file name, it is no regular file, or a link leads out of
            the folder (to anything but the hub's own cache).
    """
    if not name or name in (".", "..") or any(c in name for c in "/\\\0") or len(name) > 255:
        raise UserError(
            f"{folder} names the file '{name}' as one of its own",
            expected="the plain name of a file in that directory",
            fix="Do not use this model unless you trust its source",
        )
    path = folder / name
    kind = kind_of(path)
    if kind == "nothing":
        if path.is_symlink():
            raise UserError(f"The link {path} leads to nothing", fix=_AGAIN)
        return None
    if kind != "file":
        kind = "a directory" if kind == "directory" else kind
        raise UserError(f"{path} is {kind}", expected="a regular file")
    real = Path(os.path.realpath(path))
    if not any(real.is_relative_to(home) for home in _homes(folder)):
        raise UserError(
            f"{path} is a link that leads out of its directory, to {real}",
            expected="the files themselves, or links into the hub's cache",
            fix="Copy the file there, or give the directory that it lies in",
        )
    return path


def _homes(folder: Path) -> list[Path]:
    """Where a folder's files may really lie: in it, or in the blobs of the hub's cache."""
    from huggingface_hub.constants import HF_HUB_CACHE

    real = Path(os.path.realpath(folder))
    homes = [real, Path(os.path.realpath(HF_HUB_CACHE))]
    if real.parent.name == "snapshots":  # models--owner--name/snapshots/REVISION: the hub's layout
        homes.append(real.parent.parent / "blobs")
    return homes


def read_object(path: Path, limit: int = CONFIG_BYTES) -> dict[str, Any]:
    """The JSON object that a file holds.

    Raises:
        UserError: the file is too large, cannot be read, or is not a JSON object.
    """
    try:
        with path.open("rb") as stream:
            data = stream.read(limit + 1)
        if len(data) > limit:
            raise UserError(f"{path} is larger than {limit >> 20} MB", expected="a small JSON file")
        value = json.loads(data.decode("utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error
    except RecursionError as error:
        raise UserError(f"{path} is nested too deeply", expected="a JSON object") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a JSON {type(value).__name__}", expected="an object")
    return value


@dataclass(frozen=True, slots=True)
class Weights:
    """The safetensors files of a folder, and the shape of every tensor in them by name."""

    files: tuple[Path, ...]
    shapes: dict[str, tuple[int, ...]]
    bytes: int

    @property
    def elements(self) -> int:
        """Number of weights in all tensors."""
        return sum(prod(shape) for shape in self.shapes.values())

    @property
    def layers(self) -> int:
        """How many different numbers stand in the tensors' names: at least as many as layers."""
        parts = (part for name in self.shapes for part in name.split("."))
        return len({part for part in parts if part.isdigit()})


def find_weights(folder: Path) -> Weights:
    """The headers of a folder's safetensors files, whole and in agreement with their sizes.

    Raises:
        UserError: weights are missing, incomplete, damaged, empty, or there are pickles only.
    """
    found = {name: own_file(folder, name) for name in _shards(folder)}
    files = [path for path in found.values() if path is not None]
    if missing := [name for name, path in found.items() if path is None]:
        raise UserError(
            f"{folder} is incomplete: {len(missing)} of {len(found)} weight files are missing, "
            f"among them {missing[0]}",
            fix=_AGAIN,
        )
    shapes: dict[str, tuple[int, ...]] = {}
    for path in files:
        for name, shape in _shapes(path).items():
            if name in shapes:
                raise UserError(f"{path} holds {name}, which another part holds, too", fix=_AGAIN)
            shapes[name] = shape
    if not shapes:
        raise UserError(f"{folder} has no weights: its files hold no tensor", fix=_AGAIN)
    return Weights(tuple(files), shapes, sum(path.stat().st_size for path in files))


def _shards(folder: Path) -> list[str]:
    """Names of the weight files. One file goes before an index, as for transformers."""
    if own_file(folder, "model.safetensors") is not None:
        return ["model.safetensors"]
    index = own_file(folder, "model.safetensors.index.json")
    if index is not None:
        names = read_object(index, INDEX_BYTES).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(n, str) for n in names.values()):
            raise UserError(f"{index} is damaged: it has no weight_map of file names", fix=_AGAIN)
        if not names:
            raise UserError(f"{index} lists no weights", fix=_AGAIN)
        return sorted(set(names.values()))
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise UserError(
            f"{folder} has its weights only as {pickles[0]}, a format that can run code when "
            "it is opened, so it is not read",
            expected="model.safetensors",
            fix="If you trust the file, convert it: load it once with transformers and call "
            "save_pretrained on a new directory, which writes safetensors",
        )
    raise UserError(
        f"{folder} has no weights",
        expected="model.safetensors, or model.safetensors.index.json and its parts",
    )


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes by name. The library checks the header: offsets, sizes, overlaps, the file's end."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:  # ValueError: names that are not UTF-8
        raise UserError(
            f"{path} is cut off or damaged: {error}",
            expected="a whole safetensors file",
            fix=_AGAIN,
        ) from error
