"""Choosing by trying: of each fact's edits at some layers, by some editors and at some strengths,
the one that does best on prompts that only the choice asks.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from goldenlayers.choosing.probes import own_probes
from goldenlayers.choosing.rule import choose
from goldenlayers.decoding import settle_joints
from goldenlayers.delta import WeightDelta
from goldenlayers.delta.apply import deltas_in_force
from goldenlayers.editors import Editing, Editor, Options, make_editor
from goldenlayers.errors import DataError, UserError, check_number
from goldenlayers.evaluation.bootstrap import Floats
from goldenlayers.evaluation.plan import EvaluationPlan
from goldenlayers.facts import Fact, refuse_contradictions, repeats
from goldenlayers.models import check_model
from goldenlayers.progress import Progress
from goldenlayers.racing import Worth

if TYPE_CHECKING:
    from goldenlayers.models import Model

__all__ = ["FILE", "STRENGTHS", "Chosen", "Try", "choose_edits", "depths", "usual_layers"]

FILE = "tries.json"
"""Where a run of ``golden edit`` keeps what was tried."""

EDITORS = ("clear-rome", "rome", "alphaedit")
"""The editors of ``--method auto``: they share one search a layer. R-ROME, MEMIT and EMMET write
next to what ROME writes for one fact."""

STRENGTHS = (0.5, 0.75, 1.0, 1.2)
"""What a change is multiplied by with ``--strength auto``."""


_PARTS = ("rewrite", "rephrase", "locality")


@dataclass(frozen=True)
class Try:
    """One way to edit a fact: where, by which editor, and what its change is multiplied by."""

    layer: int
    editor: Editor
    strength: float = 1.0

    def __str__(self) -> str:
        return f"layer {self.layer}, {self.editor.name}, strength {self.strength:g}"

    def to_json(self) -> dict[str, Any]:
        """Its three parts; the editor by name."""
        return {"layer": self.layer, "method": self.editor.name, "strength": self.strength}


@dataclass(frozen=True, eq=False)
class Chosen:
    """What :func:`choose_edits` found.

    Attributes:
        delta: all facts' edits added up; a fact's row says which try it is, and by what.
        facts: that were edited.
        tries: what was tried on each fact; the first is the usual one.
        scores: (N, K) in points of 100 by the chooser's own prompts, NaN where an edit failed.
        picks: for each fact the place in ``tries`` of what was kept.
        seconds: that it took.
    """

    delta: WeightDelta
    facts: tuple[Fact, ...]
    tries: tuple[Try, ...]
    scores: Floats
    picks: tuple[int, ...]
    seconds: float

    def sentences(self) -> list[str]:
        """For each fact what was kept, with its score and that of the usual try."""
        found = []
        for row, pick in zip(self.scores, self.picks, strict=True):
            text = f"{self.tries[pick]}: {_points(row[pick])} by its own probes"
            usual = f"{self.tries[0]}, as usual"
            found.append(f"{text} ({usual}: {_points(row[0])})" if pick else f"{text}, as usual")
        return found

    def cost(self) -> str:
        """How many tries there were, and how long they took."""
        return f"{len(self.tries)} tries a fact, {self.seconds:.0f} s"

    def to_json(self) -> dict[str, Any]:
        """The content of ``tries.json``."""
        return {
            "schema": 1,
            "tries": [one.to_json() for one in self.tries],
            "seconds": round(self.seconds, 1),
            "facts": [
                {
                    "id": fact.id,
                    "kept": pick,
                    "scores": [None if math.isnan(x) else round(float(x), 2) for x in row],
                }
                for fact, pick, row in zip(self.facts, self.picks, self.scores, strict=True)
            ],
        }


def _points(score: float) -> str:
    return "no score" if math.isnan(score) else f"{score / 100:.2f}"


def depths(n_layers: int) -> list[int]:
    """The published layer, and six spread over the depth."""
    from goldenlayers.locating import published_layer

    spread = ((2 * i + 1) * n_layers // 12 for i in range(6))
    return list(dict.fromkeys((published_layer(n_layers), *spread)))


def usual_layers(model: Model) -> list[int]:
    """The layers that are tried by default: :func:`depths`, for one without an MLP the nearest."""
    return list(dict.fromkeys(map(model.layers.nearest, depths(len(model.layers)))))


def choose_edits(
    model: Model,
    facts: Fact | Sequence[Fact],
    methods: str | Editor | Sequence[str | Editor] = EDITORS,
    *,
    layers: Sequence[int] = (),
    strengths: Sequence[float] = STRENGTHS,
    progress: Progress | None = None,
    **more: Any,
) -> Chosen:
    """Edit each fact in several ways and keep, of each, what its own prompts speak for.

    Every edit is made on the untouched model; those that are kept are added up. A try's score is
    the mean of rewrite, rephrase and locality by probabilities, on half of the fact's own probes or
    on made ones (:mod:`goldenlayers.choosing.probes`); :func:`goldenlayers.check` then asks none of
    them. What is kept: :mod:`goldenlayers.choosing.rule`.

    Args:
        model: a loaded model; it is left as it is.
        facts: one or several.
        methods: editors to try. The first, at the first layer with strength 1 (or the first), is
            the usual try, which stays unless another is better by a margin.
        layers: to try, from the end if negative; default: see :func:`usual_layers`.
        strengths: what a change is multiplied by, above 0.
        progress: told (tries done, tries in all); ``on_dropped`` as in :func:`goldenlayers.edit`.
        more: as for :func:`goldenlayers.edit`; settings that only some of the editors have go to
            those.

    Raises:
        UserError: nothing to edit or to try; an edit that fails in every way (with ``on_dropped``:
            that of every fact).
    """
    start, tell = time.monotonic(), progress or Progress()
    facts = [facts] if isinstance(facts, Fact) else list(facts)
    if not facts:
        raise UserError("there are no facts to edit", expected="at least one fact")
    if deltas_in_force(check_model(model)):
        raise UserError(
            "edits cannot be chosen while a delta is applied to the model",
            fix="Leave the 'applied' context",
        )
    refuse_contradictions(facts)
    again = {id(later) for _, later in repeats(facts)[0]}
    facts = settle_joints(model, [fact for fact in facts if id(fact) not in again])
    options, settings = Options.split(more)
    some = [methods] if isinstance(methods, str | Editor) else list(methods)
    editors = [_with(one, settings, some) for one in some]
    tries = _tries(layers or usual_layers(model), editors, strengths, model)
    own = own_probes(model, facts, tries[0].layer)
    asked = settle_joints(model, [one.fact for one in own])
    values = {} if options.value_cache is None else options.value_cache
    work = dataclasses.replace(options, value_cache=values).editing(
        model, tries[0].editor, tries[0].layer
    )
    scores = np.full((len(facts), len(tries)), math.nan)
    deltas: dict[tuple[int, str], list[WeightDelta | UserError]] = {}
    plan = _Plan(model, asked)
    tell.tell(0, len(tries))
    done = 0
    for layer in sorted({one.layer for one in tries}):  # names' keys go on upwards
        places = [k for k, one in enumerate(tries) if one.layer == layer]
        for one in (tries[k] for k in places):
            if (layer, one.editor.name) not in deltas:
                deltas[layer, one.editor.name] = _edited(work, one, facts)
        edits = [_scaled(e, tries[k]) for k in places for e in deltas[layer, tries[k].editor.name]]
        scores[:, places] = plan.scores(edits)
        done += len(places)
        tell.tell(done, len(tries))
    picks = choose(scores, 0)
    parts, kept = [], []
    for i, (fact, pick) in enumerate(zip(facts, picks, strict=True)):
        one = tries[pick]
        delta = deltas[one.layer, one.editor.name][i]
        if isinstance(delta, UserError):
            if tell.on_dropped is None:
                raise delta
            tell.on_dropped(DataError(f"fact '{fact.id}' cannot be edited: {delta}"))
            continue
        row = {**delta.facts[0], "chosen": one.to_json(), "chosen_by": own[i].told}
        parts.append(dataclasses.replace(_scaled(delta, one), facts=[row]))
        kept.append(i)
    if not parts:
        raise UserError(f"none of the {len(facts)} facts can be edited")
    return Chosen(
        delta=sum(parts[1:], parts[0]),
        facts=tuple(facts[i] for i in kept),
        tries=tuple(tries),
        scores=scores[kept],
        picks=tuple(picks[i] for i in kept),
        seconds=time.monotonic() - start,
    )


def _with(one: str | Editor, settings: dict[str, Any], among: Iterable[str | Editor]) -> Editor:
    """The editor with those of the settings that it has.

    Raises:
        UserError: a setting that none of the editors has.
    """
    names = [set(make_editor(other).to_json()) for other in among]
    editor = make_editor(one)
    mine = {
        name: value
        for name, value in settings.items()
        if name in editor.to_json() or not any(name in some for some in names)
    }
    return make_editor(editor, **mine)


def _tries(
    layers: Sequence[int], editors: Sequence[Editor], strengths: Sequence[float], model: Model
) -> list[Try]:
    """All combinations, the usual one first.

    Raises:
        UserError: there is none; a strength that is no number above 0.
    """
    for strength in strengths:
        check_number("the strength", strength, 0, 100, whole=False, above=True)
    places = list(dict.fromkeys(model.layers[layer].index for layer in layers))
    found = [Try(at, one, float(s)) for at in places for one in editors for s in strengths]
    if not found:
        raise UserError("there is nothing to try", expected="at least one editor and strength")
    usual = next((one for one in found if one.strength == 1), found[0])
    return [usual, *(one for one in found if one is not usual)]


class _Plan:
    """The facts' prompts, once for each way that is tried at a layer, so that all are read in the
    same passes.
    """

    def __init__(self, model: Model, facts: Sequence[Fact]) -> None:
        self._model, self._facts = model, list(facts)
        self._plans: dict[int, EvaluationPlan] = {}

    def scores(self, edits: Sequence[WeightDelta | UserError]) -> Floats:
        """(N, K) of K ways, from the N facts' edits the first way, the second way, and so on."""
        n_ways = len(edits) // len(self._facts)
        ids = [f"{way} {i}" for way in range(n_ways) for i in range(len(self._facts))]
        if n_ways not in self._plans:
            facts = [
                dataclasses.replace(f, id=x) for f, x in zip(self._facts * n_ways, ids, strict=True)
            ]
            self._plans[n_ways] = EvaluationPlan(self._model, facts, _PARTS)
        found = Worth(by="soft").by_fact(self._plans[n_ways].score(edits))
        table = [found.get(one, math.nan) for one in ids]
        return np.array(table).reshape(n_ways, len(self._facts)).T


def _scaled(delta: Any, one: Try) -> Any:
    """The change at the try's strength; an error as it is."""
    return delta if isinstance(delta, UserError) or one.strength == 1 else delta * one.strength


def _edited(work: Editing, one: Try, facts: Sequence[Fact]) -> list[WeightDelta | UserError]:
    """Each fact's edit by itself; where all fail alike, that error for each."""
    here = dataclasses.replace(work, editor=one.editor, layer=one.layer, previous_keys={})
    try:
        return here.each_safely(facts)
    except UserError as error:
        return [error] * len(facts)
