"""The facts of a study's cell, and the layer choices that are judged in it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cells import DATA, ROOT

from goldenlayers.comparing import LocateRun
from goldenlayers.datasets import load_facts
from goldenlayers.facts import Fact
from goldenlayers.locating import locate
from goldenlayers.locating.known import known_facts
from goldenlayers.locating.ranking import LayerRanking
from goldenlayers.models.model import Model
from goldenlayers.progress import Progress

ROWS = ROOT / "runs" / "study"
TEST, PROXY, WIDE, TRACED = 10, 100, 300, 8
# Method, settings of locate, and how many of the proxy facts.
RUNS: tuple[tuple[str, dict[str, Any], int], ...] = (
    ("lga", {}, PROXY),
    ("lga", {"loss": "answer"}, PROXY),
    ("lga", {"scope": "down"}, PROXY),
    ("lga", {"scope": "attention"}, PROXY),
    ("lga", {"scope": "block"}, PROXY),
    ("transfer", {}, PROXY),
    ("transfer", {"reach": True}, PROXY),
    ("transfer", {"align": True}, PROXY),
    ("saliency", {}, PROXY),
    ("cma", {}, TRACED),
)
# These are also asked what more proxy facts would have brought.
WIDER: tuple[tuple[str, dict[str, Any]], ...] = (
    ("lga", {}),
    ("transfer", {}),
)


@dataclass(frozen=True)
class Facts:
    """Test and proxy facts about different subjects; ``known`` are proxy facts for tracing.

    ``more`` are further proxy facts, for the curves over their number alone.
    """

    test: list[Fact]
    proxy: list[Fact]
    known: list[Fact]
    more: list[Fact]


def draw(model: Model, data: str, shared: Path) -> Facts:
    """Starter facts are those that the model knows; of the other sets any fact will do."""
    source = DATA[data] if data == "starter" else str(shared / DATA[data])
    drawn = list(load_facts(source, limit=600, seed=0, skip_invalid=True))
    if data == "starter":
        drawn = known_facts(model, drawn)
    # Fewer kinds of probes make another Overall: the facts with the most kinds come first.
    drawn.sort(key=lambda f: -(bool(f.rephrasings) + bool(f.locality) + bool(f.portability)))
    subjects: set[str] = set()
    distinct = []
    for fact in drawn:
        if fact.subject.casefold() not in subjects:
            subjects.add(fact.subject.casefold())
            distinct.append(fact)
    test, rest = distinct[:TEST], distinct[TEST:]
    proxy = rest[:PROXY]
    known = proxy if data == "starter" else known_facts(model, rest)
    return Facts(test, proxy, known[:TRACED], rest[PROXY:WIDE])


def located(model: Model, data: str, facts: Facts, statistics: Any) -> list[LocateRun]:
    """The layer choices on the proxy facts; kept, so that a second call is quick."""
    runs = []
    for method, settings, count in RUNS:
        chosen = facts.known if method == "cma" else facts.proxy[:count]
        if chosen:
            runs.append(_run(model, data, method, settings, chosen, statistics))
    return runs


def wider(
    model: Model, data: str, facts: Facts, statistics: Any, runs: list[LocateRun]
) -> list[LocateRun]:
    """Runs of WIDER with the rows of further proxy facts; their rankings are of the first ones."""
    found = []
    for method, settings in WIDER:
        name = name_of(model.name, data, method, settings)
        first = next(run for run in runs if run.run == name)
        more = _run(model, data, method, settings, facts.more, statistics, "-more")
        rows = sorted([*first.rows, *more.rows], key=lambda row: str(row["fact"]))
        found.append(LocateRun(name, first.ranking, rows, settings))
    return found


def name_of(model: str, data: str, method: str, settings: dict[str, Any]) -> str:
    """A run's name, also that of its file."""
    return "-".join([model, data, method, *(f"{k}-{v}" for k, v in settings.items())])


def _run(
    model: Model,
    data: str,
    method: str,
    settings: dict[str, Any],
    facts: list[Fact],
    statistics: Any,
    suffix: str = "",
) -> LocateRun:
    name = name_of(model.name, data, method, settings)
    path = ROWS / f"{name}{suffix}.json"
    if path.exists():
        record = json.loads(path.read_text(encoding="utf-8"))
    else:
        rows: list[dict[str, Any]] = []
        extra: dict[str, Any] = {}
        if method == "transfer":
            extra = {"statistics": statistics}
        progress = Progress(on_rows=rows.extend)
        ranking = locate(model, facts, method, progress=progress, **extra, **settings)
        record = {"ranking": ranking.to_json(), "rows": rows}
        write(path, record)
        print(f"  {name}{suffix}: {ranking.candidates} {ranking.seconds:.0f} s", flush=True)
    rows = sorted(record["rows"], key=lambda row: str(row["fact"]))
    return LocateRun(name, LayerRanking.from_json(record["ranking"]), rows, settings)


def write(path: Path, record: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(rounded(record)) + "\n", encoding="utf-8")
    part.replace(path)


def rounded(value: Any) -> Any:
    """Numbers to six digits: a cell is to be small."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, list) else value
