"""docs/results/earlier-study.md and its figures, from the cells kept in docs/results/cells/earlier.

python tools/results/earlier_study.py            # write
python tools/results/earlier_study.py --check    # exit 1 if the page is out of date
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from cells import QUICK
from earlier_figures import curves_figure, sizes_figure
from earlier_record import (
    DATASETS,
    METHODS,
    MODELS,
    PROXY,
    RANK_ONE,
    STUDY,
    TRACED,
    Cell,
    load,
)
from earlier_tables import (
    blocks_table,
    carried,
    cell_table,
    controls,
    earlier_note,
    existence,
    methods_table,
    races,
    sizes_table,
    wanted,
)
from render import RESULTS, written

PAGE = RESULTS / "earlier-study.md"
READING = STUDY / "reading.md"


def page(cells: Sequence[Cell]) -> str:
    every = [(m, d, e) for m in MODELS for d in DATASETS for e in METHODS]
    done = {(c["model"], c["data"], c["method"]) for c in cells}
    left = [" × ".join(one) for one in every if one not in done]
    rank_one = [c for c in cells if c["method"] in RANK_ONE]
    tuned = [c for c in cells if c["method"] not in RANK_ONE]
    parts = [
        "# The earlier study: ten facts a cell",
        "Written by `python tools/results/earlier_study.py` from the JSON files in "
        "`cells/earlier/`. [Golden layers](golden-layers.md) has the study that came after it, "
        "with four times the facts; this one has editors and methods that the later one has not. "
        "Here locality probes that contradict the edit are counted as the data sets publish them. "
        f"{len(cells)} of {len(every)} cells are there. ",
        f"A cell is a model, a data set and an editor. {cells[0]['n_test']} test facts are edited "
        "one at a time at every layer and scored; Overall is the mean of rewrite, rephrase, "
        "locality and portability, in points of 100. Layers are chosen on "
        f"{PROXY} proxy facts about other subjects ({TRACED} known ones for CMA, which is dear). "
        "*Regret* is the golden layer's test score minus the chosen layer's. Starter facts are "
        "such as the model knows; other data are taken as they come, facts with more kinds of "
        "probes first. Editors run with "
        f"{QUICK['steps']} steps of length {QUICK['lr']} and {QUICK['prefixes']} sampled prefixes "
        "(a third of the default's work), key statistics from Wikipedia text. ROME, R-ROME and "
        "EMMET share the value search, and its time counts for each. Times are of one thread of a "
        "2-core machine that other work shared.",
        "With ten test facts a cell's golden layer is itself uncertain: the intervals say how "
        "much.",
        *earlier_note(cells),
        "## What was hoped for",
        wanted(cells),
    ]
    if READING.exists():
        parts.append(READING.read_text(encoding="utf-8").strip())
    parts += [
        "## Is there a golden layer?",
        "*Gap*: what each fact's own best layer would add (it is chosen after the fact, so it is "
        "flattered). *Half → half*: the layer chosen on a random half of the test facts, judged on "
        "the other half. *Half ↔ half*: the rank correlation of the layers' scores on the two "
        "halves; *ceiling*: what follows from it (Spearman–Brown) for the rank correlation that a "
        "method which knew the true order could be expected to show in the tables below.",
        existence(cells),
        "![Overall by layer](cells/earlier/curves.svg)",
        "## Does it carry over?",
        "Mean regret of the golden layer of one data set judged on another, same model and editor:",
        carried(cells, "data", ("model", "method")),
        "From one editor to another, same model and facts:",
        carried(cells, "method", ("model", "data")),
        "## Which method finds it?",
        "### Rank-one editors (ROME, R-ROME, EMMET)",
        methods_table(rank_one),
    ]
    parts += ["Mean regret by model and data set:", blocks_table(rank_one)]
    if tuned:
        parts += ["### Fine-tuning (FT-M)", methods_table(tuned)]
    if controls():
        parts += [
            "### What LGA's ranking is made of",
            "LGA on the same proxy facts, with both answers of each fact replaced by those of "
            "another (`python tools/results/controls.py`): if the layers are ranked the same, the "
            "ranking does not come from what is to be edited. Beside it, the rank correlation of "
            "S_L with the summed products of the two gradients' norms, their angle left out.",
            controls(),
        ]
    if races():
        parts += [
            "### How many edits does a verified choice need?",
            "Races replayed on the sweeps' own scores: the facts "
            "to race on are drawn from the test facts, which flatters the race. KTA is made for "
            "rank-one edits.",
            races(),
        ]
    parts += [
        "### Cell by cell",
        "Chosen layer and its regret.",
        cell_table(cells),
        "## How many proxy facts?",
        "Rank-one editors: mean regret over the cells when the layer is chosen on random subsets "
        "of the proxy facts, and how often the subsets agree on the most frequent layer. 200 and "
        "300 facts are of the data sets that have so many, so their columns are of other cells.",
        sizes_table(rank_one),
        "![Regret and agreement by number of proxy facts](cells/earlier/sizes.svg)",
    ]
    if left:
        parts += ["## Still open", "\n".join(f"- {one}" for one in left)]
    return "\n\n".join(parts) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the study's page from its cells.")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    cells = load()
    if not cells:
        print("there is no cell")
        return 1
    status = written({PAGE: page(cells)}, "earlier_study.py", check=args.check)
    if not args.check:
        curves_figure(cells, STUDY / "curves")
        sizes_figure([c for c in cells if c["method"] in RANK_ONE], STUDY / "sizes")
    return status


if __name__ == "__main__":
    sys.exit(main())
