"""Damaged GGUF files made from a whole one, the same for the same seed.

Kinds: a field of the header set to a telling number, flipped bytes, a cut, bytes put in or taken
out, an entry left out or doubled. As a program it feeds them to the whole conversion, each in a
process of its own with limits on time and memory, and counts how they end:

    python tests/gguf_mutations.py --cases 2000 --seed 0
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import resource
import signal
import struct
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

_WIDTH = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_TELLING = (
    *(0, 1, 2, 3, 5, 7, 8, 9, 13, 31, 33, 255, 65_535, 300_000),
    *(2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**60, 2**61, 2**63 - 1, 2**63, 2**64 - 1),
)
SECONDS, MEMORY = 20, 6 << 30  # of the processor, in bytes


@dataclass(frozen=True)
class Field:
    """A number in the header: where it stands, how many bytes it has, and what it is."""

    offset: int
    width: int
    what: str


@dataclass(frozen=True)
class Layout:
    """Fields of a whole file, spans of its entries, and where its header ends."""

    fields: tuple[Field, ...]
    entries: tuple[tuple[int, int], ...]
    end: int


def layout(data: bytes) -> Layout:
    """Walk through a whole file's header."""
    fields: list[Field] = []
    entries: list[tuple[int, int]] = []
    place = 0

    def number(width: int, what: str) -> int:
        nonlocal place
        fields.append(Field(place, width, what))
        place += width
        return int.from_bytes(data[place - width : place], "little")

    def text(what: str) -> None:
        nonlocal place
        length = number(8, f"length of {what}")
        place += length

    def value(kind: int) -> None:
        nonlocal place
        if kind == 8:
            text("string")
        elif kind == 9:
            item, count = number(4, "item type"), number(8, "item count")
            if item == 8:
                for _ in range(count):
                    text("item")
            else:
                place += _WIDTH[item] * count
        else:
            number(_WIDTH[kind], "value")

    number(4, "magic")
    number(4, "version")
    tensors, count = number(8, "tensor count"), number(8, "entry count")
    for _ in range(count):
        start = place
        text("key")
        value(number(4, "type"))
        entries.append((start, place))
    for _ in range(tensors):
        start = place
        text("tensor name")
        for _ in range(number(4, "dimension count")):
            number(8, "dimension")
        number(4, "tensor type")
        number(8, "tensor offset")
        entries.append((start, place))
    return Layout(tuple(fields), tuple(entries), place)


def mutations(data: bytes, cases: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """``cases`` damaged files, each with words for what was done to it."""
    chance = random.Random(seed)
    plan = layout(data)
    # The lengths of the vocabulary's words are alike: keep enough of them, not all.
    few = [f for f in plan.fields if f.what == "length of item"]
    rest = [f for f in plan.fields if f.what != "length of item"]
    fields = rest + chance.sample(few, min(len(few), 20))

    def field() -> tuple[str, bytes]:
        one = chance.choice(fields)
        number = chance.choice(_TELLING) % (1 << 8 * one.width)
        return f"{one.what} at {one.offset} is {number}", _put(data, one, number)

    def flip() -> tuple[str, bytes]:
        changed = bytearray(data)
        places = [chance.randrange(plan.end) for _ in range(chance.choice((1, 1, 2, 8)))]
        for place in places:
            changed[place] ^= 1 << chance.randrange(8)
        return f"flipped at {places}", bytes(changed)

    def cut() -> tuple[str, bytes]:
        end = chance.choice((chance.randrange(plan.end), chance.randrange(len(data))))
        return f"cut at {end}", data[:end]

    def shift() -> tuple[str, bytes]:
        place, size = chance.randrange(plan.end), chance.randrange(1, 20)
        if chance.random() < 0.5:
            return f"{size} bytes taken out at {place}", data[:place] + data[place + size :]
        return f"{size} bytes put in at {place}", data[:place] + chance.randbytes(size) + data[
            place:
        ]

    def entry() -> tuple[str, bytes]:
        start, end = chance.choice(plan.entries)
        in_table = plan.entries.index((start, end)) >= _number(data, 16)
        count = Field(8 if in_table else 16, 8, "count")
        more = chance.choice((-1, 1))
        body = data[:start] + (data[start:end] * 2 if more > 0 else b"") + data[end:]
        return (
            f"entry at {start} {'doubled' if more > 0 else 'left out'}",
            _put(body, count, _number(body, count.offset) + more),
        )

    kinds: list[Callable[[], tuple[str, bytes]]] = [field, field, field, flip, cut, shift, entry]
    for _ in range(cases):
        yield chance.choice(kinds)()


def _number(data: bytes, offset: int) -> int:
    return struct.unpack_from("<Q", data, offset)[0]


def _put(data: bytes, field: Field, number: int) -> bytes:
    place = slice(field.offset, field.offset + field.width)
    changed = bytearray(data)
    changed[place] = number.to_bytes(field.width, "little")
    return bytes(changed)


def outcome(path: Path) -> str:
    """How ``models.locate`` ends on a file, in a process with limits: "refused", "converted", …"""
    from goldenlayers import models
    from goldenlayers.errors import UserError

    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 5))
            signal.alarm(6 * SECONDS)  # of the clock: a busy machine is no hang
            silence = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silence, 1)
            os.dup2(silence, 2)
            with tempfile.TemporaryDirectory() as cache:
                try:
                    models.locate(path, cache_dir=cache, progress=lambda _: None)
                    said = "converted"
                except UserError as error:
                    said = f"refused {error}"
                except BaseException as error:
                    frames = traceback.extract_tb(error.__traceback__)[-2:]
                    where = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in frames)
                    said = f"traceback {type(error).__name__}: {str(error)[:150]} ({where})"
            os.write(writer, said.encode(errors="replace")[:4000])
        finally:
            os._exit(0)
    os.close(writer)
    said = b""
    while piece := os.read(reader, 4096):
        said += piece
    os.close(reader)
    _, status = os.waitpid(child, 0)
    if said:
        return said.decode(errors="replace")
    ended = os.WTERMSIG(status)
    return "hung" if ended in (signal.SIGALRM, signal.SIGXCPU) else f"killed by {ended}"


def main() -> None:
    """Count the ends of many damaged files."""
    options = argparse.ArgumentParser()
    options.add_argument("--cases", type=int, default=500)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--show", default="traceback hung killed", help="ends to print")
    given = options.parse_args()
    sys.path.insert(0, str(Path(__file__).parent))
    from families import build
    from gguf_built import write_llama_gguf
    from tokenizers_built import byte_level_bpe

    import goldenlayers.models.loading  # noqa: F401  (once, before the forks)

    ends: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as place, contextlib.suppress(KeyboardInterrupt):
        whole = write_llama_gguf(Path(place, "whole.gguf"), build("llama"), byte_level_bpe())
        first = outcome(whole)
        if first != "converted":
            raise SystemExit(f"the whole file: {first}")
        path = Path(place, "damaged.gguf")
        for what, data in mutations(whole.read_bytes(), given.cases, given.seed):
            path.write_bytes(data)
            end = outcome(path)
            kind = end.split()[0]
            ends[kind] += 1
            if kind in given.show.split():
                print(f"{what}: {end[:400]}", flush=True)
    print(f"{sum(ends.values())} cases, seed {given.seed}: {dict(ends)}")


if __name__ == "__main__":
    main()
