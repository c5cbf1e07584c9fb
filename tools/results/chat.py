"""What an edit that was made of plain prompts does in a chat, and the other way round.

    python tools/results/chat.py qwen2.5-coder-0.5b --layer 4 --limit 12 \
        --statistics wikipedia.jsonl --rows chat.jsonl

Every fact is edited by ROME and clear-rome, with plain prompts and in chat form, and each edit is
asked in both forms. Rows that are there already are kept; without --statistics the rows there are
tabled. With --ask nothing is edited: the model is asked for rephrasings, and those that the check
would keep are shown.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import goldenlayers as gl
from goldenlayers.checking.asking import asked_of_model
from goldenlayers.decoding import greedy, settle_joints

EDITORS = ("rome", "clear-rome")
FORMS = {"plain": False, "chat": True}
QUICK = {"steps": 8, "prefixes": 0}
TOKENS = 20  # of an answer
PER_FACT = 1  # rephrasings, and neighbours, of a fact that are asked


def answers(model: gl.Model, prompts: Sequence[str]) -> list[str]:
    """The model's greedy answers."""
    rows = [model.encoder.encode(prompt).ids for prompt in prompts]
    said = greedy(model, rows, TOKENS)
    return [model.encoder.continuation(*pair) for pair in zip(rows, said, strict=True)]


def measure(args: argparse.Namespace, done: set[tuple[str, ...]]) -> None:
    plain = gl.load(args.model)
    models = {form: dataclasses.replace(plain, chat=chat) for form, chat in FORMS.items()}
    statistics = gl.key_statistics(plain, [args.layer], text=args.statistics)
    caches: dict[str, dict[Any, Any]] = {form: {} for form in FORMS}
    for fact in settle_joints(plain, list(gl.load_facts("starter", limit=args.limit, seed=1))):
        near = [probe.prompt for probe in fact.must_stay][:PER_FACT]
        prompts = [fact.prompt, *fact.rephrasings[:PER_FACT], *near]
        if all((fact.id, e, m, a) in done for e in EDITORS for m in FORMS for a in FORMS):
            continue
        before = {form: answers(model, prompts) for form, model in models.items()}
        for made, model in models.items():
            for editor in EDITORS:
                given = {"statistics": statistics, "value_cache": caches[made], **QUICK}
                delta = gl.edit(model, fact, editor, layer=args.layer, **given)
                for asked, asking in models.items():
                    with delta.applied(asking):
                        after = answers(asking, prompts)
                    row = {"fact": fact.id, "editor": editor, "made": made, "asked": asked}
                    row |= {"target": fact.target, "near": len(near), "prompts": prompts}
                    row |= {"before": before[asked], "after": after}
                    with args.rows.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def ask(args: argparse.Namespace) -> None:
    model = gl.load(args.model, chat=True)
    facts = list(gl.load_facts("starter", limit=args.limit, seed=1))
    kept = []
    for fact in facts:
        (lines,) = asked_of_model(model, [fact])
        kept.append(lines)
        print(fact.prompt, *(f"    {line}" for line in lines), sep="\n", flush=True)
    print(
        f"{sum(map(len, kept))} lines kept of {len(facts)} facts, {sum(map(bool, kept))} have any"
    )


def share(rows: Sequence[dict[str, Any]], of: Callable[[dict[str, Any]], list[bool]]) -> str:
    """The share of prompts of which something holds, in points of 100."""
    found = [one for row in rows for one in of(row)]
    return f"{100 * mean(found):.0f}" if found else "-"


def table(rows: Sequence[dict[str, Any]]) -> None:
    def begins(row: dict[str, Any], places: slice) -> list[bool]:
        return [text.lstrip().startswith(row["target"]) for text in row["after"][places]]

    def says(row: dict[str, Any], places: slice, when: str = "after") -> list[bool]:
        return [row["target"].casefold() in text.casefold() for text in row[when][places]]

    def asked_anew(row: dict[str, Any]) -> slice:
        return slice(1, len(row["prompts"]) - row["near"])

    def near(row: dict[str, Any]) -> slice:
        return slice(len(row["prompts"]) - row["near"], None)

    def same(row: dict[str, Any]) -> list[bool]:
        before, after = (row[when][near(row)] for when in ("before", "after"))
        return [a == b for a, b in zip(before, after, strict=True)]

    print(f"{len({row['fact'] for row in rows})} facts\n")
    print(
        "| made | asked | editor | prompt: begins with the new answer | says it "
        "| rephrasings: begin | say it | neighbours: same answer | say the new answer |"
    )
    print("|" + " --- |" * 9)
    for made in FORMS:
        for asked in FORMS:
            for editor in EDITORS:
                some = [
                    row
                    for row in rows
                    if (row["made"], row["asked"], row["editor"]) == (made, asked, editor)
                ]
                cells = [
                    made,
                    asked,
                    editor,
                    share(some, lambda row: begins(row, slice(0, 1))),
                    share(some, lambda row: says(row, slice(0, 1))),
                    share(some, lambda row: begins(row, asked_anew(row))),
                    share(some, lambda row: says(row, asked_anew(row))),
                    share(some, same),
                    share(some, lambda row: says(row, near(row))),
                ]
                print("| " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--layer", type=int, default=4)
    parser.add_argument("--limit", type=int, default=12)
    parser.add_argument("--statistics")
    parser.add_argument("--rows", type=Path, default=Path("chat.jsonl"))
    parser.add_argument("--ask", action="store_true")
    args = parser.parse_args()
    if args.ask:
        ask(args)
        return
    if args.statistics:
        done = set()
        if args.rows.exists():
            rows = map(json.loads, args.rows.read_text("utf-8").splitlines())
            done = {(row["fact"], row["editor"], row["made"], row["asked"]) for row in rows}
        measure(args, done)
    table([json.loads(line) for line in args.rows.read_text("utf-8").splitlines()])


if __name__ == "__main__":
    main()
