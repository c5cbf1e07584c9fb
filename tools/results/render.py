"""docs/results/editors.md and evaluation.md from the cells that are there.

python tools/results/render.py            # write
python tools/results/render.py --check    # exit 1 if a page is out of date
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results"
CELLS = RESULTS / "cells"
METHODS = (
    "none",
    "in-context",
    "rome",
    "r-rome",
    "memit",
    "emmet",
    "alphaedit",
    "pmet",
    "ft-m",
    "ft-l",
)
MANY = (
    ("batch", "memit"),
    ("batch", "emmet"),
    ("batch", "alphaedit"),
    ("sequential", "alphaedit"),
    ("sequential", "r-rome"),
)
TIMES = (
    "Seconds were taken beside up to a dozen other jobs on two cores: they tell of the order of "
    "magnitude at best. Editors below rome take its value search over, where they share it."
)
# Editors whose value search has a KL term.
SEARCHING = ("rome", "r-rome", "memit", "emmet", "alphaedit", "pmet")
EARLIER = (
    "† Computed before the KL term ran from the edited to the clean distribution, and before the "
    "bare prompt's key weighed one half; how far such figures move is measured in "
    "[earlier-study.md](earlier-study.md)."
)
EVALUATED = ("none", "in-context", "ft-m", "rome", "r-rome", "memit", "alphaedit")
Record = dict[str, Any]


def load(suite: str) -> list[Record]:
    """All cells of a suite, in a fixed order."""
    records = [json.loads(p.read_text(encoding="utf-8")) for p in (CELLS / suite).glob("*.json")]

    def key(record: Record) -> tuple[Any, ...]:
        c = record["cell"]
        return (
            c["model"],
            c["data"],
            -1 if c["layer"] is None else c["layer"],
            c["mode"],
            METHODS.index(c["method"]),
            c["statistics"],
        )

    return sorted(records, key=key)


def figure(record: Record, metric: str) -> str:
    """A mean with its 95 % bootstrap interval, in points of 100."""
    if metric == "overall":
        found = record["summary"].get("overall")
    else:
        found = record["summary"]["metrics"].get(metric)
    if not found or found.get("mean") is None:
        return "–"
    if metric == "perplexity":
        return f"{found['mean']:.2f}"
    mean, low, high = (found[k] for k in ("mean", "low", "high"))
    return f"{mean:.1f} ({low:.0f}–{high:.0f})"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)


def earlier(record: Record) -> bool:
    """Whether a cell is of the KL term and the key mean of before."""
    return record.get("cell", record)["method"] in SEARCHING and "reading" not in record


def done(path: Path) -> bool:
    """Whether a cell is there and need not be computed again."""
    return path.exists() and not earlier(json.loads(path.read_text(encoding="utf-8")))


def name_of(record: Record) -> str:
    return record["cell"]["method"] + (" †" if earlier(record) else "")


def with_note(text: str, records: Iterable[Record]) -> list[str]:
    """A table, and what its † means if there is one."""
    return [text, EARLIER] if any(earlier(r) for r in records) else [text]


def layer_of(record: Record) -> str:
    layer = record["cell"]["layer"]
    return "–" if layer is None else str(layer)


def rows_for(
    records: Iterable[Record], metrics: Sequence[str], lead: Callable[[Record], Sequence[str]]
) -> list[list[str]]:
    return [
        [
            *lead(r),
            *(figure(r, m) for m in metrics),
            f"{r['seconds'] / r['cell']['n_facts']:.1f}",
        ]
        for r in records
    ]


def editors_page() -> str:
    """Issue: every editor one fact at a time, then many facts, then statistics by source."""
    usual = ["rewrite", "rephrase", "locality", "portability"]
    parts: list[str] = [
        "# Editors on real models",
        "Written by `python tools/results/render.py` from the JSON files in `cells/`. Figures are "
        "means over facts in points of 100, with 95 % bootstrap intervals over facts in brackets. "
        "Facts are starter facts whose old answer the model gives by itself; settings are the "
        "defaults of when they were computed (`adam true steps 25`); "
        "key statistics come from Wikipedia text unless the table says otherwise. " + TIMES,
        "## One fact at a time",
        "`python tools/results/cells.py editors --model MODEL`: 30 facts, each edited on the "
        "untouched model. The first layer of each model is the one LGA chooses on 200 starter "
        "facts; its neighbour and the middle of the network stand beside it.",
    ]
    single = load("editors")
    for model in sorted({r["cell"]["model"] for r in single}):
        mine = [r for r in single if r["cell"]["model"] == model]
        parts.append(f"### {model}")
        head = ["layer", "editor", *usual, "s per fact"]
        rows = rows_for(mine, usual, lambda r: (layer_of(r), name_of(r)))
        parts += with_note(table(head, rows), mine)
        same = all(r["model_unchanged"] for r in mine)
        parts.append(
            "The model's fingerprint was the same after every cell as before it."
            if same
            else "**The model's fingerprint changed in some cell.**"
        )
    many = load("many")
    if many:
        parts += [
            "## Many facts",
            "`python tools/results/cells.py many --model MODEL`: all facts at once (batch), or one "
            "after another and all scored after the last (sequential). Perplexity is that of the "
            "edited model on held-out Wikipedia text (1024 tokens); `before` is the same text on "
            "the untouched model. To save time these cells use 15 steps of length 0.5 and 2 "
            "sampled prefixes.",
        ]
        metrics = ["rewrite", "rewrite_at_once", "locality"]
        head = [
            "model",
            "layer",
            "mode",
            "editor",
            "facts",
            *metrics,
            "perplexity",
            "before",
            "s per fact",
        ]
        rows = [
            [
                r["cell"]["model"],
                layer_of(r),
                r["cell"]["mode"],
                name_of(r),
                str(r["cell"]["n_facts"]),
                *(figure(r, m) for m in metrics),
                figure(r, "perplexity"),
                before_perplexity(r),
                f"{r['seconds'] / r['cell']['n_facts']:.1f}",
            ]
            for r in many
        ]
        parts += with_note(table(head, rows), many)
        done = {(r["cell"]["mode"], r["cell"]["method"]) for r in many}
        left = [f"{method} {mode}" for mode, method in MANY if (mode, method) not in done]
        if left:
            parts.append("Still open: " + ", ".join(left) + ".")
    sources = load("statistics")
    if sources:
        parts += [
            "## Key statistics by source of text",
            "`python tools/results/cells.py statistics --model MODEL`: the same edits with the "
            "covariance of Wikipedia text, of text sampled from the model itself, and with none "
            "(the identity, which is another algorithm).",
        ]
        head = ["model", "layer", "editor", "text", *usual, "s per fact"]
        rows = rows_for(
            sources,
            usual,
            lambda r: (r["cell"]["model"], layer_of(r), name_of(r), r["cell"]["statistics"]),
        )
        parts += with_note(table(head, rows), sources)
    parts += texts()
    parts += key_means()
    return "\n\n".join(parts) + "\n"


def texts() -> list[str]:
    """The same edits with C from several texts, and from more or less of them."""
    paths = sorted((CELLS / "texts").glob("*.json"))
    records = [json.loads(p.read_text(encoding="utf-8")) for p in paths]
    if not records:
        return []
    found = {(row["text"], row["widths"]) for r in records for row in r["rows"]}
    order = [(t, w) for t in ("wikipedia", "model", "package", "none") for w in (10, 40, 4, 0)]
    columns = [one for one in order if one in found]
    rows: list[list[str]] = []
    for r in records:
        cells: dict[str, dict[tuple[str, int], str]] = {}
        for row in r["rows"]:
            means = [sum(s.values()) / len(s) for s in row["scores"].values() if s]
            place = cells.setdefault(row["editor"], {})
            place[row["text"], row["widths"]] = " / ".join(f"{mean:.0f}" for mean in means)
        facts = f"{len(r['facts'])} {r['data']}"
        for editor, mine in cells.items():
            scores = [mine.get(column, "–") for column in columns]
            rows.append([r["model"], facts, str(r["layer"]), editor, *scores])
    heads = [f"{text}, {widths} ×" if widths else text for text, widths in columns]
    return [
        "`python tools/results/texts.py --model MODEL --data DATA --layer LAYER`: the same values "
        "written with the covariance of other texts, and of more or less of them (tokens in MLP "
        "widths). *rewrite / rephrase / locality*, means; one fact of 12 is 8 points. `package` is "
        "the text that comes with the package, the default. What is missing is open.",
        table(["model", "facts", "layer", "editor", *heads], rows),
    ]


def key_means() -> list[str]:
    """Which mean of a fact's keys edits better."""
    paths = sorted((CELLS / "keys").glob("*.json"))
    records = [json.loads(p.read_text(encoding="utf-8")) for p in paths]
    if not records:
        return []
    metrics = list(records[0]["metrics"])
    head = ["model", "facts", "editor", "mode", *metrics]
    rows = [
        [
            r["model"],
            f"{len(r['facts'])} {r['data']}",
            r["method"],
            r["mode"],
            *(
                f"{m['half']:.1f} – {m['alike']:.1f}: {m['difference']:+.1f} ± {m['se']:.1f}"
                for m in r["metrics"].values()
            ),
        ]
        for r in records
    ]
    return [
        "## The mean of the keys",
        "`python tools/results/key_mean.py --model MODEL --layer LAYER`: MEMIT, EMMET, AlphaEdit "
        "and PMET write on a fact's mean key. In the released code the bare prompt weighs one half "
        "and the sampled prefixes the other; the alternative weighs all six alike. The same facts "
        "(none of those of the other tables), the same values, both means: *half* – *alike*: mean "
        "difference by fact ± its standard error, in points.",
        table(head, rows),
    ]


def before_perplexity(record: Record) -> str:
    found = record["summary"]["metrics"].get("perplexity_before")
    return "–" if not found or found.get("mean") is None else f"{found['mean']:.2f}"


def evaluation_page() -> str:
    """Issue: models × data sets × editors at the LGA layer."""
    metrics = ["rewrite", "rephrase", "locality", "portability", "overall", "generation_rewrite"]
    parts = [
        "# Evaluation at the LGA layer",
        "Written by `python tools/results/render.py` from the JSON files in `cells/`. 20 facts per "
        "cell, single mode; means in points of 100 with 95 % bootstrap intervals over facts. "
        "`generation_rewrite` is free greedy decoding with a normalised match, the realistic "
        "figure beside the teacher-forced ones. "
        f"Command: `python tools/results/cells.py evaluation --model MODEL`. {TIMES}",
    ]
    records = load("evaluation")
    counts = Counter((r["cell"]["model"], r["cell"]["data"]) for r in records)
    done = set(counts)
    for model, data in sorted(done):
        mine = [r for r in records if (r["cell"]["model"], r["cell"]["data"]) == (model, data)]
        parts.append(f"## {model}, {data}")
        known = {r["known"] for r in mine if "known" in r}
        if known and min(known) < mine[0]["cell"]["n_facts"]:
            parts.append(
                f"The model gives the old answer of {min(known)} of these facts by itself."
            )
        head = ["editor", "layer", *metrics, "s per fact"]
        rows = rows_for(mine, metrics, lambda r: (name_of(r), layer_of(r)))
        parts += with_note(table(head, rows), mine)
    open_cells = [
        f"{model} × {data}"
        + (f" ({counts[model, data]} of {len(EVALUATED)} editors)" if counts[model, data] else "")
        for model in ("gemma3-270m", "smollm2-135m")
        for data in (
            "starter",
            "counterfact_500",
            "ZsRE-test-all",
            "counterfact_3k",
            "wiki_counterfact",
            "wiki_recent",
            "WikiBio",
        )
        if counts[model, data] < len(EVALUATED)
    ]
    if open_cells:
        parts.append("## Still open\n\n" + "\n".join(f"- {cell}" for cell in open_cells))
    return "\n\n".join(parts) + "\n"


def written(pages: Mapping[Path, str], script: str, *, check: bool) -> int:
    """Write pages; or only say which are out of date, and hand back 1 if some are."""
    stale = []
    for path, text in pages.items():
        if not check:
            path.write_text(text, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(path)
    for path in stale:
        print(f"{path} is out of date: run python tools/results/{script}")
    return 1 if stale else 0


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the pages of docs/results from the cells.")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    pages = {
        RESULTS / f"{name}.md": page()
        for name, page in (("editors", editors_page), ("evaluation", evaluation_page))
        if (CELLS / name).exists()
    }
    return written(pages, "render.py", check=args.check)


if __name__ == "__main__":
    sys.exit(main())
