"""The study of docs/results/golden-layers.md: is there a golden layer, and which method finds it?

    python tools/results/study.py --model gemma3-270m --data starter
    python tools/results/study.py                     # all that is missing, the most wanted first
    python tools/results/golden_layers.py             # the page

One cell is a model, a data set and an editor: a sweep over all layers on the test facts, the layer
choices made on proxy facts (other subjects) judged by it, and the choices verified with real edits.
Its figures are kept as a small JSON in docs/results/study; a cell that is there is not computed
again, so the study can be continued on another machine. The raw rows go to runs/study (not kept).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cells import DATA, ROOT

import goldenlayers.models as models
from goldenlayers.compare import LocateRun, compare
from goldenlayers.datasets import load_facts
from goldenlayers.editors import EditSettings, editor
from goldenlayers.editors.prefixes import sample_prefixes
from goldenlayers.facts import Fact
from goldenlayers.locate import LayerRanking, locate
from goldenlayers.locate.known import known_facts
from goldenlayers.models.model import Model
from goldenlayers.statistics import key_statistics
from goldenlayers.sweep import sweep
from goldenlayers.truth import Truth, to_json
from goldenlayers.verify import best_layers, verify

STUDY = ROOT / "docs" / "results" / "study"
ROWS = ROOT / "runs" / "study"
MODELS = ("gemma3-270m", "smollm2-135m")
DATASETS = ("starter", "counterfact_500", "ZsRE-test-all", "wiki_counterfact")
METHODS = ("rome", "r-rome", "emmet", "ft-m")
# A third of the default's work per edit; the ranking of the layers is what counts here.
SETTINGS = EditSettings(steps=15, lr=0.5, prefixes=2)
TEST, PROXY, TRACED, VERIFY = 10, 100, 8, 5
SIZES = (5, 10, 20, 50, 100)
# Method, settings of locate, and how many of the proxy facts.
RUNS: tuple[tuple[str, dict[str, Any], int], ...] = (
    ("lga", {}, PROXY),
    ("lga", {"loss": "answer"}, PROXY),
    ("lga", {"scope": "down"}, PROXY),
    ("lga", {"scope": "attention"}, PROXY),
    ("lga", {"scope": "block"}, PROXY),
    ("transfer", {}, PROXY),
    ("transfer", {"reach": True}, PROXY),
    ("saliency", {}, PROXY),
    ("cma", {}, TRACED),
)


@dataclass(frozen=True)
class Facts:
    """Test and proxy facts about different subjects; ``known`` are proxy facts for tracing."""

    test: list[Fact]
    proxy: list[Fact]
    known: list[Fact]


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
    return Facts(test, proxy, known[:TRACED])


def located(model: Model, data: str, facts: Facts, statistics: Any) -> list[LocateRun]:
    """The layer choices on the proxy facts; kept, so that a second call is quick."""
    prefixes = sample_prefixes(model, 5, 8, 0)
    runs = []
    for method, settings, count in RUNS:
        name = "-".join([model.name, data, method, *(f"{k}-{v}" for k, v in settings.items())])
        path = ROWS / f"{name}.json"
        if path.exists():
            record = json.loads(path.read_text(encoding="utf-8"))
        else:
            chosen = facts.known if method == "cma" else facts.proxy[:count]
            if not chosen:
                continue
            rows: list[dict[str, Any]] = []
            extra = {"statistics": statistics, "prefixes": prefixes} if method == "transfer" else {}
            ranking = locate(model, chosen, method, on_rows=rows.extend, **extra, **settings)
            record = {"ranking": ranking.to_json(), "rows": rows}
            write(path, record)
            print(f"  {name}: {ranking.candidates} {ranking.seconds:.0f} s", flush=True)
        runs.append(
            LocateRun(
                name,
                LayerRanking.from_json(record["ranking"]),
                sorted(record["rows"], key=lambda row: str(row["fact"])),
                settings,
            )
        )
    return runs


def verified(
    model: Model,
    facts: Facts,
    runs: list[LocateRun],
    method: str,
    statistics: Any,
    values: dict[Any, Any],
    seconds: dict[str, float],
) -> list[LocateRun]:
    """The paper's LGA and plain transfer with their five best layers raced on proxy facts.

    Each race has values of its own, shared with the other editors' races of that choice alone;
    ``seconds`` holds ROME's times, which the editors that take over its values would need too.
    """
    found = list(runs)
    for i, run in enumerate(runs):
        if run.settings or run.method not in ("lga", "transfer"):
            continue
        choice = verify(
            model,
            facts.proxy,
            best_layers(run.ranking, VERIFY),
            method,
            settings=SETTINGS,
            statistics=statistics,
            found_values=values.setdefault(run.run, {}),
        )
        record = choice.to_json()
        if method == "rome":
            seconds[run.run] = choice.seconds
        elif shares_values(method) and run.run in seconds:
            record["seconds"] = max(choice.seconds, seconds[run.run])
        found[i] = dataclasses.replace(run, verified=record)
    return found


def shares_values(method: str) -> bool:
    """Whether the editor takes over what ROME's value search found."""
    return method in ("r-rome", "emmet")


def cell(
    model: Model,
    data: str,
    method: str,
    facts: Facts,
    runs: list[LocateRun],
    statistics: Any,
    values: dict[Any, Any],
    races: dict[Any, Any],
    spent: dict[str, float],
) -> dict[str, Any]:
    """Sweep, judge, verify: one cell's record."""
    start = time.perf_counter()
    needs = editor(method).needs_statistics
    found = sweep(
        model,
        facts.test,
        method,
        settings=SETTINGS,
        statistics=statistics if needs else None,
        found_values=values,
    )
    # Editors that take over ROME's values would need its time if they stood alone.
    spent[method] = found.seconds
    seconds = spent.get("rome", found.seconds) if shares_values(method) else found.seconds
    truth = Truth.from_rows(found.rows)
    runs = verified(model, facts, runs, method, statistics if needs else None, races, spent)
    judged = compare(truth, runs, sweep_seconds=seconds, sizes=SIZES, n_layers=len(model.layers))
    record = judged.to_json()
    summary = to_json(truth)
    for choice in record["choices"]:
        for name in ("run", "note", "scope", "loss", "fence"):
            choice.pop(name, None)
    record["proxy_sizes"] = [
        {
            "name": curve["name"],
            "points": [
                {k: point[k] for k in ("n", "regret", "sd", "wins", "layer", "agreement")}
                for point in curve["points"]
            ],
        }
        for curve in record["proxy_sizes"]
    ]
    return {
        "model": model.name,
        "data": data,
        "method": method,
        "n_test": len(facts.test),
        "n_proxy": len(facts.proxy),
        "n_traced": len(facts.known),
        "settings": dataclasses.asdict(SETTINGS),
        "seconds": round(time.perf_counter() - start, 1),
        "sweep_seconds": round(seconds, 1),
        "facts": list(truth.facts),
        "overall": [[None if v != v else round(v, 2) for v in row] for row in truth.table()],
        "by_metric": {
            name: [None if v is None else round(v, 2) for v in one["mean"]]
            for name, one in summary["metrics"].items()
        },
        **{
            name: summary[name]
            for name in ("golden_layers", "oracle", "gap", "wins", "sample_optima", "split_half")
        },
        "layer_scores": {
            run.run.removeprefix(f"{model.name}-{data}-"): [
                float(f"{one.score:.5g}") for one in run.ranking.layers
            ]
            for run in runs
        },
        "compare": record,
    }


def path_of(model: str, data: str, method: str) -> Path:
    return STUDY / f"{model}-{data}-{method}.json"


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


def blocks(args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    for data in args.data or DATASETS:
        for name in args.model or MODELS:
            yield name, data


def main() -> None:
    parser = argparse.ArgumentParser(description="Compute the missing cells of the study.")
    parser.add_argument("--model", nargs="*")
    parser.add_argument("--data", nargs="*", choices=DATASETS)
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--minutes", type=float, default=1e9, help="start no cell after this")
    args = parser.parse_args()
    start = time.perf_counter()
    loaded: dict[str, tuple[Model, Any]] = {}
    for name, data in blocks(args):
        missing = [m for m in args.methods if not path_of(name, data, m).exists()]
        if not missing:
            continue
        if data != "starter" and not (args.shared / DATA[data]).exists():
            print(f"open: {name} × {data}: {args.shared / DATA[data]} is not there")
            continue
        if time.perf_counter() - start > 60 * args.minutes:
            print(f"open: {name} × {data}: {', '.join(missing)}")
            continue
        if name not in loaded:
            model = models.load(name)
            corpus = args.shared / "corpora" / "wikipedia_en_2014_train.jsonl"
            text = str(corpus) if corpus.exists() else "model"
            loaded = {name: (model, key_statistics(model, range(len(model.layers)), text=text))}
        model, statistics = loaded[name]
        print(f"{name} × {data}", flush=True)
        facts = draw(model, data, args.shared)
        runs = located(model, data, facts, statistics)
        values: dict[Any, Any] = {}
        races: dict[Any, Any] = {}
        spent: dict[str, float] = {}
        for method in missing:
            record = cell(model, data, method, facts, runs, statistics, values, races, spent)
            write(path_of(name, data, method), record)
            print(f"  {method}: golden {record['golden_layers']['overall']}", flush=True)
            for choice in record["compare"]["choices"]:
                print(
                    f"    {choice['name']:34} {choice['layer']} regret {choice['regret']:.1f} "
                    f"rho {choice['spearman']} {choice['seconds']}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
