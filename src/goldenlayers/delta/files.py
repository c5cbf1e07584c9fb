"""A delta on disk: ``delta.safetensors`` (complete in itself) and ``delta.json`` (to be read).

Both carry the same record and one hash of all that is in it and of the tensors, so that a file that
was altered, torn, or put beside another delta's is refused. Files of schema 1 (versions up to 0.1)
have a hash of their tensors alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from goldenlayers.delta.factors import Dense, LowRank, tensors_of
from goldenlayers.durable import SMALL, is_abandoned, lock, open_file, read_text_file
from goldenlayers.errors import UserError
from goldenlayers.records import entry, parse_json, plain, refuse_odd, short

TENSORS = "delta.safetensors"
RECORD = "delta.json"
FORMAT = "goldenlayers.delta"
SCHEMA = 2
_KINDS: dict[str, Any] = {
    "base_fingerprint": str,
    "base_name": str,
    "base_dtype": str,
    "method": str,
    "layers": list[int],
    "facts": list[dict[str, Any]],
    "settings": dict[str, Any],
    "created_with": str,
}
FIELDS = tuple(_KINDS)
_PARTS = {"low-rank": ("left", "right"), "dense": ("value",)}
_OF_FACTS = ("id", "subject", "prompt", "target")
_TYPES = ("F64", "F32", "F16", "BF16")
_NAME = re.compile(r"[\w.:-]{1,500}")  # of a parameter: a module path
_LARGEST = 1 << 20  # a layer's number, a matrix's rows or columns: far more than there are


def write(
    folder: Path,
    changes: Mapping[str, LowRank | Dense],
    fields: Mapping[str, Any],
    *,
    overwrite: bool,
) -> Path:
    """Write both files; at any moment the tensors there are a whole delta, old or new."""
    tensors = {
        f"{name}.{part}": tensor.cpu().contiguous()
        for name, change in changes.items()
        for part, tensor in zip(_PARTS[_kind(change)], tensors_of(change), strict=True)
    }
    record = {
        "format": FORMAT,
        "schema": SCHEMA,
        **{name: plain(fields[name], odd=_as_text) for name in FIELDS},
        "parameters": {
            name: {
                "kind": _kind(change),
                "shape": list(change.shape),
                "rank": change.rank,
                "norm": change.norm(),
            }
            for name, change in changes.items()
        },
    }
    try:
        refuse_odd(record)
        _check_record(record)
    except (ValueError, UserError) as error:
        raise UserError(f"the delta cannot be saved: its record is odd ({error})") from error
    record = {**record, "sha256": seal(record, tensors)}
    if (folder / TENSORS).exists() and not overwrite:
        raise UserError(
            f"'{folder}' holds a delta already",
            fix="Choose another folder, or overwrite it (overwrite=True)",
        )
    # A single entry: several would be written in random order, and equal deltas would differ.
    compact = json.dumps(record, ensure_ascii=False, separators=(",", ":"))
    if len(compact.encode()) > SMALL:
        raise UserError(
            f"the delta's record is larger than {SMALL >> 20} MB",
            fix="Edit fewer facts, or save them as several deltas",
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
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
            lock(file.fileno())
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            yield part
    finally:
        part.unlink(missing_ok=True)


def _sweep(folder: Path) -> None:
    """Remove what killed saves left."""
    for name in (TENSORS, RECORD):
        for part in folder.glob(f".{name}.*.part"):
            if is_abandoned(part):
                with suppress(OSError):
                    part.unlink()


def read(path: Path) -> tuple[dict[str, LowRank | Dense], dict[str, Any]]:
    """The changes and the fields of a saved delta, checked through."""
    file = _find(path)
    record, tensors = _open(file)
    whole = record.pop("sha256", None)
    schema = record["schema"]
    if whole != (seal(record, tensors) if schema == SCHEMA else digest(tensors)):
        raise _damaged(file, "it is not what it was saved as (its hash differs)")
    beside = file.with_name(RECORD)
    if file.name == TENSORS and beside.exists():
        _compare(beside, {**record, "sha256": whole})
    if schema == 1:
        record["base_dtype"] = ""
    try:
        _check_record(record)
    except UserError as error:
        raise _damaged(file, error.found) from error
    return _assemble(file, tensors, record), {name: record[name] for name in FIELDS}


def _as_text(value: Any) -> Any:
    return list(value) if isinstance(value, set | frozenset) else str(value)


def _kind(change: LowRank | Dense) -> str:
    return "low-rank" if isinstance(change, LowRank) else "dense"


def _find(path: Path) -> Path:
    """The file of tensors that ``path`` stands for."""
    try:
        file = path / TENSORS if path.is_dir() else path
        if file.name == RECORD:
            file = file.with_name(TENSORS)
        if file.exists():
            file = file.resolve() if file.is_symlink() else file
            with os.fdopen(open_file(file), "rb") as opened:  # a pipe would not be read to an end
                if opened.read(4) == b"GGUF":
                    raise UserError(
                        f"'{file}' is a GGUF file, such as an adapter for llama.cpp",
                        expected="an edit as golden edit saved it",
                        fix="Give the folder that 'golden edit --out' wrote",
                    )
            return file
    except (OSError, ValueError) as error:  # ValueError: NUL in the name
        raise UserError(
            f"there can be no delta at {short(str(path))} ({getattr(error, 'strerror', error)})"
        ) from error
    raise UserError(
        f"there is no delta at '{path}'",
        expected=f"a folder with {TENSORS}, or the file itself",
        fix="Give the folder that 'golden edit --out' wrote",
    )


def _open(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    tensors: dict[str, Tensor] = {}
    try:
        with safe_open(str(file), framework="pt") as stream:
            metadata = stream.metadata() or {}
            if FORMAT not in metadata:
                raise UserError(
                    f"'{file}' is a safetensors file but not a delta",
                    expected=f"one with a '{FORMAT}' entry in its header",
                    fix="Give the folder that 'golden edit --out' wrote",
                )
            for key in stream.keys():  # noqa: SIM118 - not a mapping
                kind = stream.get_slice(key).get_dtype()
                if kind not in _TYPES:
                    raise _damaged(file, f"its tensor {short(key)} is of the type {kind}")
                tensors[key] = stream.get_tensor(key)
    except (SafetensorError, OSError, ValueError) as error:  # ValueError: names that are no UTF-8
        said = " ".join(str(error).split())[:200]
        raise _damaged(file, f"it is no readable safetensors file ({said})") from error
    record = _json(metadata[FORMAT], file)
    schema = record.get("schema")
    if type(schema) is not int or schema not in (1, SCHEMA):
        raise UserError(
            f"'{file}' has schema {short(schema)}",
            expected=f"schema {SCHEMA} or 1",
            fix="Update goldenlayers, or make the delta anew",
        )
    return record, tensors


def _json(text: str, file: Path) -> dict[str, Any]:
    try:
        record = parse_json(text, "its record")
    except UserError as error:
        raise _damaged(file, error.found) from error
    if not isinstance(record, dict):
        raise _damaged(file, "its record is no JSON object")
    return record


def _compare(beside: Path, record: dict[str, Any]) -> None:
    try:
        other = _json(read_text_file(beside.resolve()), beside)
    except (OSError, RuntimeError) as error:  # links that lead nowhere, or in a circle
        raise _damaged(beside, f"it cannot be read ({error})") from error
    differing = sorted(
        short(key)
        for key in {*record, *other}
        if _canonical(record.get(key)) != _canonical(other.get(key))
    )
    if differing:
        raise UserError(
            f"'{beside}' and the {TENSORS} beside it do not belong together: they differ in "
            + ", ".join(differing[:8]),
            fix=f"Delete {RECORD} if {TENSORS} is the one you want: it is whole in itself",
        )


def _check_record(record: dict[str, Any]) -> None:
    """Hold every field to its type.

    Raises:
        UserError: a field that is missing or something else.
    """
    for name, hint in _KINDS.items():
        entry(record, name, hint, "its record")
    if not all(0 <= layer < _LARGEST for layer in record["layers"]):
        raise UserError("its field 'layers' holds numbers that are no layers")
    for place, fact in enumerate(record["facts"], 1):
        for name in _OF_FACTS:
            entry(fact, name, str, f"fact {place} of its record", "")
    for name, about in entry(record, "parameters", dict[str, dict[str, Any]], "its record").items():
        if not _NAME.fullmatch(name):
            raise UserError(f"{short(name)} is no name of a parameter")
        where = f"its record of '{_shown(name)}'"
        shape = entry(about, "shape", tuple[int, int], where)
        rank = entry(about, "rank", int, where)
        entry(about, "norm", float, where)
        if not all(0 <= number <= _LARGEST for number in (*shape, rank)):
            raise UserError(f"{where} gives the shape {list(shape)} and the rank {rank}")


def _assemble(
    file: Path, tensors: dict[str, Tensor], record: dict[str, Any]
) -> dict[str, LowRank | Dense]:
    changes: dict[str, LowRank | Dense] = {}
    used = 0
    for name, about in record["parameters"].items():
        kind, shown = about.get("kind"), _shown(name)
        parts = _PARTS.get(str(kind))
        if parts is None:
            raise _damaged(
                file, f"the kind of '{shown}' is {short(kind)}, not 'low-rank' or 'dense'"
            )
        missing = [part for part in parts if f"{name}.{part}" not in tensors]
        if missing:
            raise _damaged(file, f"'{shown}' lacks its tensor '{missing[0]}'")
        used += len(parts)
        values = [tensors[f"{name}.{part}"] for part in parts]
        try:
            change = Dense(values[0]) if len(values) == 1 else LowRank(values[0], values[1])
        except UserError as error:
            raise _damaged(file, f"for '{shown}', {error.found}") from error
        if [*change.shape, change.rank] != [*about["shape"], about["rank"]]:
            raise _damaged(
                file,
                f"'{shown}' is {list(change.shape)} of rank {change.rank}, its record says "
                f"{about['shape']} of rank {about['rank']}",
            )
        changes[name] = change
    if used != len(tensors):
        raise _damaged(file, f"it holds {len(tensors)} tensors, its record names {used}")
    return changes


def _shown(name: str) -> str:
    return name if len(name) <= 80 else f"...{name[-77:]}"


def _damaged(file: Path, what: str) -> UserError:
    return UserError(
        f"the delta '{file}' is damaged: {what}", fix="Copy it again, or make the edit anew"
    )


def seal(record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the whole record (but for the field "sha256") and all tensors."""
    fields = {name: value for name, value in record.items() if name != "sha256"}
    return hashlib.sha256(f"{_canonical(fields)}\n{digest(tensors)}".encode()).hexdigest()


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        found.update(f"{name}|{tensor.dtype}|{list(tensor.shape)}|".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
