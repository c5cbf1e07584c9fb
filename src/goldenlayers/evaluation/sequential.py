"""One edit after another: each scored right after its own, all scored after the last.

What has been edited so far is kept in a folder, so that a killed run goes on where it was.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from goldenlayers.durable import disk_errors
from goldenlayers.editors.batch import edit_next
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
    from goldenlayers.editors import Editor, Workbench

_KEYS = "previous_keys"
_GONE = "the weights as they were right after its edit are gone"


def run_sequence(
    work: Work, bench: Workbench, chosen: Editor, layer: int, folder: Path | None, chunk: int
) -> None:
    """Edit and score in turn, then score everything under the last state.

    Each fact gets a row ``rewrite_at_once`` with "step", its place in the sequence: beside the
    final rewrite rows that is the forgetting curve (:func:`retention`). A fact whose edit fails is
    left unedited, and its rows are unscored.

    Raises:
        UserError: every edit fails; or rows of an earlier call are there but not their edits.
    """
    model = work.model
    _ = bench.base_fingerprint, bench.prefixes  # both belong to the untouched model
    total = saved(folder, work, bench, chosen, layer)
    _read_keys(folder, bench, len(total.facts) if total is not None else 0)
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
    for i, fact in enumerate(work.facts):
        if fact.id in seen:
            continue
        edit: UserError | None = None
        if fact.id not in inside:
            try:
                total = edit_next(bench, chosen, fact, layer, total)
            except UserError as error:
                edit = failed[fact.id] = error
            else:
                _write_keys(folder, bench, len(total.facts))
                store(folder, total)
                _drop_keys(folder, len(total.facts))
        if edit is not None:
            rows = quick.score([edit], facts=[i])
        elif total is not None and total.facts[-1].get("id") == fact.id:
            with total.applied(model):
                rows = quick.score_applied(facts=[i], first_layer=first_block(model, [total]))
        else:  # a kill costs the rows of the last edit at most; here more were lost
            asked = [question for question in quick.questions if question.fact == i]
            rows = [row for question in asked for row in unscored(fact, question, _GONE)]
        work.add([{**row, "metric": AT_ONCE, "step": i} for row in rows], 0)
    step_of = {fact.id: i for i, fact in enumerate(work.facts)}
    if total is None:
        raise next(iter(failed.values()))
    score_under(work, total, chunk, failed, step_of)


def _keys_file(folder: Path, n_facts: int) -> Path:
    """The keys of the first ``n_facts`` edits.

    Each number has a file of its own: whenever a kill comes, one belongs to the delta.
    """
    return folder / f"{_KEYS}.{n_facts}.safetensors"


def _write_keys(folder: Path | None, bench: Workbench, n_facts: int) -> None:
    """Keep the keys AlphaEdit keeps clear of; to be called before the delta is stored."""
    if folder is None or not bench.previous_keys:
        return
    from safetensors.torch import save

    file = _keys_file(folder, n_facts)
    part = file.with_name(f"{file.name}.part")
    with disk_errors(file):
        part.write_bytes(save({str(at): k.contiguous() for at, k in bench.previous_keys.items()}))
        part.replace(file)


def _drop_keys(folder: Path | None, n_facts: int) -> None:
    """Remove the keys of other numbers of edits."""
    if folder is None:
        return
    for file in folder.glob(f"{_KEYS}.*"):
        if file != _keys_file(folder, n_facts):
            file.unlink(missing_ok=True)


def _read_keys(folder: Path | None, bench: Workbench, n_facts: int) -> None:
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
        bench.previous_keys.update({int(layer): keys for layer, keys in found.items()})
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{file} is damaged ({error})", fix="Begin anew without it") from error
