"""Editors: facts in, a :class:`WeightDelta` out, the model bit-identical afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

from goldenlayers.decoding import settle_joints
from goldenlayers.delta import WeightDelta
from goldenlayers.delta.apply import untouched
from goldenlayers.editors.base import Editor, Settings, ValueSearch, needed_layers
from goldenlayers.editors.editing import Editing, Options
from goldenlayers.editors.finetune import FtL, FtM
from goldenlayers.editors.locate_then_edit import (
    AlphaEdit,
    ClearRome,
    Emmet,
    Memit,
    Pmet,
    Rome,
    RRome,
)
from goldenlayers.editors.named import (
    EDITORS,
    PRESETS,
    InContext,
    Preset,
    check_step,
    in_context_prefix,
    make_editor,
    one_at_a_time,
    preset,
    read_settings,
    with_settings,
)
from goldenlayers.editors.routing import statistics_for
from goldenlayers.errors import DataError, UserError, near_matches
from goldenlayers.facts import Fact, refuse_contradictions, repeats
from goldenlayers.models import check_model
from goldenlayers.progress import Progress

if TYPE_CHECKING:
    from goldenlayers.models import Model

__all__ = [
    "EDITORS",
    "PRESETS",
    "AlphaEdit",
    "ClearRome",
    "Editing",
    "Editor",
    "Emmet",
    "FtL",
    "FtM",
    "InContext",
    "Memit",
    "Options",
    "Pmet",
    "Preset",
    "RRome",
    "Rome",
    "Settings",
    "ValueSearch",
    "check_step",
    "edit",
    "edit_each",
    "in_context_prefix",
    "make_editor",
    "needed_layers",
    "one_at_a_time",
    "preset",
    "read_settings",
    "statistics_for",
    "with_settings",
]

Mode = Literal["batch", "sequential"]


def edit(
    model: Model,
    facts: Fact | Sequence[Fact],
    method: str | Editor = "rome",
    *,
    layer: int,
    mode: Mode | None = None,
    step: int = 1,
    progress: Progress | None = None,
    **more: Any,
) -> WeightDelta:
    """Write ``facts`` at ``layer`` and hand back the change; ``model`` is left as it is.

    Args:
        model: a loaded model.
        facts: what it should answer from now on, one fact or several; one that is given twice is
            edited once.
        method: a name in ``EDITORS``, or an editor such as ``Memit(layers_before=4)``.
        layer: the block to edit, from the end if negative; for editors over several layers the
            last one.
        mode: "batch" writes all facts in one solve, "sequential" one after another, each on the
            model with the earlier ones. Default: batch where the editor can, else sequential.
        step: in the mode "sequential", how many facts are written at a time.
        progress: ``on_progress`` is called with (facts done, facts in all), ``on_dropped`` with the
            error of each fact that cannot be edited, which is then left out. Without it the first
            such fact ends the edit.
        more: ``statistics``, key statistics per layer (left out: collected from text sampled from
            the model, and cached); ``seed`` of the sampled prefixes and statistics; ``names`` that
            the edit is to stay clear of; and settings of the editor, ``steps=30``.

    Raises:
        UserError: unknown editor, setting or mode, layer out of range, no facts, two facts with one
            prompt and different new answers, or numbers that are not finite (with ``on_dropped``:
            for all facts).
    """
    tell = progress or Progress()
    facts = [facts] if isinstance(facts, Fact) else list(facts)
    if not facts:
        raise UserError("there are no facts to edit", expected="at least one fact")
    refuse_contradictions(facts)
    again = {id(later) for _, later in repeats(facts)[0]}
    facts = [fact for fact in facts if id(fact) not in again]
    if mode is not None and mode not in get_args(Mode):
        raise UserError(f"unknown mode '{mode}'", fix=near_matches(mode, get_args(Mode)))
    options, settings = Options.split(more)
    work = options.editing(model, make_editor(method, **settings), layer)
    batch = work.editor.edits_together or len(facts) == 1 if mode is None else mode == "batch"
    if batch and step != 1 and mode is not None:
        raise UserError(f"the step is {step}, and the mode is batch", fix="Use mode sequential")
    batch = batch and step == 1
    with untouched(model):
        facts = settle_joints(model, facts)
    total = len(facts)
    work.on_done = lambda done: tell.tell(done, total)
    work.on_done(0)

    def drop(fact: Fact, error: UserError) -> None:
        if tell.on_dropped is not None:
            tell.on_dropped(DataError(f"fact '{fact.id}' cannot be edited: {error}"))

    if not batch:
        return work.sequence(facts, step, on_failed=drop if tell.on_dropped else None)
    if tell.on_dropped is None:
        return work.together(facts)
    delta, failed = work.together_safely(facts)
    for fact in facts:
        if fact.id in failed:
            drop(fact, failed[fact.id])
    return delta


def edit_each(
    model: Model,
    facts: Sequence[Fact],
    method: str | Editor = "rome",
    *,
    layer: int,
    progress: Progress | None = None,
    **more: Any,
) -> list[WeightDelta]:
    """One delta per fact, each made on the untouched model; arguments as for :func:`edit`."""
    check_model(model)
    options, settings = Options.split(more)
    work = options.editing(model, make_editor(method, **settings), layer)
    if progress is not None:
        work.on_done = lambda done: progress.tell(done, len(facts))
        work.on_done(0)
    with untouched(model):
        facts = settle_joints(model, facts)
    return work.each(facts)
