"""One delta of many facts: kept in a run's folder, where a killed run finds it again, and all facts
scored under it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from goldenlayers.delta import WeightDelta
from goldenlayers.delta.files import RECORD, TENSORS
from goldenlayers.errors import UserError
from goldenlayers.evaluation.plan import Edit, EvaluationPlan, first_block
from goldenlayers.evaluation.scoring import FAILED
from goldenlayers.evaluation.scoring import ScoreRow as Row
from goldenlayers.facts import Fact, repeats

if TYPE_CHECKING:
    from goldenlayers.editors.editing import Editing
    from goldenlayers.models.model import Model


class Work(Protocol):
    """What an edit of many facts needs of the evaluation it is a part of.

    ``folder``: where the delta is kept, and found again.
    """

    model: Model
    facts: list[Fact]
    rows: list[Row]
    folder: Path | None

    def plan(
        self, places: Sequence[int], metrics: Sequence[str] | None = None
    ) -> EvaluationPlan: ...
    def todo(self) -> Iterator[list[int]]: ...
    def add(self, rows: Collection[Row], n_facts: int) -> None: ...


def run_batch(work: Work, editing: Editing) -> None:
    """Edit all facts together, then score each under that one delta.

    A fact that repeats an earlier one is edited with it, once, and scored by itself.
    The rows of facts that cannot be edited are unscored with the reason.

    Raises:
        UserError: see :meth:`Editing.together_safely`.
    """
    delta = saved(work, editing)
    twins = {later.id: first.id for first, later in repeats(work.facts)[0]}
    once = [fact for fact in work.facts if fact.id not in twins]
    if delta is None:
        delta, failed = editing.together_safely(once)
        store(work.folder, delta)
    else:
        inside, told = ids_of(delta), told_failures(work.rows)
        failed = {
            fact.id: told.get(fact.id)
            or editing.failure([fact])
            or UserError("the delta of the earlier call was made without it")
            for fact in once
            if fact.id not in inside
        }
    failed |= {later: failed[first] for later, first in twins.items() if first in failed}
    score_under(work, delta, failed)


def score_under(
    work: Work,
    delta: WeightDelta,
    failed: Mapping[str, UserError] | None = None,
    steps: Mapping[str, int] | None = None,
) -> None:
    """Score all facts under one delta; the rows of ``failed`` facts (by id) get their error.

    ``steps``: places in a sequence, by fact, that the rows are to hold.
    """
    failed, steps = failed or {}, steps or {}
    first = first_block(work.model, [delta])
    for places in work.todo():
        plan = work.plan(places)
        plan.baseline()
        names = [work.facts[place].id for place in places]
        lost = [n for n, name in enumerate(names) if name in failed]
        kept = [n for n in range(len(names)) if n not in lost]
        errors: list[Edit] = [failed[names[n]] for n in lost]
        rows = plan.score(errors, facts=lost) if lost else []
        with delta.applied(work.model):
            rows += plan.score_applied(facts=kept, first_layer=first) if kept else []
        if steps:
            rows = [{**row, "step": steps[row["fact"]]} for row in rows]
        work.add(rows, len(places))


def ids_of(delta: WeightDelta | None) -> set[str]:
    """Ids of the facts in a delta."""
    return {str(entry.get("id")) for entry in (delta.facts if delta else ())}


def told_failures(rows: Iterable[Row]) -> dict[str, UserError]:
    """The errors of edits, by fact, as the rows tell them."""
    return {
        row["fact"]: UserError(row["reason"].removeprefix(FAILED))
        for row in rows
        if str(row.get("reason", "")).startswith(FAILED)
    }


def saved(work: Work, editing: Editing) -> WeightDelta | None:
    """The delta that :func:`store` left, if there is one.

    Raises:
        UserError: it is damaged, or not of this work.
    """
    folder = work.folder
    if folder is None or not (folder / TENSORS).is_file():
        return None
    delta = WeightDelta.load(folder)
    told = (delta.method, delta.base_fingerprint, editing.layer in delta.layers)
    others = ids_of(delta) - {fact.id for fact in work.facts}
    if told != (editing.editor.name, editing.base_fingerprint, True) or others:
        raise UserError(
            f"the delta in {folder} is not of this run: it was made by {delta.method} at layers "
            f"{delta.layers}, with {len(others)} other facts, or on other weights",
            fix=f"Remove {folder} to begin anew",
        )
    if not (folder / RECORD).is_file():  # the kill came between the two files
        store(folder, delta)
    return delta


def store(folder: Path | None, delta: WeightDelta) -> None:
    """Keep the delta in a run's folder."""
    if folder is not None:
        delta.save(folder, overwrite=True)
