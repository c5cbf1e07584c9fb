"""A comparison of layer choices for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from goldenlayers.report.terminal import show, table
from goldenlayers.shown import put, say

if TYPE_CHECKING:
    from goldenlayers.comparing import Choice, Comparison
    from goldenlayers.truth import TransferMatrix


def show_comparison(found: Comparison, title: str, data: str) -> None:
    """Print the choices, best first below the yardsticks, and the curves over proxy facts."""
    marks = [one for one in found.choices if one.method in ("golden", "oracle", "random")]
    rest = [one for one in found.choices if one not in marks]
    rest.sort(key=lambda one: (one.regret.value != one.regret.value, one.regret.value))
    name = "Overall" if found.metric == "overall" else found.metric
    columns = ("choice", "facts", "layer", name, "regret", "at", "rho", "cost")
    facts = f"{found.n_facts} facts" + (f" of {data}" if data else "")
    show(table(f"{title}: {facts}", columns, [_line(one) for one in [*marks, *rest]]))
    put(
        "regret: points below the golden layer, with the 95 % interval over the facts",
        "at: the golden layer's place in the choice's own order",
        "rho: rank correlation of its layer scores with the sweep's",
        "cost: seconds, and how many times as long the sweep takes",
    )
    if curves := [one for one in found.proxy_sizes if len(one.points) > 1]:
        sizes = sorted({point.n for one in curves for point in one.points})
        rows = []
        for one in curves:
            at = {p.n: f"{_number(p.regret)} {100 * p.wins:.0f}%" for p in one.points}
            rows.append((_short(one.name), *(at.get(n) for n in sizes)))
        heading = "Mean regret with N proxy facts, and how often the golden layer is chosen"
        show(table(heading, ("choice", *map(str, sizes)), rows))
    if found.transfer is not None:
        show(_matrix(found.transfer))
    for one in found.choices:
        if one.note and one.method not in ("oracle", "random"):
            put(f"{_short(one.name)}: {one.note}.")
    for warning in found.warnings:
        say(f"Warning: {warning}.")


def _matrix(found: TransferMatrix) -> Any:
    """Rows: whose golden layer. Columns: on which sweep it is judged."""
    letters = [chr(ord("A") + i) if i < 26 else str(i + 1) for i in range(len(found.names))]
    rows = [
        (f"{letter}: {name}", layer, *(_number(one.value) for one in regrets))
        for letter, name, layer, regrets in zip(
            letters, found.names, found.golden, found.regret, strict=True
        )
    ]
    heading = "Regret of each sweep's golden layer, judged by each sweep"
    return table(heading, ("chosen on", "layer", *(f"on {x}" for x in letters)), rows)


def _line(one: Choice) -> tuple[Any, ...]:
    regret = _number(one.regret.value)
    if one.regret.low == one.regret.low and one.method != "golden":
        regret = f"{regret} ({one.regret.low:.1f} to {one.regret.high:.1f})"
    cost = None if one.seconds is None else f"{one.seconds:.1f} s"
    if cost is not None and one.speed_up is not None and one.method not in ("golden", "oracle"):
        cost = f"{cost}, {one.speed_up:.0f}x"
    correlation = None if one.spearman != one.spearman else f"{one.spearman:.2f}"
    name, facts, score = _short(one.name), one.n_proxy or None, _number(one.score)
    return name, facts, one.layer, score, regret, one.golden_rank, correlation, cost


def _short(name: str) -> str:
    """A name without the settings that are the default."""
    return name.replace(" mlp", "").replace(" sequence", "").replace("+", " + ")


def _number(value: float) -> str | None:
    return None if value != value else f"{value:.1f}"
