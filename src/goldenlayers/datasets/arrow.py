"""Parquet files, folders of the datasets library, and data sets on the hub (extra ``hub``).

The columns are read and nothing else: no class that a file names is made, no code of it is run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from goldenlayers.datasets import records
from goldenlayers.datasets.records import Table, loads
from goldenlayers.errors import UserError, shortened

PARQUET = b"PAR1"
MOST_ROWS = 1_000_000
_STATE, _SPLITS = "state.json", "dataset_dict.json"
_AGAIN = "Save the folder again"
_USUAL_SPLITS = frozenset({"train", "test", "validation", "valid", "dev", "val"})
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
        if sum(map(len, parts)) > records.LIMIT:
            raise records.too_large(source)

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
                if size > records.LIMIT or len(rows) > MOST_ROWS:
                    raise records.too_large(source)
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
        return records.file_bytes(path)
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


def from_hub(address: str) -> Table:
    """The records of a data set on the hub: ``owner/name[:config][:split]``.

    One part after the name is a split if it is called like one (train, test, validation, or a
    slice such as "train[:100]"), and a configuration otherwise. Rows count from 1; the hash is
    over the records, since a hub data set has no one file.

    Raises:
        UserError: the extra ``hub`` is missing, the address is malformed, the data set cannot be
            had, or it has several splits and none was chosen.
    """
    name, config, split = parse_address(address)
    shown = shortened(f"hub:{address}", 200)
    try:
        import datasets as library  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError(
            f"{shown} needs the package 'datasets', which is not installed",
            fix="pip install 'goldenlayers[hub]'",
        ) from None
    try:
        found: Any = library.load_dataset(name, config, split=split)
    except Exception as error:  # the client's errors are many; the user needs the first line
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"the data set '{shortened(name)}' could not be loaded from the hub "
            f"({shortened(first, 200)})",
            expected="hub:owner/name[:config][:split]",
        ) from error
    if isinstance(found, Mapping):
        splits = sorted(map(str, found))
        if len(splits) != 1:
            raise UserError(
                f"{shown} has the splits {shortened(', '.join(splits), 200)}",
                fix=f"Choose one: {shown}:{splits[0] if splits else 'train'}",
            )
        found = found[splits[0]]
    if len(found) > MOST_ROWS:
        raise UserError(
            f"{shown} has {len(found):,} rows",
            expected=f"at most {MOST_ROWS:,}",
            fix=f"Take a part: hub:{shortened(name)}:{split or 'train'}[:1000]",
        )
    rows = tuple((number, dict(record)) for number, record in enumerate(found, 1))
    if not rows:
        raise UserError(f"{shown} is empty", expected="at least one record")
    text = json.dumps([record for _, record in rows], sort_keys=True, default=str)
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    return Table(name, f"hub:{address}", digest, rows)


def parse_address(address: str) -> tuple[str, str | None, str | None]:
    """(name, configuration or None, split or None) of ``owner/name[:config][:split]``."""
    name, _, rest = address.partition(":")
    # A slice has a colon of its own: "train[:100]".
    head, bracket, tail = rest.partition("[")
    config, colon, split = head.partition(":")
    if colon:
        split += bracket + tail
    elif bracket or config in _USUAL_SPLITS:
        config, split = "", config + bracket + tail
    if not name.strip() or ":" in split.partition("[")[0]:
        raise UserError(
            f"'{shortened(f'hub:{address}')}' is not an address of a data set",
            expected="hub:owner/name[:config][:split]",
        )
    return name, config or None, split or None
