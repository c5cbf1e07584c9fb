"""What the sweep's tests share, importable by the processes that they start."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from families import tiny

from goldenlayers.editors import Editor, Rome, make_editor
from goldenlayers.facts import Fact, Probe
from goldenlayers.models import Model

FAST: dict[str, Any] = {"steps": 3, "prefixes": 1, "prefix_tokens": 4}


def fast(method: str) -> Editor:
    """An editor with those of ``FAST`` that it has."""
    own = {f.name for f in dataclasses.fields(make_editor(method))}
    return make_editor(method, **{name: value for name, value in FAST.items() if name in own})


@dataclass(frozen=True, kw_only=True)
class Ours(Rome):
    """An editor that is no part of the package."""

    name = "ours"


_PLACES = (
    ("France", "Paris", "Rome"),
    ("Italy", "Rome", "Ulm"),
    ("Brazil", "Brasilia", "Lima"),
    ("Japan", "Tokyo", "Apple"),
    ("China", "Beijing", "Paris"),
    ("California", "Sacramento", "Shanghai"),
)


def some_facts(count: int = 3) -> list[Fact]:
    """Short facts with all kinds of probes; the second has no portability probes."""
    return [
        Fact(
            id=f"f{i}",
            subject=place,
            prompt=f"The capital of {place} is",
            target=new,
            target_old=old,
            rephrasings=(f"{place} has the capital",),
            locality=(
                Probe(f"The river of {_PLACES[i - 1][0]} is", "the Po"),
                Probe("The chemical symbol of gold is", "Au", kind="other"),
            ),
            portability=() if i == 1 else (Probe(f"The mayor of {place} lives in", new),),
        )
        for i, (place, old, new) in enumerate(_PLACES[:count])
    ]


def write_plain(path: Path, facts: Iterable[Fact]) -> None:
    """Facts without their probes, as JSON lines."""
    names = ("id", "subject", "prompt", "target_new", "target_old", "rephrasings")
    rows = [{name: getattr(fact, name.removesuffix("_new")) for name in names} for fact in facts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def load_tiny() -> Model:
    return tiny("llama")


def load_other() -> Model:
    return tiny("llama", seed=1)


@dataclass(frozen=True)
class DiesOnce:
    """Loads the tiny model; the first worker to do so is killed in the middle of its 2nd task."""

    flag: Path

    def __call__(self) -> Model:
        from goldenlayers.evaluation.plan import EvaluationPlan

        try:
            os.close(os.open(self.flag, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return load_tiny()
        score, calls = EvaluationPlan.score, []

        def deadly(self: EvaluationPlan, *args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            if len(calls) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return score(self, *args, **kwargs)

        EvaluationPlan.score = deadly
        return load_tiny()


def canonical(rows: Iterable[Mapping[str, Any]]) -> list[tuple[Any, ...]]:
    """Rows in an order of their own; what is there twice stays there twice."""
    found = [
        (r["fact"], r["layer"], r["metric"], str(r["probe"]), r.get("kind", ""), r["score"])
        for r in rows
    ]
    return sorted(found, key=lambda row: row[:-1])
