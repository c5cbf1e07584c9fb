"""Sections on edits: what changed, what else moved, scores under an edit, and whole studies."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from goldenlayers.checking import FILE, Check
from goldenlayers.checking.probes import Part
from goldenlayers.records import entry
from goldenlayers.report.page import charts
from goldenlayers.report.page.parts import Chart, Section, Table, interval, number
from goldenlayers.report.page.runs import named, place
from goldenlayers.store import RunFolder

_PARTS: dict[Part, str] = {
    "prompt": "edited prompt",
    "rephrase": "rephrasing",
    "neighbours": "neighbour",
    "unrelated": "unrelated",
}
_MOST_DRAWN = 60  # prompts in a chart; the table has more


def edit_section(folder: RunFolder, record: Mapping[str, Any]) -> Section:
    """An edit: the facts, its check, and every answer before and after."""
    where = folder.file("delta.json")
    facts = entry(record, "facts", list[dict[str, Any]], where)
    layers = entry(record, "layers", list[int], where, [])
    method = entry(record, "method", str, where, "")
    model = named(folder, "model") or entry(record, "base_name", str, where, "")
    at = f"layer {', '.join(map(str, layers))}" if layers else "all layers it took"
    words = [f"{method or 'An editor'} wrote {len(facts)} fact{'s' * (len(facts) != 1)} at {at}."]
    columns = {"id": "fact", "subject": "subject", "prompt": "prompt", "target": "new answer"}
    rows = [[entry(one, name, str, where, None) for name in columns] for one in facts]
    parts: list[Table | Chart] = [Table("The facts", list(columns.values()), rows, len(rows) > 8)]
    if os.path.lexists(folder.file(FILE)):
        check = Check.from_json(folder.json(FILE), folder.file(FILE))
        words.append(f"Check: {check.sentence()}")
        parts.insert(0, _check(check))
    else:
        words.append("It was not checked.")
    return Section(f"Edit: {model} · {method}", words, parts, place(folder))


def _check(check: Check) -> Chart:
    order = list(_PARTS)
    probes = sorted(check.probes, key=lambda one: order.index(one.part))
    drawn = probes[:_MOST_DRAWN]
    names = [f"{_PARTS[one.part]}: {one.prompt}" for one in drawn]
    figure = (
        charts.moves(
            names,
            [one.p_before for one in drawn],
            [one.p_after for one in drawn],
            "probability of the new answer",
        )
        | {}
    )
    figure["layout"]["meta"] = {"narrow": {"yaxis.showticklabels": False}}
    rows = [
        [_PARTS[one.part] + " (made)" * one.made, one.prompt, one.before, one.after,
         one.p_before, one.p_after, "as it should be" if one.ok else "NOT as it should be"]
        for one in probes
    ]  # fmt: skip
    ends: dict[Part, str] = {
        "rephrase": "rephrasings give the new answer",
        "neighbours": "neighbours keep theirs",
        "unrelated": "unrelated prompts keep theirs",
    }
    counts = [(check.share(part), words) for part, words in ends.items()]
    shares = [f"{share.ok} of {share.n} {words}" for share, words in counts if share.n]
    said = (
        "How likely the model gives the new answer before the edit and after it. It should rise "
        f"for the edited prompt and its rephrasings, and stay for all others. {', '.join(shares)}."
    )
    columns = ["asked", "prompt", "answer before", "answer after", "p before", "p after", ""]
    table = Table("Answers before and after", columns, rows)
    return Chart("What the edit moved", said, {"": figure}, table, 140 + 22 * len(drawn), True)


def evaluation_section(folder: RunFolder, found: Mapping[str, Any]) -> Section:
    """Scores with intervals, and what a sequence of edits left of the earlier ones."""
    where = folder.file("summary.json")
    metrics = entry(found, "metrics", dict[str, dict[str, Any]], where)
    rows = [_scored(name, one, where) for name, one in metrics.items()]
    for name in ("overall", "gain", "harmonic"):
        if (one := entry(found, name, dict[str, Any], where, None)) is not None:
            rows.append(_scored(name, one, where))
    method = entry(found, "method", str, where, "")
    mode = entry(found, "mode", str, where, "")
    layer = entry(found, "layer", int, where, None)
    count = entry(found, "n_facts", int, where, None)
    words = [f"{count or '?'} facts, mode {mode or '?'}, {method or 'no edit'}"
             + (f" at layer {layer}." if layer is not None else ".")]  # fmt: skip
    table = Table(
        "Scores", ["metric", "mean", "95 %", "scored", "unscored"],
        [[name, mean, interval(low, high), n, lost] for name, mean, low, high, n, lost in rows],
        True,
    )  # fmt: skip
    drawn = [
        r for r in rows if r[1] is not None and all(0 <= v <= 100 for v in r[1:4] if v is not None)
    ]
    parts: list[Table | Chart] = []
    if drawn:
        names, means, low, high = (list(some) for some in zip(*(r[:4] for r in drawn), strict=True))
        figure = charts.dots(names, means, low, high, "score", xaxis={"range": [-2, 102]})
        said = (
            "Mean scores with their 95 % intervals over the facts. What has another scale is in "
            "the table alone."
        )
        parts.append(Chart("Scores", said, {"": figure}, table, 130 + 26 * len(drawn)))
    else:
        parts.append(table)
    ages = entry(found, "retention", list[dict[str, Any]], where, [])
    if len(ages) > 1:
        parts.append(_forgetting(ages, where))
    about = " · ".join(
        p for p in (named(folder, "model"), named(folder, "data"), method, mode) if p
    )
    return Section(f"Evaluation: {about}", words, parts, place(folder))


def _scored(name: str, one: Mapping[str, Any], where: Any) -> list[Any]:
    mean, low, high = (entry(one, n, float, where, None) for n in ("mean", "low", "high"))
    counts = [entry(one, n, int, where, None) for n in ("scored", "unscored")]
    return [name.replace("_", " "), mean, low, high, *counts]


def _forgetting(ages: list[dict[str, Any]], where: Any) -> Chart:
    rows = []
    for one in ages:
        age = entry(one, "age", tuple[int, int], where)
        once, end = (entry(one, n, float, where) for n in ("rewrite_at_once", "rewrite"))
        rows.append([age[0], age[1], entry(one, "facts", int, where), once, end])
    x = [(row[0] + row[1]) / 2 for row in rows]
    lines = [
        charts.curve(x, [row[i] for row in rows], name, place)  # pyright: ignore[reportArgumentType]
        | {"hovertemplate": "%{x:.0f} edits after it: %{y:.1f}<extra>%{fullData.name}</extra>"}
        for i, name, place in ((3, "right after the edit", 0), (4, "in the end", 1))
    ]
    figure = charts.figure(
        lines, "edits made after it", "rewrite, mean over facts", yaxis={"range": [-2, 104]}
    )
    said = (
        f"What is left of an edit after others: of the oldest, rewrite was {number(rows[-1][3])} "
        f"at once and is {number(rows[-1][4])} in the end."
    )
    table = Table(
        "What is left of an edit",
        ["edits after it, from", "to", "facts", "rewrite right after it", "rewrite in the end"],
        rows,
        True,
    )
    return Chart("Forgetting over the sequence", said, {"": figure}, table, 300)


def study_section(folder: RunFolder, found: Mapping[str, Any]) -> Section:
    """A study's means over its cells: editors, and what choices of a layer lose."""
    where = folder.file("summary.json")
    parts: list[Table | Chart] = []
    metrics = entry(found, "metrics", list[str], where)
    rows = []
    for one in entry(found, "means", list[dict[str, Any]], where):
        scores = entry(one, "metrics", dict[str, dict[str, Any]], where)
        head = [entry(one, "editor", str, where), entry(one, "at", str, where, ""),
                len(entry(one, "cells", list[str], where))]  # fmt: skip
        rows.append(head + [_estimate(scores.get(m), where)[0] for m in metrics])
    if rows:
        columns = ["editor", "layer", "cells", *(m.replace("_", " ") for m in metrics)]
        parts.append(Table("Editors: means over the cells", columns, rows))
    choices = entry(found, "choices", dict[str, Any], where, {})
    if means := entry(choices, "means", list[dict[str, Any]], where, []):
        parts.append(_study_choices(choices, means, where))
    failed = entry(found, "failed", dict[str, str], where, {})
    left = entry(found, "left", list[str], where, [])
    words = [f"Failed: {run}: {why}" for run, why in failed.items()]
    words += [f"{len(left)} runs are still to be made."] * bool(left)
    return Section(f"Study: {folder.path.parent.name}", words, parts, place(folder))


def _estimate(one: Mapping[str, Any] | None, where: Any) -> list[float | None]:
    return [entry(one or {}, n, float, where, None) for n in ("value", "low", "high")]


def _study_choices(choices: Mapping[str, Any], means: list[dict[str, Any]], where: Any) -> Chart:
    floor = entry(choices, "noise_floor", float, where, None)
    rows = []
    for one in means:
        name = entry(one, "choice", str, where)
        regret = _estimate(entry(one, "regret", dict[str, Any], where, None), where)
        worst, against = (
            entry(one, n, float, where, None) for n in ("worst", "worst_against_published")
        )
        rows.append([name, entry(one, "cells", int, where), *regret, worst, against])
    rows.sort(key=lambda row: (row[2] is None, row[2] or 0.0))
    names, lost, low, high = ([row[i] for row in rows] for i in (0, 2, 3, 4))
    figure = charts.dots(names, lost, low, high, "points lost", floor=floor)
    said = (
        "What each way to choose a layer loses against the golden layer, mean over the cells, with "
        f"95 % intervals over the facts. Noise floor: {number(floor)} points."
    )
    table = Table(
        "Choices of a layer",
        ["choice", "cells", "regret", "95 %", "worst cell", "worst against published"],
        [[*row[:3], interval(row[3], row[4]), *row[5:]] for row in rows],
        True,
    )
    return Chart("Choices of a layer, all cells", said, {"": figure}, table, 130 + 26 * len(rows))
