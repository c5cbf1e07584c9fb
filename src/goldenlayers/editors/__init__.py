"""Editors: facts in, a :class:`WeightDelta` out, the model bit-identical afterwards."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

from goldenlayers.covariance import Covariance
from goldenlayers.decoding import settle_joints
from goldenlayers.delta import WeightDelta
from goldenlayers.delta.apply import untouched
from goldenlayers.editors.base import Editor, Workbench, edited_layers
from goldenlayers.editors.batch import edit_together, sequence
from goldenlayers.editors.finetune import FT_L, FT_M
from goldenlayers.editors.incontext import in_context_prefix
from goldenlayers.editors.memit import ALPHAEDIT, EMMET, MEMIT, PMET
from goldenlayers.editors.presets import PRESETS, preset
from goldenlayers.editors.rome import Rome
from goldenlayers.editors.settings import EditSettings
from goldenlayers.errors import UserError, near_matches
from goldenlayers.facts import Fact, refuse_contradictions, repeats

if TYPE_CHECKING:
    from goldenlayers.editors.values import Value
    from goldenlayers.models.model import Model

__all__ = [
    "EDITORS",
    "PRESETS",
    "EditSettings",
    "Editor",
    "Workbench",
    "edit",
    "edit_each",
    "edited_layers",
    "editor",
    "in_context_prefix",
    "preset",
    "sequence",
]

Mode = Literal["batch", "sequential"]

EDITORS: dict[str, Editor] = {
    e.name: e
    for e in (
        Rome(),
        Rome("r-rome", averaged=True),
        MEMIT,
        EMMET,
        ALPHAEDIT,
        PMET,
        FT_M,
        FT_L,
    )
}


def editor(name: str) -> Editor:
    """The editor called ``name``.

    Raises:
        UserError: unknown, with near matches.
    """
    if name not in EDITORS:
        extra = " (in-context changes no weights)" if name == "in-context" else ""
        raise UserError(f"unknown editor '{name}'{extra}", fix=near_matches(name, EDITORS))
    return EDITORS[name]


def workbench(
    model: Model,
    method: str,
    layer: int,
    *,
    settings: EditSettings | None = None,
    statistics: Mapping[int, Covariance] | None = None,
    seed: int = 0,
    on_done: Callable[[int], None] | None = None,
    value_cache: dict[tuple[Any, ...], Value] | None = None,
) -> Workbench:
    """What ``method`` needs to edit at ``layer``, key statistics included (collected if missing).

    Raises:
        UserError: unknown editor, layer out of range.
    """
    settings = settings or EditSettings()
    chosen = editor(method)
    layers = edited_layers(model.layers[layer].index, settings)
    if chosen.needs_statistics and statistics is None:
        from goldenlayers.statistics import key_statistics

        statistics = key_statistics(model, layers, seed=seed)
    bench = Workbench(model, settings, statistics, seed, on_done)
    if value_cache is not None:
        bench.value_cache = value_cache
    return bench


def edit(
    model: Model,
    facts: Sequence[Fact],
    method: str = "rome",
    *,
    layer: int,
    mode: Mode | None = None,
    settings: EditSettings | None = None,
    statistics: Mapping[int, Covariance] | None = None,
    seed: int = 0,
    on_done: Callable[[int], None] | None = None,
    on_failed: Callable[[Fact, UserError], None] | None = None,
) -> WeightDelta:
    """Write ``facts`` at ``layer`` and hand back the change; ``model`` is left as it is.

    Args:
        model: a loaded model.
        facts: what it should answer from now on; one that is given twice is edited once.
        method: a name in ``EDITORS``.
        layer: the block to edit; for editors over several layers the last one.
        mode: "batch" writes all facts in one solve, "sequential" one after another, each on the
            model with the earlier ones. Default: batch where the editor can, else sequential.
        settings: see :class:`EditSettings`; the defaults scale with the model.
        statistics: key statistics per layer; collected from text sampled from the model (and
            cached) when left out.
        seed: of the sampled prefixes and statistics.
        on_done: told how many facts have been optimised.
        on_failed: told of each fact that cannot be edited, and why; it is left out. Without it the
            first such fact ends the edit.

    Raises:
        UserError: unknown editor or mode, layer out of range, no facts, two facts with one prompt
            and different new answers, or numbers that are not finite (with ``on_failed``: for all
            facts).
    """
    if not facts:
        raise UserError("there are no facts to edit", expected="at least one fact")
    refuse_contradictions(facts)
    again = {id(later) for _, later in repeats(facts)[0]}
    facts = [fact for fact in facts if id(fact) not in again]
    if mode is not None and mode not in get_args(Mode):
        raise UserError(f"unknown mode '{mode}'", fix=near_matches(mode, get_args(Mode)))
    bench = workbench(
        model,
        method,
        layer,
        settings=settings,
        statistics=statistics,
        seed=seed,
        on_done=on_done,
    )
    with untouched(model):
        facts = settle_joints(model, facts)
    chosen = editor(method)
    if mode == "batch" or (mode is None and (chosen.edits_together or len(facts) == 1)):
        if on_failed is None:
            return chosen.together(bench, facts, layer)
        delta, failed = edit_together(bench, chosen, facts, layer)
        for fact in facts:
            if fact.id in failed:
                on_failed(fact, failed[fact.id])
        return delta
    return sequence(bench, chosen, facts, layer, on_failed=on_failed)


def edit_each(
    model: Model,
    facts: Sequence[Fact],
    method: str = "rome",
    *,
    layer: int,
    settings: EditSettings | None = None,
    statistics: Mapping[int, Covariance] | None = None,
    seed: int = 0,
    on_done: Callable[[int], None] | None = None,
) -> list[WeightDelta]:
    """One delta per fact, each made on the untouched model; arguments as for :func:`edit`."""
    bench = workbench(
        model,
        method,
        layer,
        settings=settings,
        statistics=statistics,
        seed=seed,
        on_done=on_done,
    )
    with untouched(model):
        facts = settle_joints(model, facts)
    return editor(method).each(bench, facts, layer) if facts else []
