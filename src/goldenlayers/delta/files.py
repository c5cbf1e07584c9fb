"""A delta on disk: ``delta.safetensors`` (complete in itself) and ``delta.json`` (to be read).

Both carry the same facts about the delta and a hash of its tensors, so that a file that was
altered, torn, or put beside another delta's is refused.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from goldenlayers.delta.factors import Dense, LowRank
from goldenlayers.errors import UserError

TENSORS = "delta.safetensors"
RECORD = "delta.json"
FORMAT = "goldenlayers.delta"
SCHEMA = 1
FIELDS = ("base_fingerprint", "base_name", "method", "layers", "facts", "settings", "created_with")
_KINDS: dict[str, type] = {
    "base_fingerprint": str,
    "base_name": str,
    "method": str,
    "layers": list,
    "facts": list,
    "settings": dict,
    "created_with": str,
}


def plain(value: Any) -> Any:
    """``value`` in what JSON knows: no NaN or infinity (None instead), anything odd as text."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    return str(value)


def write(
    folder: Path,
    changes: Mapping[str, LowRank | Dense],
    fields: Mapping[str, Any],
    *,
    overwrite: bool,
) -> Path:
    """Write both files; at any moment the tensors there are a whole delta, old or new."""
    tensors: dict[str, Tensor] = {}
    for name, change in changes.items():
        if isinstance(change, LowRank):
            tensors[f"{name}.left"] = change.left.cpu().contiguous()
            tensors[f"{name}.right"] = change.right.cpu().contiguous()
        else:
            tensors[f"{name}.value"] = change.value.cpu().contiguous()
    record = {
        "format": FORMAT,
        "schema": SCHEMA,
        "sha256": _digest(tensors),
        **{name: plain(fields[name]) for name in FIELDS},
        "parameters": {
            name: {
                "kind": "low-rank" if isinstance(change, LowRank) else "dense",
                "shape": list(change.shape),
                "rank": change.rank,
                "norm": change.norm(),
            }
            for name, change in changes.items()
        },
    }
    if (folder / TENSORS).exists() and not overwrite:
        raise UserError(
            f"'{folder}' holds a delta already",
            fix="Choose another folder, or overwrite it (overwrite=True)",
        )
    # A single entry: several would be written in random order, and equal deltas would differ.
    compact = json.dumps(record, ensure_ascii=False, separators=(",", ":"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(record, ensure_ascii=False, indent=2) + "\n"
        with (
            _part(folder / TENSORS, to_bytes(tensors, {FORMAT: compact})) as whole,
            _part(folder / RECORD, text.encode()) as readable,
        ):
            # Gone first: killed in between, tensors without a record are a delta, tensors beside
            # another delta's record are refused.
            (folder / RECORD).unlink(missing_ok=True)
            whole.replace(folder / TENSORS)
            readable.replace(folder / RECORD)
    except OSError as error:
        raise UserError(
            f"the delta could not be written to '{folder}': {error.strerror or error}",
            fix="Check the path, its permissions and the free space",
        ) from error
    return folder


@contextmanager
def _part(path: Path, data: bytes) -> Iterator[Path]:
    """A file beside ``path`` that holds ``data``, on the disk; it is to be moved to ``path``."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield part
    finally:
        part.unlink(missing_ok=True)


def read(path: Path) -> tuple[dict[str, LowRank | Dense], dict[str, Any]]:
    """The changes and the fields of a saved delta, checked through."""
    file = path / TENSORS if path.is_dir() else path
    if file.name == RECORD:
        file = file.with_name(TENSORS)
    if not file.is_file():
        raise UserError(
            f"there is no delta at '{path}'",
            expected=f"a folder with {TENSORS}, or the file itself",
            fix="Give the folder that 'golden edit --out' wrote",
        )
    tensors, record = _open(file)
    if _digest(tensors) != record.get("sha256"):
        raise _damaged(file, "its tensors are not those it was saved with")
    beside = file.with_name(RECORD)
    if file.name == TENSORS and beside.is_file():
        _compare(beside, record)
    fields: dict[str, Any] = {}
    for name in FIELDS:
        fields[name] = record.get(name)
        if not isinstance(fields[name], _KINDS[name]):
            raise _damaged(file, f"its field '{name}' is missing or no {_KINDS[name].__name__}")
    if not all(isinstance(layer, int) for layer in fields["layers"]):
        raise _damaged(file, "its field 'layers' holds something other than numbers")
    if not all(isinstance(fact, dict) for fact in fields["facts"]):
        raise _damaged(file, "its field 'facts' holds something other than records")
    return _assemble(file, tensors, record), fields


def _open(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(str(file), framework="pt") as stream:
            metadata = stream.metadata() or {}
            if FORMAT not in metadata:
                raise UserError(
                    f"'{file}' is a safetensors file but not a delta",
                    expected=f"one with a '{FORMAT}' entry in its header",
                    fix="Give the folder that 'golden edit --out' wrote",
                )
            tensors = {key: stream.get_tensor(key) for key in stream.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise _damaged(file, f"it is no readable safetensors file ({error})") from error
    record = _json(metadata[FORMAT], file)
    if record.get("schema") != SCHEMA:
        raise UserError(
            f"'{file}' has schema {record.get('schema')!r}",
            expected=f"schema {SCHEMA}",
            fix="Update goldenlayers, or make the delta anew",
        )
    return tensors, record


def _json(text: str, file: Path) -> dict[str, Any]:
    try:
        record = json.loads(text)
    except ValueError as error:
        raise _damaged(file, f"its record is no JSON ({error})") from error
    if not isinstance(record, dict):
        raise _damaged(file, "its record is no JSON object")
    return record


def _compare(beside: Path, record: dict[str, Any]) -> None:
    try:
        other = _json(beside.read_text(encoding="utf-8"), beside)
    except (OSError, UnicodeDecodeError) as error:
        raise _damaged(beside, f"it cannot be read ({error})") from error
    differing = sorted(key for key in {*record, *other} if record.get(key) != other.get(key))
    if differing:
        raise UserError(
            f"'{beside}' and the {TENSORS} beside it do not belong together: they differ in "
            + ", ".join(differing),
            fix=f"Delete {RECORD} if {TENSORS} is the one you want: it is whole in itself",
        )


def _assemble(
    file: Path, tensors: dict[str, Tensor], record: dict[str, Any]
) -> dict[str, LowRank | Dense]:
    parameters = record.get("parameters")
    if not isinstance(parameters, dict):
        raise _damaged(file, "its list of parameters is missing")
    changes: dict[str, LowRank | Dense] = {}
    used = 0
    for name, entry in parameters.items():
        kind = entry.get("kind") if isinstance(entry, dict) else None
        parts = {"low-rank": ("left", "right"), "dense": ("value",)}.get(str(kind))
        if parts is None:
            raise _damaged(file, f"the kind of '{name}' is {kind!r}, not 'low-rank' or 'dense'")
        missing = [part for part in parts if f"{name}.{part}" not in tensors]
        if missing:
            raise _damaged(file, f"'{name}' lacks its tensor '{missing[0]}'")
        used += len(parts)
        values = [tensors[f"{name}.{part}"] for part in parts]
        try:
            changes[name] = LowRank(*values) if len(parts) == 2 else Dense(*values)
        except UserError as error:
            raise _damaged(file, f"for '{name}', {error.found}") from error
        if list(changes[name].shape) != entry.get("shape"):
            raise _damaged(
                file,
                f"'{name}' is {list(changes[name].shape)}, its record says {entry.get('shape')}",
            )
    if used != len(tensors):
        raise _damaged(file, f"it holds {len(tensors)} tensors, its record names {used}")
    return changes


def _damaged(file: Path, what: str) -> UserError:
    return UserError(
        f"the delta '{file}' is damaged: {what}", fix="Copy it again, or make the edit anew"
    )


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name}|{tensor.dtype}|{list(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
