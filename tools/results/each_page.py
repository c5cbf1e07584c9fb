"""The page on choosing for each fact, from the tries kept in `cells/each` (`each.py` makes them).

python tools/results/each_page.py            # writes docs/results/each.md and its figure
python tools/results/each_page.py --check
python tools/results/each_page.py --tune ROWS   # the rule's settings on the development facts
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from kept import Cell, load, unpack
from render import CELLS, RESULTS, table, written

from goldenlayers.choosing import EDITORS, depths
from goldenlayers.choosing.rule import choose
from goldenlayers.evaluation.bootstrap import Floats, harmonic_mean, resampled_means
from goldenlayers.locating.base import published_layer
from goldenlayers.report.figures import OKABE_ITO, save, style

KEPT, PAGE = CELLS / "each", CELLS.parent / "each.md"
PARTS = ("rewrite", "rephrase", "locality")
JUDGE, OWN_SOFT = 0, 3  # of what a try keeps: judge's hits, soft; the chooser's hits, soft
_USUAL = {"clear-10": "clear-rome"}  # the default's name among the weights
_COLOURS = {"clear-rome": "vermillion", "rome": "black", "alphaedit": "bluish green"}


CEILING = (
    "Rows of [the study](golden-layers.md) (four editors at all layers), of `cells/clear` (six "
    "editors at one sixth, one third and half of the depth) and of `cells/curve` (weights of "
    "staying clear, one layer). The default is clear-rome at the published depth. Harmonic mean of "
    "hits, and leads over the default. The *oracle* sees the judge's hits. In the other columns "
    "one half of each fact's own probes chooses (by probabilities; by hits where the rows have "
    "none), the other half judges, and both in turn."
)
OFFERED = (
    "The study's cells, clear-rome, the rule as it is: half of each fact's own probes choose, the "
    "other half judges, and both in turn. Leads over clear-rome at the published depth, in points "
    "of the harmonic mean; in the last two columns over ROME there, which was the default when "
    "choosing for each fact was begun."
)


@dataclass(frozen=True, eq=False)
class Tries:
    """Facts × ways, in points: the judge's hits (N, K, 3) and the chooser's scores (N, K)."""

    ways: list[tuple[int, str, float]]
    hits: Floats
    own: Floats
    seconds: Floats
    published: int

    def where(self, **fixed: Any) -> list[int]:
        """The ways with a given layer, editor or strength; the usual way first."""
        names = ("layer", "editor", "strength")
        ok = [
            k
            for k, way in enumerate(self.ways)
            if all(way[names.index(n)] == v for n, v in fixed.items())
        ]
        return sorted(ok, key=lambda k: k != self.usual)

    @property
    def usual(self) -> int:
        """clear-rome at the published depth, as it is."""
        return self.ways.index((self.published, "clear-rome", 1.0))

    def fixed(self, k: int) -> Floats:
        """(N, 3) where every fact has one way."""
        return self.hits[:, k]

    def chosen(self, among: Sequence[int], **rule: float) -> Floats:
        """(N, 3) where each fact has what its own prompts speak for, of some ways."""
        picks = self.picks(among, **rule)
        return self.hits[np.arange(len(picks)), picks]

    def picks(self, among: Sequence[int], **rule: float) -> list[int]:
        ways = list(among)
        return [ways[k] for k in choose(self.own[:, ways], ways.index(self.usual), **rule)]

    def oracle(self, among: Sequence[int]) -> Floats:
        """(N, 3) where each fact has what its judge likes best."""
        ways = list(among)
        best = np.nansum(self.hits[:, ways], axis=2).argmax(1)
        return self.hits[np.arange(len(best)), [ways[k] for k in best]]


def tries_of(rows: Sequence[dict[str, Any]]) -> Tries:
    ways = [(int(layer), str(e), float(s)) for layer, e, s, *_ in rows[0]["tries"]]
    table = np.array(
        [
            [[[np.nan if x is None else x for x in p] for p in t[3:]] for t in r["tries"]]
            for r in rows
        ]
    )
    own = np.nanmean(table[:, :, OWN_SOFT], axis=2)
    return Tries(
        ways, table[:, :, JUDGE], own, np.array([row["seconds"] for row in rows]), ways[0][0]
    )


def harmonic(parts: Floats) -> float:
    return float(harmonic_mean(np.nanmean(parts, axis=0)))


def interval(*both: Floats) -> tuple[float, float]:
    """95 % bootstrap interval over facts of the harmonic mean, or of the first's lead."""
    draws = [harmonic_mean(resampled_means(parts)) for parts in both]
    low, high = np.percentile(draws[0] - draws[1] if len(draws) > 1 else draws[0], [2.5, 97.5])
    return float(low), float(high)


def line(name: str, parts: Floats, usual: Floats) -> list[str]:
    means = [f"{x:.1f}" for x in np.nanmean(parts, axis=0)]
    low, high = interval(parts)
    return [
        name,
        *means,
        f"{harmonic(parts):.1f} ({low:.0f} to {high:.0f})",
        "–" if parts is usual else lead_of(parts, usual),
    ]


def named(way: tuple[int, str, float]) -> str:
    return f"layer {way[0]}, {way[1]}, strength {way[2]:g}"


def choices(tries: Tries) -> str:
    """The ways to choose, one a line."""
    every = tries.where()
    first = tries.published
    usual = tries.fixed(tries.usual)
    fixed = {k: harmonic(tries.fixed(k)) for k in every}
    best = max(fixed, key=lambda k: fixed[k])
    whole = tries.where(strength=1.0)
    best_whole = max(whole, key=lambda k: fixed[k])
    rows = [
        line(f"the default: {named(tries.ways[tries.usual])}", usual, usual),
        line("rome there", tries.fixed(tries.ways.index((first, "rome", 1.0))), usual),
        line(f"best fixed at strength 1: {named(tries.ways[best_whole])}",
             tries.fixed(best_whole), usual),
        line(f"best fixed of all {len(every)}: {named(tries.ways[best])}",
             tries.fixed(best), usual),
    ]  # fmt: skip
    for name, among in (
        ("`--layer each`", tries.where(editor="clear-rome", strength=1.0)),
        ("`--method auto`", tries.where(layer=first, strength=1.0)),
        ("`--strength auto`", tries.where(layer=first, editor="clear-rome")),
        ("all three", every),
    ):
        rows.append(line(f"{name}, {len(among)} ways", tries.chosen(among), usual))
    alone = tries.chosen(every, own=1.0, margin=0.0)
    pooled = tries.chosen(every, own=0.0, prior=0.0, margin=0.0)
    rows.append(line("all three, each fact alone, no margin", alone, usual))
    rows.append(line("all three, one way for all by the made prompts", pooled, usual))
    rows.append(line("oracle: each fact by its judge", tries.oracle(every), usual))
    return table(["choice", *PARTS, "harmonic mean", "above the default"], rows)


def curve(tries: Tries) -> str:
    layers = sorted({way[0] for way in tries.ways})
    editors = list(dict.fromkeys(way[1] for way in tries.ways))
    strengths = sorted({way[2] for way in tries.ways})
    rows = []
    for layer, editor in itertools.product(layers, editors):
        said = []
        for strength in strengths:
            parts = tries.fixed(tries.ways.index((layer, editor, strength)))
            means = np.nanmean(parts, axis=0)
            said.append(" / ".join(f"{x:.0f}" for x in means) + f"; {harmonic(parts):.1f}")
        rows.append([str(layer), editor, *said])
    return table(["layer", "editor", *(f"strength {s:g}" for s in strengths)], rows)


def picked(tries: Tries) -> str:
    counts = Counter(tries.picks(tries.where()))
    told = [f"{named(tries.ways[k])}: {n}" for k, n in counts.most_common(8)]
    return "; ".join(told) + ("; and others" if len(counts) > 8 else "")


def draw(sets: dict[str, Tries], stem: Path) -> None:
    """A panel per data set, a line per editor and layer along the strengths."""
    from matplotlib.figure import Figure

    with style():
        figure = Figure(figsize=(max(8.0, 4.4 * len(sets)), 4.6), layout="constrained")
        axes = figure.subplots(1, len(sets), squeeze=False, sharey=True)[0]
        for ax, (name, tries) in zip(axes, sets.items(), strict=True):
            layers = sorted({way[0] for way in tries.ways})
            for layer, editor in itertools.product(layers, _COLOURS):
                ways = sorted(
                    tries.where(layer=layer, editor=editor), key=lambda k: tries.ways[k][2]
                )
                means = np.array([np.nanmean(tries.fixed(k), axis=0) for k in ways])
                ax.plot(
                    means[:, 2], means[:, 1], color=OKABE_ITO[_COLOURS[editor]],
                    marker="os^Dv"[layers.index(layer) % 5], markersize=5, linewidth=1,
                    label=f"{editor}, layer {layer}",
                )  # fmt: skip
            best = np.nanmean(tries.oracle(tries.where()), axis=0)
            ax.plot(best[2], best[1], "*", color=OKABE_ITO["orange"], markersize=12,
                    label="oracle for each fact")  # fmt: skip
            ax.set_title(name, fontsize=9)
            ax.set_xlabel("locality: answers that stayed, %")
            ax.grid(linewidth=0.3)
        axes[0].set_ylabel("rephrase: answers that follow, %")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
        save(figure, stem, ("svg",))


def ceilings() -> str:
    """The default, the best fixed way, the oracle, and choices by half of each fact's own probes
    judged by the other half, of the kept cells of `cells/clear` and `cells/curve`.
    """
    rows = []
    kinds = {
        RESULTS / "study": "editors and layers",
        CELLS / "clear": "editors and layers",
        CELLS / "curve": "weights",
    }
    for cell, kind in ((cell, kind) for folder, kind in kinds.items() for cell in load(folder)):
        tries, halves = cell_tries(cell)
        usual, every = tries.fixed(tries.usual), tries.where()
        if np.isnan(usual).all(axis=0).any():
            continue  # data without rephrasings
        best = max(every, key=lambda k: harmonic(tries.fixed(k)))
        first = tries.published
        alike = [k for k in tries.where(layer=first) if tries.ways[k][1] in EDITORS]
        before = np.concatenate([half.fixed(half.usual) for half in halves])
        one, alone = {"own": 0.0, "margin": 0.0, "prior": 0.0}, {"own": 1.0, "margin": 0.0}
        leads = [
            lead_of(np.concatenate([half.chosen(among, **rule) for half in halves]), before)
            for among, rule in (
                (every, alone),
                (every, {}),
                (tries.where(editor="clear-rome"), {}),
                (tries.where(editor="clear-rome"), one),
                (alike, {}),
            )
        ]
        if len({way[0] for way in tries.ways}) == 1:
            leads[2:] = ["–"] * 3
        rows.append([
            f"{cell['model']}, {cell['data']}",
            f"{len(usual)}",
            f"{len(every)} {kind}",
            f"{harmonic(usual):.1f}",
            f"{harmonic(tries.fixed(best)):.1f} ({tries.ways[best][1]}, {tries.ways[best][0]})",
            lead_of(tries.oracle(every), usual),
            *leads,
        ])  # fmt: skip
    head = ["data", "facts", "ways", "the default", "best fixed way (editor, layer)", "oracle"]
    head += ["each fact alone", "rule, all ways", "rule, layers", "one layer for all"]
    return table([*head, "rule, editors"], rows)


def offered() -> str:
    """What the rule gains by how many layers are offered to it, of the study's cells."""
    rows = []
    for cell in load(RESULTS / "study"):
        tries, halves = cell_tries(cell)
        by_editor = {e: tries.where(editor=e) for e in ("clear-rome", "rome")}
        usual, rome = (
            np.concatenate([half.fixed(_at(tries, some, tries.published)) for half in halves])
            for some in by_editor.values()
        )
        if np.isnan(usual).all(axis=0).any():
            continue  # data without rephrasings
        every, n = by_editor["clear-rome"], cell["n_layers"]
        if len(every) < n:
            continue  # some layers alone
        thirds = [tries.published, round(n / 3), round(n / 2)]
        three, seven, whole, ways = (
            np.concatenate([half.chosen(some) for half in halves])
            for some in (
                [_at(tries, every, layer) for layer in thirds],
                [_at(tries, every, layer) for layer in depths(n)],
                every,
                [k for k in tries.where() if tries.ways[k][1] != "ft-m"],
            )
        )
        rows.append([
            f"{cell['model']}, {cell['data']}", f"{len(usual) // 2}",
            *(lead_of(some, usual) for some in (three, seven, whole, ways)),
            lead_of(seven, three),
            *(lead_of(some, rome) for some in (usual, seven)),
        ])  # fmt: skip
    head = ["data", "facts", "3 layers", "`--layer each`: 7 layers", "all layers"]
    head += [
        "all layers, four editors",
        "7 layers over 3",
        "the default, over ROME",
        "`--layer each`, over ROME",
    ]
    return table(head, rows)


def _at(tries: Tries, among: Sequence[int], layer: int) -> int:
    return next(k for k in among if tries.ways[k][0] == layer)


def lead_of(parts: Floats, usual: Floats) -> str:
    low, high = interval(parts, usual)
    return f"{harmonic(parts) - harmonic(usual):+.1f} ({low:+.1f} to {high:+.1f})"


def cell_tries(cell: Cell) -> tuple[Tries, list[Tries]]:
    """A kept cell as tries: by all probes, and twice with one half to choose and one to judge."""
    sums: dict[tuple[Any, ...], list[tuple[float, float]]] = {}
    ways = set()
    for editor, some in unpack(cell):
        for row in some:
            if row["metric"] in PARTS and row["score"] is not None and row["layer"] >= 0:
                way = row["layer"], _USUAL.get(editor, editor), 1.0
                ways.add(way)
                where = row["fact"], way, row["metric"]
                sums.setdefault(where, []).append((row["score"], row.get("soft", row["score"])))
    order, facts = sorted(ways), sorted({fact for fact, *_ in sums})
    published = published_layer(cell["n_layers"])

    def means(half: slice, which: int) -> Floats:
        def mean(fact: str, way: Any, part: str) -> float:
            some = sums.get((fact, way, part), [])
            some = some[half] if len(some) > 1 else some  # the one rewrite serves both halves
            return float(np.mean([one[which] for one in some])) if some else np.nan

        return np.array([[[mean(f, w, p) for p in PARTS] for w in order] for f in facts])

    none, first, second = np.zeros((len(facts), 3)), slice(0, None, 2), slice(1, None, 2)
    whole = Tries(order, means(slice(None), 0), means(slice(None), 1).mean(2), none, published)
    halves = [
        Tries(order, means(judge, 0), np.nanmean(means(own, 1), axis=2), none, published)
        for own, judge in ((first, second), (second, first))
    ]
    return whole, halves


def sets_of(rows: Sequence[dict[str, Any]]) -> dict[str, Tries]:
    """By data set, and all facts together."""
    by_data: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_data.setdefault(row["data"], []).append(row)
    found = {f"{data}, {len(some)} facts": tries_of(some) for data, some in by_data.items()}
    return {**found, f"both, {len(rows)} facts": tries_of(rows)} if len(found) > 1 else found


def page(kept: dict[str, list[dict[str, Any]]], *, write: bool) -> str:
    parts = [
        (KEPT / "reading.md").read_text("utf-8").strip(),
        "## The ceiling",
        CEILING,
        ceilings(),
        "## How many layers to offer",
        OFFERED,
        offered(),
    ]
    for model, rows in kept.items():
        sets = sets_of(rows)
        stem = PAGE.with_name(f"each-{model}")
        if write:
            draw(sets, stem)
        name, both = list(sets.items())[-1]
        parts += [
            f"## {model}, made probes: {name}",
            choices(both),
            f"Kept by all three: {picked(both)}.",
        ]
        parts += [
            f"## What can be had at all on {model}",
            f"![Rephrase against locality by editor, layer and strength]({stem.name}.svg)",
            "Along a line the strength goes from 0.5 to 1.2. Rewrite / rephrase / locality; "
            "harmonic mean; all facts:",
            curve(both),
            "Seconds a fact, on a busy machine, median: {:.0f} for the prompts, {:.0f} for the "
            "edits, {:.0f} for asking (both judges).".format(*np.median(both.seconds, axis=0)),
        ]
    return "\n\n".join(parts) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--keep", type=Path, nargs="*", help="rows of each.py to keep")
    args = parser.parse_args()
    for path in args.keep or ():
        KEPT.mkdir(exist_ok=True)
        lines = path.read_text("utf-8").splitlines()
        rows = {(row["data"], row["fact"]): row for row in map(json.loads, lines)}
        model = next(iter(rows.values()))["model"]
        text = "".join(json.dumps(rows[key]) + "\n" for key in sorted(rows))
        (KEPT / f"{model}.jsonl.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
    kept = {
        path.name.removesuffix(".jsonl.gz"): [
            json.loads(one) for one in gzip.decompress(path.read_bytes()).decode().splitlines()
        ]
        for path in sorted(KEPT.glob("*.jsonl.gz"))
    }
    return written({PAGE: page(kept, write=not args.check)}, "each_page.py", check=args.check)


if __name__ == "__main__":
    sys.exit(main())
