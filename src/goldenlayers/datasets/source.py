"""From a file or the package to numbered records, with clear errors on the way."""

from __future__ import annotations

import difflib
import hashlib
import os
from importlib import resources
from pathlib import Path

from goldenlayers.datasets import arrow, records, tables
from goldenlayers.datasets.records import Table, lines, whole
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
        printable = os.fsencode(path).decode("utf-8", "replace") if _encodes(path) else shown
        raise UserError(
            f"the name of the file {printable} is not UTF-8 text",
            fix="Rename it: results record the names of their data",
        ) from None
    try:
        place = place.expanduser()
        if place.is_dir():
            if arrow.is_saved(place):
                return arrow.from_folder(place, str(path))
            raise _directory(place)
        raw = records.file_bytes(place)
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
    raw = records.unpacked(raw, source)
    if raw.startswith(arrow.PARQUET):
        return Table(name, source, digest, arrow.parquet_rows(raw, source))
    text = records.decoded(raw, source)
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


def _encodes(path: str | os.PathLike[str]) -> bool:
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        return False
    return True


def _directory(path: Path) -> UserError:
    inside = sorted(item.name for item in path.iterdir() if item.suffix in _SUFFIXES)
    such_as = f", such as {', '.join(map(shortened, inside[:3]))} in it" if inside else ""
    return UserError(
        f"{path} is a directory", expected=f"a file{such_as}, or a folder of save_to_disk"
    )


def _near_files(path: Path) -> str:
    if not path.parent.is_dir():
        return f"The folder {shortened(str(path.parent), 300)} does not exist either"
    try:
        there = sorted(item.name for item in path.parent.iterdir())
    except OSError:
        return ""
    close = difflib.get_close_matches(path.name, there, n=3, cutoff=0.6)
    if not close:
        return ""
    return "Did you mean " + " or ".join(str(path.parent / name) for name in close) + "?"
