"""What text, and how much of it, do key statistics need? The same values written with each.

    python tools/results/texts.py --model gemma3-270m --layer 3 --data starter
    python tools/results/render.py

Every fact is edited by itself with 15 steps and 2 prefixes. The facts are drawn with seed 1; none
is a test fact of the study. Kept in docs/results/cells/texts, with the scores of every fact; a call
that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from cells import CELLS, DATA, ROOT

from goldenlayers import models
from goldenlayers.datasets import load_facts
from goldenlayers.editors import make_editor
from goldenlayers.evaluation import evaluate
from goldenlayers.evaluation.summary import fact_scores
from goldenlayers.statistics import key_statistics

METRICS = ("rewrite", "rephrase", "locality")
FACTS = 12
WIKIPEDIA = "wikipedia"
# (text, tokens in MLP widths)
TEXTS = (
    (WIKIPEDIA, 10),
    ("model", 10),
    ("none", 0),
    ("package", 4),
    ("package", 10),
    (WIKIPEDIA, 4),
    (WIKIPEDIA, 40),
    ("package", 40),
)
EDITORS = ("rome", "clear-rome", "memit", "alphaedit")
FEW = 5  # texts that all editors are tried with; the others with the first two


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="gemma3-270m")
    parser.add_argument("--layer", type=int, default=3)
    parser.add_argument("--data", default="starter")
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared" / "data")
    args = parser.parse_args()
    data = args.data if args.data == "starter" else str(args.shared / DATA[args.data])
    tested = {f.id for f in load_facts(data, limit=24, seed=0, skip_invalid=True)}
    pool = load_facts(data, limit=60, seed=1, skip_invalid=True)
    model = models.load(args.model)
    facts = [fact for fact in pool if fact.id not in tested][:FACTS]
    place = CELLS / "texts" / f"{model.name}-{args.data}.json"
    place.parent.mkdir(exist_ok=True)
    record: dict[str, Any] = {
        "model": model.name,
        "data": args.data,
        "layer": args.layer,
        "facts": [fact.id for fact in facts],
        "rows": [],
    }
    if place.exists():
        record = json.loads(place.read_text(encoding="utf-8"))
    done = {(row["editor"], row["text"], row["widths"]) for row in record["rows"]}
    values: dict[tuple[Any, ...], Any] = {}
    for number, (text, widths) in enumerate(TEXTS):
        wanted = [
            editor
            for editor in EDITORS[: len(EDITORS) if number < FEW else 2]
            if (editor, text, widths) not in done and (editor, text) != ("alphaedit", "none")
        ]
        if not wanted:
            continue
        source = args.shared / "corpora" / "wikipedia_en_2014_train.jsonl"
        moments = key_statistics(
            model,
            [args.layer],
            text=str(source) if text == WIKIPEDIA else text,
            tokens=widths * model.layers.d_mlp or None,
            settle=0 if text != "model" else 0.1,
        )
        if moments.n_tokens < 0.9 * widths * model.layers.d_mlp:
            print(f"{text} gives only {moments.n_tokens} tokens", flush=True)
            continue
        for editor in wanted:
            found = evaluate(
                model,
                facts,
                make_editor(editor, steps=15, prefixes=2),
                layer=args.layer,
                metrics=METRICS,
                statistics=moments,
                value_cache=values,
            )
            scores = {metric: fact_scores(found.rows, metric) for metric in METRICS}
            record["rows"].append(
                {
                    "editor": editor,
                    "text": text,
                    "widths": widths,
                    "tokens": moments.n_tokens,
                    "scores": scores,
                }
            )
            part = place.with_suffix(".part")
            part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            part.replace(place)
            means = [f"{m} {statistics.mean(scores[m].values()):.1f}" for m in METRICS]
            print(editor, text, moments.n_tokens, *means, flush=True)


if __name__ == "__main__":
    main()
