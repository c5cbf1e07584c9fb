"""``golden compare``: layer choices against a sweep's truth."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from goldenlayers.cli import showing
from goldenlayers.commands import shared
from goldenlayers.config import CompareConfig
from goldenlayers.errors import UserError

if TYPE_CHECKING:
    from goldenlayers.compare import Choice, Comparison
    from goldenlayers.store import RunFolder
    from goldenlayers.truth import Truth

COMPARE = "compare.json"


def run(config: CompareConfig) -> int:
    """Compare, print the tables, and write the run folder if one is asked for."""
    from goldenlayers.compare import LocateRun, compare, overlap_warnings
    from goldenlayers.store import RunFolder

    if config.out is not None and not config.overwrite:
        shared.refuse_taken(config.out)
    sweep, truth = _sweep(config)
    if config.metric == "overall" and truth.leading not in ("overall", None):
        raise UserError(
            f"nothing that Overall is made of was scored in {sweep.path}",
            expected=f"a metric of this sweep: {', '.join(m for m in truth.metrics[:-1])}",
            fix=f"Add --metric {truth.leading}",
        )
    runs = [LocateRun.read(RunFolder.open(path)) for path in config.with_]
    origin = _origin(sweep)
    warnings = overlap_warnings(
        runs,
        truth,
        data_sha256=origin["data_sha256"],
        fingerprint=origin["fingerprint"],
        allow_overlap=config.allow_overlap,
    )
    found = compare(
        truth,
        runs,
        metric=config.metric,
        sweep_seconds=origin["seconds"],
        # A run ranks all layers of its model, the sweep may have been of some.
        n_layers=None if runs else origin["n_layers"],
        sizes=config.sizes,
        repeats=config.repeats,
        seed=config.seed,
        warnings=warnings,
    )
    with shared.run_folder(config, "compare") as folder:
        if folder is not None:
            folder.write_json(COMPARE, found.to_json() | {"sweep": origin})
            folder.finish()
    with showing():
        show(found, f"{origin['method']} on {origin['model']}", origin["data"])
    if folder is not None:
        shared.say(f"Written to {folder.path}: {COMPARE}")
    return 0


def _sweep(config: CompareConfig) -> tuple[RunFolder, Truth]:
    from goldenlayers.commands.sweep import truth_of
    from goldenlayers.store import RunFolder

    folder = RunFolder.open(config.sweep)
    if folder.kind != "sweep":
        raise UserError(
            f"{folder.path} is a run of '{folder.kind}'", expected="a run of golden sweep"
        )
    return folder, truth_of(folder)


def _origin(folder: RunFolder) -> dict[str, Any]:
    """Where the truth comes from, and what it cost."""
    config, summary = folder.config, folder.json("summary.json")
    data, model = config.get("data") or {}, config.get("model") or {}
    return {
        "run": folder.path.name,
        "method": summary.get("method", ""),
        "model": model.get("name", ""),
        "fingerprint": model.get("fingerprint", ""),
        "data": data.get("name", ""),
        "data_sha256": data.get("sha256", ""),
        "seconds": summary.get("seconds"),
        "n_layers": summary.get("n_layers"),
    }


def show(found: Comparison, title: str, data: str) -> None:
    """Print the choices, best first below the yardsticks, and the curves over proxy facts."""
    from goldenlayers.report.terminal import show as put
    from goldenlayers.report.terminal import table

    marks = [one for one in found.choices if one.method in ("golden", "oracle", "random")]
    rest = [one for one in found.choices if one not in marks]
    rest.sort(key=lambda one: (one.regret.value != one.regret.value, one.regret.value))
    name = "Overall" if found.metric == "overall" else found.metric
    columns = ("choice", "facts", "layer", name, "regret", "at", "rho", "cost")
    facts = f"{found.n_facts} facts" + (f" of {data}" if data else "")
    put(table(f"{title}: {facts}", columns, [_line(one) for one in [*marks, *rest]]))
    print(
        "regret: points below the golden layer, with the 95 % interval over the facts\n"
        "at: the golden layer's place in the choice's own order\n"
        "rho: rank correlation of its layer scores with the sweep's\n"
        "cost: seconds, and how many times as long the sweep takes"
    )
    if curves := [one for one in found.proxy_sizes if len(one.points) > 1]:
        sizes = sorted({point.n for one in curves for point in one.points})
        rows = []
        for one in curves:
            at = {p.n: f"{_number(p.regret)} {100 * p.wins:.0f}%" for p in one.points}
            rows.append((_short(one.name), *(at.get(n) for n in sizes)))
        heading = "Mean regret with N proxy facts, and how often the golden layer is chosen"
        put(table(heading, ("choice", *map(str, sizes)), rows))
    for one in found.choices:
        if one.note and one.method not in ("oracle", "random"):
            print(f"{_short(one.name)}: {one.note}.")
    for warning in found.warnings:
        shared.say(f"Warning: {warning}.")


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
