"""The documents that a text is made of, read where they lie: those of a file, of a data set of the
hub, or of the text that comes with the package.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from goldenlayers.datasets.source import of_hub
from goldenlayers.durable import absolute
from goldenlayers.errors import DataError, UserError, near_matches

WORDS = ("package", "model", "none")  # texts that are no file
# Sampled once from an Apache-2.0 model, for any model to read: see text.md beside it.
PACKAGE_TEXT = Path(__file__).with_name("text.jsonl")
FIELD = "text"
# A plain text file is one long document; it is cut at line ends into pieces of about this size,
# so that its parts can be drawn in any order.
_PIECE_BYTES = 4096


class Documents(ABC):
    """A sequence of texts.

    Attributes:
        name: what to call it in messages.
        identity: what tells this text from any other (goes into the cache key).
    """

    name: str
    identity: dict[str, Any]

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> str: ...


class FileDocuments(Documents):
    """A JSON-lines file (one object with a field "text" per line) or a plain text file.

    Recognised by its content: a file whose first character is ``{`` is JSON lines.

    Raises:
        UserError: no such file, or an empty one.
        DataError: when a document is read: broken JSON, no field "text", not UTF-8; with its row.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            folder = path.parent if path.parent.is_dir() else Path()
            names = [p.name for p in folder.iterdir() if p.is_file()]
            raise UserError(
                f"there is no text file '{path}'",
                expected="'package', 'model' (text sampled from the model), a text or JSON-lines "
                "file, or 'hub:NAME'",
                fix=near_matches(path.name, names) if len(names) < 1000 else "",
            )
        self.path, self.name = path, path.name
        digest = hashlib.sha256()
        # (first byte, number of bytes, row) of each document
        self.places: list[tuple[int, int, int]] = []
        self.json_lines = path.suffix != ".txt" and self._first_character() == b"{"
        start = position = row = first_row = 0
        with path.open("rb") as stream:
            for row, line in enumerate(stream, 1):
                digest.update(line)
                if start == position:
                    first_row = row
                position += len(line)
                if not line.strip() and start == position - len(line):
                    start = position  # blank lines between documents
                elif self.json_lines or position - start >= _PIECE_BYTES:
                    self.places.append((start, position - start, first_row))
                    start = position
        if position > start:
            self.places.append((start, position - start, first_row))
        if not self.places:
            raise UserError(
                f"the text file '{path}' is empty", expected='text, or lines such as {"text": "…"}'
            )
        self.identity = {"kind": "file", "sha256": digest.hexdigest(), "json": self.json_lines}

    def _first_character(self) -> bytes:
        with self.path.open("rb") as stream:
            return stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> str:
        start, size, row = self.places[index]
        with self.path.open("rb") as stream:
            stream.seek(start)
            raw = stream.read(size)
        try:
            text = raw.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            row += raw[: error.start].count(b"\n")
            raise DataError("not UTF-8 text").at(source=self.name, row=row) from None
        if not self.json_lines:
            return text
        try:
            record = json.loads(text)
        except ValueError as error:
            wrong = DataError(f"broken JSON ({error})", expected="one object per line")
            raise wrong.at(source=self.name, row=row) from None
        return _text_of(record, self.name, row)


class HubDocuments(Documents):
    """A data set of the hub: ``NAME``, ``NAME@CONFIGURATION``, each with ``:SPLIT`` if not train.

    Raises:
        UserError: the extra ``hub`` is not installed, or the data set cannot be had.
    """

    def __init__(self, address: str) -> None:
        self.name = f"hub:{address}"
        rest, _, split = address.partition(":")
        name, _, configuration = rest.partition("@")
        form = "hub:NAME[@CONFIGURATION][:SPLIT]"
        self.rows = of_hub(self.name, name, configuration or None, split or "train", expected=form)
        fingerprint = str(getattr(self.rows, "_fingerprint", ""))
        self.identity = {"kind": "hub", "address": address, "fingerprint": fingerprint}
        if not len(self.rows):
            raise UserError(f"the data set '{self.name}' is empty")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> str:
        return _text_of(self.rows[index], self.name, index + 1)


def _text_of(record: Any, source: str, row: int) -> str:
    text = record.get(FIELD) if isinstance(record, dict) else None
    if not isinstance(text, str):
        found = ", ".join(map(str, record)) if isinstance(record, dict) else type(record).__name__
        raise DataError(
            "there is no text",
            field=FIELD,
            expected=f"an object with a string '{FIELD}' (found: {found or 'no fields'})",
        ).at(source=source, row=row)
    return text


def open_documents(text: str | Path) -> Documents:
    """The documents behind ``package``, a file path or ``hub:NAME``."""
    if text == "package":
        found = FileDocuments(PACKAGE_TEXT)
        found.name = "the text of the package"
        return found
    if isinstance(text, str) and text.startswith("hub:"):
        return HubDocuments(text.removeprefix("hub:"))
    return FileDocuments(Path(text).expanduser())


def absolute_name(text: str) -> str:
    """``text`` of ``key_statistics`` as it is good from any working directory."""
    return text if text in WORDS or text.startswith("hub:") else absolute(text)


def windows(documents: Documents, order: list[int], size: int) -> Iterator[str]:
    """Passages of about ``size`` characters: the first of every document, then every second, …

    Taking turns keeps a few long documents from filling a small budget by themselves. Passages end
    at white space where there is some.
    """
    turn = 0
    while order:
        remaining: list[int] = []
        for index in order:
            text = documents[index]
            start, stop = _boundary(text, turn * size), _boundary(text, (turn + 1) * size)
            if stop > start:
                yield text[start:stop]
            if stop < len(text):
                remaining.append(index)
        order, turn = remaining, turn + 1


def _boundary(text: str, position: int) -> int:
    """The first white space at or soon after a position; the position itself if there is none."""
    if position == 0 or position >= len(text):
        return min(position, len(text))
    near = text[position : position + 64]
    return position + next((i for i, char in enumerate(near) if char.isspace()), 0)
