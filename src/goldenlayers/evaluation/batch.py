"""Many facts in one delta, edited together or one after another, and scored.

What has been edited is kept in a run's folder, where a killed run finds it again. In sequence each
fact is scored right after its own edit, and all after the last.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from goldenlayers.delta import WeightDelta
from goldenlayers.delta.files import RECORD, TENSORS
from goldenlayers.durable import write_bytes
from goldenlayers.errors import UserError
from goldenlayers.evaluation.plan import Edit, EvaluationPlan, first_block
from goldenlayers.evaluation.scoring import FAILED, unscored
from goldenlayers.evaluation.scoring import ScoreRow as Row
from goldenlayers.evaluation.summary import AT_ONCE
from goldenlayers.facts import Fact, repeats

if TYPE_CHECKING:
    from goldenlayers.editors.editing import Editing
    from goldenlayers.models import Model

_KEYS = "previous_keys"
_GONE = "the weights as they were right after its edit are gone"


def run_sequence(work: Work, editing: Editing, step: int = 1) -> None:
    """Edit and score in turn, then score everything under the last state.

    Each fact gets a row ``rewrite_at_once`` with "step", the number of its edit in the sequence:
    beside the final rewrite rows that is the forgetting curve (:func:`retention`). A fact whose
    edit fails is left unedited, and its rows are unscored. ``step`` facts are edited at a time.

    Raises:
        UserError: every edit fails; or rows of an earlier call are there but not their edits.
    """
    model, folder = work.model, work.folder
    editing.judged = work.facts
    editing.prepare()  # prefixes and statistics belong to the untouched model
    total = saved(work, editing)
    _read_keys(folder, editing, len(total.facts) if total is not None else 0)
    seen = {row["fact"] for row in work.rows if row["metric"] == AT_ONCE}
    failed = told_failures(row for row in work.rows if row["metric"] == AT_ONCE)
    inside = ids_of(total)
    if not seen <= inside | failed.keys():
        raise UserError(
            "the edits that were made before the interruption are gone",
            fix="Begin anew without the earlier rows",
        )
    quick = work.plan(range(len(work.facts)), ["rewrite"])
    quick.baseline()
    for start in range(0, len(work.facts), step):
        group = range(start, min(start + step, len(work.facts)))
        todo = [i for i in group if work.facts[i].id not in seen]
        new = [work.facts[i] for i in todo if work.facts[i].id not in inside]
        errors: dict[str, UserError] = {}
        if new:
            try:
                total, errors = editing.onto(total, new)
            except UserError as error:
                errors = {fact.id: error for fact in new}
            if len(errors) < len(new) and total is not None:
                _write_keys(folder, editing, len(total.facts))
                store(folder, total)
                _drop_keys(folder, len(total.facts))
            failed |= errors
        lost = [i for i in todo if work.facts[i].id in errors]
        kept = [i for i in todo if i not in lost]
        rows = quick.score([errors[work.facts[i].id] for i in lost], facts=lost) if lost else []
        latest = total.facts[-1].get("id") if total is not None else None
        if total is not None and latest in {work.facts[i].id for i in group}:
            with total.applied(model):
                first = first_block(model, [total])
                rows += quick.score_applied(facts=kept, first_layer=first) if kept else []
        else:  # a kill costs the rows of the last edit at most; here more were lost
            asked = [question for question in quick.questions if question.fact in kept]
            rows += [row for q in asked for row in unscored(work.facts[q.fact], q, _GONE)]
        place = {work.facts[i].id: i for i in todo}
        rows.sort(key=lambda row: place[row["fact"]])
        work.add([{**row, "metric": AT_ONCE, "step": start // step} for row in rows], 0)
    if total is None:
        raise next(iter(failed.values()))
    score_under(work, total, failed, {fact.id: i // step for i, fact in enumerate(work.facts)})


def _keys_file(folder: Path, n_facts: int) -> Path:
    """The keys of the first ``n_facts`` edits.

    Each number has a file of its own: whenever a kill comes, one belongs to the delta.
    """
    return folder / f"{_KEYS}.{n_facts}.safetensors"


def _write_keys(folder: Path | None, editing: Editing, n_facts: int) -> None:
    """Keep the keys that AlphaEdit leaves alone; to be called before the delta is stored."""
    if folder is None or not editing.previous_keys:
        return
    from safetensors.torch import save

    keys = {str(at): k.contiguous() for at, k in editing.previous_keys.items()}
    write_bytes(_keys_file(folder, n_facts), save(keys))


def _drop_keys(folder: Path | None, n_facts: int) -> None:
    """Remove the keys of other numbers of edits."""
    if folder is None:
        return
    for file in folder.glob(f"{_KEYS}.*"):
        if file != _keys_file(folder, n_facts):
            file.unlink(missing_ok=True)


def _read_keys(folder: Path | None, editing: Editing, n_facts: int) -> None:
    if folder is None or not any(folder.glob(f"{_KEYS}.*")) or n_facts == 0:
        return
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = _keys_file(folder, n_facts)
    if not file.is_file():
        raise UserError(
            f"the keys of the {n_facts} edits made before the interruption are gone: "
            f"there is no {file.name} in {folder}",
            fix="Begin anew without the earlier rows",
        )
    try:
        found = load_file(str(file))
        editing.previous_keys.update({int(layer): keys for layer, keys in found.items()})
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{file} is damaged ({error})", fix="Begin anew without it") from error


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
    editing.judged = work.facts
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
