"""What goes wrong in the middle of a command loses nothing, and nothing half looks whole.

Every command is killed, interrupted, or refused a file by the system, at points all over its run;
then the same command is run again. Afterwards its folder must hold what an undisturbed run wrote,
and nothing may be left beside it. A few points of each command are tried here;
``make test-faults`` tries many (GOLDENLAYERS_FAULTS, cases per test) and prints the counts.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import save, tiny
from faults import End, Server
from gguf_built import write_llama_gguf
from safetensors.torch import load_file
from sweep_helpers import some_facts
from tokenizers_built import byte_level_bpe

CASES = int(os.environ.get("GOLDENLAYERS_FAULTS", "1"))  # per test
QUICK = ("--statistics", "none", "--set", "steps", "2", "prefixes", "0")

# What differs from run to run: times, memory, places. The log is not compared at all.
_VARIES = {"seconds", "seconds_per_cell", "peak_memory_bytes", "out", "settings", "cost", "times"}
_COUNTS: Counter[str] = Counter()


class Place:
    """A folder with a model, facts, and an undisturbed run of every command in ``whole/NAME``."""

    def __init__(self, folder: Path, server: Server) -> None:
        self.folder, self.server = folder, server
        model = tiny("llama")
        save(model, folder / "model")
        tokenizer = byte_level_bpe()
        write_llama_gguf(folder / "tiny.gguf", model.hf, tokenizer)
        facts = "".join(json.dumps(_row(fact)) + "\n" for fact in some_facts(4))
        (folder / "facts.jsonl").write_text(facts)
        (folder / "text.txt").write_text("The river of Italy is long and the capital is old. " * 40)
        self.operations: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        for name in COMMANDS:
            _fresh(self.cache(name))
            start = time.perf_counter()
            end = self.run(name, folder / "whole" / name)
            self.seconds[name] = time.perf_counter() - start
            assert end.status == 0, (name, end.err)
            assert end.operations is not None
            self.operations[name] = end.operations

    def cache(self, name: str) -> Path:
        """The cache of a command that fills one; a fresh copy of nothing for each case."""
        return self.folder / "cache" / name

    def run(self, name: str, out: Path, fault: dict[str, Any] | None = None) -> End:
        return self.server.run(*COMMANDS[name](self, out), fault=fault)


def _fresh(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _row(fact: Any) -> dict[str, Any]:
    row = {
        "id": fact.id,
        "subject": fact.subject,
        "prompt": fact.prompt,
        "target_new": fact.target,
        "target_old": fact.target_old,
        "rephrasings": list(fact.rephrasings),
        "locality": [{"prompt": p.prompt, "answer": p.answer} for p in fact.locality],
    }
    return {key: value for key, value in row.items() if value}


def _common(place: Place, name: str, out: Path, *, model: str = "model") -> list[object]:
    return [place.folder / model, "--cache-dir", place.cache(name), "--out", out]


COMMANDS: dict[str, Callable[[Place, Path], list[object]]] = {
    "locate": lambda p, out: [
        *("locate", *_common(p, "locate", out), p.folder / "facts.jsonl", "--bootstrap", 20),
        *("--batch-size", 2),
    ],
    "transfer": lambda p, out: [
        *("locate", *_common(p, "transfer", out), p.folder / "facts.jsonl", "--method", "transfer"),
        *("--statistics", p.folder / "text.txt", "--bootstrap", 20),
    ],
    "gguf": lambda p, out: [
        *("locate", *_common(p, "gguf", out, model="tiny.gguf"), p.folder / "facts.jsonl"),
        *("--bootstrap", 20),
    ],
    "race": lambda p, out: [
        *("locate", *_common(p, "race", out), p.folder / "facts.jsonl", "--method", "race"),
        *("--set", "edits", 24, "--editor-set", "steps", 2, "--editor", "ft-m"),
    ],
    "edit": lambda p, out: [
        *("edit", *_common(p, "edit", out), "--facts", p.folder / "facts.jsonl", "--layer", 1),
        *QUICK,
    ],
    "evaluate": lambda p, out: [
        *("evaluate", *_common(p, "evaluate", out), p.folder / "facts.jsonl", "--method", "rome"),
        *("--layer", 1, *QUICK),
    ],
    "sequential": lambda p, out: [
        *("evaluate", *_common(p, "sequential", out), p.folder / "facts.jsonl", "--layer", 1),
        *("--method", "alphaedit", "--mode", "sequential", "--statistics", p.folder / "text.txt"),
        *("--set", "steps", 2, "prefixes", 0),
    ],
    "sweep": lambda p, out: [
        *("sweep", *_common(p, "sweep", out), p.folder / "facts.jsonl", "--method", "rome"),
        *("--layers", "0-2", "--chunk", 2, *QUICK),
    ],
    "compare": lambda p, out: [
        *("compare", p.folder / "whole" / "sweep", "--with", p.folder / "whole" / "locate"),
        *("--allow-overlap", "--repeats", 3, "--sizes", 2, "--out", out),
    ],
    "run": lambda p, out: ["run", p.folder / "whole" / "edit", "--out", out],
    "peft": lambda p, out: [
        *("export", p.folder / "whole" / "edit", "--model", p.folder / "model"),
        *("--to", "peft", "--out", out),
    ],
    "merged": lambda p, out: [
        *("export", p.folder / "whole" / "edit", "--model", p.folder / "model"),
        *("--to", "merged", "--out", out),
    ],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("faults")
    with Server(folder) as server:
        yield Place(folder, server)
    if _COUNTS:
        width = max(map(len, _COUNTS))
        print("\n" + "\n".join(f"{name:<{width}} {n:6}" for name, n in sorted(_COUNTS.items())))


def share(part: int) -> list[str]:
    """The commands that a kind of fault is tried on: of the two halves one in the usual tests, so
    that each command meets half of the kinds there, and all of them where more cases are asked for.
    """
    return list(COMMANDS) if CASES > 1 else list(COMMANDS)[part::2]


def _content(path: Path) -> Any:
    """What a file says, without what differs from run to run."""
    if path.suffix == ".safetensors":
        return load_file(path)
    if path.suffix in (".png", ".svg", ".txt", ".md") or path.name == "times.jsonl":
        return path.stat().st_size > 0
    if path.suffix == ".jsonl":
        rows = [_lasting(json.loads(line)) for line in path.read_text().splitlines()]
        return sorted(rows, key=lambda row: json.dumps(row, default=str, sort_keys=True)[:200])
    if path.suffix == ".json":
        return _lasting(json.loads(path.read_text()))
    return path.stat().st_size > 0


def _lasting(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if k not in _VARIES and not k.startswith("check")}
        return {key: _lasting(item) for key, item in kept.items()}
    return [_lasting(item) for item in value] if isinstance(value, list) else value


def _alike(left: Any, right: Any) -> bool:
    """Equal, numbers to within what another order of adding up changes."""
    if isinstance(left, torch.Tensor):
        return bool(torch.allclose(left.float(), right.float(), rtol=1e-3, atol=1e-5))
    if isinstance(left, float) and isinstance(right, float | int):
        return left == pytest.approx(right, rel=1e-3, abs=1e-4)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(_alike(left[k], right[k]) for k in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(_alike, left, right))
    return left == right


def _check_whole(place: Place, name: str, out: Path) -> None:
    """``out`` holds what the undisturbed run wrote, and nothing is left beside it."""
    whole = place.folder / "whole" / name
    names = sorted(p.name for p in whole.iterdir())
    assert sorted(p.name for p in out.iterdir()) == names
    for file in names:
        assert _alike(_content(out / file), _content(whole / file)), file
    assert [p.name for p in out.parent.iterdir()] == [out.name]


def _disturbed(place: Place, name: str, out: Path, fault: dict[str, Any]) -> End:
    """Run with the fault; whatever stands at ``out`` afterwards is whole."""
    _fresh(place.cache(name))
    end = place.run(name, out, fault)
    _COUNTS[f"{name}: {fault.get('do', 'file too large')}, status {end.status}"] += 1
    assert "Traceback" not in end.err and end.status != "hangs", (fault, end)
    if fault.get("do") in ("INT", "TERM") and end.operations is None:
        assert end.status != 0, (fault, end)
    return end


def _again(place: Place, name: str, out: Path, end: End) -> None:
    """The same command once more, if it has not come to its end; then all is as it should be."""
    # A finished folder may stand though the command was killed: right after the last rename.
    if not out.exists():
        second = place.run(name, out)
        assert second.status == 0, (end, second)
    _check_whole(place, name, out)


def _meant(name: str, what: str) -> str:
    """The fault; but Ctrl-C ends a race on purpose, with what is known by then."""
    return "KILL" if name == "race" and what == "INT" else what


def _case(place: Place, test: str, name: str, i: int) -> Path:
    return place.folder / test / name / str(i) / "out"


@pytest.mark.parametrize("name", share(0))
def test_a_command_cut_short_at_any_file_can_be_run_again(place: Place, name: str):
    rng = random.Random(f"cut/{name}")
    for i in range(CASES):
        out = _case(place, "cut", name, i)
        what = ("KILL", "ENOSPC", "INT", "KILL", "TERM", "EIO")[rng.randrange(6)]
        what = _meant(name, what)
        fault = {"at": rng.randint(1, place.operations[name]), "do": what}
        _again(place, name, out, _disturbed(place, name, out, fault))


@pytest.mark.parametrize("name", share(1))
def test_a_command_cut_short_at_any_time_can_be_run_again(place: Place, name: str):
    rng = random.Random(f"time/{name}")
    for i in range(CASES):
        out = _case(place, "time", name, i)
        after, what = rng.random() * place.seconds[name], rng.choice(["KILL", "INT"])
        fault = {"after": after, "do": _meant(name, what)}
        _again(place, name, out, _disturbed(place, name, out, fault))


@pytest.mark.parametrize("name", share(0))
def test_a_disk_that_fills_up_in_the_middle_of_a_file(place: Place, name: str):
    rng = random.Random(f"full/{name}")
    for i in range(CASES):
        out = _case(place, "full", name, i)
        fault = {"file_bytes": int(10 ** rng.uniform(1, 5.5))}
        end = _disturbed(place, name, out, fault)
        if end.status == 0:  # a picture that cannot be drawn costs no result
            lost = {p.name for p in (place.folder / "whole" / name).iterdir()}
            lost -= {p.name for p in out.iterdir()}
            assert all(file.endswith((".svg", ".png")) for file in lost), lost
        else:
            assert end.status == 2 and "be written" in end.err, end
            _again(place, name, out, end)


@pytest.mark.parametrize("name", share(1))
def test_two_at_once_in_one_folder(place: Place, name: str):
    for i in range(max(1, CASES // 4)):
        out = _case(place, "two", name, i)
        _fresh(place.cache(name))
        ends = place.server.together([COMMANDS[name](place, out)] * 2)
        for end in ends:
            _COUNTS[f"two at once, {name}: status {end.status}"] += 1
            assert end.status in (0, 2) and "Traceback" not in end.err, end
        assert any(end.status == 0 for end in ends), ends
        _check_whole(place, name, out)


# A finished folder, and the commands that read it.
READERS: dict[str, tuple[str, Callable[[Place, Path, Path], list[object]]]] = {
    "ask": (
        "edit",
        lambda p, run, out: [
            *("ask", p.folder / "model", "The capital of France is", "--delta", run, "--tokens", 3)
        ],
    ),
    "export": (
        "edit",
        lambda p, run, out: ["export", run, "--model", p.folder / "model", "--out", out],
    ),
    "evaluate": (
        "edit",
        lambda p, run, out: [
            *(
                "evaluate",
                p.folder / "model",
                p.folder / "facts.jsonl",
                "--delta",
                run,
                "--out",
                out,
            )
        ],
    ),
    "compare a sweep": (
        "sweep",
        lambda p, run, out: ["compare", run, "--repeats", 2, "--sizes", 2, "--out", out],
    ),
    "compare a ranking": (
        "locate",
        lambda p, run, out: [
            *("compare", p.folder / "whole" / "sweep", "--with", run, "--allow-overlap"),
            *("--repeats", 2, "--sizes", 2, "--out", out),
        ],
    ),
    "repeat": ("evaluate", lambda p, run, out: ["run", run, "--out", out]),
    "see a sweep": ("sweep", lambda p, run, out: COMMANDS["sweep"](p, run)),
}
# What a reader of these must notice, whatever bit of them is damaged.
GUARDED = {"ask", "export", "evaluate"}


def _damage(path: Path, rng: random.Random) -> str:
    """Damage a file in one of the ways that disks, kills and people do."""
    data = bytearray(path.read_bytes())
    how = rng.choice(["flip", "flip", "cut", "zeros", "empty", "more", "gone"])
    if how == "gone" or not data:
        path.unlink()
    elif how == "flip":
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif how == "cut":
        del data[rng.randrange(len(data)) :]
    elif how == "zeros":
        start = rng.randrange(len(data))
        data[start : start + 64] = bytes(len(data[start : start + 64]))
    elif how == "empty":
        data.clear()
    else:
        data += rng.randbytes(rng.randint(1, 40))
    if path.exists():
        path.write_bytes(data)
    return how


@pytest.mark.parametrize("name", READERS)
def test_a_damaged_folder_is_told_or_makes_no_difference(place: Place, name: str):
    rng = random.Random(f"damage/{name}")
    made, command = READERS[name]
    run = place.folder / "damaged" / name.replace(" ", "-") / "run"
    shutil.copytree(place.folder / "whole" / made, run)
    pristine = place.server.run(*command(place, run, run.with_name("pristine")))
    assert pristine.status == 0, pristine
    good = _result(run.with_name("pristine"), pristine)
    for i in range(3 * CASES):
        shutil.rmtree(run)
        shutil.copytree(place.folder / "whole" / made, run)
        damaged = rng.choice([p for p in run.iterdir() if p.suffix not in (".png", ".svg", ".txt")])
        how = _damage(damaged, rng)
        out = run.with_name(str(i))
        end = place.server.run(*command(place, run, out))
        same = end.status == 0 and _alike(_result(out, end), good)
        told = "told" if end.status == 2 else "no difference" if same else "UNNOTICED"
        _COUNTS[f"damage, {name}: {told}"] += 1
        assert not end.crashed and end.status in (0, 2), (damaged.name, how, end)
        assert told != "UNNOTICED" or name not in GUARDED, (damaged.name, how, end)


def _result(out: Path, end: End) -> Any:
    """What a reader made of a folder."""
    if not out.exists():
        return end.out
    return {p.name: _content(p) for p in sorted(out.iterdir()) if p.name != "config.yaml"}
