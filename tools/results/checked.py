"""How well the check's made probes foretell what a fact's own probes say of an edit.

    python tools/results/checked.py gemma3-270m --layers 3 9 --facts starter counterfact.json \
        --statistics wikipedia.jsonl --rows checked.jsonl

Every fact is edited by ROME and clear-rome at every layer; the edit is checked twice, with the
fact's probes and without any, so that they are made. Rows that are there already are kept.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import goldenlayers as gl
from goldenlayers.checking import Check
from goldenlayers.decoding import settle_joints
from goldenlayers.evaluation.bootstrap import spearman

PARTS = ("rephrase", "neighbours")
EDITORS = ("rome", "clear-rome")
QUICK = {"steps": 15, "prefixes": 2}


def shares(found: Check) -> dict[str, float]:
    return {part: 1 - found.share(part).failed for part in PARTS}


def measure(args: argparse.Namespace, done: set[tuple[Any, ...]]) -> None:
    model = gl.load(args.model)
    statistics = gl.key_statistics(model, args.layers, text=args.statistics)
    for data in args.facts:
        for fact in settle_joints(model, list(gl.load_facts(data, limit=args.limit, seed=1))):
            bare = dataclasses.replace(
                fact, rephrasings=(), locality=(), portability=(), generation_prompts=()
            )
            cache: dict[Any, Any] = {}
            given = {"statistics": statistics, "value_cache": cache, **QUICK}
            for layer in args.layers:
                for editor in EDITORS:
                    key = (Path(data).stem, fact.id, layer, editor)
                    if key in done:
                        continue
                    delta = gl.edit(model, fact, editor, layer=layer, **given)
                    row: dict[str, Any] = dict(
                        zip(("data", "fact", "layer", "editor"), key, strict=True)
                    )
                    row["own"] = shares(gl.check(model, delta, [fact]))
                    row["made"] = shares(gl.check(model, delta, [bare]))
                    with args.rows.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(row) + "\n")


def table(rows: list[dict[str, Any]]) -> None:
    print("| facts | edits | part | own probes | made probes | rank correlation |")
    print("| --- | --- | --- | --- | --- | --- |")
    for data in sorted({row["data"] for row in rows}):
        mine = [row for row in rows if row["data"] == data]
        for part in PARTS:
            own, made = ([row[kind][part] for row in mine] for kind in ("own", "made"))
            rho = spearman(own, made)
            means = " | ".join(f"{100 * sum(some) / len(some):.1f}" for some in (own, made))
            print(f"| {data} | {len(mine)} | {part} | {means} | {rho:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--layers", type=int, nargs="+", required=True)
    parser.add_argument("--facts", nargs="+", default=["starter"])
    parser.add_argument("--limit", type=int, default=24)
    parser.add_argument("--statistics", required=True)
    parser.add_argument("--rows", type=Path, required=True)
    args = parser.parse_args()
    text = args.rows.read_text("utf-8") if args.rows.exists() else ""
    done = [json.loads(line) for line in text.splitlines()]
    measure(args, {(row["data"], row["fact"], row["layer"], row["editor"]) for row in done})
    table([json.loads(line) for line in args.rows.read_text("utf-8").splitlines()])


if __name__ == "__main__":
    main()
