"""The header of a GGUF file, read within bounds: every count is held against the file's size first.

A file that passes is whole, its tensors lie inside it side by side, and what its entries say about
the model fits its tensors and its own vocabulary. Format: GGUF version 2 and 3, little-endian,
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from goldenlayers.errors import UserError, shortened
from goldenlayers.models.files import kind_of

# GGUF value type -> struct code
_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_BOOL, _STRING, _ARRAY = 7, 8, 9
# Most that a header may count. The largest files have some 1,500 tensors, 60 entries and 300,000
# words; a key may have 65,535 bytes by the format, a tensor's name 64.
_TENSORS, _ENTRIES, _ITEMS = 1 << 17, 1 << 14, 1 << 23
_KEY, _NAME, _TEXT = 65_535, 255, 1 << 24
_ALIGNMENTS = tuple(1 << power for power in range(3, 17))
_AGAIN = "Download the file again"


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor: its name, its dimensions (the fastest first), its bytes' place in the data, and
    how its numbers are stored (the number of a ggml type).
    """

    name: str
    dims: tuple[int, ...]
    offset: int
    size: int
    kind: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """``values``: entries by key, arrays as lists. ``tensors``: by name, in the file's order.
    ``start``: the byte at which the tensors' data begin.
    """

    values: dict[str, Any]
    tensors: dict[str, GgufTensor] = field(default_factory=dict)
    start: int = 0

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the model family."""
        return str(self.values.get("general.architecture", ""))

    @property
    def elements(self) -> int:
        """Number of weights in all tensors."""
        return sum(prod(tensor.dims) for tensor in self.tensors.values())


def read_header(path: Path) -> GgufHeader:
    """Read the header of ``path`` and check that the file is whole.

    Raises:
        UserError: not a GGUF file, or one that was cut off or damaged; says what was found where.
    """
    try:
        if kind_of(path) != "file":
            raise UserError(f"{path} is no regular file", expected="a .gguf file")
        with path.open("rb") as stream:
            if stream.read(4) != b"GGUF":
                raise UserError(
                    f"{path} is not a GGUF file (its first bytes are not 'GGUF')",
                    fix="Give a .gguf file as llama.cpp writes it",
                )
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Reader(path, data).header()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


class _Reader:
    """Reads a mapped file from front to back; what goes beyond its end is an error, not a read."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.size = len(data)
        self.place = 4

    def wrong(self, problem: str, expected: str = "") -> UserError:
        """The error for what was found just before the place where the reader stands."""
        return UserError(
            f"{self.path} is damaged in its header at byte {self.place}: {problem}",
            expected=expected,
            fix=_AGAIN,
        )

    def need(self, count: int, what: str) -> None:
        """Refuse what the rest of the file cannot hold."""
        if count > self.size - self.place:
            raise UserError(
                f"{self.path} is cut off or damaged in its header at byte {self.place}: {what} of "
                f"{count} bytes is more than the {self.size - self.place} bytes that are left",
                fix=_AGAIN,
            )

    def number(self, code: str, what: str) -> Any:
        width = struct.calcsize(code)
        self.need(width, what)
        value = struct.unpack_from(code, self.data, self.place)[0]
        self.place += width
        return value

    def count(self, code: str, what: str, most: int) -> int:
        value = self.number(code, what)
        if value > most:
            raise self.wrong(f"{what} is {value}", f"{most} at most")
        return value

    def text(self, what: str, most: int) -> str:
        length = self.count("<Q", f"the length of {what}", most)
        self.need(length, what)
        raw = self.data[self.place : self.place + length]
        try:
            value = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.wrong(f"{what} is not UTF-8 text") from error
        self.place += length
        return value

    def texts(self, count: int, what: str) -> list[str]:
        """``count`` strings: as ``text`` reads them, in a third of the time."""
        items: list[str] = []
        length_at = struct.Struct("<Q").unpack_from
        while len(items) < count and self.place + 8 <= self.size:
            start = self.place + 8
            end = start + length_at(self.data, self.place)[0]
            if end > min(self.size, start + _TEXT):
                break
            try:
                items.append(self.data[start:end].decode("utf-8"))
            except UnicodeDecodeError:
                break
            self.place = end
        if len(items) < count:
            self.text(f"item {len(items)} of {what}", _TEXT)  # says what is wrong with it
        return items

    def header(self) -> GgufHeader:
        version = self.number("<I", "the version")
        if version not in (2, 3):
            order = " (big-endian)" if version and not version & 0xFFFF else ""
            raise UserError(
                f"{self.path} has GGUF version {version}{order}",
                expected="version 2 or 3, little-endian",
            )
        tensors = self.count("<Q", "the number of tensors", _TENSORS)
        entries = self.count("<Q", "the number of entries", _ENTRIES)
        values: dict[str, Any] = {}
        for _ in range(entries):
            key = self.text("a key", _KEY)
            if not key or key in values:
                raise self.wrong(f"the key '{shortened(key)}' is empty or there twice")
            values[key] = self.value(key, self.number("<I", f"the type of '{shortened(key)}'"))
        align = values.get("general.alignment", 32)
        if isinstance(align, bool) or align not in _ALIGNMENTS:
            raise self.wrong(
                f"general.alignment is {shortened(str(align))}", "a power of two from 8 to 65536"
            )
        table = [self.tensor(align) for _ in range(tensors)]
        start = -(-self.place // align) * align
        self.check_places(table, start)
        by_name = {tensor.name: tensor for tensor in table}
        if len(by_name) != len(table):
            raise self.wrong("two tensors have one name")
        return GgufHeader(values, by_name, start)

    def value(self, key: str, kind: int) -> Any:
        what = f"the value of '{shortened(key)}'"
        if kind == _STRING:
            return self.text(what, _TEXT)
        if kind == _ARRAY:
            return self.array(what)
        if kind not in _SCALARS:
            raise self.wrong(f"{what} has the unknown type {kind}", "a type from 0 to 12")
        if kind == _BOOL and self.place < self.size and self.data[self.place] > 1:
            raise self.wrong(f"{what} is {self.data[self.place]}", "0 or 1 for false or true")
        return self.number(f"<{_SCALARS[kind]}", what)

    def array(self, what: str) -> list[Any]:
        kind = self.number("<I", f"the item type of {what}")
        count = self.count("<Q", f"the number of items in {what}", _ITEMS)
        if kind == _STRING:
            self.need(8 * count, what)
            return self.texts(count, what)
        if kind not in _SCALARS:
            raise self.wrong(
                f"{what} is an array of items of type {kind}", "an array of numbers or strings"
            )
        code = f"<{count}{_SCALARS[kind]}"
        self.need(struct.calcsize(code), what)
        items = list(struct.unpack_from(code, self.data, self.place))
        self.place += struct.calcsize(code)
        return items

    def tensor(self, align: int) -> GgufTensor:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        name = self.text("the name of a tensor", _NAME)
        what = f"the tensor '{shortened(name)}'"
        if not name:
            raise self.wrong("a tensor has no name")
        ranks = self.number("<I", f"the number of dimensions of {what}")
        if not 1 <= ranks <= 4:
            raise self.wrong(f"{what} has {ranks} dimensions", "1 to 4")
        dims = tuple(self.number("<Q", f"a dimension of {what}") for _ in range(ranks))
        kind = self.number("<I", f"the type of {what}")
        offset = self.number("<Q", f"the offset of {what}")
        try:
            block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        except (ValueError, KeyError) as error:
            raise UserError(
                f"{self.path}: {what} has the type {kind}, which the package gguf does not know",
                fix="Upgrade it (python -m pip install --upgrade gguf), or download the file again",
            ) from error
        if 0 in dims or dims[0] % block:
            raise self.wrong(f"{what} has the dimensions {dims}", f"multiples of {block} first")
        if offset % align:
            raise self.wrong(f"{what} begins at {offset}", f"a multiple of {align}")
        return GgufTensor(name, dims, offset, prod(dims) // block * block_bytes, kind)

    def check_places(self, table: list[GgufTensor], start: int) -> None:
        """Refuse tensors that overlap, or that end beyond the file."""
        end = 0
        for tensor in sorted(table, key=lambda tensor: (tensor.offset, tensor.size)):
            if tensor.offset < end:
                raise self.wrong(f"the tensor '{shortened(tensor.name)}' overlaps another one")
            end = tensor.offset + tensor.size
        if table and start + end > self.size:
            raise UserError(
                f"{self.path} has {self.size} bytes: it is cut off, or its header is damaged",
                expected=f"at least {shortened(str(start + end))} bytes",
                fix=_AGAIN,
            )


_ENCODERS = ("t5", "t5encoder", "bert", "nomic-bert", "clip")
_IDS = ("bos", "eos", "unknown", "padding")
_BLOCK = re.compile(r"blk\.(\d{1,6})\.")
# Entries of an architecture that transformers reads: whole numbers above 0 (some families give
# one per layer), and finite numbers above 0.
_WHOLE = (
    *("block_count", "context_length", "embedding_length", "feed_forward_length"),
    *("attention.head_count", "attention.head_count_kv", "attention.key_length"),
    *("attention.value_length", "attention.sliding_window", "rope.dimension_count", "vocab_size"),
)
_FINITE = (
    *("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon", "rope.freq_base"),
    *("rope.scaling.factor", "rope.freq_base_swa", "attn_logit_softcapping"),
    *("final_logit_softcapping",),
)
_MOST = 1 << 31


def check_model(path: Path, header: GgufHeader) -> None:
    """Refuse a kind of model that cannot be handled, or entries that contradict the tensors.

    Raises:
        UserError: names the entry, what it says and what was expected.
    """
    arch = header.values.get("general.architecture")
    if not isinstance(arch, str) or not re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", arch):
        raise _wrong(path, "general.architecture", arch, "the name of a model family")
    _refuse_unsupported(path, header)
    for key in _FINITE:
        value = header.values.get(f"{arch}.{key}", 0)
        if not isinstance(value, float | int) or not 0 <= value < math.inf:
            raise _wrong(path, f"{arch}.{key}", value, "a finite number")
    for key in _WHOLE:
        value = header.values.get(f"{arch}.{key}", 1)
        # A layer without attention or without an MLP counts 0 of them.
        least = 0 if isinstance(value, list) or key.endswith("sliding_window") else 1
        if not all(_is_whole(v, least) for v in (value if isinstance(value, list) else [value])):
            raise _wrong(path, f"{arch}.{key}", value, "a whole number above 0")
    _check_layers(path, header)
    _check_vocabulary(path, header)


def _refuse_unsupported(path: Path, header: GgufHeader) -> None:
    arch, values = header.architecture, header.values
    if values.get("general.type") == "adapter":
        raise UserError(
            f"{path} is an adapter, a change of a model",
            expected="a model",
            fix="Load the GGUF file that it was made for; llama.cpp takes the adapter beside it",
        )
    experts, parts = values.get(f"{arch}.expert_count", 0), values.get("split.count", 0)
    for key, value in ((f"{arch}.expert_count", experts), ("split.count", parts)):
        if not _is_whole(value, 0):
            raise _wrong(path, key, value, "a whole number")
    if experts > 1:
        raise UserError(
            f"{path} is a mixture-of-experts model ({experts} experts), not converted here",
            fix="Use the model's safetensors checkpoint (a directory or a hub id) instead",
        )
    if parts > 1:
        raise UserError(
            f"{path} is one of {parts} parts of a split GGUF file",
            fix="Join the parts first (llama-gguf-split --merge)",
        )
    if arch in _ENCODERS:
        raise UserError(
            f"{path} holds a model of the kind '{arch}'", expected="a decoder-only language model"
        )


def _check_layers(path: Path, header: GgufHeader) -> None:
    """The layers that are counted are those that have tensors, of the width that is stated."""
    arch = header.architecture
    count = header.values.get(f"{arch}.block_count")
    if not isinstance(count, int):
        raise _wrong(path, f"{arch}.block_count", count, "the number of layers")
    there = {int(found[1]) for name in header.tensors if (found := _BLOCK.match(name))}
    if there != set(range(min(count, len(header.tensors) + 1))):
        raise UserError(
            f"{path} says {arch}.block_count {count}, and its tensors are of {len(there)} layers"
            + (f" ({min(there)} to {max(there)})" if there else ""),
            fix=_AGAIN,
        )
    width = header.values.get(f"{arch}.embedding_length")
    embedding = header.tensors.get("token_embd.weight")
    if embedding is not None and isinstance(width, int) and embedding.dims[0] != width:
        raise _wrong(path, f"{arch}.embedding_length", width, f"{embedding.dims[0]}, as the tensor")
    key = f"{arch}.attention.head_count"
    heads, groups = header.values.get(key), header.values.get(f"{key}_kv")
    if isinstance(heads, int) and isinstance(groups, int) and heads % groups:
        raise _wrong(path, f"{key}_kv", groups, f"a divisor of the {heads} heads")


def _check_vocabulary(path: Path, header: GgufHeader) -> None:
    values = header.values
    kind = values.get("tokenizer.ggml.model")
    if not isinstance(kind, str):
        raise _wrong(path, "tokenizer.ggml.model", kind, "the kind of tokenizer, such as gpt2")
    tokens = _strings(path, values, "tokenizer.ggml.tokens")
    if not tokens:
        raise _wrong(path, "tokenizer.ggml.tokens", None, "the vocabulary, a list of texts")
    embedding = header.tensors.get("token_embd.weight")
    rows = embedding.dims[-1] if embedding is not None else len(tokens)
    if len(tokens) > rows:
        raise UserError(
            f"{path} has {len(tokens)} tokens in tokenizer.ggml.tokens and {rows} embeddings",
            fix=_AGAIN,
        )
    for key in ("scores", "token_type"):
        items = values.get(f"tokenizer.ggml.{key}")
        if items is None:
            continue
        if not isinstance(items, list) or len(items) != len(tokens):
            size = len(items) if isinstance(items, list) else None
            raise _wrong(path, f"tokenizer.ggml.{key}", size, f"{len(tokens)} numbers")
        for place, item in enumerate(items):
            if not isinstance(item, int | float) or math.isnan(item):
                raise _wrong(path, f"tokenizer.ggml.{key}[{place}]", item, "a number")
    for place, merge in enumerate(_strings(path, values, "tokenizer.ggml.merges")):
        if merge.count(" ") != 1 or not merge.strip():
            raise _wrong(path, f"tokenizer.ggml.merges[{place}]", merge, "two pieces and a space")
    for key in (f"tokenizer.ggml.{name}_token_id" for name in _IDS):
        token = values.get(key, 0)
        if not _is_whole(token, 0) or token >= len(tokens):
            raise _wrong(path, key, token, f"a token below {len(tokens)}")
    for key in ("add_bos_token", "add_eos_token", "add_space_prefix"):
        flag = values.get(f"tokenizer.ggml.{key}", False)
        if not isinstance(flag, bool):
            raise _wrong(path, f"tokenizer.ggml.{key}", flag, "true or false")
    for key in ("tokenizer.chat_template", "tokenizer.ggml.pre"):
        if not isinstance(values.get(key, ""), str):
            raise _wrong(path, key, values[key], "a text")


def _strings(path: Path, values: dict[str, Any], key: str) -> list[str]:
    items = values.get(key, [])
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        raise _wrong(path, key, type(items).__name__, "a list of texts")
    return items


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= _MOST


def _wrong(path: Path, key: str, found: Any, expected: str) -> UserError:
    said = f"says {key} {str(found)[:80]!r}" if found is not None else f"does not say {key}"
    return UserError(f"{path} {said}", expected=expected, fix=_AGAIN)
