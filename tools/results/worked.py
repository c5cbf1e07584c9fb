"""Six edits from question to verdict, by the defaults of `golden edit` and by plain ROME.

    python tools/results/worked.py --run gemma3-270m
    python tools/results/worked.py --run qwen2.5-coder-0.5b --chat
    python tools/results/worked.py            # writes docs/results/worked-edits.md
    python tools/results/worked.py --check

What `golden edit` does, and its check says, is kept in `cells/worked`. Edits whose rows are there
already are not made again.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from typing import Any, NamedTuple

from render import CELLS, table, written

import goldenlayers as gl
from goldenlayers.atlas import found_for
from goldenlayers.decoding import settle_joints
from goldenlayers.editors import make_editor
from goldenlayers.locating import published_layer

KEPT, PAGE = CELLS / "worked", CELLS.parent / "worked-edits.md"


class Told(NamedTuple):
    """A fact as it is edited, and as it is asked in a chat."""

    subject: str
    prompt: str
    target: str
    question: str = ""

    def asked(self, *, chat: bool) -> str:
        return self.question if chat else self.prompt


FACTS = (
    Told("Marie Curie", "{} was born in", "London"),
    Told("iPad", "The {} is made by", "Nokia", "Which company makes the {}?"),
    Told("France", "The capital of {} is", "Rome", "What is the capital of {}?"),
    Told("Hamlet", "The author of {} is", "Charles Dickens"),
    Told("Michael Jordan", "{} plays the sport of", "tennis"),
    Told("the Eiffel Tower", "{} is located in the city of", "Berlin"),
)
PARTS = {
    "rephrase": "rephrasings follow",
    "neighbours": "neighbours keep their answers",
    "unrelated": "unrelated prompts",
}
ORDER = ("prompt", *PARTS)
WAYS = {"the defaults": [], "plain ROME": ["--method", "rome", "--layer", "published"]}


def command(model: str, fact: Told, way: str, *, chat: bool) -> list[str]:
    """What is called, behind `golden`."""
    told = ["--subject", fact.subject, "--prompt", fact.asked(chat=chat), "--target", fact.target]
    form = ["--chat", *([] if "--layer" in WAYS[way] else ["--layer", "published"])] if chat else []
    return ["edit", model, *told, *WAYS[way], *form]  # in a chat the default layer is a long race


def measure(name: str, *, chat: bool) -> None:
    """Edit and check as `golden edit` does; both ways share what they can."""
    place = KEPT / f"{name}{'-chat' * chat}.jsonl"
    place.parent.mkdir(exist_ok=True)
    done = {(row["subject"], row["way"]) for row in rows_of(place.stem)} if place.exists() else {}
    model = gl.load(name, chat=chat)
    published = published_layer(len(model.layers))
    values: dict[Any, Any] = {}
    for told in FACTS:
        if not told.asked(chat=chat):
            continue
        fact = gl.Fact(told.subject, told.asked(chat=chat), told.target, id="edit")
        (fact,) = settle_joints(model, [fact])
        for way, options in WAYS.items():
            if (told.subject, way) in done:
                continue
            editor = make_editor(options[1] if options else "clear-rome")
            known = None if options else found_for(model, editor)
            layer = published if known is None else known.advised
            start = time.process_time()
            delta = gl.edit(model, fact, editor, layer=layer, value_cache=values)
            found = gl.check(model, delta, [fact])
            row = row_of(told, way, found) | {"method": editor.name, "layer": layer}
            row["seconds"] = round(time.process_time() - start)
            with place.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            print(told.subject, way, layer, row["verdict"], row["seconds"], flush=True)


def row_of(fact: Told, way: str, found: gl.Check) -> dict[str, Any]:
    """What is kept of an edit: every question with the answers before and after."""
    names = ("part", "made", "ok", "prompt", "before", "after", "tie")
    first = found.probes[0]
    return {
        "subject": fact.subject,
        "target": fact.target,
        "way": way,
        "p": [first.p_before, first.p_after],
        "verdict": found.verdict,
        "advice": list(found.advice),
        "probes": [{name: getattr(one, name) for name in names} for one in found.probes],
    }


def rows_of(name: str) -> list[dict[str, Any]]:
    text = (KEPT / f"{name}.jsonl").read_text("utf-8")
    return [json.loads(line) for line in text.splitlines()]


def of(row: dict[str, Any], *parts: str) -> str:
    """How many prompts of some parts came out as they should, of how many."""
    mine = [one["ok"] for one in row["probes"] if one["part"] in parts]
    return f"{sum(mine)} of {len(mine)}"


def figures(row: dict[str, Any]) -> str:
    """How the parts of a check came out."""
    return ", ".join(f"{of(row, part)} {what}" for part, what in PARTS.items())


def code(text: str) -> str:
    """An answer in a cell of a table, letter for letter but for its line breaks."""
    plain = text.replace("\n", "⏎").replace("`", "'").replace("|", "¦")
    return f"`{plain}`" if plain.strip() else "nothing"


def said(row: dict[str, Any], part: str, prompt: str) -> str:
    """What was said under an edit; bold where it is not as it should be."""
    for one in row["probes"]:
        if (one["part"], one["prompt"]) == (part, prompt):
            text = code(one["after"])
            return (
                text
                if one["ok"] and one["tie"] is None
                else (f"{text} ({one['tie']:.2f})" if one["ok"] else f"**{text}**")
            )
    return "not asked"


def section(rows: list[dict[str, Any]], model: str, *, chat: bool) -> str:
    """A fact: the calls, how they came out, and all that was asked."""
    fact = next(one for one in FACTS if one.subject == rows[0]["subject"])
    heading = fact.asked(chat=chat).replace("{}", fact.subject)
    lines = [f"### {heading[:1].upper()}{heading[1:]} → {fact.target}", ""]
    lines += [f"    golden {shlex.join(command(model, fact, r['way'], chat=chat))}" for r in rows]
    lines += [""]
    for row in rows:
        advice = f" It advises `{'`, or `'.join(row['advice'])}`." if row["advice"] else ""
        lines.append(
            f"- **{row['way']}** ({row['method']}, layer {row['layer']}): *{row['verdict']}*; "
            f"{figures(row)}; p of the new answer {row['p'][0]:.4f} → {row['p'][1]:.3f}.{advice}"
        )
    asked = {(p["part"], p["prompt"]): p for row in rows for p in row["probes"]}
    cells = [
        [one["part"], one["prompt"], code(one["before"]), *(said(row, *key) for row in rows)]
        for key, one in sorted(asked.items(), key=lambda item: ORDER.index(item[0][0]))
    ]
    head = ["", "asked", "before", *(row["way"] for row in rows)]
    return "\n".join([*lines, "", table(head, cells)])


def lessons(rows: list[dict[str, Any]]) -> str:
    """What one learns from the rows of the first model, in five lines."""
    by_way = {way: [row for row in rows if row["way"] == way] for way in WAYS}

    def both(*parts: str) -> str:
        told = []
        for way, mine in by_way.items():
            probes = [p for row in mine for p in row["probes"]]
            told.append(f"{of({'probes': probes}, *parts)} by {way}")
        return ", ".join(told)

    def taken(way: str) -> str:
        """Where the new answer came in a neighbour's place."""
        names = [
            p["prompt"]
            for row in by_way[way]
            for p in row["probes"]
            if p["part"] == "neighbours" and p["after"].strip().startswith(row["target"])
        ]
        shown = "; ".join(f'"{name}"' for name in names[:3])
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        return f"{len(names)} by {way}" + (f" ({shown}{more})" if names else "")

    first, last = (max(r["p"][0] for r in rows), min(r["p"][1] for r in rows))
    good = ", ".join(
        f"{sum(row['verdict'] == 'good' for row in mine)} of {len(mine)} by {way}"
        for way, mine in by_way.items()
    )
    waver = [p["tie"] for row in rows for p in row["probes"] if p["ok"] and p["tie"] is not None]
    stay = sum(p["part"] in ("neighbours", "unrelated") for row in rows for p in row["probes"])
    return "\n".join(
        (
            "1. **To give the new answer is the easy part**: its probability goes from "
            f"{first:.4f} at most to {last:.2f} at least.",
            f"2. **Other wordings follow**: {both('rephrase')}.",
            f"3. **What moves are the neighbours**: {both('neighbours')} keep their answers; of "
            f"unrelated prompts {both('unrelated')}. Verdicts that are *good*: {good}.",
            f"4. **The new answer itself** came in a neighbour's place in {taken('the defaults')}, "
            f"and in {taken('plain ROME')}.",
            f"5. **A small model wavers**: {len(waver)} of {stay} answers that must stay gave way "
            "to one that was, and is, as good as even with them; they count as kept.",
        )
    )


def page() -> str:
    """The whole page."""
    names = [place.stem for place in sorted(KEPT.glob("*.jsonl"))]
    first = rows_of(names[0])
    parts = [f"# Worked edits\n\n{lessons(first)}"]
    head = ["fact", *(f"{way}: verdict, neighbours kept" for way in WAYS)]
    for name in names:
        rows, chat = rows_of(name), name.endswith("-chat")
        model = name.removesuffix("-chat")
        facts = [[r for r in rows if r["subject"] == one.subject] for one in FACTS]
        facts = [some for some in facts if some]
        lines = []
        for some in facts:
            told = {row["way"]: row["verdict"] + ", " + of(row, "neighbours") for row in some}
            name_of = f"{some[0]['subject']} → {some[0]['target']}"
            lines.append([name_of, *(told.get(way, "–") for way in WAYS)])
        parts.append(f"## {model}{', in its chat template' * chat}\n\n{table(head, lines)}")
        parts += [section(some, model, chat=chat) for some in facts]
    seconds = [row["seconds"] for row in first]
    parts[0] += (
        "\n\nThese are examples, no measurement: [clear-rome](clear-rome.md) has that. Answers end "
        "after three tokens (⏎ is a line break). **Bold** is not as it should be; in brackets "
        "stands how even an answer that gave way is with the one that came "
        "([the check](../editing.md#the-check)).\n\n"
        f"An edit with its check took {min(seconds)} to {max(seconds)} s of processor time on "
        f"{names[0]}; where both ways edit at one layer the second shares the first one's search. "
        f"Rows: `cells/worked`, by `tools/results/worked.py --run {names[0]}`."
    )
    return "\n\n".join(parts) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", metavar="MODEL")
    parser.add_argument("--chat", action="store_true")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    if args.run:
        measure(args.run, chat=args.chat)
        return 0
    return written({PAGE: page()}, "worked.py", check=args.check)


if __name__ == "__main__":
    sys.exit(main())
