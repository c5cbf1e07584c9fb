"""``golden compare``: layer choices against a sweep's truth."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from goldenlayers.commands import shared
from goldenlayers.config import CompareConfig
from goldenlayers.errors import UserError
from goldenlayers.shown import put

if TYPE_CHECKING:
    from goldenlayers.comparing import Choice, Comparison, LocateRun, SweepRun
    from goldenlayers.truth import TransferMatrix

COMPARE = "compare.json"


def run(config: CompareConfig) -> int:
    """Compare, print the tables, and write the run folder if one is asked for."""
    from goldenlayers.comparing import (
        LocateRun,
        SweepRun,
        compare,
        overlap_warnings,
        transfer_warnings,
    )
    from goldenlayers.store import RunFolder

    shared.refuse_out(config, "compare")
    sweep = SweepRun.read(RunFolder.open(config.sweep))
    truth = sweep.truth
    if config.metric == "overall" and truth.leading not in ("overall", None):
        raise UserError(
            f"nothing that Overall is made of was scored in {config.sweep}",
            expected=f"a metric of this sweep: {', '.join(m for m in truth.metrics[:-1])}",
            fix=f"Add --metric {truth.leading}",
        )
    others = _choices(config)
    warnings = overlap_warnings(
        [one for one in others if isinstance(one, LocateRun)],
        sweep,
        allow_overlap=config.allow_overlap,
    )
    sweeps = [one for one in others if isinstance(one, SweepRun)]
    warnings += transfer_warnings(sweep, sweeps, config.metric)
    found = compare(
        sweep,
        others,
        metric=config.metric,
        sizes=config.sizes,
        repeats=config.repeats,
        seed=config.seed,
    )
    found = dataclasses.replace(found, warnings=(*warnings, *found.warnings))
    with shared.run_folder(config, "compare") as folder:
        if folder is not None:
            folder.write_json(COMPARE, found.to_json() | {"sweep": _origin(sweep)})
            folder.finish()
    show(found, f"{sweep.editor} on {sweep.model}", sweep.data)
    if folder is not None:
        shared.say(f"Written to {folder.path}: {COMPARE}")
    return 0


def _choices(config: CompareConfig) -> list[LocateRun | SweepRun]:
    """The locate runs and the other sweeps of ``--with``."""
    from goldenlayers.comparing import LocateRun, SweepRun
    from goldenlayers.store import RunFolder

    found: list[LocateRun | SweepRun] = []
    for path in config.with_:
        folder = RunFolder.open(path)
        if folder.kind not in ("locate", "sweep"):
            raise UserError(
                f"{folder.path} is a run of '{folder.kind}'",
                expected="a run of golden locate or golden sweep",
            )
        if path.resolve() == config.sweep.resolve():
            raise UserError(
                f"{path} is the sweep that judges", expected="other sweeps behind --with"
            )
        kind = SweepRun if folder.kind == "sweep" else LocateRun
        found.append(kind.read(folder))
    return found


def _origin(sweep: SweepRun) -> dict[str, Any]:
    """Where the truth comes from, and what it cost."""
    return {
        "run": sweep.run,
        "method": sweep.editor,
        **{name: getattr(sweep, name) for name in ("model", "fingerprint", "data", "data_sha256")},
        **{name: getattr(sweep, name) for name in ("seconds", "n_layers")},
    }


def show(found: Comparison, title: str, data: str) -> None:
    """Print the choices, best first below the yardsticks, and the curves over proxy facts."""
    from goldenlayers.report.terminal import show as show_table
    from goldenlayers.report.terminal import table

    marks = [one for one in found.choices if one.method in ("golden", "oracle", "random")]
    rest = [one for one in found.choices if one not in marks]
    rest.sort(key=lambda one: (one.regret.value != one.regret.value, one.regret.value))
    name = "Overall" if found.metric == "overall" else found.metric
    columns = ("choice", "facts", "layer", name, "regret", "at", "rho", "cost")
    facts = f"{found.n_facts} facts" + (f" of {data}" if data else "")
    show_table(table(f"{title}: {facts}", columns, [_line(one) for one in [*marks, *rest]]))
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
        show_table(table(heading, ("choice", *map(str, sizes)), rows))
    if found.transfer is not None:
        show_table(_matrix(found.transfer))
    for one in found.choices:
        if one.note and one.method not in ("oracle", "random"):
            put(f"{_short(one.name)}: {one.note}.")
    for warning in found.warnings:
        shared.say(f"Warning: {warning}.")


def _matrix(found: TransferMatrix) -> Any:
    """Rows: whose golden layer. Columns: on which sweep it is judged."""
    from goldenlayers.report.terminal import table

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
