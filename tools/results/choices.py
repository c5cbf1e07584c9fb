"""What choices of a layer are worth, from the rows kept in docs/results/study.

    python tools/results/choices.py        # writes docs/results/study/summary.json

Every cell (a model, a data set, an editor) is split again and again at random into proxy facts,
which choose, and test facts, which judge. A choice's regret is the score of the test facts' best
layer minus that of the chosen layer. The best of many layers is in part luck, so that the truly
best layer shows a regret as well: the noise floor, by drawing as many test facts from a cell's
facts again and again, as if these were all there are.

Shapes: B facts, L layers, R splits.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from kept import Cell, load
from own_layers import NAMED_SHARE, SHARES, Figures, Swept, drawn, per_fact, swept
from render import RESULTS

from goldenlayers.atlas import leads_of, shared_layer
from goldenlayers.editors import EDITORS
from goldenlayers.evaluation.bootstrap import Floats, nan_mean
from goldenlayers.racing import few_layers, replay
from goldenlayers.racing.rule import EDITS, Raced
from goldenlayers.racing.worth import expected_hits
from goldenlayers.truth import Interval
from goldenlayers.truth.table import best_place, eligible_means, plain

STUDY = RESULTS / "study"
SUMMARY = STUDY / "summary.json"
PROXIES = 0.6  # share of a cell's facts that choose; the others judge
SPLITS = 60
PUBLISHED, RANDOM, RACE = "published", "random layer", "race"
ATLAS = "the atlas, by other kinds of facts"
WITH_TRANSFER = "race with key transfer's layer"
ON_STARTER = "race on starter facts"
FINE_TUNED = ("ft-m", "ft-l")


def choices(one: Swept, others: Sequence[Swept] = ()) -> dict[str, Callable[[list[int]], int]]:
    """By name, but for the race: proxy facts (places) → the place of the layer that is chosen.

    ``others`` are the sweeps of the same model and editor on other kinds of facts: what an atlas
    would know.
    """

    def best(table: Floats, facts: list[int]) -> int:
        place = best_place(table[facts])
        return one.published if place is None else place

    found: dict[str, Callable[[list[int]], int]] = {
        PUBLISHED: lambda _: one.published,
        "race of 36 edits": lambda facts: race(one, facts, edits=36).place,
        "race with two thirds of the depth alone": lambda facts: race(one, facts, (2 / 3,)).place,
        "all edits, expected hits": lambda facts: best(one.soft, facts),
        "all edits, hits": lambda facts: best(one.hard, facts),
    }
    if others:
        known = _atlas(others, one.layers[one.published])
        found[ATLAS] = _always(one.nearest(known))
    for other in others:
        if other.cell["data"] == "starter":  # what --layer auto does where no atlas helps
            place = race(other, list(range(len(other.facts)))).place
            found[ON_STARTER] = _always(one.nearest(other.layers[place]))
    for name, layer in one.cell["choices"].items():
        place = one.nearest(layer)
        found[name] = _always(place)
        if name == "transfer-align":
            found[WITH_TRANSFER] = partial(_with, one, place)
    return found


def race(
    one: Swept,
    facts: list[int],
    depths: Sequence[float] | None = None,
    also: Sequence[int] = (),
    edits: int = EDITS,
) -> Raced:
    """The race on some facts: the published depth, others (the editor's), and further places."""
    n = one.cell["n_layers"]
    depths = EDITORS[one.editor].race_depths if depths is None else depths
    places = [*map(one.nearest, few_layers(n, depths)), *also]
    return replay(one.both[facts], places, one.published, edits)


def _atlas(sweeps: Sequence[Swept], published: int) -> int:
    tables = [leads_of(one.truth, one.layers[one.published]) for one in sweeps]
    layer, lead = shared_layer(tables, published)
    return layer if lead.low > 0 else published


def _with(one: Swept, place: int, facts: list[int]) -> int:
    return race(one, facts, also=[place]).place


def _always(place: int) -> Callable[[list[int]], int]:
    return lambda _: place


def splits(n: int, seed: int = 0) -> Iterator[tuple[list[int], list[int]]]:
    """Random proxy and test facts, by place."""
    rng = np.random.default_rng(seed)
    for _ in range(SPLITS):
        order = rng.permutation(n).tolist()
        yield order[: round(PROXIES * n)], order[round(PROXIES * n) :]


def noise_floor(one: Swept, draws: int = 1000) -> float:
    """The regret that the best layer over all facts shows on as many facts as judge a choice."""
    rng, n = np.random.default_rng(0), len(one.facts)
    golden = best_place(one.hard)
    lost = []
    for _ in range(draws):
        means = eligible_means(one.hard[rng.integers(n, size=n - round(PROXIES * n))])
        lost.append(float(np.nanmax(means) - means[golden]))
    return float(np.nanmean(lost))


def judge(one: Swept, others: Sequence[Swept] = ()) -> dict[str, Any]:
    """Regrets of every choice, the noise floor, and what the cell says for itself.

    ``gains`` holds, for each choice and fact, what its layers score above the published depth where
    the fact was among the judges.
    """
    rules = choices(one, others)
    lost: dict[str, list[float]] = {name: [] for name in (RACE, *rules, RANDOM)}
    gains = {name: np.zeros(len(one.facts)) for name in (RACE, *rules)}
    judged, costs, promised = np.zeros(len(one.facts)), [], []
    for proxy, test in splits(len(one.facts)):
        means = eligible_means(one.hard[test])
        top = float(np.nanmax(means))
        places = {name: rule(proxy) for name, rule in rules.items()}
        raced = race(one, proxy)
        places[RACE] = raced.place
        costs.append(raced.edits)
        if raced.place != one.published:
            lead = raced.gain(one.published)
            truly = float(means[raced.place] - means[one.published])
            promised.append((lead.value, lead.low, lead.high, truly))
        judged[test] += 1
        for name, place in places.items():
            lost[name].append(top - float(means[place]))
            gains[name][test] += one.hard[test, place] - one.hard[test, one.published]
        lost[RANDOM].append(top - float(np.nanmean(means)))
    return {
        "about": one.about,
        "model": one.cell["model"],
        "data": one.cell["data"],
        "editor": one.editor,
        "facts": len(one.facts),
        "layers": one.layers,
        "n_layers": one.cell["n_layers"],
        "golden_layer": one.truth.golden_layer(),
        "golden_in_resamples": one.truth.wins()[one.truth.golden_layer()],
        "published_layer": one.layers[one.published],
        "means": [plain(round(float(m), 2)) for m in nan_mean(one.hard)],
        "ends": [[plain(round(float(end), 2)) for end in both] for both in one.truth.intervals()],
        "oracle_gap": figures(one.truth.gap()),
        "by_kind": by_kind(one),
        "noise_floor": noise_floor(one),
        "edits": float(np.mean(costs)),
        "moved": len(promised) / SPLITS,
        "promised": [float(m) for m in np.mean(promised, axis=0)] if promised else [],
        "regrets": {name: float(np.mean(values)) for name, values in lost.items()},
        "gains": {name: (total / judged).tolist() for name, total in gains.items()},
        "chosen": dict(one.cell["choices"]),
    }


def figures(interval: Interval) -> Figures:
    """Value and ends."""
    return interval.value, interval.low, interval.high


def by_kind(one: Swept) -> dict[str, list[float | None]]:
    """By layer the share of each kind of locality that stays, and of the edits that take."""
    named = {f"locality_{kind}": kind for kind in ("subject", "neighbour")}
    tables = one.truth.scores
    there = [metric for metric in named if metric in tables]
    return {
        named.get(metric, metric): [plain(round(float(m), 2)) for m in nan_mean(tables[metric])]
        for metric in (*there, "rewrite")
    }


def hits_by_probability(sweeps: Sequence[Swept]) -> list[dict[str, Any]]:
    """How often an answer, or what was predicted, is the likeliest, by tenths of the soft score."""
    found = []
    for kind, metrics in (
        ("answers", ("rewrite", "rephrase", "portability")),
        ("locality", ("locality",)),
    ):
        for tenth in range(10):
            of: dict[str, list[float]] = {}
            for one in sweeps:
                of.setdefault(one.about, []).extend(
                    row["score"]
                    for row in one.rows
                    if row["metric"] in metrics
                    and row["score"] is not None
                    and min(9, int(row.get("soft", -1) // 10)) == tenth
                )
            found.append(
                {
                    "kind": kind,
                    "from": 10 * tenth,
                    "expected": expected_hits(metrics[0], 10 * tenth + 5),
                    "shares": {k: float(np.mean(v)) for k, v in of.items() if len(v) >= 20},
                }
            )
    return found


def summary(cells: Sequence[Cell]) -> dict[str, Any]:
    """What docs/results/study/summary.json holds."""
    sweeps = list(swept(cells))
    rows = [
        judge(
            one,
            [
                other
                for other in sweeps
                if (other.cell["model"], other.editor) == (one.cell["model"], one.editor)
                and other is not one
            ],
        )
        for one in sweeps
    ]
    single = [found for one in sweeps if (found := per_fact(one)) is not None]
    names = list(dict.fromkeys(name for row in rows for name in row["regrets"]))
    kinds = {
        "all": rows,
        "rome family": [r for r in rows if r["editor"] not in FINE_TUNED],
        "fine-tuning": [r for r in rows if r["editor"] in FINE_TUNED],
    }

    def mean(some: Sequence[Mapping[str, Any]], name: str) -> float | None:
        values = [row["regrets"][name] for row in some if name in row["regrets"]]
        return float(np.mean(values)) if values else None

    gains = {
        name: drawn([(r["about"], r["gains"][name]) for r in rows if name in r["gains"]])
        for name in names
        if name not in (RANDOM, PUBLISHED)
    }
    for row in rows:
        del row["gains"], row["about"]
    default = RACE
    worst = max((r["regrets"][default] - r["regrets"][PUBLISHED] for r in rows), default=None)
    own: dict[str, Any] = {}
    if single:
        by_share = {
            str(s): drawn([(one["about"], one["gains"][str(s)]) for one in single]) for s in SHARES
        }
        value, low, high = by_share[str(NAMED_SHARE)]
        gap = float(np.mean([np.mean(one["gap"]) for one in single]))
        own = {
            "gain": value,
            "low": low,
            "high": high,
            "gap_share": value / gap if gap else None,
            "gap": gap,
            "cells": len(single),
            "by_share": by_share,
        }
    return {
        "models": sorted({r["model"] for r in rows}),
        "cells": len(rows),
        "proxies": PROXIES,
        "splits": SPLITS,
        "default_choice": {
            "name": default,
            "mean_regret": mean(rows, default),
            "noise_floor": float(np.mean([r["noise_floor"] for r in rows])) if rows else None,
            "worst_against_published": worst,
            "cost_edits": float(np.mean([r["edits"] for r in rows])) if rows else None,
        },
        "per_fact": own,
        "choices": {
            name: {kind: mean(some, name) for kind, some in kinds.items()} for name in names
        },
        "against_published": gains,
        "expected_hits": hits_by_probability(sweeps),
        "noise_floors": {
            kind: float(np.mean([r["noise_floor"] for r in some])) if some else None
            for kind, some in kinds.items()
        },
        "rows": rows,
    }


def rounded(value: Any) -> Any:
    """Floats to three digits, so that the file is the same on any machine."""
    if isinstance(value, float):
        return round(value, 3)
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    return [rounded(one) for one in value] if isinstance(value, list | tuple) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--cells", type=Path, default=STUDY)
    parser.add_argument("--out", type=Path, default=SUMMARY)
    args = parser.parse_args()
    found = rounded(summary(load(args.cells)))
    args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({k: v for k, v in found.items() if k != "rows"}, indent=1))


if __name__ == "__main__":
    main()
