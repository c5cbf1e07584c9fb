"""The header of a GGUF file: scalar values and sizes, in a fraction of a second.

Long arrays (the vocabulary) are skipped, so that a wrong or cut-off file is recognised before the
slow conversion begins. Format: GGUF version 2 and 3, little-endian.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

from goldenlayers.errors import UserError

_SCALARS = {  # GGUF value type -> struct code
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """``values``: scalar entries by key. ``elements``: number of weights in all tensors."""

    values: dict[str, Any]
    elements: int

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the model family."""
        return str(self.values.get("general.architecture", ""))


def read_header(path: Path) -> GgufHeader:
    """Read the header of ``path`` and check that the file is as long as its tensors need.

    Raises:
        UserError: not a GGUF file, or one that was cut off.

    """
    try:
        with path.open("rb") as stream:
            if stream.read(4) != b"GGUF":
                raise UserError(
                    f"{path} is not a GGUF file (its first bytes are not 'GGUF')",
                    fix="Give a .gguf file as llama.cpp writes it",
                )
            version = _number(stream, "<I")
            if version not in (2, 3):
                raise UserError(
                    f"{path} has GGUF version {version}", expected="version 2 or 3, little-endian"
                )
            tensors, entries = _number(stream, "<Q"), _number(stream, "<Q")
            values: dict[str, Any] = {}
            for _ in range(entries):
                key = _text(stream)
                value = _value(stream, _number(stream, "<I"))
                if value is not None:
                    values[key] = value
            elements, data_bytes = _tensor_table(stream, tensors)
            alignment = int(values.get("general.alignment", 32))
            start = -(-stream.tell() // alignment) * alignment
    except (EOFError, struct.error, UnicodeDecodeError, OverflowError) as error:
        raise UserError(f"{path} is cut off or damaged in its header", fix=_AGAIN) from error
    if path.stat().st_size < start + data_bytes:
        raise UserError(
            f"{path} has {path.stat().st_size} bytes: it is cut off",
            expected=f"at least {start + data_bytes} bytes",
            fix=_AGAIN,
        )
    return GgufHeader(values, elements)


_AGAIN = "Download the file again"


def _tensor_table(stream: BufferedReader, count: int) -> tuple[int, int]:
    """Number of weights, and bytes from the start of the data to the end of the last tensor."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    elements = end = 0
    for _ in range(count):
        _text(stream)
        size = 1
        for _ in range(_number(stream, "<I")):
            size *= _number(stream, "<Q")
        kind, offset = _number(stream, "<I"), _number(stream, "<Q")
        elements += size
        try:
            block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        except (ValueError, KeyError):  # a type newer than the gguf package: its size is unknown
            continue
        end = max(end, offset + size // block * block_bytes)
    return elements, end


def _take(stream: BufferedReader, size: int) -> bytes:
    data = stream.read(size)
    if len(data) != size:
        raise EOFError
    return data


def _number(stream: BufferedReader, code: str) -> Any:
    return struct.unpack(code, _take(stream, struct.calcsize(code)))[0]


def _text(stream: BufferedReader) -> str:
    return _take(stream, _number(stream, "<Q")).decode("utf-8")


def _value(stream: BufferedReader, kind: int) -> Any:
    """One value; None for an array, which is stepped over."""
    if kind in _SCALARS:
        return _number(stream, _SCALARS[kind])
    if kind == _STRING:
        return _text(stream)
    if kind != _ARRAY:
        raise EOFError
    item, count = _number(stream, "<I"), _number(stream, "<Q")
    if item in _SCALARS:
        stream.seek(struct.calcsize(_SCALARS[item]) * count, 1)
    else:
        for _ in range(count):
            if item == _STRING:
                stream.seek(_number(stream, "<Q"), 1)
            else:
                _value(stream, item)
    return None
