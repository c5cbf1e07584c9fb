"""docs/results/choices.md and its figure, from the cells kept in docs/results/cells/layers.

python tools/results/choices.py                  # first: summary.json, minutes
python tools/results/choices_page.py             # write
python tools/results/choices_page.py --check     # exit 1 if the page is out of date
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from choices import EDITS, NAMED_SHARE, PUBLISHED, RACE, RANDOM, STUDY, SUMMARY
from render import RESULTS, table, written

from goldenlayers.report.figures import OKABE_ITO, STAR, save, style

PAGE = RESULTS / "choices.md"
READING = STUDY / "reading.md"
PLAN = RESULTS.parents[1] / "studies" / "golden-layers.yaml"
_COLOURS = dict(
    zip(
        ("rome", "clear-rome", "memit", "alphaedit", "ft-m"),
        ("blue", "vermillion", "bluish green", "reddish purple", "orange"),
        strict=True,
    )
)
Found = Mapping[str, Any]


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
    rows.append(["its cost", f"at most {EDITS} full edits", points(choice["cost_edits"])])
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
    """Mean regret of every choice, by kind of editor."""
    kinds = [k for k, floor in found["noise_floors"].items() if floor is not None]
    rows = [
        [name, *(points(of.get(kind)) for kind in kinds)]
        for name, of in sorted(
            found["choices"].items(), key=lambda item: item[1].get("all") or float("inf")
        )
    ]
    floor = ["*noise floor*", *(points(found["noise_floors"][kind]) for kind in kinds)]
    return table(["choice", *kinds], [floor, *rows])


def cells_table(found: Found) -> str:
    """Cell by cell: golden layer, floor, regrets."""
    names = [PUBLISHED, RANDOM, RACE, "lga", "lga-answer", "transfer-align"]
    rows = []
    for row in found["rows"]:
        said = []
        for name in names:
            layer = row["chosen"].get(name)
            regret = points(row["regrets"].get(name))
            said.append(regret if layer is None else f"{regret} ({layer})")
        where = f"{row['model']}, {row['data']}, {row['editor']}"
        rows.append([where, str(row["golden_layer"]), points(row["noise_floor"]), *said])
    return table(["cell", "golden layer", "noise floor", *names], rows)


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
    """The cells of the plan that are not there."""
    plan = yaml.safe_load(PLAN.read_text(encoding="utf-8"))
    there = {(row["model"], row["data"]) for row in found["rows"]}
    models = [m if isinstance(m, str) else m["model"] for m in plan["models"]]
    data = [
        Path(d).stem if isinstance(d, str) else d.get("name", Path(d["data"]).stem)
        for d in plan["data"]
    ]
    return [f"{m} × {d}" for m in models for d in data if (m, d) not in there]


def draw(found: Found, stem: Path) -> None:
    """Overall by layer of every cell: models and data down and across, a line per editor."""
    from matplotlib.figure import Figure

    cells = list(dict.fromkeys((row["model"], row["data"]) for row in found["rows"]))
    across = min(4, len(cells))
    down = -(-len(cells) // across)
    with style():
        figure = Figure(
            figsize=(max(6.4, 3.0 * across + 1), 2.6 * down + 0.7), layout="constrained"
        )
        axes = figure.subplots(down, across, squeeze=False)
        for ax in axes.flat[len(cells) :]:
            ax.set_visible(False)
        for ax, (model, data) in zip(axes.flat, cells, strict=False):
            rows = [r for r in found["rows"] if (r["model"], r["data"]) == (model, data)]
            for row in rows:
                colour, golden = OKABE_ITO[_COLOURS[row["editor"]]], row["golden_layer"]
                layers, means = row["layers"], row["means"]
                best = means[layers.index(golden)]
                ax.plot(layers, means, color=colour, lw=1.2, label=row["editor"])
                ax.plot([golden], [best], **STAR | {"markersize": 10})
            ax.axvline(rows[0]["published_layer"], color="#555555", lw=0.8, ls=":")
            ax.set_title(f"{model}, {data}", fontsize=8)
            ax.set_xlabel("edited layer")
            ax.xaxis.get_major_locator().set_params(integer=True)
            ax.grid(axis="y", linewidth=0.3)
        for row in axes:
            row[0].set_ylabel("Overall")
        handles, labels = axes.flat[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
        save(figure, stem, ("svg", "pdf"))


def page(found: Found) -> str:
    """The page."""
    facts = sorted({row["facts"] for row in found["rows"]})
    tested = f"{facts[0]} to {facts[-1]}" if len(facts) > 1 else str(facts[0])
    parts = [
        "# What a choice of layer is worth",
        *([READING.read_text(encoding="utf-8").strip()] if READING.exists() else []),
        "## What was wanted, and what was measured",
        wanted(found),
        "## What a choice is worth",
        f"A cell is a model, a data set and an editor; {found['cells']} are there, of "
        f"{tested} facts each, edited one at a time at every layer (`golden study "
        "studies/golden-layers.yaml`, drawn with seed 0). Overall is the mean of rewrite, "
        "rephrase, locality and portability, in points of 100, without probes that contradict the "
        f"edit. {found['splits']} times the facts of a cell are split: {found['proxies']} choose, "
        "the others judge, so that each fact judges in turn. *Regret* is what the judges' best "
        "layer scores above the chosen one. The best of many layers is in part luck: the layer "
        "that is best over all facts shows a regret as well, the *noise floor*. LGA and transfer "
        "choose on 100 other facts. The race and the tables of all edits choose by soft scores "
        "unless it says hits.",
        choices_table(found),
        "![Overall by layer](layer-curves.svg)",
        "Dotted: the published depth. Stars: the layer that is best over all facts.",
        "## Cell by cell",
        "Regret, and in brackets the layer that was chosen.",
        cells_table(found),
        "## A layer for each fact",
        "Half of a fact's probes choose its layer by soft scores, together with the mean of the "
        "other facts; the other half judges, by hits. The fixed layer is the best of the other "
        f"facts. {NAMED_SHARE:.0%} was named beforehand.",
        shares(found),
        "## Other dials than the layer",
        "Overall against ROME at the published depth. The golden layers are chosen by the facts "
        "they are judged on here, so their columns are flattered by about the noise floor.",
        dials(found),
    ]
    if left := missing(found):
        parts += ["## Still open", ", ".join(left) + "."]
    return "\n\n".join(parts) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the study's page from its summary.")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    found = json.loads(SUMMARY.read_text(encoding="utf-8"))
    status = written({PAGE: page(found)}, "choices_page.py", check=args.check)
    if not args.check:
        draw(found, RESULTS / "layer-curves")
    return status


if __name__ == "__main__":
    sys.exit(main())
