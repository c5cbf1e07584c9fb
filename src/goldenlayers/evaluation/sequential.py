"""One edit after another: each scored right after its own, all scored after the last.

What has been edited so far is kept in a folder, so that a killed run goes on where it was.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from goldenlayers.durable import write_bytes
from goldenlayers.errors import UserError
from goldenlayers.evaluation.batch import (
    Work,
    ids_of,
    saved,
    score_under,
    store,
    told_failures,
)
from goldenlayers.evaluation.plan import first_block
from goldenlayers.evaluation.scoring import unscored
from goldenlayers.evaluation.summary import AT_ONCE

if TYPE_CHECKING:
    from goldenlayers.editors.editing import Editing

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
