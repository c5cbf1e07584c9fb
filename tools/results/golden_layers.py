"""docs/results/golden-layers.md and its figures from the cells of the study that are there.

python tools/results/golden_layers.py            # write
python tools/results/golden_layers.py --check    # exit 1 if the page is out of date
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from render import RESULTS, table
from study import DATASETS, METHODS, MODELS, PROXY, SETTINGS, STUDY, TRACED, path_of

from goldenlayers.report.figures import OKABE_ITO, save, style
from goldenlayers.truth import Truth, transfer_matrix

Cell = dict[str, Any]
PAGE = RESULTS / "golden-layers.md"
READING = STUDY / "reading.md"
RANK_ONE = ("rome", "r-rome", "emmet")
# Choices by their name in compare.json, and what the page calls them.
LGA, KTA = "lga mlp sequence tukey", "transfer"
NAMES = {
    LGA: "LGA (the paper's: MLP, whole text, fences)",
    "lga mlp sequence raw": "LGA without fences",
    "lga mlp sequence cosine": "LGA, mean cosine",
    "lga mlp sequence normalised": "LGA over the gradients' norms",
    "lga mlp answer tukey": "LGA, answer loss",
    "lga mlp answer raw": "LGA, answer loss, without fences",
    "lga down sequence tukey": "LGA, down projection only",
    "lga attention sequence tukey": "LGA, attention",
    "lga block sequence tukey": "LGA, whole block",
    KTA: "KTA",
    "transfer reach": "KTA with reach",
    "lga+transfer mlp sequence": "LGA and KTA, mean of ranks",
    "cma": "CMA",
    "saliency mlp sequence": "saliency",
    "published": "published depth (1/6)",
    "middle": "middle layer",
    "random layer": "a random layer (expected)",
    f"{LGA} verified": "LGA, five best verified",
    f"{KTA} verified": "KTA, five best verified",
}
MAIN = (LGA, KTA, "cma", "saliency", "published", "middle", "random layer")
COLOURS = dict(zip(DATASETS, ("blue", "vermillion", "bluish green", "reddish purple"), strict=True))


def load() -> list[Cell]:
    """The cells that are there, in a fixed order."""
    paths = [path_of(m, d, e) for m in MODELS for d in DATASETS for e in METHODS]
    return [json.loads(p.read_text(encoding="utf-8")) for p in paths if p.exists()]


def truth_of(cell: Cell) -> Truth:
    """Overall by fact and layer."""
    values = np.array([[np.nan if v is None else v for v in row] for row in cell["overall"]])
    return Truth(tuple(cell["facts"]), tuple(range(values.shape[1])), {"overall": values})


def choices(cell: Cell) -> dict[str, dict[str, Any]]:
    return {one["name"]: one for one in cell["compare"]["choices"]}


def number(value: float | None, digits: int = 1) -> str:
    return "–" if value is None or value != value else f"{value:.{digits}f}"


def interval(one: dict[str, Any] | None) -> str:
    if not one or one.get("value") is None:
        return "–"
    low, high = one.get("low"), one.get("high")
    ends = "" if low is None or high is None else f" ({low:.1f}–{high:.1f})"
    return f"{one['value']:.1f}{ends}"


def mean_of(values: Iterable[float | None]) -> float:
    known = [v for v in values if v is not None and v == v]
    return statistics.fmean(known) if known else float("nan")


def existence(cells: Sequence[Cell]) -> str:
    rows = []
    for c in cells:
        golden = c["golden_layers"]["overall"]
        split = c["split_half"] or {}
        means = c["by_metric"]
        rows.append(
            [
                c["model"],
                c["data"],
                c["method"],
                str(golden),
                number(means["overall"][golden]),
                interval(c["oracle"]),
                interval(c["gap"]),
                f"{100 * c['wins'].get(str(golden), 0):.0f} %",
                interval(split.get("regret")) if split else "–",
                number(choices(c)["random layer"]["regret"]),
            ]
        )
    head = [
        "model",
        "data",
        "editor",
        "golden",
        "score",
        "oracle",
        "gap to oracle",
        "golden in resamples",
        "regret, half → half",
        "random layer's regret",
    ]
    return table(head, rows)


def carried(cells: Sequence[Cell], across: str, same: Sequence[str]) -> str:
    """Regret of the row's golden layer judged by the column, averaged over what is ``same``."""
    groups: dict[tuple[str, ...], dict[str, Truth]] = {}
    for c in cells:
        groups.setdefault(tuple(c[k] for k in same), {})[c[across]] = truth_of(c)
    order = METHODS if across == "method" else DATASETS
    found: dict[tuple[str, str], list[float]] = {}
    for truths in groups.values():
        names = [name for name in order if name in truths]
        if len(names) < 2:
            continue
        matrix = transfer_matrix({name: truths[name] for name in names}).to_json()
        for a, row in zip(names, matrix["regret"], strict=True):
            for b, value in zip(names, row, strict=True):
                found.setdefault((a, b), []).append(value["value"])
    names = [n for n in order if any(n == a for a, _ in found)]
    if not names:
        return "Not enough cells yet."
    rows = [[a, *(number(mean_of(found.get((a, b), []))) for b in names)] for a in names]
    return table(["chosen on ↓, judged on →", *names], rows)


def methods_table(cells: Sequence[Cell]) -> str:
    rows = []
    for name, title in NAMES.items():
        mine = [choices(c)[name] for c in cells if name in choices(c)]
        if not mine:
            continue
        regrets = [one["regret"] for one in mine]
        ups = [one["speed_up"] for one in mine if one["speed_up"]]
        rows.append(
            [
                title,
                str(len(mine)),
                number(mean_of(regrets)),
                number(max(r for r in regrets if r is not None)),
                *(f"{100 * mean_of(one['hit_at'].get(k) for one in mine):.0f} %" for k in "135"),
                number(mean_of(one["spearman"] for one in mine), 2),
                number(
                    statistics.median(
                        [one["seconds"] for one in mine if one["seconds"]] or [float("nan")]
                    )
                ),
                f"{statistics.median(ups):.0f}×" if ups else "–",
            ]
        )
    head = [
        "choice",
        "cells",
        "mean regret",
        "worst",
        "hit@1",
        "hit@3",
        "hit@5",
        "rank correlation",
        "seconds",
        "faster than the sweep",
    ]
    return table(head, rows)


def cell_table(cells: Sequence[Cell]) -> str:
    rows = []
    for c in cells:
        found = choices(c)
        row = [c["model"], c["data"], c["method"], str(c["golden_layers"]["overall"])]
        for name in MAIN:
            one = found.get(name)
            layer = "" if one is None or one["layer"] is None else f"{one['layer']}: "
            row.append("–" if one is None else f"{layer}{number(one['regret'])}")
        rows.append(row)
    return table(["model", "data", "editor", "golden", *(NAMES[n] for n in MAIN)], rows)


def sizes_table(cells: Sequence[Cell]) -> str:
    curves = by_size(cells)
    counts = sorted({n for points in curves.values() for n in points})
    rows = []
    for name, points in curves.items():
        row = [NAMES.get(name, name)]
        for n in counts:
            one = points.get(n)
            row.append(
                "–"
                if not one
                else f"{mean_of(r for r, _ in one):.1f} ({100 * mean_of(a for _, a in one):.0f} %)"
            )
        rows.append(row)
    return table(["choice", *(f"{n} facts" for n in counts)], rows)


def by_size(cells: Sequence[Cell]) -> dict[str, dict[int, list[tuple[float, float]]]]:
    """Rule → number of facts → (regret, agreement) of each cell that has that many."""
    wanted = (
        LGA,
        "lga mlp answer tukey",
        "lga mlp sequence cosine",
        KTA,
        "lga+transfer mlp sequence",
        "saliency mlp sequence",
    )
    found: dict[str, dict[int, list[tuple[float, float]]]] = {}
    for name in wanted:
        for c in cells:
            for curve in c["compare"]["proxy_sizes"]:
                if curve["name"] == name:
                    for point in curve["points"]:
                        where = found.setdefault(name, {}).setdefault(point["n"], [])
                        where.append((point["regret"], point["agreement"]))
    return found


def curves_figure(cells: Sequence[Cell], stem: Path) -> None:
    """Overall by layer of every cell: models down, editors across, a line per data set."""
    from matplotlib.figure import Figure

    models = [m for m in MODELS if any(c["model"] == m for c in cells)]
    methods = [e for e in METHODS if any(c["method"] == e for c in cells)]
    with style():
        figure = Figure(
            figsize=(2.6 * len(methods) + 1, 2.5 * len(models) + 0.6), layout="constrained"
        )
        axes = figure.subplots(len(models), len(methods), squeeze=False, sharey="row")
        for (i, model), (j, method) in [
            ((i, m), (j, e)) for i, m in enumerate(models) for j, e in enumerate(methods)
        ]:
            ax = axes[i, j]
            for c in cells:
                if c["model"] != model or c["method"] != method:
                    continue
                means = c["by_metric"]["overall"]
                colour = OKABE_ITO[COLOURS[c["data"]]]
                ax.plot(range(len(means)), means, color=colour, linewidth=1.2, label=c["data"])
                golden = c["golden_layers"]["overall"]
                ax.plot(
                    [golden],
                    [means[golden]],
                    marker="*",
                    color=colour,
                    markersize=9,
                    markeredgecolor="black",
                    markeredgewidth=0.5,
                )
            ax.set_title(f"{method}, {model}", fontsize=8)
            ax.grid(axis="y", linewidth=0.3)
            if j == 0:
                ax.set_ylabel("Overall")
            if i == len(models) - 1:
                ax.set_xlabel("edited layer")
        lines: dict[str, Any] = {}
        for ax in axes.flat:
            for line, label in zip(*ax.get_legend_handles_labels(), strict=True):
                lines.setdefault(label, line)
        figure.legend(
            lines.values(), lines.keys(), loc="outside lower center", ncols=4, frameon=False
        )
        save(figure, stem, ("svg",))


def sizes_figure(cells: Sequence[Cell], stem: Path) -> None:
    """Mean regret and agreement against the number of proxy facts."""
    from matplotlib.figure import Figure

    looks = zip(OKABE_ITO.values(), "osD^vP", strict=False)
    with style():
        figure = Figure(figsize=(7.6, 3.4), layout="constrained")
        left, right = figure.subplots(1, 2)
        for (name, points), (colour, mark) in zip(by_size(cells).items(), looks, strict=False):
            counts = sorted(points)
            look: dict[str, Any] = {
                "color": colour,
                "marker": mark,
                "linewidth": 1.2,
                "markersize": 5,
            }
            left.plot(
                counts,
                [mean_of(r for r, _ in points[n]) for n in counts],
                label=NAMES[name],
                **look,
            )
            # With all facts there is one subset, which agrees with itself.
            some = counts[:-1]
            right.plot(some, [100 * mean_of(a for _, a in points[n]) for n in some], **look)
        for ax, label in ((left, "mean regret (points)"), (right, "subsets that agree (%)")):
            ax.set_xscale("log")
            ax.set_xticks([5, 10, 20, 50, 100], ["5", "10", "20", "50", "100"])
            ax.minorticks_off()
            ax.set_xlabel("proxy facts")
            ax.set_ylabel(label)
            ax.set_ylim(bottom=0)
            ax.grid(linewidth=0.3)
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
        save(figure, stem, ("svg",))


def wanted(cells: Sequence[Cell]) -> str:
    """What was hoped for, and what came out."""
    rank_one = [c for c in cells if c["method"] in RANK_ONE]

    def regret(name: str, some: Sequence[Cell]) -> float:
        return mean_of(choices(c)[name]["regret"] for c in some if name in choices(c))

    def ratio(name: str, some: Sequence[Cell]) -> str:
        ups = [choices(c)[name]["speed_up"] for c in some if name in choices(c)]
        return f"{statistics.median([u for u in ups if u]):.0f}×"

    def against_cma(name: str) -> str:
        found = [
            (choices(c)["cma"]["seconds"] / choices(c)["cma"]["n_proxy"])
            / (choices(c)[name]["seconds"] / choices(c)[name]["n_proxy"])
            for c in cells
            if "cma" in choices(c)
        ]
        whole = [
            choices(c)["cma"]["seconds"] / choices(c)[name]["seconds"]
            for c in cells
            if "cma" in choices(c)
        ]
        return f"{statistics.median(found):.0f}× per fact, {statistics.median(whole):.1f}× as run"

    rho = mean_of(choices(c)[KTA]["spearman"] for c in rank_one)
    best = min(regret(f"{LGA} verified", cells), regret(f"{KTA} verified", cells))
    rows = [
        ["LGA's mean regret over all cells", "≤ 1.5", number(regret(LGA, cells))],
        ["CMA's mean regret over all cells", "no less than LGA's", number(regret("cma", cells))],
        ["KTA's mean regret, rank-one editors", "≤ 1.0", number(regret(KTA, rank_one))],
        ["KTA's mean rank correlation, rank-one editors", "≥ 0.8", number(rho, 2)],
        ["the better of the verified choices, mean regret", "≤ 0.5", number(best)],
        ["LGA faster than the sweep", "≥ 100×", ratio(LGA, cells)],
        ["KTA faster than the sweep", "≥ 100×", ratio(KTA, cells)],
        ["LGA faster than CMA", "≥ 10×", against_cma(LGA)],
        ["KTA faster than CMA", "≥ 10×", against_cma(KTA)],
    ]
    return table(["figure", "hoped for", "measured"], rows)


def page(cells: Sequence[Cell]) -> str:
    every = [(m, d, e) for m in MODELS for d in DATASETS for e in METHODS]
    done = {(c["model"], c["data"], c["method"]) for c in cells}
    left = [" × ".join(one) for one in every if one not in done]
    rank_one = [c for c in cells if c["method"] in RANK_ONE]
    tuned = [c for c in cells if c["method"] not in RANK_ONE]
    parts = [
        "# Golden layers: the study",
        "Written by `python tools/results/golden_layers.py` from the JSON files in `study/`, which "
        "`make study` computes (`python tools/results/study.py`). "
        f"{len(cells)} of {len(every)} cells are there; what is open stands at the end. ",
        f"A cell is a model, a data set and an editor. {cells[0]['n_test']} test facts are edited "
        "one at a time at every layer and scored; Overall is the mean of rewrite, rephrase, "
        "locality and portability, in points of 100. Layers are chosen on "
        f"{PROXY} proxy facts about other subjects ({TRACED} known ones for CMA, which is dear). "
        "*Regret* is the golden layer's test score minus the chosen layer's. Starter facts are "
        "such as the model knows; other data are taken as they come. Editors run with "
        f"{SETTINGS.steps} steps of length {SETTINGS.lr} and {SETTINGS.prefixes} sampled prefixes "
        "(a third of the default's work), key statistics from Wikipedia text. ROME, R-ROME and "
        "EMMET share the value search, and its time counts for each. Times are of one thread of a "
        "2-core machine that other work shared.",
        "With ten test facts a cell's golden layer is itself uncertain: the intervals say how "
        "much. A regret of a point or two is often within the noise of the test facts.",
        "## What was hoped for",
        wanted(cells),
    ]
    if READING.exists():
        parts.append(READING.read_text(encoding="utf-8").strip())
    parts += [
        "## Is there a golden layer?",
        "*Gap*: what each fact's own best layer would add (it is chosen after the fact, so it is "
        "flattered). *Half → half*: the layer chosen on a random half of the test facts, judged on "
        "the other half.",
        existence(cells),
        "![Overall by layer](study/curves.svg)",
        "## Does it carry over?",
        "Mean regret of the golden layer of one data set judged on another, same model and editor:",
        carried(cells, "data", ("model", "method")),
        "From one editor to another, same model and facts:",
        carried(cells, "method", ("model", "data")),
        "## Which method finds it?",
        "### Rank-one editors (ROME, R-ROME, EMMET)",
        methods_table(rank_one),
    ]
    if tuned:
        parts += ["### Fine-tuning (FT-M)", methods_table(tuned)]
    parts += [
        "### Cell by cell",
        "Chosen layer and its regret.",
        cell_table(cells),
        "## How many proxy facts?",
        "Mean regret over the cells when the layer is chosen on random subsets of the proxy facts, "
        "and how often the subsets agree on the most frequent layer.",
        sizes_table(cells),
        "![Regret and agreement by number of proxy facts](study/sizes.svg)",
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
        print("there is no cell yet: run python tools/results/study.py")
        return 1
    text = page(cells)
    if args.check:
        stale = not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text
        if stale:
            print(f"{PAGE} is out of date: run python tools/results/golden_layers.py")
        return int(stale)
    PAGE.write_text(text, encoding="utf-8")
    figures: list[tuple[Callable[[Sequence[Cell], Path], None], str]] = [
        (curves_figure, "curves"),
        (sizes_figure, "sizes"),
    ]
    for draw, name in figures:
        draw(cells, STUDY / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
