"""The tables of docs/results/earlier-study.md."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from earlier_record import (
    BY_BLOCK,
    DATASETS,
    KTA,
    LGA,
    MAIN,
    METHODS,
    MODELS,
    NAMES,
    RANK_ONE,
    SPREAD,
    STUDY,
    Cell,
    agreement,
    by_chance,
    by_size,
    choices,
    mean_of,
    number,
    truth_of,
)
from render import earlier, table

from goldenlayers.truth import Truth, transfer_matrix

CONTROLS = STUDY / "controls.json"
MOVED = STUDY / "moved.json"
RACES = STUDY / "races.json"


def interval(one: dict[str, Any] | None) -> str:
    if not one or one.get("value") is None:
        return "–"
    low, high = one.get("low"), one.get("high")
    ends = "" if low is None or high is None else f" ({low:.1f}–{high:.1f})"
    return f"{one['value']:.1f}{ends}"


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
                " / ".join(number(value, 2) for value in agreement(c)),
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
        "rank correlation, half ↔ half / ceiling",
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


def blocks_table(cells: Sequence[Cell]) -> str:
    """Mean regret over the editors, by model and data set."""
    pairs = [(m, d) for m in MODELS for d in DATASETS]
    columns = {p: [c for c in cells if (c["model"], c["data"]) == p] for p in pairs}
    columns = {pair: some for pair, some in columns.items() if some}
    rows = [
        [
            NAMES[name],
            *(
                number(mean_of(choices(c)[name]["regret"] for c in some if name in choices(c)))
                for some in columns.values()
            ),
        ]
        for name in BY_BLOCK
        if any(name in choices(c) for c in cells)
    ]
    return table(["choice", *(f"{m}, {d}" for m, d in columns)], rows)


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


def wanted(cells: Sequence[Cell]) -> str:
    """What was hoped for, and what came out."""
    rank_one = [c for c in cells if c["method"] in RANK_ONE]

    def regret(name: str, some: Sequence[Cell]) -> float:
        return mean_of(choices(c)[name]["regret"] for c in some if name in choices(c))

    def ratio(seconds: Callable[[Cell], tuple[float, int]], name: str) -> str:
        """How much faster per fact, and as it was run with the numbers of facts it was given."""
        pairs = [
            (*seconds(c), choices(c)[name]["seconds"], choices(c)[name]["n_proxy"])
            for c in cells
            if name in choices(c) and "cma" in choices(c)
        ]
        each = statistics.median((a / n) / (b / m) for a, n, b, m in pairs)
        whole = statistics.median(a / b for a, n, b, m in pairs)
        return f"{each:.0f}× per fact, {whole:.1f}× as run"

    def sweep(c: Cell) -> tuple[float, int]:
        return c["sweep_seconds"], c["n_test"]

    def cma(c: Cell) -> tuple[float, int]:
        return choices(c)["cma"]["seconds"], choices(c)["cma"]["n_proxy"]

    rho = mean_of(choices(c)[KTA]["spearman"] for c in rank_one)
    ceiling = mean_of(agreement(c)[1] for c in rank_one)
    verified = [f"{LGA} verified", f"{KTA} verified", f"{KTA} verified{SPREAD}"]
    best = min(verified, key=lambda name: regret(name, cells))
    aligned = mean_of(choices(c)["transfer align"]["spearman"] for c in rank_one)
    chance = mean_of(by_chance(c) for c in cells)
    rows = [
        ["LGA's mean regret over all cells", "≤ 1.5", number(regret(LGA, cells))],
        ["CMA's mean regret over all cells", "no less than LGA's", number(regret("cma", cells))],
        [
            "KTA's mean regret, rank-one editors",
            "≤ 1.0",
            f"{number(regret(KTA, rank_one))}; with alignment "
            f"{number(regret('transfer align', rank_one))}",
        ],
        [
            "KTA's mean rank correlation, rank-one editors",
            "≥ 0.8",
            f"{number(rho, 2)}; with alignment {number(aligned, 2)} (ceiling, from the noise of "
            f"the test facts: {number(ceiling, 2)})",
        ],
        [
            "the best of the verified choices, mean regret",
            "≤ 0.5",
            f"{number(regret(best, cells))} (rank-one editors {number(regret(best, rank_one))}): "
            f"{NAMES[best]}",
        ],
        ["LGA faster than the sweep", "≥ 100×", ratio(sweep, LGA)],
        ["KTA faster than the sweep", "≥ 100×", ratio(sweep, KTA)],
        ["LGA faster than CMA", "≥ 10×", ratio(cma, LGA)],
        ["KTA faster than CMA", "≥ 10×", ratio(cma, KTA)],
    ]
    floor = (
        "With so few test facts the layer that is truly best would itself show a regret of "
        f"{number(chance)} points on average (bootstrap over the test facts): less than that "
        "cannot be told from luck."
    )
    return table(["figure", "hoped for", "measured"], rows) + "\n\n" + floor


def controls() -> str:
    """LGA beside itself with other facts' answers."""
    if not CONTROLS.exists():
        return ""
    record = json.loads(CONTROLS.read_text(encoding="utf-8"))
    rows = [
        [
            one["model"],
            one["data"],
            {"sequence": "whole text", "answer": "answer"}[one["loss"]],
            str(one["layer"]),
            str(one["layer_with_other_answers"]),
            number(one["correlation_with_other_answers"], 2),
            number(one["correlation_with_norms"], 2),
        ]
        for _, one in sorted(record.items())
    ]
    head = [
        "model",
        "data",
        "loss",
        "LGA's layer",
        "with other facts' answers",
        "rank correlation of the two",
        "of LGA with the gradients' norms alone",
    ]
    return table(head, rows)


def earlier_note(cells: Sequence[Cell]) -> list[str]:
    """Which cells are of the KL term and the key mean of before, and how far figures move."""
    old = [c for c in cells if earlier(c)]
    if not old:
        return []
    text = (
        f"**{len(old)} of {len(cells)} cells are of an earlier loss**: those of "
        f"{', '.join(sorted({c['method'] for c in old}))}. They were computed before the value "
        "search's KL term ran from the edited to the clean distribution, as published, and before "
        "the bare prompt's key weighed one half in EMMET. FT-M has no such term."
    )
    if not MOVED.exists():
        return [text]
    record = json.loads(MOVED.read_text(encoding="utf-8"))
    rows = [
        [
            *name.split(" "),
            ", ".join(map(str, one["layers"])),
            " ".join(f"{x:.0f}" for x in one["before"]),
            " ".join(f"{x:.0f}" for x in one["after"]),
            f"{one['difference']:+.1f} ± {one['se']:.1f}",
            f"{one['absolute']:.1f}",
        ]
        for name, one in sorted(record.items())
    ]
    head = ["model", "data", "editor", "layers", "before", "after", "difference", "absolute"]
    return [
        f"{text} How far that moves the figures: the test facts "
        "edited again at some layers. *Before*, *after*: Overall of each of these layers; "
        "*difference*: after minus before, mean over facts ± standard error; *absolute*: mean size "
        "of the difference of one fact at one layer.",
        table(head, rows),
    ]


def races() -> str:
    """What races of different candidates and lengths come to."""
    if not RACES.exists():
        return ""
    rows = [
        [
            one["candidates"],
            str(one["facts"]),
            number(one["edits"], 0),
            number(one["regret"]["rome"]),
            number(one["worst"]["rome"]),
            number(one["regret"]["ft-m"]),
            number(one["worst"]["ft-m"]),
        ]
        for one in json.loads(RACES.read_text(encoding="utf-8"))
    ]
    head = ["candidates", "facts at most", "edits", "ROME: mean regret", "worst cell"]
    head += ["FT-M: mean regret", "worst cell"]
    return table(head, rows)
