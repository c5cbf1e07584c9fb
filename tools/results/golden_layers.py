"""docs/results/golden-layers.md and its figures, from the cells kept in docs/results/study.

python tools/results/choices.py                  # first: summary.json, minutes
python tools/results/golden_layers.py             # write
python tools/results/golden_layers.py --check     # exit 1 if the page is out of date
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from choices import STUDY, SUMMARY
from golden_tables import (
    Found,
    carried,
    cells_table,
    choices_table,
    dials,
    existence,
    expected,
    kinds_table,
    missing,
    promises,
    shares,
    sink_edits,
    sinks,
    wanted,
)
from own_layers import NAMED_SHARE
from render import RESULTS, written

from goldenlayers.report.figures import OKABE_ITO, STAR, save, style

PAGE = RESULTS / "golden-layers.md"
READING = STUDY / "reading.md"
_COLOURS = dict(
    zip(
        ("rome", "clear-rome", "memit", "alphaedit", "ft-m"),
        ("blue", "vermillion", "bluish green", "reddish purple", "orange"),
        strict=True,
    )
)


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
                low, high = zip(*row["ends"], strict=True)
                ax.fill_between(layers, low, high, color=colour, alpha=0.1, lw=0)
                ax.plot([golden], [best], **STAR | {"markersize": 10})
            ax.axvline(rows[0]["published_layer"], color="#555555", lw=0.8, ls=":")
            ax.set_title(f"{model}, {data}", fontsize=8)
            ax.set_xlabel("edited layer")
            ax.xaxis.get_major_locator().set_params(integer=True)
            ax.grid(axis="y", linewidth=0.3)
        for row in axes:
            row[0].set_ylabel("Overall")
        named = {
            label: line
            for ax in axes.flat
            for line, label in zip(*ax.get_legend_handles_labels(), strict=True)
        }
        figure.legend(
            list(named.values()), list(named), loc="outside lower center", ncols=5, frameon=False
        )
        save(figure, stem, ("svg", "pdf"))


def halved(found: Found) -> str:
    """Where only some layers were swept."""
    swept: dict[tuple[str, str], dict[str, int]] = {}
    for row in found["rows"]:
        some = len(row["layers"]) if len(row["layers"]) < row["n_layers"] else 0
        swept.setdefault((row["model"], row["data"]), {})[row["editor"]] = some
    told = []
    for (model, data), by_editor in sorted(swept.items()):
        for count in sorted({count for count in by_editor.values() if count}):
            mine = [editor for editor, some in by_editor.items() if some == count]
            by = "" if len(mine) == len(by_editor) else f" with {', '.join(mine)}"
            told.append(f"{model}, {data}{by} ({count} of them)")
    if not told:
        return ""
    return f" but in {'; '.join(told)}; a choice between layers stands for the nearest"


def own_layers(found: Found) -> str:
    """Why no more than that can be had by choosing for each fact."""
    own = found["per_fact"]
    alone, low, high = own["by_share"]["1.0"]
    return (
        f"The facts' own best layers lie {own['gap']:.1f} points above the fixed one, and "
        f"{own['gap_share']:.0%} of that can be had. A fact's own evidence alone finds "
        f"{alone:+.1f} ({low:+.1f} to {high:+.1f}): what one half of its probes says for a layer "
        "the other half hardly repeats. So most of the gap is the luck of a few probes, or cannot "
        "be found by so few; the share that can be had needs the other facts' evidence beside it. "
        "(Of rewrite, rephrase and locality; portability has too few probes to halve.)"
    )


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
        f"{tested} facts each, edited one at a time at every layer{halved(found)} (`golden study "
        "studies/golden-layers.yaml`, drawn with seed 0). Overall is the mean of rewrite, "
        "rephrase, locality and portability, in points of 100, without probes that contradict the "
        f"edit. {found['splits']} times the facts of a cell are split: {found['proxies']:.0%} of "
        "them choose, the others judge, so that each fact judges in turn. *Regret* is what the "
        "judges' best layer scores above the chosen one. The best of many layers is in part luck, "
        "so that the truly best layer shows a regret as well: the *noise floor*, by drawing as "
        "many judges from the cell's facts, as if these were all there are. LGA and transfer "
        "choose on 100 other facts. The race chooses by the mean of hits and expected hits, at the "
        "published depth and one and two thirds of the depth (fine-tuning: two thirds and the last "
        "layer). Values were searched for by 10 steps with 2 prefixes (FT-M: 15 steps), half of "
        "the defaults' work, and key statistics are of Wikipedia text (10 MLP widths of tokens, of "
        "the 1.5B 4), not the package's: whether "
        "the layers rank alike by the defaults was not measured. Differences from "
        "the published depth are paired by fact; their intervals (95 %) draw the facts anew, for "
        "all editors of a cell alike. The rows are in `study/`, compressed; `python "
        "tools/results/choices.py` and `golden_layers.py` make this page.",
        "## Is there a golden layer?",
        existence(found),
        "*Golden in resamples*: how often the layer stays the best one when the facts are drawn "
        "anew. The last column is chosen and judged on the same probes, so it is flattered.",
        "![Overall by layer](study/curves.svg)",
        "Dotted: the published depth. Stars: the golden layers. Bands: 95 % over the facts.",
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
        "By how much a race's choice leads the published depth on the facts that chose it, with "
        "its 95 % interval in the mean over the splits in which it leaves that depth, and what the "
        "judges find. Where the interval's lower end is above 0 the lead holds; elsewhere a lead "
        "of the best of three is mostly luck:",
        promises(found),
        "### From probabilities to hits",
        "An answer's probability, and how much is left of what was predicted, against the share of "
        "hits: real edits at all layers, by all editors. The curve that the race uses was drawn "
        "from Gemma's starter and CounterFact cells and 16 facts of SmolLM2's CounterFact cell.",
        expected(found),
        "### LGA and the first token",
        "The layers that LGA names when all tokens count, all but the first, the lookup token "
        "alone, and with the answer's loss.",
        sinks(found),
        "Edits that take (%) at the layers which carry the first token's activations, and in the "
        "mean of the two layers beside each:",
        sink_edits(found),
        "ROME, clear-rome and MEMIT take there about as often as beside them; at layer 28 they do "
        "what the last layers do. AlphaEdit alone breaks down at layer 11, not at 2 and 9. So an "
        "edit there does not fail because of the sink, but for AlphaEdit's at one layer.",
        "## What must stay decides the layer",
        "Locality asks two things: that the subject's other answers stay (ZsRE, wiki_counterfact), "
        "and that other subjects' answers do (CounterFact, starter); no data set asks both. "
        "Percent that stay, and behind the stroke the edits that take, by depth:",
        kinds_table(found),
        "## A layer for each fact",
        "Half of a fact's probes choose its layer by expected hits, together with the mean of the "
        "other facts; the other half judges, by hits. The fixed layer is the best of the other "
        f"facts. {NAMED_SHARE:.0%} was named beforehand. [Each](each.md) has the same with an "
        "editor and a strength for each fact.",
        shares(found),
        own_layers(found),
        "## Other dials than the layer",
        "Overall against ROME at the published depth. The golden layers are chosen by the facts "
        "they are judged on here, so their columns are flattered by about the noise floor. The "
        "third dial, the strength of the change, stands in "
        "[each](each.md#what-can-be-had-at-all-on-gemma3-270m); two layers at once were not "
        "measured.",
        dials(found),
    ]
    if left := missing(found):
        parts += ["## Still open", "\n".join(left)]
    return "\n\n".join(parts) + "\n"


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
