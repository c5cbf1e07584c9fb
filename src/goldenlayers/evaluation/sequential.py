"""One edit after another: each scored right after its own, all scored after the last.

What has been edited so far is kept in a folder, so that a killed run goes on where it was.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from goldenlayers.delta import WeightDelta
from goldenlayers.errors import UserError
from goldenlayers.evaluation.plan import Edit, EvaluationPlan, Row, first_block
from goldenlayers.facts import Fact

if TYPE_CHECKING:
    from goldenlayers.editors import Editor, Workbench
    from goldenlayers.models.model import Model

AT_ONCE = "rewrite_at_once"
_KEYS = "previous_keys.safetensors"
_FAILED = "the edit failed: "


class Work(Protocol):
    """What a sequence needs of the evaluation it is a part of."""

    model: Model
    facts: list[Fact]
    rows: list[Row]

    def plan(
        self, places: Sequence[int], metrics: Sequence[str] | None = None
    ) -> EvaluationPlan: ...
    def todo(self, chunk: int) -> Iterator[list[int]]: ...
    def add(self, rows: Collection[Row], n_facts: int) -> None: ...


def run_sequence(
    work: Work, bench: Workbench, chosen: Editor, layer: int, folder: Path | None, chunk: int
) -> None:
    """Edit and score in turn, then score everything under the last state.

    Each fact gets a row ``rewrite_at_once`` with "step", its place in the sequence: beside the
    final rewrite rows that is the forgetting curve. A fact whose edit fails is left unedited, and
    its rows are unscored.

    Raises:
        UserError: every edit fails; or rows of an earlier call are there but not their edits.
    """
    model = work.model
    _ = bench.base_fingerprint, bench.prefixes  # both belong to the untouched model
    total = saved(folder)
    _read_keys(folder, bench)
    seen = {row["fact"]: row for row in work.rows if row["metric"] == AT_ONCE}
    failed: dict[str, UserError] = {
        fact: UserError(row["reason"].removeprefix(_FAILED))
        for fact, row in seen.items()
        if str(row.get("reason", "")).startswith(_FAILED)
    }
    inside = {str(entry.get("id")) for entry in (total.facts if total else ())}
    if not seen.keys() <= inside | failed.keys():
        raise UserError(
            "the edits that were made before the interruption are gone",
            fix="Begin anew without the earlier rows",
        )
    quick = work.plan(range(len(work.facts)), ["rewrite"])
    quick.baseline()
    for i, fact in enumerate(work.facts):
        if fact.id in seen:
            continue
        edit: UserError | None = None
        if fact.id not in inside:
            try:
                with nullcontext() if total is None else total.applied(model):
                    step = chosen.together(bench, [fact], layer)
            except UserError as error:
                edit = failed[fact.id] = error
            else:
                total = step if total is None else total + step
                _write_keys(folder, bench)
                store(folder, total)
        if edit is not None:
            rows = quick.score([edit], facts=[i])
        else:
            assert total is not None  # this fact is in it
            with total.applied(model):
                rows = quick.score_applied(facts=[i], first_layer=first_block(model, [total]))
        work.add([{**row, "metric": AT_ONCE, "step": i} for row in rows], 0)
    step_of = {fact.id: i for i, fact in enumerate(work.facts)}
    if total is None:
        raise next(iter(failed.values()))
    first = first_block(model, [total])
    for places in work.todo(chunk):
        plan = work.plan(places)
        plan.baseline()
        names = [work.facts[place].id for place in places]
        lost = [n for n, name in enumerate(names) if name in failed]
        kept = [n for n in range(len(names)) if n not in lost]
        errors: list[Edit] = [failed[names[n]] for n in lost]
        rows = plan.score(errors, facts=lost) if lost else []
        with total.applied(model):
            rows += plan.score_applied(facts=kept, first_layer=first) if kept else []
        work.add([{**row, "step": step_of[row["fact"]]} for row in rows], len(places))


def saved(folder: Path | None) -> WeightDelta | None:
    """The delta that :func:`store` left, if there is one."""
    if folder is None or not (folder / "delta.json").is_file():
        return None
    return WeightDelta.load(folder)


def store(folder: Path | None, delta: WeightDelta) -> None:
    """Keep the delta in a run's folder."""
    if folder is not None:
        delta.save(folder, overwrite=True)


def _write_keys(folder: Path | None, bench: Workbench) -> None:
    """Keep the keys AlphaEdit keeps clear of."""
    if folder is None or not bench.previous_keys:
        return
    from safetensors.torch import save_file

    part = folder / f"{_KEYS}.part"
    save_file({str(layer): k.contiguous() for layer, k in bench.previous_keys.items()}, str(part))
    part.replace(folder / _KEYS)


def _read_keys(folder: Path | None, bench: Workbench) -> None:
    if folder is None or not (folder / _KEYS).is_file():
        return
    from safetensors.torch import load_file

    found: dict[str, Any] = load_file(str(folder / _KEYS))
    bench.previous_keys.update({int(layer): keys for layer, keys in found.items()})
