"""Damaged deltas by the thousand: what is loaded is what was saved, or a ``UserError`` is raised.

``python tests/delta_damage.py 4000`` prints how often each outcome was met; the suite runs a few
hundred. Damage: bytes flipped, cut, doubled and inserted in either file, and records that are
whole JSON with fields changed, removed, nested or swapped.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from goldenlayers.delta import Dense, LowRank, WeightDelta
from goldenlayers.errors import UserError

TENSORS, RECORD, FORMAT = "delta.safetensors", "delta.json", "goldenlayers.delta"
DEEP = "[" * 100_000 + "]" * 100_000
ODD: list[Any] = [
    None, True, False, -1, 0, 1, 2, 3, 1 << 70, 0.5, -0.0, 1e308, "", "x", "x" * 5000, "nul\0",
    "half \ud800", "\x1b[2J", [], {}, [1], ["x"], [[]], [None], {"x": 1}, [{"id": 1}], [True],
    [{"subject": ["a"]}], {"a.weight": {}}, {"a.weight": {"kind": "dense", "shape": [1, 1]}},
]  # fmt: skip
DTYPES = (torch.int32, torch.float16, torch.bool, torch.float64, torch.float8_e4m3fn)


def saved(folder: Path) -> WeightDelta:
    """A small delta with everything in it, on disk."""
    generator = torch.Generator().manual_seed(0)

    def matrix(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    delta = WeightDelta(
        {
            "model.layers.1.mlp.down_proj.weight": LowRank(matrix(6, 2), matrix(9, 2)),
            "model.layers.2.mlp.down_proj.weight": Dense(matrix(4, 5)),
        },
        base_fingerprint="f" * 64,
        base_name="tiny",
        method="rome",
        layers=(1, 2),
        facts=({"id": "1", "subject": "Zoë", "prompt": "Zoë's tongue is", "target": "French"},),
        settings={"steps": 20, "lr": 0.5, "parts": [{"method": "rome"}, {"scale": 2.0}]},
    )
    delta.save(folder)
    return delta


def content(delta: WeightDelta) -> Any:
    """Everything a delta says and does, to be compared."""
    tensors = {
        name: [
            (str(part.dtype), part.tolist())
            for part in (
                (change.left, change.right) if isinstance(change, LowRank) else (change.value,)
            )
        ]
        for name, change in delta.changes.items()
    }
    told = {
        name: value
        for name, value in vars(delta).items()
        if name not in ("changes", "settings", "facts")
    }
    told |= {"settings": dict(delta.settings), "facts": [dict(fact) for fact in delta.facts]}
    return json.dumps([tensors, told], sort_keys=True, default=str)


def damage(folder: Path, rng: random.Random) -> str:
    """Damage the delta in ``folder`` in one way; says which."""
    ways = [_bytes, _bytes, _record, _record, _record, _both, _deep, _retyped]
    way = rng.choice(ways)
    way(folder, rng)
    return way.__name__.strip("_")


def _bytes(folder: Path, rng: random.Random) -> None:
    file = folder / rng.choice([TENSORS, TENSORS, RECORD])
    if file.name == TENSORS and rng.random() < 0.5:
        (folder / RECORD).unlink()
    data = bytearray(file.read_bytes())
    place = rng.randrange(len(data))
    kind = rng.choice(["flip", "flip", "byte", "cut", "double", "insert", "zero"])
    if kind == "flip":
        data[place] ^= 1 << rng.randrange(8)
    elif kind == "byte":
        data[place] = rng.randrange(256)
    elif kind == "cut":
        del data[place:]
    elif kind == "double":
        data[place:place] = data[: rng.randrange(1, 64)]
    elif kind == "insert":
        data[place:place] = rng.randbytes(rng.randrange(1, 9))
    else:
        data[place : place + 64] = bytes(len(data[place : place + 64]))
    file.write_bytes(data)


def _mutated(value: Any, rng: random.Random) -> Any:
    """``value`` changed in one place."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        made = dict(value)
        chance = rng.random()
        if chance < 0.1:
            del made[key]
        elif chance < 0.2:
            made[rng.choice(["x", key + "x", "", "model.norm.weight"])] = made.pop(key)
        else:
            made[key] = _mutated(value[key], rng)
        return made
    if isinstance(value, list) and value and rng.random() < 0.6:
        place = rng.randrange(len(value))
        return [*value[:place], _mutated(value[place], rng), *value[place + 1 :]]
    if isinstance(value, str) and value and rng.random() < 0.5:
        place = rng.randrange(len(value))
        return value[:place] + rng.choice("aZ0 \n") + value[place + 1 :]
    if isinstance(value, int | float) and rng.random() < 0.5:
        return value + rng.choice([1, -1, 0.5])
    return rng.choice(ODD)


def _changed_record(folder: Path, rng: random.Random, text: str | None = None) -> str:
    file = folder / TENSORS
    with safe_open(str(file), framework="pt") as stream:
        record = json.loads(stream.metadata()[FORMAT])
    if text is None:
        text = json.dumps(_mutated(record, rng))
    save_file(load_file(file), file, {FORMAT: text})
    return text


def _record(folder: Path, rng: random.Random) -> None:
    _changed_record(folder, rng)
    (folder / RECORD).unlink()


def _both(folder: Path, rng: random.Random) -> None:
    text = _changed_record(folder, rng)
    (folder / RECORD).write_text(text, encoding="utf-8", errors="surrogatepass")


def _deep(folder: Path, rng: random.Random) -> None:
    text = rng.choice([DEEP, '{"schema": 1, "settings": ' + DEEP + "}"])
    if rng.random() < 0.5:
        (folder / RECORD).write_text(text)
    else:
        _changed_record(folder, rng, text)
        (folder / RECORD).unlink()


def _retyped(folder: Path, rng: random.Random) -> None:
    file = folder / TENSORS
    with safe_open(str(file), framework="pt") as stream:
        metadata = stream.metadata()
    held = load_file(file)
    name = rng.choice(list(held))
    held[name] = rng.choice(
        [
            held[name].to(rng.choice(DTYPES)),
            held[name].T.contiguous(),
            held[name].flatten(),
            held[name] * torch.nan,
            held[name] + 1,
        ]
    )
    save_file(held, file, metadata)


def outcomes(count: int, seed: int = 0) -> dict[str, Counter[str]]:
    """What became of ``count`` damaged deltas, by the kind of damage.

    "refused": a UserError. "same": loaded with all that was saved. "other": loaded as something
    else. Anything else is the name of an exception.
    """
    rng = random.Random(seed)
    found: dict[str, Counter[str]] = {}
    with tempfile.TemporaryDirectory() as place:
        whole, folder = Path(place, "whole"), Path(place, "damaged")
        told = content(saved(whole))
        for _ in range(count):
            shutil.copytree(whole, folder)
            kind = damage(folder, rng)
            try:
                end = "same" if content(WeightDelta.load(folder)) == told else "other"
            except UserError as error:
                str(error).encode()
                end = "refused" if len(str(error)) < 2000 else "long"
            except Exception as error:
                end = type(error).__name__
            found.setdefault(kind, Counter())[end] += 1
            shutil.rmtree(folder)
    return found


if __name__ == "__main__":
    for kind, ends in sorted(outcomes(int(sys.argv[1])).items()):
        print(f"{kind:8}", dict(ends.most_common()))
