"""The tables of docs/results/golden-layers.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import yaml
from choices import ON_STARTER, PUBLISHED, RACE, RANDOM
from render import RESULTS, table

PLAN = RESULTS.parents[1] / "studies" / "golden-layers.yaml"
Found = Mapping[str, Any]
DEPTHS = {"1/6": 1 / 6, "1/3": 1 / 3, "1/2": 1 / 2, "2/3": 2 / 3, "5/6": 5 / 6}


def points(value: float | None, sign: bool = False) -> str:
    """A figure in points, or a dash."""
    return "–" if value is None else f"{value:{'+' if sign else ''}.1f}"


def wanted(found: Found) -> str:
    """What was wanted, and what was measured."""
    choice, floors = found["default_choice"], found["noise_floors"]
    of = found["choices"].get(choice["name"], {})
    rows = []
    for kind in ("all", "rome family", "fine-tuning"):
        if of.get(kind) is not None:
            rows.append(
                [
                    f"mean regret of the race, {kind}",
                    "at most 1.0 above the noise floor",
                    f"{of[kind]:.1f}, noise floor {floors[kind]:.1f}: "
                    f"{of[kind] - floors[kind]:+.1f}",
                ]
            )
    rows.append(
        [
            "worst cell against one sixth of the depth",
            "at most 1 point worse",
            points(choice["worst_against_published"], sign=True),
        ]
    )
    served = [row for row in found["rows"] if ON_STARTER in row["regrets"]]
    if served:
        lost = [row["regrets"][ON_STARTER] - row["regrets"][PUBLISHED] for row in served]
        floor = mean(row["noise_floor"] for row in served)
        regret = mean(row["regrets"][ON_STARTER] for row in served)
        rows.append(
            [
                "`--layer auto` without an atlas: a race on starter facts, judged by other kinds",
                "at most 1.0 above the noise floor, at most 1 point worse",
                f"{regret:.1f}, noise floor {floor:.1f}: {regret - floor:+.1f}; over one sixth "
                f"{between(found['against_published'][ON_STARTER])}, worst cell {max(lost):+.1f} "
                f"({len(served)} cells)",
            ]
        )
    rows.append(
        [
            "its cost",
            "at most the time of 120 edits",
            f"{points(choice['cost_edits'])} edits",
        ]
    )
    if own := found["per_fact"]:
        rows.append(
            [
                "a layer for each fact, disjoint probes, against the best fixed layer",
                "at least +3, interval above 0",
                f"{own['gain']:+.1f} ({own['low']:+.1f} to {own['high']:+.1f}), {own['cells']} "
                f"cells; the facts' own best layers: {own['gap']:+.1f}",
            ]
        )
    return table(["figure", "wanted", "measured"], rows)


def choices_table(found: Found) -> str:
    """Mean regret of every choice, over all cells and by model, and its lead."""
    models, rows = found["models"], []
    for name, of in sorted(
        found["choices"].items(), key=lambda item: item[1].get("all") or float("inf")
    ):
        lead = found["against_published"].get(name)
        rows.append(
            [
                name,
                points(of["all"]),
                *(points(mean_of(found, name, model)) for model in models),
                "–" if lead is None else between(lead),
            ]
        )
    floor = [
        "*noise floor*",
        points(found["noise_floors"]["all"]),
        *(points(mean_of(found, None, model)) for model in models),
        "",
    ]
    return table(["choice", "all cells", *models, "against the published depth"], [floor, *rows])


def between(figures: Sequence[float]) -> str:
    """A difference with its interval."""
    value, low, high = figures
    return f"{value:+.1f} ({low:+.1f} to {high:+.1f})"


def mean_of(found: Found, name: str | None, model: str) -> float | None:
    """A choice's mean regret over a model's cells; without a name the noise floor's."""
    values = [
        row["noise_floor"] if name is None else row["regrets"][name]
        for row in found["rows"]
        if row["model"] == model and (name is None or name in row["regrets"])
    ]
    return sum(values) / len(values) if values else None


def existence(found: Found) -> str:
    """Cell by cell: the golden layer, how sure it is, and what other layers lose."""
    rows = []
    for row in found["rows"]:
        place = row["layers"].index(row["golden_layer"])
        best, ends = row["means"][place], row["ends"][place]
        gap, low, high = row["oracle_gap"]
        rows.append(
            [
                f"{row['model']}, {row['data']}, {row['editor']}",
                str(row["golden_layer"]),
                f"{row['golden_in_resamples']:.0%}",
                "{} ({} to {})".format(*map(points, (best, *ends))),
                points(best - row["means"][row["layers"].index(row["published_layer"])]),
                points(row["regrets"][RANDOM]),
                f"{gap:.1f} ({low:.1f} to {high:.1f})",
            ]
        )
    head = ["cell", "golden layer", "golden in resamples", "Overall there"]
    head += ["published depth loses", "random layer loses", "the facts' own best layers add"]
    return table(head, rows)


def carried(found: Found, by: str, same: tuple[str, str]) -> str:
    """Mean loss of the golden layer of one data set (or editor) on another."""
    names = list(dict.fromkeys(row[by] for row in found["rows"]))
    cells = {(row[by], *(row[key] for key in same)): row for row in found["rows"]}
    rows = []
    for chosen in names:
        said = []
        for judged in names:
            lost = []
            for (one, *rest), row in cells.items():
                other = cells.get((chosen, *rest))
                if one == judged and other and other["golden_layer"] in row["layers"]:
                    means = row["means"]
                    place = row["layers"].index(other["golden_layer"])
                    lost.append(means[row["layers"].index(row["golden_layer"])] - means[place])
            said.append(points(sum(lost) / len(lost)) if lost else "–")
        rows.append([chosen, *said])
    return table(["chosen on ↓, judged on →", *names], rows)


def kinds_table(found: Found) -> str:
    """How much of each kind of locality stays at five depths, and how many edits take there."""
    rows = []
    for kind, whose in (("subject", "the subject's other answers"), ("neighbour", "neighbours'")):
        cells = [row for row in found["rows"] if kind in row["by_kind"]]
        for editor in dict.fromkeys(row["editor"] for row in cells):
            some = [row for row in cells if row["editor"] == editor]
            rows.append(
                [
                    whose,
                    editor,
                    str(len(some)),
                    *(
                        " / ".join(
                            f"{mean(_at_depth(row, name, depth) for row in some):.0f}"
                            for name in (kind, "rewrite")
                        )
                        for depth in DEPTHS.values()
                    ),
                ]
            )
    return table(["what must stay", "editor", "cells", *DEPTHS], rows)


def _at_depth(row: Found, name: str, depth: float) -> float:
    """A figure of a cell at the swept layer that is nearest to a share of the depth."""
    wanted = depth * row["n_layers"]
    place = min(range(len(row["layers"])), key=lambda i: abs(row["layers"][i] - wanted))
    return float(row["by_kind"][name][place])


def promises(found: Found) -> str:
    """What a race's choice led by, where it leaves the published depth, and what judges find."""
    rows = []
    for row in found["rows"]:
        if row["promised"]:
            value, low, high, truly = row["promised"]
            where = f"{row['model']}, {row['data']}, {row['editor']}"
            rows.append(
                [where, f"{row['moved']:.0%}", between((value, low, high)), f"{truly:+.1f}"]
            )
    return table(["cell", "leaves it", "led by", "leads the judges' facts by"], rows)


def expected(found: Found) -> str:
    """Shares of hits by the probability, and what the race expects."""
    cells = list(dict.fromkeys(cell for one in found["expected_hits"] for cell in one["shares"]))
    rows = [
        [
            f"{one['kind']}, {one['from']} to {one['from'] + 10}",
            f"{one['expected']:.0f}",
            *(f"{one['shares'][c]:.0f}" if c in one["shares"] else "–" for c in cells),
        ]
        for one in found["expected_hits"]
    ]
    return table(["soft score (%)", "expected hits (%)", *cells], rows)


def sinks(found: Found) -> str:
    """The layers that LGA's variants name, by model and data set."""
    names = ("lga", "lga-no-sink", "lga-lookup", "lga-answer")
    rows = {}
    for row in found["rows"]:
        layers = [str(row["chosen"].get(name, "–")) for name in names]
        rows[row["model"], row["data"]] = [f"{row['model']}, {row['data']}", *layers]
    return table(["cell", *names], list(rows.values()))


SINKS = {"smollm2-135m": (2, 9, 11, 28)}  # layers that carry the first token's activations


def sink_edits(found: Found) -> str:
    """How many edits take at the sink's layers, and at the two layers beside each."""
    rows = []
    for row in found["rows"]:
        sinks = SINKS.get(row["model"], ())
        if not sinks or row["layers"] != list(range(row["n_layers"])):
            continue
        took = row["by_kind"]["rewrite"]
        beside = [(took[one - 1] + took[one + 1]) / 2 for one in sinks]
        there = [f"{took[s]:.0f} / {b:.0f}" for s, b in zip(sinks, beside, strict=True)]
        rows.append([f"{row['model']}, {row['data']}, {row['editor']}", *there])
    numbers = [f"layer {one}" for some in SINKS.values() for one in some]
    return table(["cell", *numbers], rows)


def cells_table(found: Found) -> str:
    """Cell by cell: golden layer, floor, regrets."""
    names = [PUBLISHED, RACE, "lga", "lga-answer", "transfer", "transfer-align"]
    rows = []
    for row in found["rows"]:
        said = []
        for name in names:
            layer = row["chosen"].get(name)
            regret = points(row["regrets"].get(name))
            said.append(regret if layer is None else f"{regret} ({layer})")
        where = f"{row['model']}, {row['data']}, {row['editor']}"
        rows.append([where, points(row["noise_floor"]), *said])
    return table(["cell", "noise floor", *names], rows)


def dials(found: Found) -> str:
    """What a layer's choice is worth beside that of the editor."""
    cells: dict[tuple[str, str], dict[str, Found]] = {}
    for row in found["rows"]:
        cells.setdefault((row["model"], row["data"]), {})[row["editor"]] = row
    rows = []
    for (model, data), of in cells.items():
        if "rome" not in of:
            continue

        def at(editor: str, layer: str, of: dict[str, Found] = of) -> float:
            row = of[editor]
            return row["means"][row["layers"].index(row[layer])]

        base = at("rome", "published_layer")
        best = max(of, key=lambda editor: at(editor, "golden_layer"))
        rows.append(
            [
                f"{model}, {data}",
                points(base),
                points(at("rome", "golden_layer") - base, sign=True),
                points(at("clear-rome", "published_layer") - base, sign=True)
                if "clear-rome" in of
                else "–",
                f"{at(best, 'golden_layer') - base:+.1f} ({best}, layer "
                f"{of[best]['golden_layer']})",
            ]
        )
    head = ["cell", "ROME at the published depth", "the best layer", "clear-rome", "best of both"]
    return table(head, rows)


def shares(found: Found) -> str:
    """Per fact: gain by how much of the evidence is the fact's own."""
    by_share = found["per_fact"].get("by_share", {})
    rows = [
        [f"{float(s):.0%}", f"{g:+.1f} ({low:+.1f} to {high:+.1f})"]
        for s, (g, low, high) in by_share.items()
    ]
    return table(["the fact's own evidence", "against the best fixed layer"], rows)


def missing(found: Found) -> list[str]:
    """The cells of the plan that are not there, with the editors that they lack."""
    plan = yaml.safe_load(PLAN.read_text(encoding="utf-8"))
    there = {(row["model"], row["data"], row["editor"]) for row in found["rows"]}
    editors = [one if isinstance(one, str) else one["editor"] for one in plan["editors"]]
    lacking = []
    for model in plan["models"]:
        one = {"model": model} if isinstance(model, str) else model
        for data in map(_stem, one.get("data", plan["data"])):
            left = [e for e in editors if (one["model"], data, e) not in there]
            if left:
                every = "all editors" if left == editors else ", ".join(left)
                lacking.append(f"- {one['model']} × {data}: {every}")
    return lacking


def _stem(data: str | dict[str, str]) -> str:
    return Path(data).stem if isinstance(data, str) else data.get("name", Path(data["data"]).stem)
