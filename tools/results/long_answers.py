"""What editors do with answers of a few words, a sentence, and two sentences on two lines: WikiBio.

    python tools/results/long_answers.py gemma3-270m --layer 3 --limit 8 \
        --facts wikibio-test-all.json --statistics wikipedia.jsonl --rows long.jsonl
    python tools/results/long_answers.py qwen2.5-coder-0.5b --layer 4 --code \
        --statistics wikipedia.jsonl --rows code.jsonl

The prompt is the first sentence alone, "This is a Wikipedia passage about ...", so that the subject
stands near its end. rome, clear-rome and memit share a value search,
whose time stands with rome. Rows that are there already are kept; without --statistics the rows
there are tabled.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import random
import resource
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import goldenlayers as gl
from goldenlayers.decoding import forced_predictions, greedy, settle_joints
from goldenlayers.evaluation.scoring import fluency

EDITORS = ("rome", "clear-rome", "memit", "ft-m")
SEARCH = {"steps": 12, "prefixes": 0}
WORDS = {"3 words": 3}
AFTER = 24  # tokens of which fluency is told

CODE = (
    gl.Fact(
        "quicksort",
        "In our library the function that sorts by quicksort is called",
        "fast_sort_inplace",
        id="name",
    ),
    gl.Fact(
        "open_store",
        "# How open_store is used, in two lines of Python:\n",
        'with open_store("main") as store:\n    store.put("key", 42)',
        id="snippet",
    ),
)


def facts_of(args: argparse.Namespace) -> Iterator[tuple[str, gl.Fact]]:
    """Facts with a name for how long their answers are."""
    if args.code:
        yield from ((fact.id, fact) for fact in CODE)
        return
    found = list(gl.load_facts(args.facts))
    following = [
        (one, more) for one, more in itertools.pairwise(found)
        if one.subject == more.subject and one.target in more.prompt
    ]  # fmt: skip
    chosen = random.Random(1).sample(following, args.limit)
    for fact, more in chosen:
        words = fact.target.split()
        answers = {name: " ".join(words[:count]) for name, count in WORDS.items()}
        answers |= {"a sentence": fact.target, "two lines": f"{fact.target}\n{more.target}"}
        for name, answer in answers.items():
            prompt = fact.prompt[: fact.prompt.index(fact.subject) + len(fact.subject)] + "."
            yield (
                name,
                dataclasses.replace(fact, prompt=prompt, target=answer, id=f"{fact.id} {name}"),
            )


def measure(args: argparse.Namespace, done: set[tuple[str, str]]) -> None:
    model = gl.load(args.model, chat=args.chat)
    statistics = gl.key_statistics(model, [args.layer], text=args.statistics)
    others = [fact.prompt for fact in gl.load_facts("starter", limit=6, seed=2)]
    unrelated = [model.encoder.encode(text).ids for text in others[:2]]
    kept = greedy(model, unrelated, 4)
    for length, fact in facts_of(args):
        (fact,) = settle_joints(model, [fact])
        encoding = model.encoder.fact(fact, fact.target)
        asking = encoding.ids[: encoding.n_prompt]
        own = [model.encoder.encode(probe.prompt).ids for probe in fact.must_stay][:1]
        stay = greedy(model, own, 3)
        (was,) = greedy(model, [asking], AFTER)
        cache: dict[Any, Any] = {}
        for editor in EDITORS:
            if (fact.id, editor) in done:
                continue
            given: dict[str, Any] = {} if editor == "ft-m" else {"value_cache": cache, **SEARCH}
            start = time.perf_counter()
            delta = gl.edit(model, fact, editor, layer=args.layer, statistics=statistics, **given)
            seconds = time.perf_counter() - start
            with delta.applied(model):
                (forced,) = forced_predictions(model, [encoding])
                (said,) = greedy(model, [asking], AFTER)
                moved = greedy(model, unrelated, 4)
                still = greedy(model, own, 3)
            right = [a == b for a, b in zip(forced, encoding.answer_ids, strict=True)]
            first = next((i for i, one in enumerate(right) if not one), len(right))
            row = {"fact": fact.id, "length": length, "editor": editor, "seconds": seconds}
            row |= {"tokens": len(right), "right": mean(right), "first_wrong": first}
            row |= {"exact": all(right), "said": model.encoder.continuation(asking, said)}
            row |= {"fluency_before": fluency(was), "fluency": fluency(said)}
            row |= {"unrelated": mean(a == b for a, b in zip(kept, moved, strict=True))}
            row |= {"subject": mean(map(list.__eq__, stay, still)) if own else None}
            row |= {"norm": max(one.relative for one in delta.norms(model).values())}
            row |= {"peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
            with args.rows.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


def table(rows: Sequence[dict[str, Any]]) -> None:
    print("| answer | tokens | editor | edits | tokens right | whole | up to the first wrong one "
          "| unrelated kept | same subject kept | fluency | seconds |")  # fmt: skip
    print("|" + " --- |" * 11)
    for length in dict.fromkeys(row["length"] for row in rows):
        for editor in EDITORS:
            some = [r for r in rows if (r["length"], r["editor"]) == (length, editor)]
            if not some:
                continue
            mine = {name: [r[name] for r in some if r[name] is not None] for name in some[0]}
            kept = f"{100 * mean(mine['subject']):.0f} %" if mine["subject"] else "-"
            before = mean(mine["fluency_before"])
            print(
                f"| {length} | {mean(mine['tokens']):.0f} | {editor} | {len(some)} "
                f"| {100 * mean(mine['right']):.0f} % | {sum(mine['exact'])} of {len(some)} "
                f"| {mean(mine['first_wrong']):.0f} | {100 * mean(mine['unrelated']):.0f} % "
                f"| {kept} | {mean(mine['fluency']):.0f} ({before:.0f}) "
                f"| {mean(mine['seconds']):.0f} |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--layer", type=int, default=3)
    parser.add_argument("--limit", type=int, default=8)
    parser.add_argument("--facts")
    parser.add_argument("--code", action="store_true")
    parser.add_argument("--chat", action="store_true")
    parser.add_argument("--statistics")
    parser.add_argument("--rows", type=Path, required=True)
    args = parser.parse_args()
    if args.statistics:
        done = set()
        if args.rows.exists():
            rows = map(json.loads, args.rows.read_text("utf-8").splitlines())
            done = {(row["fact"], row["editor"]) for row in rows}
        measure(args, done)
    table([json.loads(line) for line in args.rows.read_text("utf-8").splitlines()])


if __name__ == "__main__":
    main()
