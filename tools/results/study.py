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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from cells import DATA, READING, ROOT, quick
from render import done
from study_choices import Facts, draw, located, wider, write

import goldenlayers.models as models
from goldenlayers.comparing import LocateRun, SweepRun, compare
from goldenlayers.locating import published_layer
from goldenlayers.models.model import Model
from goldenlayers.racing import best_layers, verify
from goldenlayers.statistics import key_statistics
from goldenlayers.sweeping import sweep
from goldenlayers.truth import Truth, to_json

STUDY = ROOT / "docs" / "results" / "study"
MODELS = ("gemma3-270m", "smollm2-135m")
DATASETS = ("starter", "counterfact_500", "ZsRE-test-all", "wiki_counterfact")
METHODS = ("rome", "r-rome", "emmet", "ft-m")
VERIFY = 5
SPREAD, LONG = ", spread", ", spread, 32 facts"
SIZES = (5, 10, 20, 50, 100, 200, 300)


@dataclass
class Block:
    """A model and a data set: what its cells have in common.

    ``values`` and ``races`` hold what the value search found, for the sweep and by race: editors
    that differ in the solve alone take it over. ``spent`` holds ROME's seconds, which those editors
    would need too if they stood alone.
    """

    model: Model
    data: str
    facts: Facts
    runs: list[LocateRun]
    wide: list[LocateRun]
    statistics: Any
    values: dict[Any, Any] = field(default_factory=dict)
    races: dict[tuple[str, str], dict[Any, Any]] = field(default_factory=dict)
    spent: dict[tuple[str, str] | str, float] = field(default_factory=dict)


def raced(block: Block, method: str, kind: str) -> list[LocateRun]:
    """Choices with five layers raced on proxy facts.

    ``kind`` "": the five best layers of the paper's LGA and of plain transfer. SPREAD: of transfer
    alone, layers at least two apart, the published depth among them. LONG: those on four times as
    many facts.
    """
    # A third of the default's work per edit; the ranking of the layers is what counts here.
    editor = quick(method)
    found = []
    for run in block.runs:
        if run.settings or run.method not in (("transfer",) if kind else ("lga", "transfer")):
            continue
        layers = best_layers(run.ranking, VERIFY)
        if kind:
            published = published_layer(len(block.model.layers))
            spread = best_layers(run.ranking, VERIFY, spacing=2)
            layers = list(dict.fromkeys([published, *spread]))[:VERIFY]
        key = (run.run, kind)
        choice = verify(
            block.model,
            block.facts.proxy,
            layers,
            editor,
            n_facts=32 if kind == LONG else 8,
            statistics=block.statistics,
            # Each race has values of its own: its time is to be that of a race that stands alone.
            value_cache=block.races.setdefault(key, {}),
        )
        record = choice.to_json()
        if method == "rome":
            block.spent[key] = choice.seconds
        elif shares_values(method) and key in block.spent:
            record["seconds"] = max(choice.seconds, block.spent[key])
        found.append(dataclasses.replace(run, verified=record))
    return found


def shares_values(method: str) -> bool:
    """Whether the editor takes over what ROME's value search found."""
    return method in ("r-rome", "emmet")


def cell(block: Block, method: str) -> dict[str, Any]:
    """Sweep, judge, verify: one cell's record."""
    start = time.perf_counter()
    model, editor = block.model, quick(method)
    found = sweep(
        model,
        block.facts.test,
        editor,
        statistics=block.statistics,
        value_cache=block.values,
    )
    # Editors that take over ROME's values would need its time if they stood alone.
    block.spent[method] = found.seconds
    seconds = block.spent.get("rome", found.seconds) if shares_values(method) else found.seconds
    truth = Truth.from_rows(found.rows)
    summary = to_json(truth)
    record = {
        "model": model.name,
        "data": block.data,
        "method": method,
        "reading": READING,
        "n_test": len(block.facts.test),
        "n_proxy": len(block.facts.proxy),
        "n_traced": len(block.facts.known),
        "settings": editor.to_json(),
        "seconds": 0.0,
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
        "layer_scores": layer_scores(model.name, block.data, block.runs),
        "compare": judged(block, truth, method, seconds),
    }
    record["seconds"] = round(time.perf_counter() - start, 1)
    return record


def layer_scores(model: str, data: str, runs: list[LocateRun]) -> dict[str, list[float]]:
    """Every run's scores by layer."""
    return {
        run.run.removeprefix(f"{model}-{data}-"): [
            float(f"{one.score:.5g}") for one in run.ranking.layers
        ]
        for run in runs
    }


def judged(
    block: Block,
    truth: Truth,
    method: str,
    seconds: float,
    kept: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """The choices judged, and their curves over the number of proxy facts.

    Races that are among the ``kept`` choices are not run again.
    """
    n_layers = len(block.model.layers)
    sweep = SweepRun("this sweep", truth, seconds=seconds, n_layers=n_layers)
    record = compare(sweep, block.runs, sizes=SIZES).to_json()
    raced_already = {one["name"]: one for one in kept if " verified" in one["name"]}
    # The long race is dear: ROME speaks for the editors that share its values.
    for kind in ("", SPREAD, LONG) if method == "rome" else ("", SPREAD):
        asked = ("transfer",) if kind else ("lga mlp sequence tukey", "transfer")
        names = [f"{name} verified{kind}" for name in asked]
        if not all(name in raced_already for name in names):
            fresh = compare(sweep, raced(block, method, kind), sizes=SIZES).to_json()["choices"]
            raced_already |= {
                one["name"] + kind: one | {"name": one["name"] + kind}
                for one in fresh
                if one["name"].endswith(" verified")
            }
        record["choices"] += [raced_already[name] for name in names]
    for choice in record["choices"]:
        for name in ("run", "note", "scope", "loss", "fence"):
            choice.pop(name, None)
    curves = {one["name"]: one for one in record["proxy_sizes"]}
    wide = compare(sweep, block.wide, sizes=SIZES).to_json()
    curves |= {one["name"]: one for one in wide["proxy_sizes"]}
    record["proxy_sizes"] = [
        {
            "name": curve["name"],
            "points": [
                {k: point[k] for k in ("n", "regret", "sd", "wins", "layer", "agreement")}
                for point in curve["points"]
                if point["n"] in SIZES  # not the odd number of facts that there happen to be
            ],
        }
        for curve in curves.values()
    ]
    return record


def judged_again(block: Block, record: dict[str, Any]) -> dict[str, Any]:
    """A finished cell with the choices as they are made now; races are not run again."""
    kept = record["compare"]["choices"]
    fresh = judged(block, truth_of(record), record["method"], record["sweep_seconds"], kept)
    scores = layer_scores(record["model"], record["data"], block.runs)
    return record | {"layer_scores": scores, "compare": fresh}


def truth_of(record: dict[str, Any]) -> Truth:
    """Overall by fact and layer, from a cell's record."""
    values = np.array([[np.nan if v is None else v for v in row] for row in record["overall"]])
    return Truth(tuple(record["facts"]), tuple(range(values.shape[1])), {"overall": values})


def path_of(model: str, data: str, method: str) -> Path:
    return STUDY / f"{model}-{data}-{method}.json"


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
    parser.add_argument(
        "--again",
        action="store_true",
        help="judge the choices of the cells that are there anew, without sweeping",
    )
    args = parser.parse_args()
    start = time.perf_counter()
    loaded: dict[str, tuple[Model, Any]] = {}
    for name, data in blocks(args):
        there = [m for m in args.methods if path_of(name, data, m).exists()]
        missing = [m for m in args.methods if not done(path_of(name, data, m))]
        work = there if args.again else missing
        if not work:
            continue
        if data != "starter" and not (args.shared / DATA[data]).exists():
            print(f"open: {name} × {data}: {args.shared / DATA[data]} is not there")
            continue
        if time.perf_counter() - start > 60 * args.minutes:
            print(f"open: {name} × {data}: {', '.join(work)}")
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
        wide = wider(model, data, facts, statistics, runs)
        block = Block(model, data, facts, runs, wide, statistics)
        for method in work:
            path = path_of(name, data, method)
            if args.again:
                record = judged_again(block, json.loads(path.read_text(encoding="utf-8")))
            else:
                record = cell(block, method)
            write(path, record)
            print(f"  {method}: golden {record['golden_layers']['overall']}", flush=True)


if __name__ == "__main__":
    main()
