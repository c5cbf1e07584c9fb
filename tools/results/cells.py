"""The cells of docs/results: one model, one data set, one editor, one layer, one mode, each a small
JSON that is kept, so that the tables can be continued on another machine.

    python tools/results/cells.py editors --model gemma3-270m
    python tools/results/cells.py many --model smollm2-135m
    python tools/results/cells.py evaluation --model gemma3-270m --shared ../shared/data
    python tools/results/render.py

A cell whose JSON is there is not computed again, unless it is of the earlier loss. Facts are the
first ones, in a seeded draw, whose old answer the model gives by itself; where it knows too few,
other facts make up the number.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from render import done

import goldenlayers.models as models
from goldenlayers.datasets import load_facts
from goldenlayers.editors import Editor, make_editor
from goldenlayers.evaluation import evaluate
from goldenlayers.facts import Fact
from goldenlayers.locating import locate
from goldenlayers.locating.known import known_facts
from goldenlayers.models import Model
from goldenlayers.statistics import key_statistics

ROOT = Path(__file__).resolve().parents[2]
CELLS = ROOT / "docs" / "results" / "cells"
EDITORS = ("rome", "r-rome", "memit", "emmet", "alphaedit", "pmet", "ft-m", "ft-l")
DATA = {
    "starter": "starter",
    "counterfact_500": "counterfact/counterfact_500.json",
    "ZsRE-test-all": "KnowEdit/ZsRE/ZsRE-test-all.json",
    "counterfact_3k": "counterfact/counterfact_3k.json",
    "wiki_counterfact": "KnowEdit/wiki_counterfact/train_cf.json",
    "wiki_recent": "KnowEdit/wiki_recent/recent_train.json",
    "WikiBio": "KnowEdit/WikiBio/wikibio-test-all.json",
}
# Many facts: a third of the default's work per fact.
QUICK: dict[str, Any] = {"adam": True, "steps": 15, "lr": 0.5, "prefixes": 2}
# Written into every cell: what the value search takes for its KL term, and how keys are averaged.
# Cells without it are from before both were made as published.
READING = "KL(edited ‖ clean), bare prompt's key one half"
# Their old answers are missing or whole sentences: no small model gives them, none is tried.
UNKNOWN = ("wiki_recent", "WikiBio")


@dataclass(frozen=True)
class Cell:
    """One cell of a table."""

    suite: str
    model: str
    data: str
    method: str
    layer: int | None
    mode: str
    n_facts: int
    statistics: str = "wikipedia"

    @property
    def path(self) -> Path:
        at = "none" if self.layer is None else f"layer{self.layer}"
        text = "" if self.statistics == "wikipedia" else f"-{self.statistics}"
        name = f"{self.model}-{self.data}-{self.method}-{at}-{self.mode}-{self.n_facts}{text}"
        return CELLS / self.suite / f"{name}.json"


def quick(method: str) -> Editor:
    """An editor with those of ``QUICK`` that it has."""
    own = make_editor(method).to_json()
    return make_editor(method, **{n: value for n, value in QUICK.items() if n in own})


class Bench:
    """A loaded model with its facts and statistics, each fetched once."""

    def __init__(self, name: str, shared: Path) -> None:
        self.model: Model = models.load(name)
        self.shared = shared
        self.value_cache: dict[Any, Any] = {}  # ROME to AlphaEdit share the value optimisation
        self._facts: dict[str, list[Fact]] = {}
        self.n_known: dict[str, int] = {}
        self._statistics: dict[tuple[int, str], Any] = {}

    def facts(self, data: str, count: int) -> list[Fact]:
        if len(self._facts.get(data, [])) < count:
            source = DATA[data] if data == "starter" else str(self.shared / DATA[data])
            drawn = list(load_facts(source, limit=30 * count, seed=0, skip_invalid=True))
            known = [] if data in UNKNOWN else known_facts(self.model, drawn)
            # Small models know next to nothing of some sets: other facts make up the number.
            known_ids = {fact.id for fact in known}
            self._facts[data] = known + [fact for fact in drawn if fact.id not in known_ids]
            self.n_known[data] = len(known)
        return self._facts[data][:count]

    def statistics(self, layer: int, text: str) -> Any:
        if (layer, text) not in self._statistics:
            corpus = self.shared / "corpora" / "wikipedia_en_2014_train.jsonl"
            source = str(corpus) if text == "wikipedia" else text
            self._statistics[layer, text] = key_statistics(self.model, [layer], text=source)
        return self._statistics[layer, text]


def compute(bench: Bench, cell: Cell, metrics: list[str]) -> dict[str, Any]:
    """Edit and score one cell; its record."""
    facts = bench.facts(cell.data, cell.n_facts)
    heldout = bench.shared / "corpora" / "wikipedia_en_2014_heldout.jsonl"
    method: Any = cell.method
    if cell.layer is not None:
        method = quick(method) if cell.suite == "many" else make_editor(method)
    start = time.perf_counter()
    before = bench.model.fingerprint()
    found = evaluate(
        bench.model,
        facts,
        method,
        layer=cell.layer,
        mode=cell.mode,  # type: ignore[arg-type]
        metrics=metrics,
        statistics=bench.statistics(cell.layer, cell.statistics)
        if cell.layer is not None and method.needs_statistics
        else None,
        value_cache=bench.value_cache,
        text=_text(heldout) if "perplexity" in metrics else None,
    )
    bench.model.forget_fingerprint()
    return {
        "cell": asdict(cell) | {"n_facts": len(facts)},
        "reading": READING,
        "known": min(len(facts), bench.n_known[cell.data]),
        "seconds": round(time.perf_counter() - start, 1),
        "model_unchanged": bench.model.fingerprint() == before,
        "summary": found.to_json(),
    }


def _text(path: Path) -> str:
    rows = path.read_text(encoding="utf-8").splitlines()[:5]
    return "\n".join(json.loads(row)["text"] for row in rows)


def suites(name: str, bench: Bench, args: argparse.Namespace) -> Iterator[tuple[Cell, list[str]]]:
    """The cells of a suite, the most wanted first."""
    model = args.model
    usual = ["rewrite", "rephrase", "locality", "portability"]
    middle = len(bench.model.layers) // 2
    proxy = load_facts("starter", limit=200)
    golden = args.layers[0] if args.layers else locate(bench.model, proxy).golden_layer
    if name == "editors":
        layers = args.layers or [golden, golden + 1, middle]
        for layer in layers:
            # Beside the golden layer, the editors that tell whether the layer is to blame.
            few = ("rome", "r-rome", "memit") if layer != layers[0] else EDITORS
            for method in args.methods or few:
                yield Cell(name, model, "starter", method, layer, "single", 30), usual
    elif name == "many":
        for method, mode in (
            ("memit", "batch"),
            ("emmet", "batch"),
            ("alphaedit", "batch"),
            ("alphaedit", "sequential"),
            ("r-rome", "sequential"),
        ):
            metrics = ["rewrite", "locality", "perplexity"]
            yield Cell(name, model, "starter", method, golden, mode, args.facts or 100), metrics
    elif name == "statistics":
        for method in ("rome", "memit"):
            for text in ("wikipedia", "model", "none"):
                yield Cell(name, model, "starter", method, golden, "single", 20, text), usual
    elif name == "evaluation":
        metrics = [*usual, "generation"]
        for data in args.data or DATA:
            for method in ("none", "in-context", "ft-m", "rome", "r-rome", "memit", "alphaedit"):
                at = None if method in ("none", "in-context") else golden
                yield Cell(name, model, data, method, at, "single", args.facts or 20), metrics


def main() -> None:
    parser = argparse.ArgumentParser(description="Compute the missing cells of a suite.")
    parser.add_argument("suite", choices=["editors", "many", "statistics", "evaluation"])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--methods", nargs="*")
    parser.add_argument("--modes", nargs="*", help="only cells of these modes")
    parser.add_argument("--layers", nargs="*", type=int)
    parser.add_argument("--data", nargs="*")
    parser.add_argument("--facts", type=int)
    parser.add_argument("--minutes", type=float, default=1e9, help="start no cell after this")
    args = parser.parse_args()
    start = time.perf_counter()
    bench = Bench(args.model, args.shared)
    for cell, metrics in suites(args.suite, bench, args):
        wanted = (not args.methods or cell.method in args.methods) and (
            not args.modes or cell.mode in args.modes
        )
        if done(cell.path) or not wanted:
            continue
        if time.perf_counter() - start > 60 * args.minutes:
            print(f"open: {cell.path.name}", flush=True)
            continue
        record = compute(bench, cell, metrics)
        cell.path.parent.mkdir(parents=True, exist_ok=True)
        part = cell.path.with_suffix(".part")
        part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        part.replace(cell.path)
        means = {k: v["mean"] for k, v in record["summary"]["metrics"].items()}
        print(cell.path.name, record["seconds"], means, flush=True)


if __name__ == "__main__":
    main()
