"""Tries of edits at several layers, by several editors and at several strengths, fact by fact: what
the data's probes say of each, and what the chooser's made ones.

    python tools/results/each.py gemma3-270m --rows tries.jsonl --statistics wiki.jsonl
        --facts counterfact_500.json starter
    python tools/results/each_page.py --keep tries.jsonl

A run that was stopped goes on with the same command.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import goldenlayers as gl
from goldenlayers.choosing import EDITORS, STRENGTHS, usual_layers
from goldenlayers.choosing.probes import own_probes
from goldenlayers.decoding import settle_joints
from goldenlayers.editors import Editing, make_editor
from goldenlayers.evaluation.plan import EvaluationPlan
from goldenlayers.facts import Fact

LOCALITY = 5  # of the data's probes, of ten
PARTS = ("rewrite", "rephrase", "locality")
QUICK: dict[str, Any] = {"steps": 10, "prefixes": 2}


def drawn(args: argparse.Namespace, seed: int, limit: int) -> Iterator[tuple[str, Fact]]:
    """The facts of the data sets in turn, so that a run that is stopped has as many of each.

    Those to develop with, of another seed, are none of the tested ones, nor about their subjects.
    """
    sets = []
    for data in args.facts:
        tested = gl.load_facts(data, limit=args.limit, seed=0, skip_invalid=True)
        facts = list(tested)
        if seed:
            gone = {fact.subject for fact in tested}
            more = gl.load_facts(data, limit=limit + args.limit, seed=seed, skip_invalid=True)
            facts = [fact for fact in more if fact.subject not in gone]
        sets.append([(Path(data).stem, fact) for fact in facts[:limit]])
    for group in itertools.zip_longest(*sets):
        yield from (one for one in group if one is not None)


def measure(args: argparse.Namespace, done: set[tuple[str, str]]) -> None:
    model = gl.load(args.model)
    layers = args.layers or usual_layers(model)
    statistics = gl.key_statistics(model, sorted(layers), text=args.statistics)
    work = Editing(model, make_editor("rome", **QUICK), layers[0], statistics=statistics)
    limits, asked_for = ((1, args.develop), (0, args.limit)), []
    queues = [[(data, f, seed) for data, f in drawn(args, seed, n)] for seed, n in limits]
    n_sets = len(args.facts)
    while any(queues):  # one of each set to develop with, then two of each to test
        turn = queues[0][:n_sets] + queues[1][: 2 * n_sets]
        queues = [queues[0][n_sets:], queues[1][2 * n_sets :]]
        asked_for += turn
    for data, fact, seed in asked_for:
        if (data, fact.id) in done:
            continue
        (fact,) = settle_joints(model, [fact])
        start = time.perf_counter()
        (own,) = own_probes(model, [fact], layers[0], given=False)
        (asked,) = settle_joints(model, [own.fact])
        stay = fact.must_stay[:LOCALITY]
        judge = dataclasses.replace(fact, locality=stay, portability=(), generation_prompts=())
        ways = [(e, s) for e in args.editors for s in args.strengths]
        both = [
            dataclasses.replace(one, id=f"{of} {w}")
            for w in range(len(ways))
            for of, one in (("judge", judge), ("own", asked))
        ]
        plan = EvaluationPlan(model, both, PARTS)
        plan.baseline()
        seconds = [time.perf_counter() - start, 0.0, 0.0]
        values: dict[Any, Any] = {}
        tries = []
        for layer in layers:
            now = time.perf_counter()
            deltas: dict[str, Any] = {}
            for editor in args.editors:
                here = Editing(
                    model, make_editor(editor, **QUICK), layer,
                    statistics=statistics, value_cache=values,
                )  # fmt: skip
                here.kept = work.kept  # prefixes and the names' keys
                (deltas[editor],) = here.each_safely([fact])
            seconds[1] += time.perf_counter() - now
            now = time.perf_counter()
            edits = [
                deltas[e] if isinstance(deltas[e], gl.UserError) else deltas[e] * s
                for e, s in ways
                for _ in range(2)
            ]
            rows = plan.score(edits)
            for w, (editor, strength) in enumerate(ways):
                tries.append([layer, editor, strength, *by_part(rows, f" {w}")])
            seconds[2] += time.perf_counter() - now
        row = {
            "model": args.model, "data": data, "fact": fact.id, "seed": seed,
            "probes": [len(asked.rephrasings), len(asked.locality)],
            "seconds": [round(x, 1) for x in seconds],
            "tries": tries,
        }  # fmt: skip
        with args.rows.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(data, fact.id, row["probes"], row["seconds"], flush=True)


def by_part(rows: Sequence[Mapping[str, Any]], way: str) -> list[list[float | None]]:
    """Hits and soft scores by the fact's own probes, then by the chooser's."""
    found = []
    for whose, of in itertools.product(("judge", "own"), ("score", "soft")):
        means: list[float | None] = []
        for part in PARTS:
            mine = (r for r in rows if r["fact"] == whose + way and r["metric"] == part)
            some = [float(r[of]) for r in mine if r.get(of) is not None]
            means.append(round(float(np.mean(some)), 2) if some else None)
        found.append(means)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--statistics", required=True)
    parser.add_argument("--facts", nargs="+", default=["starter"])
    parser.add_argument("--limit", type=int, default=40)
    parser.add_argument("--develop", type=int, default=16, help="facts of each set, of seed 1")
    parser.add_argument("--layers", type=int, nargs="*")
    parser.add_argument("--editors", nargs="*", default=EDITORS)
    parser.add_argument("--strengths", type=float, nargs="*", default=STRENGTHS)
    args = parser.parse_args()
    text = args.rows.read_text("utf-8") if args.rows.exists() else ""
    rows = [json.loads(line) for line in text.splitlines()]
    measure(args, {(row["data"], row["fact"]) for row in rows})


if __name__ == "__main__":
    main()
