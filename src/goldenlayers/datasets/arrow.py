"""Parquet files and folders of the datasets library, read with pyarrow (extra ``hub``).

The columns are read and nothing else: no class that a file names is made, no code of it is run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from goldenlayers.datasets import reading
from goldenlayers.datasets.records import Table, loads
from goldenlayers.errors import UserError, shortened

PARQUET = b"PAR1"
MOST_ROWS = 1_000_000
_STATE, _SPLITS = "state.json", "dataset_dict.json"
_AGAIN = "Save the folder again"
_STEP = 100  # rows turned into Python objects at a time


def parquet_rows(raw: bytes, source: str) -> tuple[tuple[int, object], ...]:
    """The records of a parquet file, numbered from 1.

    Raises:
        UserError: pyarrow is missing, the file is damaged, too large once unpacked, or empty.
    """
    pyarrow = _pyarrow(source)

    def batches() -> Iterable[Any]:
        import pyarrow.parquet as parquet  # pyright: ignore[reportMissingImports]

        file = parquet.ParquetFile(pyarrow.BufferReader(raw))
        return file.iter_batches(batch_size=_STEP, use_threads=False)

    return _rows(batches, source)


def is_saved(folder: Path) -> bool:
    """Whether ``Dataset.save_to_disk`` or ``DatasetDict.save_to_disk`` wrote the folder."""
    return (folder / _STATE).is_file() or (folder / _SPLITS).is_file()


def from_folder(folder: Path, source: str) -> Table:
    """The records of a folder that ``save_to_disk`` wrote; of its split if it has only one.

    Raises:
        UserError: pyarrow is missing, several splits, damaged, files outside the folder, empty.
    """
    place = folder
    if not (place / _STATE).is_file():
        splits = _names(_record(place / _SPLITS).get("splits"), place / _SPLITS, "splits")
        if len(splits) != 1:
            raise UserError(
                f"{source} has the splits {shortened(', '.join(splits))}",
                fix=f"Choose one: {folder / (splits[0] if splits else 'train')}",
            )
        place /= splits[0]
    files = _record(place / _STATE).get("_data_files")
    named = (
        [one.get("filename") if isinstance(one, dict) else one for one in files]
        if (isinstance(files, list))
        else None
    )
    pyarrow = _pyarrow(source)
    digest = hashlib.sha256()
    parts: list[bytes] = []
    for name in _names(named, place / _STATE, "_data_files"):
        raw = _bytes(place / name)
        digest.update(raw)
        parts.append(raw)
        if sum(map(len, parts)) > reading.LIMIT:
            raise reading.too_large(source)

    def batches() -> Iterable[Any]:
        for raw in parts:
            yield from pyarrow.ipc.open_stream(pyarrow.BufferReader(raw))

    return Table(folder.name, source, digest.hexdigest(), _rows(batches, source))


def _rows(batches: Any, source: str) -> tuple[tuple[int, object], ...]:
    rows: list[object] = []
    size = 0
    try:
        for batch in batches():
            batch.validate(full=True)  # else damaged offsets are followed outside the memory
            for start in range(0, batch.num_rows, _STEP):
                part = batch.slice(start, _STEP)
                size += part.nbytes
                if size > reading.LIMIT or len(rows) > MOST_ROWS:
                    raise reading.too_large(source)
                rows += part.to_pylist()
    except UserError:
        raise
    except Exception as error:  # pyarrow's errors are many; the user needs the first line
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{source} could not be read by pyarrow ({shortened(first, 200)})",
            fix="Fetch the file again",
        ) from None
    if not rows:
        raise UserError(f"{source} is empty", expected="at least one record")
    return tuple(enumerate(rows, 1))


def _pyarrow(source: str) -> Any:
    try:
        import pyarrow  # pyright: ignore[reportMissingImports]
        import pyarrow.ipc  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError(
            f"{source} needs the package 'pyarrow', which is not installed",
            fix="pip install 'goldenlayers[hub]', or save the data as JSON lines or CSV",
        ) from None
    return pyarrow


def _record(path: Path) -> dict[str, Any]:
    """A JSON object of the folder's own."""
    try:
        found = loads(_bytes(path).decode())
    except ValueError as error:
        raise UserError(
            f"{shortened(str(path), 300)} could not be read ({error})", fix=_AGAIN
        ) from None
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no object", fix=_AGAIN)
    return found


def _bytes(path: Path) -> bytes:
    try:
        return reading.file_bytes(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{shortened(str(path), 300)} could not be read ({reason})", fix=_AGAIN
        ) from None


def _names(values: object, path: Path, field: str) -> list[str]:
    """Names of files inside the folder, and of nothing outside it."""
    names: list[Any] = values if isinstance(values, list) else [None]
    for name in names:
        if not isinstance(name, str) or name in ("", ".", "..") or set(name) & set("/\\\0:"):
            raise UserError(
                f"{path}, field '{field}': {shortened(json.dumps(name))} is no name of a file",
                expected="names of files beside it",
            )
    return names
