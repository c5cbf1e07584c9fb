"""The figures of a study: every editor by cell and layer, and what its layer choices are worth.

Intervals are 95 % bootstrap intervals over the test facts; the mean over cells draws the facts of
each cell anew, cells are held fixed.

Shapes: B facts, L layers, S resamples.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from goldenlayers.comparing.runs import truth_of
from goldenlayers.errors import UserError
from goldenlayers.evaluation.bootstrap import Floats, harmonic_mean, nan_mean, resampled_means
from goldenlayers.locating import published_layer
from goldenlayers.records import entry
from goldenlayers.store import RunFolder
from goldenlayers.studying.cell import Cell
from goldenlayers.studying.file import Study
from goldenlayers.studying.folders import COMPARE, SCORES, SUMMARY
from goldenlayers.truth import OVERALL, Interval, Truth, noise_floor
from goldenlayers.truth.table import eligible_means, ends, row_max

NOWHERE = ""
"""The layer's word of what edits no layer: in-context, and the model as it is."""
GOLDEN, PUBLISHED = "golden", "published"
HARMONIC_MEAN = "harmonic"
RESAMPLES = 2000


@dataclass(frozen=True, eq=False)
class Judged:
    """One editor in one cell: its scores, and the places of the layers to show by their words.

    ``searched``: whether layers were swept to find the best, so that choices can be judged.
    """

    cell: str
    editor: str
    truth: Truth
    at: Mapping[str, int]
    n_layers: int
    seconds: float | None
    folder: RunFolder
    searched: bool = False

    def column(self, word: str, metric: str) -> Floats:
        """(B,) scores at a layer; of what edits no layer the same at all."""
        return self.truth.table(metric)[:, self.at.get(word, self.at.get(NOWHERE, 0))]

    def parts(self, word: str) -> Floats:
        """(B, M) scores at a layer in what the harmonic mean is made of."""
        found = [self.column(word, metric) for metric in self.truth.harmonic_of]
        return np.stack(found or [np.full(len(self.truth.facts), np.nan)], axis=1)


def figures_of(study: Study, cells: Sequence[Cell]) -> dict[str, Any]:
    """The content of a study's ``summary.json``, without what is left."""
    names = [one.name for one in study.editors]
    judged = [one for cell in cells for one in _judged(study, cell)]
    metrics = list(dict.fromkeys(m for one in judged for m in one.truth.metrics if m != OVERALL))
    metrics += [HARMONIC_MEAN, OVERALL]
    firsts = {one.cell: one for one in judged if one.editor == names[0]}
    rows, apart = [], []
    for one in judged:
        known = [m for m in metrics if m in one.truth.metrics]
        first = firsts.get(one.cell, one)
        for word, place in one.at.items():
            columns = {m: one.column(word, m) for m in known}
            columns[HARMONIC_MEAN] = one.parts(word)
            layer = None if word == NOWHERE else one.truth.layers[place]
            counted = {"n_facts": len(one.truth.facts), "seconds": one.seconds}
            rows.append(_Row(one.cell, one.editor, word, columns, {"layer": layer} | counted))
        for word in (first if NOWHERE in one.at else one).at if first is not one else ():
            columns = _differences(first, one, word, known)
            apart.append(_Row(one.cell, one.editor, word, columns, {}))
    return {
        "schema": 1,
        "editors": names,
        "metrics": metrics,
        "rows": [row.to_json(study.seed) for row in rows],
        "means": _means(rows, study.seed),
        "against_first": [row.to_json(study.seed) for row in apart],
        "means_against_first": _means(apart, study.seed),
        "choices": _choices(judged, study.seed),
    }


@dataclass(frozen=True, eq=False)
class _Row:
    """An editor at a layer in one cell: (B,) scores, or differences, by metric; (B, M) those that
    a harmonic mean is made of.
    """

    cell: str
    editor: str
    at: str
    columns: Mapping[str, Floats]
    more: Mapping[str, Any]

    def to_json(self, seed: int) -> dict[str, Any]:
        """The row with means and intervals."""
        named = {"cell": self.cell, "editor": self.editor, "at": self.at, **self.more}
        means = {m: _mean([values], seed).to_json() for m, values in self.columns.items()}
        return named | {"metrics": means}


def _means(rows: Sequence[_Row], seed: int) -> list[dict[str, Any]]:
    """Means over the cells, by editor and word of the layer."""
    groups: dict[tuple[str, str], list[_Row]] = {}
    for row in rows:
        groups.setdefault((row.editor, row.at), []).append(row)
    return [
        {
            "editor": editor,
            "at": at,
            "cells": [row.cell for row in some],
            "metrics": {
                m: _mean([row.columns[m] for row in some if m in row.columns], seed).to_json()
                for m in dict.fromkeys(m for row in some for m in row.columns)
            },
        }
        for (editor, at), some in groups.items()
    ]


def _judged(study: Study, cell: Cell) -> Iterable[Judged]:
    """The finished editors of a cell."""
    there = cell.finished()
    for one in study.editors:
        folder = there.get(one.name)
        if folder is None:
            continue
        seconds = entry(folder.json(SUMMARY), "seconds", float, folder.path, None)
        if not one.sweeps:
            rows = [{**row, "layer": 0} for row in folder.rows(SCORES)]
            truth = Truth.from_rows(rows, seed=study.seed)
            yield Judged(cell.name, one.name, truth, {NOWHERE: 0}, 0, seconds, folder)
            continue
        truth = truth_of(folder)
        depth = entry(folder.json(SUMMARY), "n_layers", int, folder.path)
        asked = cell.layers(depth)
        at = {word: truth.layers.index(layer) for word, layer in asked.items()}
        if cell.all_layers:
            at = {}
            if truth.leading is not None:
                at[GOLDEN] = truth.layers.index(truth.golden_layer(truth.leading))
            at[PUBLISHED] = truth.layers.index(truth.nearest(published_layer(depth)))
        yield Judged(cell.name, one.name, truth, at, depth, seconds, folder, cell.all_layers)


def _differences(
    first: Judged, one: Judged, word: str, metrics: Sequence[str]
) -> dict[str, Floats]:
    """By metric: fact by fact, an editor's score minus that of the first editor."""
    places = {fact: i for i, fact in enumerate(first.truth.facts)}
    both = [(places[fact], i) for i, fact in enumerate(one.truth.facts) if fact in places]
    theirs, mine = map(list, zip(*both, strict=True)) if both else ([], [])
    return {
        m: one.column(word, m)[mine] - first.column(word, m)[theirs]
        for m in metrics
        if m in first.truth.metrics
    }


def _mean(cells: Sequence[Floats], seed: int) -> Interval:
    """Mean over cells of the mean over facts (of several columns the harmonic mean of their means),
    with its interval; cells without a score are left. ``n`` is the number of facts in all.
    """
    cells = [values[~np.isnan(values.reshape(len(values), -1)).all(1)] for values in cells]
    cells = [values for values in cells if len(values)]
    if not cells:
        return Interval(math.nan, math.nan, math.nan, 0)
    value = float(np.mean([_one(values, nan_mean(values)) for values in cells]))
    count = sum(map(len, cells))
    if any(len(values) < 2 for values in cells):
        return Interval(value, math.nan, math.nan, count)
    drawn = [
        _one(values, resampled_means(values, RESAMPLES, seed + i)) for i, values in enumerate(cells)
    ]
    return Interval(value, *ends(np.mean(drawn, axis=0)), count)


def _one(values: Floats, means: Floats) -> Floats:
    """One figure of the means of a column of scores, or of several."""
    return harmonic_mean(means) if values.ndim == 2 else means


# --- layer choices


def _choices(judged: Sequence[Judged], seed: int) -> dict[str, Any]:
    """Regrets of the layer choices, where layers were swept to find the best."""
    rows: list[dict[str, Any]] = []
    lost: dict[tuple[str, str], list[tuple[str, Floats]]] = {}
    floors: dict[str, list[float]] = {}
    for one in judged:
        truth, metric = one.truth, one.truth.leading
        if not one.searched or metric is None:
            continue
        floor = noise_floor(truth, metric)
        floors.setdefault(one.editor, []).append(floor)
        regrets = {}
        for name, choice, vector in _chosen(one, metric):
            lost.setdefault((name, one.editor), []).append((one.cell, vector))
            regrets[name] = {"layer": choice, "regret": _mean([vector], seed).to_json()}
        rows.append(
            {
                "cell": one.cell,
                "editor": one.editor,
                "golden_layer": truth.golden_layer(metric),
                "metric": metric,
                "noise_floor": floor,
                "choices": regrets,
            }
        )
    names = list(dict.fromkeys(name for name, _ in lost))
    editors = list(floors)
    means = []
    for name in names:
        mine = {editor: lost.get((name, editor), []) for editor in editors}
        every = [(e, cell, vector) for e, some in mine.items() for cell, vector in some]
        usual = {(e, cell): v for e in editors for cell, v in lost.get((PUBLISHED, e), [])}
        worst = [
            float(np.nanmean(v) - np.nanmean(usual[e, c])) for e, c, v in every if (e, c) in usual
        ]
        means.append(
            {
                "choice": name,
                "cells": len(every),
                "regret": _mean([v for *_, v in every], seed).to_json(),
                "worst": max((float(np.nanmean(v)) for *_, v in every), default=None),
                "worst_against_published": max(worst, default=None),
                "by_editor": {
                    e: _mean([v for _, v in some], seed).to_json()
                    for e, some in mine.items()
                    if some
                },
            }
        )
    every_floor = [value for some in floors.values() for value in some]
    return {
        "rows": rows,
        "means": means,
        "noise_floor": float(np.mean(every_floor)) if every_floor else None,
        "noise_floor_by_editor": {e: float(np.mean(some)) for e, some in floors.items()},
    }


def _chosen(one: Judged, metric: str) -> Iterable[tuple[str, int | None, Floats]]:
    """(name, layer, (B,) points lost against the golden layer) of every choice of a cell."""
    table, layers = one.truth.table(metric), one.truth.layers
    golden = table[:, layers.index(one.truth.golden_layer(metric))]
    able = ~np.isnan(eligible_means(table))
    yield "oracle", None, golden - row_max(table)
    yield "random layer", None, golden - nan_mean(table[:, able].T)
    seen = set()
    for choice in _compared(one):
        name, layer = choice.get("name"), choice.get("layer")
        if isinstance(name, str) and layer in layers and name not in ("golden layer", *seen):
            seen.add(name)
            yield name, layer, golden - table[:, layers.index(layer)]
    if PUBLISHED not in seen:
        layer = one.truth.nearest(published_layer(one.n_layers))
        yield PUBLISHED, layer, golden - table[:, layers.index(layer)]


def _compared(one: Judged) -> list[dict[str, Any]]:
    """The choices that ``golden compare`` judged by this sweep; [] where it has not."""
    path = one.folder.path.parent / "compare" / one.folder.path.name
    try:
        folder = RunFolder.open(path)
        found = folder.json(COMPARE)
    except UserError:
        return []
    choices = found.get("choices") if isinstance(found, dict) else None
    return [c for c in choices or [] if isinstance(c, dict)]
