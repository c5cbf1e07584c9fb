"""Run folders damaged at random, and what the commands that read them make of it.

``python tests/run_mutations.py PLACE [COUNT]`` prints counts for more cases than the tests try.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import random
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from comparing import L, sweep_rows, write_run
from families import tiny
from sweep_helpers import some_facts

from goldenlayers.cli import main
from goldenlayers.datasets import write_jsonl

ODD: list[Any] = [
    None, "", " ", 3, -1, 10**30, True, 0.5, [], {}, [1], [[]], ["x"], {"a": 1}, {"a": {"b": []}},
    float("nan"), float("inf"), "a\0b", "a" * 5000, "../../x", "1e5", "auto", "none",
]  # fmt: skip
ODD_TEXT = [
    b"\xff", b"\0", b"[" * 3000, b"{", b"NaN", b"1e999", b'"\\ud800"', b"9" * 5000, b"&a *a",
]  # fmt: skip


def mutated(value: Any, rng: random.Random) -> Any:
    """A copy with one node replaced, removed or added."""
    value = copy.deepcopy(value)
    places: list[tuple[Any, Any]] = []
    stack = [value]
    while stack:
        one = stack.pop()
        if isinstance(one, dict | list):
            places += [(one, key) for key in (one if isinstance(one, dict) else range(len(one)))]
            stack += one.values() if isinstance(one, dict) else one
    if not places or rng.random() < 0.03:
        return rng.choice(ODD)
    holder, key = rng.choice(places)
    chance = rng.random()
    if chance < 0.15:
        del holder[key]
    elif chance < 0.2 and isinstance(holder, dict):
        holder[rng.choice(["", "x", "seeds", "a\0b"])] = rng.choice(ODD)
    else:
        holder[key] = copy.deepcopy(rng.choice(ODD))
    return value


def damage(path: Path, rng: random.Random) -> None:
    """One file damaged: a value in it, or its bytes."""
    if rng.random() < 0.25:
        data = bytearray(path.read_bytes())
        at = rng.randrange(len(data) + 1)
        way = rng.randrange(4)
        if way == 0:
            del data[at:]
        elif way == 1 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif way == 2:
            data[at:at] = rng.choice(ODD_TEXT)
        else:
            del data[at : at + rng.randrange(1, 40)]
        path.write_bytes(bytes(data))
    elif path.suffix == ".yaml":
        record = yaml.safe_load(path.read_text())
        part = rng.choice(["settings", "settings", "settings", None])
        if part in record:
            record[part] = mutated(record[part], rng)
        else:
            record = mutated(record, rng)
        path.write_text(yaml.safe_dump(record))
    elif path.suffix == ".json":
        path.write_text(json.dumps(mutated(json.loads(path.read_text()), rng)))
    else:
        lines = path.read_text().splitlines()
        at = rng.randrange(len(lines))
        way = rng.random()
        if way < 0.2:
            lines.insert(rng.randrange(len(lines) + 1), lines[at])
        elif way < 0.3:
            del lines[at]
        else:
            lines[at] = json.dumps(mutated(json.loads(lines[at]), rng))
        path.write_text("\n".join(lines) + "\n")


def as_of_an_earlier_version(run: Path) -> None:
    """Take out what lets damage be seen at once, so that the checks behind it are tried, too."""
    config = run / "config.yaml"
    record = yaml.safe_load(config.read_text())
    kept = {name: value for name, value in record.items() if name not in ("key", "files")}
    config.write_text(yaml.safe_dump(kept))


def ending(*arguments: object) -> tuple[str, str]:
    """How a command ends: "done", "refused", "stopped" or "traceback"; and what it says."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            status = main([str(a) for a in arguments])
    except SystemExit as stop:
        status = stop.code
    except Exception as error:
        return "traceback", f"{type(error).__name__}: {error}"[:300]
    return {0: "done", 2: "refused"}.get(status, "stopped"), said.getvalue()  # type: ignore[call-overload]


# --- golden run -----------------------------------------------------------------------------------

EDIT = ("--statistics", "none", "--set", "steps", 1, "prefixes", 0)


def some_runs(place: Path) -> list[Path]:
    """A tiny model, two facts, and a finished run of each command."""
    model = tiny("llama")
    model.hf.save_pretrained(place / "model")
    model.tokenizer.save_pretrained(place / "model")
    write_jsonl(some_facts(2), place / "facts.jsonl")
    where = (place / "model", place / "facts.jsonl")
    short = ("--method", "ft-m", "--set", "steps", 1)
    runs = {
        "locate": ("locate", *where, "--method", "middle"),
        "evaluate": ("evaluate", *where, "--metrics", "rewrite"),
        "edit": ("edit", where[0], "--facts", where[1], "--layer", 1, "--mode", "sequential",
                 *short),
        "sweep": ("sweep", *where, *short, "--layers", "0-1", "--metrics", "rewrite"),
        "compare": ("compare", place / "sweep", "--sizes", 2, "--repeats", 2),
    }  # fmt: skip
    for name, arguments in runs.items():
        found = ending(*arguments, "--out", place / name)
        assert found[0] == "done", found
    return [place / name for name in runs]


def rerun(place: Path, runs: list[Path], rng: random.Random) -> tuple[str, str]:
    """``golden run`` of a damaged config."""
    case, again = place / "case", place / "again"
    for old in (case, again, place / "again.part"):
        shutil.rmtree(old, ignore_errors=True)
    case.mkdir()
    shutil.copy(rng.choice(runs) / "config.yaml", case)
    damage(case / "config.yaml", rng)
    return ending("run", case, "--out", again)


# --- golden compare -------------------------------------------------------------------------------


def some_compared(place: Path) -> None:
    """A sweep, another one, and two locate runs."""
    from test_comparing import built, lga_rows

    def sweep(name: str, seed: int) -> None:
        files = {
            "scores.jsonl": sweep_rows(seed, n_facts=4),
            "summary.json": {"method": "rome", "seconds": 3.0, "n_layers": L},
        }
        write_run(
            place, name, "sweep", files,
            settings={"seed": 0}, data={"name": "d", "sha256": name},
            model={"name": "m", "fingerprint": "f"},
        )  # fmt: skip

    sweep("one", 0)
    sweep("two", 1)
    for name, method in (("lga", "lga"), ("transfer", "transfer")):
        rows = lga_rows(n=6)
        files = {"ranking.json": built(method, rows).to_json(), "per_fact.jsonl": rows}
        write_run(
            place, name, "locate", files,
            settings={"scope": "mlp", "loss": "sequence"}, data={"name": "p", "sha256": "p"},
            model={"name": "m", "fingerprint": "f"},
        )  # fmt: skip


def compared(place: Path, rng: random.Random) -> tuple[str, str]:
    """``golden compare`` with one damaged file in one of its folders."""
    case = place / "case"
    shutil.rmtree(case, ignore_errors=True)
    case.mkdir()
    names = ("one", "two", "lga", "transfer")
    for name in names:
        shutil.copytree(place / name, case / name)
        if rng.random() < 0.7:
            as_of_an_earlier_version(case / name)
    files = [p for p in sorted(case.glob("*/*")) if p.name != "log.txt"]
    damage(rng.choice(files), rng)
    more = ("--sizes", 2, "--repeats", 2)
    return ending("compare", case / "one", "--with", *(case / n for n in names[1:]), *more)


# --- going on with an unfinished run --------------------------------------------------------------


def some_unfinished(place: Path) -> dict[str, tuple[object, ...]]:
    """Unfinished runs, with the finished ones beside them, and the commands that made them.

    The model and the facts stand in ``place`` or in the folder that it is in.
    """
    around = place if (place / "model").exists() else place.parent
    where = (around / "model", around / "facts.jsonl")
    short = ("--method", "ft-m", "--set", "steps", 1, "--metrics", "rewrite", "locality")
    commands: dict[str, tuple[object, ...]] = {
        "sweep": ("sweep", *where, "--layers", "0-1", *short),
        "evaluate": ("evaluate", *where, "--layer", 1, *short),
        "sequence": ("evaluate", *where, "--layer", 1, "--mode", "sequential", *short),
    }
    for name, arguments in commands.items():
        whole, part = place / f"{name}-whole", place / f"{name}.part"
        assert ending(*arguments, "--out", whole)[0] == "done"
        shutil.copytree(whole, part)
        record = yaml.safe_load((part / "config.yaml").read_text())
        record.pop("files", None)
        (part / "config.yaml").write_text(yaml.safe_dump(record))
        lines = (part / "scores.jsonl").read_text().splitlines(keepends=True)
        (part / "scores.jsonl").write_text("".join(lines[:-2]))
        (part / "summary.json").unlink()
    return commands


def resumed(
    place: Path, commands: dict[str, tuple[object, ...]], rng: random.Random
) -> tuple[str, str]:
    """An unfinished run with one damaged file gone on with; "wrong" if it ends otherwise."""
    name = rng.choice(sorted(commands))
    out, part = place / "case", place / "case.part"
    for old in (out, part):
        shutil.rmtree(old, ignore_errors=True)
    shutil.copytree(place / f"{name}.part", part)
    early = rng.random() < 0.3
    if early:
        as_of_an_earlier_version(part)
    files = [p for p in sorted(part.iterdir()) if p.suffix in (".yaml", ".jsonl")]
    damage(rng.choice(files), rng)
    found = ending(*commands[name], "--out", out)
    if found[0] == "done" and not early and scores(out) != scores(place / f"{name}-whole"):
        return "wrong", found[1]
    return found


def scores(run: Path) -> list[str]:
    """The rows of a finished run, sorted; their text without the check.

    What was scored right after an edit cannot be scored later: those rows are left out.
    """
    rows = [json.loads(line) for line in (run / "scores.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["metric"] != "rewrite_at_once"]
    return sorted(json.dumps({k: v for k, v in row.items() if k != "check"}) for row in rows)


Case = Callable[[random.Random], tuple[str, str]]


def counted(count: int, case: Case, seed: str) -> Counter[str]:
    """How ``count`` cases end; tracebacks are counted by their text, too."""
    rng = random.Random(seed)
    ends: Counter[str] = Counter()
    for _ in range(count):
        end, said = case(rng)
        ends[end] += 1
        if end in ("traceback", "wrong"):
            ends[f"{end}: {said[:150]}"] += 1
    return ends


if __name__ == "__main__":
    base, factor = Path(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 1.0
    base.mkdir(parents=True)
    made = some_runs(base)
    some_compared(base)
    begun = some_unfinished(base)
    for title, number, one in (
        ("golden run", 220, lambda rng: rerun(base, made, rng)),
        ("golden compare", 350, lambda rng: compared(base, rng)),
        ("gone on with", 110, lambda rng: resumed(base, begun, rng)),
    ):
        print(title, *counted(int(number * factor), one, title).most_common(), sep="\n   ")
