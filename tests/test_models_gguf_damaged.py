"""Damaged and hostile GGUF files: one message each, before anything is converted."""

from __future__ import annotations

import contextlib
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from families import build
from gguf_built import write_llama_gguf
from gguf_mutations import Field, layout, mutations, outcome
from tokenizers_built import byte_level_bpe

from goldenlayers.errors import UserError
from goldenlayers.models.gguf import GgufHeader, check_model, read_header


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return write_llama_gguf(path, build("llama"), byte_level_bpe())


def text(value: str | bytes, length: int | None = None) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw) if length is None else length) + raw


def gguf(
    entries: list[tuple[str | bytes, int, bytes]],
    tensors: list[bytes] = [],  # noqa: B006
    *,
    tail: bytes = bytes(64),
    version: int = 3,
    counts: tuple[int, int] | None = None,
) -> bytes:
    """A file written by hand: ``entries`` are (key, type, the value's bytes)."""
    numbers = counts or (len(tensors), len(entries))
    body = b"GGUF" + struct.pack("<IQQ", version, *numbers)
    for key, kind, value in entries:
        body += text(key) + struct.pack("<I", kind) + value
    return body + b"".join(tensors) + tail


def tensor(name: str, dims: list[int], kind: int = 0, offset: int = 0, ranks: int = -1) -> bytes:
    count = len(dims) if ranks < 0 else ranks
    numbers = struct.pack(f"<I{len(dims)}QIQ", count, *dims, kind, offset)
    return text(name) + numbers


def array(kind: int, count: int, items: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + items


ARCH = ("general.architecture", 8, text("llama"))
U32 = struct.Struct("<I").pack


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (gguf([], version=1), ("GGUF version 1",)),
        (gguf([], version=0x03000000), ("big-endian",)),
        (gguf([], counts=(2**60, 0)), ("the number of tensors is 1152921504606846976",)),
        (gguf([], counts=(0, 2**60)), ("the number of entries is",)),
        (gguf([], counts=(0, 1), tail=text("x", 2**60)), ("the length of a key",)),
        (gguf([("a", 8, text("x", 2**60))]), ("the length of the value of 'a'",)),
        (gguf([("a", 8, text("x", 2**20))]), ("cut off or damaged", "bytes that are left")),
        (gguf([("a", 9, array(8, 2**60))]), ("the number of items in the value of 'a'",)),
        (gguf([("a", 9, array(8, 2**22))]), ("cut off or damaged",)),
        (gguf([("a", 9, array(8, 3, text("b") + text(b"\xff")))]), ("item 1", "not UTF-8")),
        (gguf([("a", 9, array(4, 2**40))]), ("the number of items",)),
        (gguf([("a", 9, array(9, 1, array(9, 1)))]), ("an array of items of type 9",)),
        (gguf([("a", 13, b"")]), ("unknown type 13",)),
        (gguf([("a", 7, b"\x05")]), ("is 5", "0 or 1")),
        (gguf([(b"\xff\xfe", 4, U32(1))]), ("not UTF-8",)),
        (gguf([("", 4, U32(1))]), ("empty or there twice",)),
        (gguf([("a", 4, U32(1)), ("a", 4, U32(1))]), ("the key 'a'", "there twice")),
        (gguf([("general.alignment", 4, U32(0))]), ("general.alignment is 0", "power of two")),
        (gguf([("general.alignment", 4, U32(24))]), ("general.alignment is 24",)),
        (gguf([("general.alignment", 4, U32(2**31))]), ("general.alignment is 2147483648",)),
        (gguf([("general.alignment", 8, text("32"))]), ("general.alignment is 32",)),
        (gguf([("general.alignment", 9, array(4, 1, U32(32)))]), ("general.alignment",)),
        (gguf([], [tensor("t", [1], ranks=300_000)]), ("300000 dimensions", "1 to 4")),
        (gguf([], [tensor("t", [])]), ("0 dimensions",)),
        (gguf([], [tensor("t", [0, 4])]), ("the dimensions (0, 4)",)),
        (gguf([], [tensor("t", [2**60, 2**60])]), ("at least",)),
        (gguf([], [tensor("t", [4], kind=99)]), ("the type 99", "Upgrade")),
        (gguf([], [tensor("t", [5], kind=2)]), ("multiples of 32",)),  # Q4_0
        (gguf([], [tensor("t", [4], offset=7)]), ("begins at 7", "a multiple of 32")),
        (gguf([], [tensor("t", [4], offset=2**60)]), ("at least",)),
        (gguf([], [tensor("t", [4]), tensor("u", [4])]), ("overlaps",)),
        (gguf([], [tensor("t", [4]), tensor("t", [4], offset=32)]), ("one name",)),
        (gguf([], [tensor("", [4])]), ("has no name",)),
        (b"GGUF", ("cut off or damaged",)),
    ],
)
def test_a_header_that_cannot_be(tmp_path: Path, data: bytes, words: tuple[str, ...]) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    with pytest.raises(UserError) as caught:
        read_header(path)
    message = str(caught.value)
    for word in words:
        assert word in message
    assert str(path) in message
    assert len(message) < 500 + len(str(path))


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("general.architecture", None, ("does not say general.architecture",)),
        ("general.architecture", 5, ("general.architecture '5'",)),
        ("general.architecture", "a b\n", ("general.architecture",)),
        ("llama.block_count", None, ("does not say llama.block_count",)),
        ("llama.block_count", "4", ("llama.block_count '4'", "a whole number")),
        ("llama.block_count", 3, ("block_count 3", "4 layers (0 to 3)")),
        ("llama.block_count", 2**31, ("block_count 2147483648",)),
        ("llama.block_count", True, ("llama.block_count 'True'",)),
        ("llama.embedding_length", 64, ("embedding_length '64'", "32, as the tensor")),
        ("llama.attention.head_count", 0, ("head_count '0'", "above 0")),
        ("llama.attention.head_count_kv", 3, ("a divisor of the 4 heads",)),
        ("llama.context_length", 2**40, ("context_length",)),
        ("llama.rope.freq_base", float("nan"), ("freq_base 'nan'", "a finite number")),
        ("llama.attention.layer_norm_rms_epsilon", [1.0], ("layer_norm_rms_epsilon",)),
        ("llama.expert_count", "8", ("expert_count '8'",)),
        ("split.count", [3], ("split.count",)),
        ("tokenizer.ggml.model", 7, ("tokenizer.ggml.model '7'",)),
        ("tokenizer.ggml.tokens", None, ("does not say tokenizer.ggml.tokens",)),
        ("tokenizer.ggml.tokens", [1, 2], ("a list of texts",)),
        ("tokenizer.ggml.tokens", ["a"] * 400, ("400 tokens", "320 embeddings")),
        ("tokenizer.ggml.token_type", [1], ("token_type '1'", "320 numbers")),
        ("tokenizer.ggml.scores", [float("nan")] * 320, ("scores[0] 'nan'",)),
        ("tokenizer.ggml.merges", ["a b", "abc"], ("merges[1] 'abc'", "two pieces")),
        ("tokenizer.ggml.bos_token_id", 320, ("bos_token_id '320'", "below 320")),
        ("tokenizer.ggml.eos_token_id", -1, ("eos_token_id '-1'",)),
        ("tokenizer.ggml.add_bos_token", 1, ("add_bos_token '1'", "true or false")),
        ("tokenizer.chat_template", 1, ("chat_template",)),
    ],
)
def test_entries_that_contradict_the_tensors(
    whole: Path, key: str, value: Any, words: tuple[str, ...]
) -> None:
    header = read_header(whole)
    check_model(whole, header)  # as it is, nothing is wrong
    values = {k: v for k, v in header.values.items() if k != key}
    values |= {} if value is None else {key: value}
    with pytest.raises(UserError) as caught:
        check_model(whole, GgufHeader(values, header.tensors))
    for word in words:
        assert word in str(caught.value)


def test_damaged_files_end_in_a_message_and_soon(whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "damaged.gguf"
    refused = 0
    began = time.monotonic()
    for what, data in mutations(whole.read_bytes(), 500, seed=1):
        path.write_bytes(data)
        try:
            check_model(path, read_header(path))
        except UserError:
            refused += 1
        except Exception as error:
            raise AssertionError(what) from error
    assert refused > 400  # most of them are seen at once; the rest still say a model that can be
    assert time.monotonic() - began < 60


def test_every_cut_is_noticed(whole: Path, tmp_path: Path) -> None:
    data = whole.read_bytes()
    path = tmp_path / "cut.gguf"
    for end in [*range(0, layout(data).end, 97), len(data) - 1]:
        path.write_bytes(data[:end])
        with pytest.raises(UserError):
            read_header(path)


def test_what_the_checks_let_pass_does_not_end_in_a_traceback(whole: Path, tmp_path: Path) -> None:
    """The conversion itself, each file in a process with limits (more of them: gguf_mutations)."""
    path = tmp_path / "damaged.gguf"
    ends = []
    for what, data in mutations(whole.read_bytes(), 200, seed=2):
        path.write_bytes(data)
        with contextlib.suppress(UserError):
            check_model(path, read_header(path))
            ends.append((what, outcome(path)))
        if len(ends) == 4:
            break
    assert len(ends) == 4
    assert all(end.split()[0] in ("refused", "converted") for _, end in ends), ends


def test_the_harness_sees_a_traceback_a_hang_and_a_death(
    whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control."""
    import os
    import signal

    import gguf_mutations

    from goldenlayers import models

    def ending(act: Callable[[], object]) -> str:
        monkeypatch.setattr(models, "locate", lambda *_, **__: act())
        return outcome(whole).split()[0]

    monkeypatch.setattr(gguf_mutations, "SECONDS", 1)
    assert ending(lambda: {}["x"]) == "traceback"
    assert ending(lambda: bytearray(1 << 40)) == "traceback"
    assert ending(lambda: next(i for i in iter(int, 1) if i)) == "hung"  # counts for ever
    assert ending(lambda: os.kill(os.getpid(), signal.SIGKILL)) == "killed"


def test_fields_cover_the_header(whole: Path) -> None:
    plan = layout(whole.read_bytes())
    kinds = {field.what for field in plan.fields}
    assert {"magic", "item count", "dimension count", "tensor offset", "value"} <= kinds
    assert Field(4, 4, "version") in plan.fields
    assert len(plan.entries) == len(read_header(whole).values) + len(read_header(whole).tensors)


def test_an_adapter_beside_the_file_is_not_applied_and_nothing_is_fetched(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil
    import socket

    from goldenlayers import models

    def no_network(*_: object, **__: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    place = tmp_path / "place"
    place.mkdir()
    path = Path(shutil.copy(whole, place))
    (place / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/name"}')
    (place / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["a.B", "a.B"]}}')
    said: list[str] = []
    model = models.load(path, cache_dir=tmp_path / "cache", progress=said.append)
    assert model.n_layers == 4
