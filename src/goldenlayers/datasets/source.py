"""From a file, the package or the hub to numbered records, with clear errors on the way.

Of parquet files and folders of the datasets library (extra ``hub``) the columns are read and
nothing else: no class that a file names is made, no code of it is run.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib
import json
import os
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from goldenlayers.datasets import reading, tables
from goldenlayers.datasets.reading import Table, lines, loads, whole
from goldenlayers.errors import UserError, shortened

STARTER = "starter.jsonl"
_SUFFIXES = frozenset({".json", ".jsonl", ".csv", ".tsv", ".parquet", ".gz"})


def from_package() -> Table:
    """The starter facts that ship inside the package."""
    file = resources.files("goldenlayers.datasets") / STARTER
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise UserError(
            "the starter facts are missing from the installed package",
            fix="Install goldenlayers again",
        ) from error
    return parse(raw, "starter", "starter")


def from_file(path: str | os.PathLike[str]) -> Table:
    """The records of a file (JSON, JSON lines, CSV, TSV, parquet; gzip may pack it), or of a folder
    that the datasets library has saved. The content says which it is, not the name.

    Raises:
        UserError: no such file (near names are given), a folder, a pipe or a device, too large,
            not readable, not text, empty, broken JSON (line and column), or nothing of the above.
    """
    place, shown = Path(path), shortened(os.fspath(path), 300)
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        with contextlib.suppress(UnicodeEncodeError):
            shown = os.fsencode(path).decode("utf-8", "replace")
        raise UserError(
            f"the name of the file {shown} is not UTF-8 text",
            fix="Rename it: results record the names of their data",
        ) from None
    try:
        place = place.expanduser()
        if place.is_dir():
            if is_saved(place):
                return from_folder(place, str(path))
            raise _directory(place)
        raw = reading.file_bytes(place)
    except FileNotFoundError:
        raise UserError(f"there is no file {shown}", fix=_near_files(place)) from None
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{shown} could not be read ({reason})") from None
    name = place.with_suffix("") if place.suffix.lower() == ".gz" else place
    try:
        return parse(raw, name.stem, str(path))
    except MemoryError:
        raise UserError(
            f"{shown} needs more memory than there is", fix="Take a part of it"
        ) from None


def parse(raw: bytes, name: str, source: str) -> Table:
    """The records in the bytes of a file."""
    digest = hashlib.sha256(raw).hexdigest()
    raw = reading.unpacked(raw, source)
    if raw.startswith(PARQUET):
        return Table(name, source, digest, parquet_rows(raw, source))
    text = reading.decoded(raw, source)
    begin = text.lstrip()[:1]
    if not begin:
        raise UserError(f"{source} is empty", expected="at least one record")
    if begin == "[":
        rows = tuple(enumerate(whole(text, source), 1))
        if not rows:
            raise UserError(f"{source} is an empty list", expected="at least one record")
        return Table(name, source, digest, rows)
    if begin == "{":
        found, broken = lines(text, source)
        if broken and not any(isinstance(record, dict) for _, record in found):
            # One object over several lines is one record; if it is not that, say where it breaks.
            return Table(name, source, digest, ((1, whole(text, source)),))
        return Table(name, source, digest, tuple(found), tuple(broken))
    if not tables.is_table(text):
        first = shortened(text.strip().splitlines()[0], 40)
        raise UserError(
            f"{source} is neither a JSON array nor JSON lines nor a table: it begins with "
            f"'{first}'",
            expected="'[' or '{' first, or a header such as subject,prompt,target_new",
        )
    found, broken = tables.records(text, source)
    if not found and not broken:
        raise UserError(f"{source} has a header and no rows", expected="at least one record")
    return Table(name, source, digest, tuple(found), tuple(broken), header=True)


def exists(path: str) -> bool:
    """Whether something goes by this path; a name that cannot be one does not exist."""
    try:
        return Path(path).expanduser().exists()
    except (OSError, ValueError, RuntimeError):
        return False


def _directory(path: Path) -> UserError:
    inside = sorted(item.name for item in path.iterdir() if item.suffix in _SUFFIXES)
    such_as = f", such as {', '.join(map(shortened, inside[:3]))} in it" if inside else ""
    return UserError(
        f"{path} is a directory", expected=f"a file{such_as}, or a folder of save_to_disk"
    )


def _near_files(path: Path) -> str:
    if not path.parent.is_dir():
        return f"The folder {shortened(str(path.parent), 300)} does not exist either"
    there: list[str] = []
    with contextlib.suppress(OSError):
        there = sorted(item.name for item in path.parent.iterdir())
    close = difflib.get_close_matches(path.name, there, n=3, cutoff=0.6)
    return f"Did you mean {' or '.join(str(path.parent / one) for one in close)}?" if close else ""


_USUAL_SPLITS = frozenset({"train", "test", "validation", "valid", "dev", "val"})


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
    found = of_hub(shown, name, config, split, expected="hub:owner/name[:config][:split]")
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


def of_hub(address: str, name: str, config: str | None, split: str | None, *, expected: str) -> Any:
    """A data set of the hub as the datasets library has it, all its splits where none is named.

    Raises:
        UserError: the library is missing, or the data set cannot be had.
    """
    library = _extra("datasets", address)
    try:
        return library.load_dataset(name, config, split=split)
    except Exception as error:  # the client's errors are many
        raise UserError(
            f"the data set '{shortened(name)}' could not be loaded from the hub "
            f"({_first_line(error)})",
            expected=expected,
        ) from error


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


PARQUET = b"PAR1"
MOST_ROWS = 1_000_000
_STATE, _SPLITS = "state.json", "dataset_dict.json"
_AGAIN = "Save the folder again"
_INSTEAD = ", or save the data as JSON lines or CSV"
_STEP = 100  # rows turned into Python objects at a time


def parquet_rows(raw: bytes, source: str) -> tuple[tuple[int, object], ...]:
    """The records of a parquet file, numbered from 1.

    Raises:
        UserError: pyarrow is missing, the file is damaged, too large once unpacked, or empty.
    """
    pyarrow = _extra("pyarrow", source, _INSTEAD)

    def batches() -> Iterable[Any]:
        parquet = _extra("pyarrow.parquet", source, _INSTEAD)
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
    if isinstance(files, list):
        files = [one.get("filename") if isinstance(one, dict) else one for one in files]
    pyarrow, ipc = (_extra(one, source, _INSTEAD) for one in ("pyarrow", "pyarrow.ipc"))
    digest = hashlib.sha256()
    parts: list[bytes] = []
    for name in _names(files, place / _STATE, "_data_files"):
        raw = _bytes(place / name)
        digest.update(raw)
        parts.append(raw)
        if sum(map(len, parts)) > reading.LIMIT:
            raise reading.too_large(source)

    def batches() -> Iterable[Any]:
        for raw in parts:
            yield from ipc.open_stream(pyarrow.BufferReader(raw))

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
    except Exception as error:  # pyarrow's errors are many
        raise UserError(
            f"{source} could not be read by pyarrow ({_first_line(error)})",
            fix="Fetch the file again",
        ) from None
    if not rows:
        raise UserError(f"{source} is empty", expected="at least one record")
    return tuple(enumerate(rows, 1))


def _extra(package: str, source: str, instead: str = "") -> Any:
    """A package of the extra ``hub``; the user's error where it is not installed."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise UserError(
            f"{source} needs the package '{package.split('.')[0]}', which is not installed",
            fix=f"pip install 'goldenlayers[hub]'{instead}",
        ) from None


def _first_line(error: Exception) -> str:
    return shortened((str(error).strip() or type(error).__name__).splitlines()[0], 200)


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
