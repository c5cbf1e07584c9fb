"""From a file, the package or the hub to numbered records, with clear errors on the way."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from goldenlayers.errors import DataError, UserError

STARTER = "starter.jsonl"
_USUAL_SPLITS = frozenset({"train", "test", "validation", "valid", "dev", "val"})


@dataclass(frozen=True)
class Table:
    """Records as they stand in their source: (row number from 1, value), and the broken rows."""

    name: str
    source: str
    sha256: str
    rows: tuple[tuple[int, object], ...]
    broken: tuple[DataError, ...] = ()

    @property
    def records(self) -> list[object]:
        """The records without their numbers."""
        return [record for _, record in self.rows]


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
    """The records of a JSON or JSON-lines file.

    Raises:
        UserError: no such file (near names are given), a directory, not readable, not UTF-8,
            empty, broken JSON (line and column), or neither JSON array nor JSON lines.
    """
    place = Path(path)
    try:
        place = place.expanduser()
        if place.is_dir():
            raise _directory(place)
        raw = place.read_bytes()
    except FileNotFoundError:
        raise UserError(f"there is no file {path}", fix=_near_files(place)) from None
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} could not be read ({reason})") from None
    return parse(raw, place.stem, str(path))


def parse(raw: bytes, name: str, source: str) -> Table:
    """The records in the bytes of a file: a JSON array, JSON lines, or one JSON object."""
    digest = hashlib.sha256(raw).hexdigest()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        utf16 = " (it looks like UTF-16)" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        line = raw[: error.start].count(b"\n") + 1
        raise UserError(
            f"{source} is not UTF-8 text{utf16}: line {line}, byte {error.start}",
            fix="Save it as UTF-8",
        ) from None
    begin = text.lstrip()[:1]
    if not begin:
        raise UserError(f"{source} is empty", expected="at least one record")
    if begin == "[":
        rows = tuple(enumerate(_whole(text, source), 1))
        if not rows:
            raise UserError(f"{source} is an empty list", expected="at least one record")
        return Table(name, source, digest, rows)
    if begin != "{":
        raise UserError(
            f"{source} is neither a JSON array nor JSON lines: it begins with "
            f"'{text.strip()[:40].splitlines()[0]}'",
            expected="'[' or '{' first",
        )
    rows, broken = _lines(text, source)
    if broken and not any(isinstance(record, dict) for _, record in rows):
        # One object over several lines is one record; if it is not that, say where it breaks.
        return Table(name, source, digest, ((1, _whole(text, source)),))
    return Table(name, source, digest, tuple(rows), tuple(broken))


def _whole(text: str, source: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        cut = error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string")
        raise UserError(
            f"{source}: broken JSON at line {error.lineno}, column {error.colno} ({error.msg})"
            + ("; the file seems to be cut off" if cut else ""),
            fix="Fetch the file again" if cut else "Mend it there",
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source}: JSON that cannot be read ({error})") from None


def _lines(text: str, source: str) -> tuple[list[tuple[int, object]], list[DataError]]:
    """JSON lines; a broken line is a row error like any other. Blank lines do not count."""
    rows: list[tuple[int, object]] = []
    broken: list[DataError] = []
    # Not splitlines(): JSON text may hold U+2028 and the like unescaped.
    lines = text.split("\n")
    last = max(number for number, line in enumerate(lines, 1) if line.strip())
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            rows.append((number, json.loads(line)))
        except (ValueError, RecursionError) as error:
            at, why = "", str(error)
            if isinstance(error, json.JSONDecodeError):
                at, why = f" at column {error.colno}", error.msg
            cut = "; the file may be cut off" if number == last and len(lines) > 1 else ""
            broken.append(
                DataError(
                    f"broken JSON{at} ({why}){cut}",
                    source=source,
                    row=number,
                    expected="one object per line",
                    reason="broken JSON",
                )
            )
    return rows, broken


def exists(path: str) -> bool:
    """Whether something goes by this path; a name that cannot be one does not exist."""
    try:
        return Path(path).expanduser().exists()
    except (OSError, ValueError, RuntimeError):
        return False


def _directory(path: Path) -> UserError:
    inside = sorted(item.name for item in path.iterdir() if item.suffix in {".json", ".jsonl"})
    such_as = f", such as {', '.join(inside[:3])} in it" if inside else ""
    return UserError(f"{path} is a directory", expected=f"a file{such_as}")


def _near_files(path: Path) -> str:
    if not path.parent.is_dir():
        return f"The folder {path.parent} does not exist either"
    try:
        there = sorted(item.name for item in path.parent.iterdir())
    except OSError:
        return ""
    close = difflib.get_close_matches(path.name, there, n=3, cutoff=0.6)
    if not close:
        return ""
    return "Did you mean " + " or ".join(str(path.parent / name) for name in close) + "?"


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
    try:
        import datasets as hub  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError(
            f"hub:{address} needs the package 'datasets', which is not installed",
            fix="pip install 'goldenlayers[hub]'",
        ) from None
    try:
        found: Any = hub.load_dataset(name, config, split=split)
    except Exception as error:  # the client's errors are many; the user needs the first line
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"the data set '{name}' could not be loaded from the hub ({first})",
            expected="hub:owner/name[:config][:split]",
        ) from error
    if isinstance(found, Mapping):
        splits = sorted(map(str, found))
        if len(splits) != 1:
            raise UserError(
                f"hub:{address} has the splits {', '.join(splits)}",
                fix=f"Choose one: hub:{address}:{splits[0] if splits else 'train'}",
            )
        found = found[splits[0]]
    rows = tuple((number, dict(record)) for number, record in enumerate(found, 1))
    if not rows:
        raise UserError(f"hub:{address} is empty", expected="at least one record")
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
            f"'hub:{address}' is not an address of a data set",
            expected="hub:owner/name[:config][:split]",
        )
    return name, config or None, split or None
