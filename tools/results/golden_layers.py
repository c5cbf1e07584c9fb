"""docs/results/golden-layers.md and its figures, from the cells kept in docs/results/study.

python tools/results/choices.py                  # first: summary.json, minutes
python tools/results/golden_layers.py             # write
python tools/results/golden_layers.py --check     # exit 1 if the page is out of date
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from choices import EDITS, NAMED_SHARE, PUBLISHED, RACE, RANDOM, STUDY, SUMMARY
from render import RESULTS, table, written

from goldenlayers.report.figures import OKABE_ITO, STAR, save, style

PAGE = RESULTS / "golden-layers.md"
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
        best = row["means"][row["layers"].index(row["golden_layer"])]
        gap, low, high = row["oracle_gap"]
        rows.append(
            [
                f"{row['model']}, {row['data']}, {row['editor']}",
                str(row["golden_layer"]),
                f"{row['golden_in_resamples']:.0%}",
                points(best),
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
    """Where both kinds of locality are asked: the best layer for either, and its cost to both."""
    rows = []
    for row in found["rows"]:
        of = row["by_kind"]
        if len(of) < 2:
            continue
        at = {kind: row["layers"].index(one["golden_layer"]) for kind, one in of.items()}
        subject, neighbour = of["subject"]["means"], of["neighbour"]["means"]
        lost = (
            subject[at["subject"]] - subject[at["neighbour"]],
            neighbour[at["neighbour"]] - neighbour[at["subject"]],
        )
        rows.append(
            [
                f"{row['model']}, {row['data']}, {row['editor']}",
                *(str(of[kind]["golden_layer"]) for kind in ("subject", "neighbour")),
                *(points(value) for value in lost),
            ]
        )
    if not rows:
        return ""
    head = ["cell", "layer for the subject's other answers", "layer for the neighbours'"]
    head += ["the second loses, by the first", "the first loses, by the second"]
    return table(head, rows)


def sinks(found: Found) -> str:
    """The layers that LGA's variants name, by model and data set."""
    names = ("lga", "lga-no-sink", "lga-lookup", "lga-answer")
    rows = {}
    for row in found["rows"]:
        layers = [str(row["chosen"].get(name, "–")) for name in names]
        rows[row["model"], row["data"]] = [f"{row['model']}, {row['data']}", *layers]
    return table(["cell", *names], list(rows.values()))


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
        "# Golden layers: is there one, and what finds it?",
        READING.read_text(encoding="utf-8").strip(),
        "## What was wanted, and what was measured",
        wanted(found),
        "## How it was measured",
        f"A cell is a model, a data set and an editor; {found['cells']} are there, of "
        f"{tested} facts each, edited one at a time at every layer (`golden study "
        "studies/golden-layers.yaml`, drawn with seed 0). Overall is the mean of rewrite, "
        "rephrase, locality and portability, in points of 100, without probes that contradict the "
        f"edit. {found['splits']} times the facts of a cell are split: {found['proxies']} choose, "
        "the others judge, so that each fact judges in turn. *Regret* is what the judges' best "
        "layer scores above the chosen one. The best of many layers is in part luck, so that the "
        "truly best layer shows a regret as well: the *noise floor*, by drawing as many judges "
        "from the cell's facts, as if these were all there are. LGA and transfer choose on 100 "
        "other facts. The race and the tables of all edits choose by soft scores unless it says "
        "hits. Differences from the published depth are paired by fact; their intervals (95 %) "
        "draw the facts anew, for all editors of a cell alike. The rows are in `study/`, "
        "compressed; `python tools/results/choices.py` and `golden_layers.py` make this page.",
        "## Is there a golden layer?",
        existence(found),
        "*Golden in resamples*: how often the layer stays the best one when the facts are drawn "
        "anew. The last column is chosen and judged on the same probes, so it is flattered.",
        "![Overall by layer](study/curves.svg)",
        "Dotted: the published depth. Stars: the golden layers.",
        "## Does it carry over?",
        "What the golden layer of one data set loses on another, same model and editor:",
        carried(found, "data", ("model", "editor")),
        "Of one editor with another, same model and facts:",
        carried(found, "editor", ("model", "data")),
        "## What finds it?",
        "Mean regret, and what the choice gains over the published depth.",
        choices_table(found),
        "Cell by cell, in brackets the layer that was chosen:",
        cells_table(found),
        "### LGA and the first token",
        "The layers that LGA names when all tokens count, all but the first, the lookup token "
        "alone, and with the answer's loss.",
        sinks(found),
        *_kinds(found),
        "## A layer for each fact",
        "Half of a fact's probes choose its layer by soft scores, together with the mean of the "
        "other facts; the other half judges, by hits. The fixed layer is the best of the other "
        f"facts. {NAMED_SHARE:.0%} was named beforehand. [Each](each.md) has the same with an "
        "editor and a strength for each fact.",
        shares(found),
        "## Other dials than the layer",
        "Overall against ROME at the published depth. The golden layers are chosen by the facts "
        "they are judged on here, so their columns are flattered by about the noise floor.",
        dials(found),
    ]
    if left := missing(found):
        parts += ["## Still open", ", ".join(left) + "."]
    return "\n\n".join(parts) + "\n"


def _kinds(found: Found) -> list[str]:
    """The part on what must stay, where it was asked."""
    if not (both := kinds_table(found)):
        return []
    return [
        "## What must stay decides the layer",
        "Locality asks two things: that the subject's other answers stay, and that other subjects' "
        "answers do. Where a data set asks both: the best layer where either alone counts as "
        "locality, and what each of the two loses by the other's measure.",
        both,
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the study's page from its summary.")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    found = json.loads(SUMMARY.read_text(encoding="utf-8"))
    status = written({PAGE: page(found)}, "golden_layers.py", check=args.check)
    if not args.check:
        draw(found, STUDY / "curves")
    return status


if __name__ == "__main__":
    sys.exit(main())
