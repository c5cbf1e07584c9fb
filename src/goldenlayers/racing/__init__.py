"""The verified choice: the best candidate layers raced on a few facts with real edits.

All candidates are tried on a few facts, the worse half is dropped, the others are tried on more
(successive halving). A difference that is beyond doubt ends the race early.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from goldenlayers.errors import UserError, check_number
from goldenlayers.evaluation.metrics import DEFAULT_METRICS, Metric, metrics_of
from goldenlayers.models import check_model
from goldenlayers.progress import OutOfMemory, in_smaller_batches, memory_errors
from goldenlayers.racing.race import Evidence, VerifiedChoice, race

if TYPE_CHECKING:
    from goldenlayers.editors import Editor
    from goldenlayers.facts import Fact
    from goldenlayers.locating.ranking import LayerRanking
    from goldenlayers.models import Model
    from goldenlayers.progress import Progress

__all__ = ["Evidence", "VerifiedChoice", "best_layers", "race", "verify", "with_neighbours"]


def verify(
    model: Model,
    facts: Sequence[Fact],
    candidates: Sequence[int],
    method: str | Editor = "rome",
    *,
    n_facts: int = 8,
    metrics: Sequence[str | Metric] = DEFAULT_METRICS,
    progress: Progress | None = None,
    **more: Any,
) -> VerifiedChoice:
    """Race candidate layers on a few facts with real edits; the model is left as it is.

    Each fact is edited by itself at a layer and scored by Overall, the mean of ``metrics`` that it
    has probes for, as a sweep scores it. At most K x N edits are made, usually some two thirds.

    Args:
        model: a loaded model.
        facts: the proxy facts, never those that the choice is to be judged on. Those with the most
            kinds of probes are taken first, drawn with ``seed`` among equals.
        candidates: layers, in any order; see :func:`best_layers` and :func:`with_neighbours`.
        method: an editor or its name.
        n_facts: N, the most facts to edit at one layer.
        metrics: what Overall is made of.
        progress: ``on_progress`` is called with (edits done, edits at most).
        more: ``seed`` (see :class:`VerifiedChoice`), ``statistics`` of all candidates (collected in
            one pass when left out), ``value_cache`` (values found before are not searched for
            again; see :class:`Editing`), and settings of the editor.

    Raises:
        UserError: no fact, no candidate, a layer out of range, an unknown editor, setting or
            metric, no edit that could be scored, or memory that runs out on a single fact.
    """
    from goldenlayers.decoding import settle_joints
    from goldenlayers.editors import Options, make_editor, statistics_for
    from goldenlayers.evaluation.plan import EvaluationPlan
    from goldenlayers.evaluation.summary import overall_by_fact

    start = time.perf_counter()
    if not facts:
        raise UserError("there are no facts to verify with", expected="at least one fact")
    check_number("the number of facts", n_facts, 1, 10**9)
    options, settings = Options.split(more)
    seed = options.seed
    editor, asked = make_editor(method, **settings), metrics_of(metrics)
    names = tuple(metric.name for metric in asked)
    layers = sorted({check_model(model).layers[layer].index for layer in candidates})
    drawn = settle_joints(model, _drawn(facts, names, n_facts, seed))
    if len(layers) > 1 and options.statistics is None:
        found = statistics_for(model, editor, layers, seed=seed)
        options = replace(options, statistics=found)
    work = options.editing(model, editor, layers[0] if layers else 0)
    plans: list[EvaluationPlan] = []
    failures: list[UserError] = []

    def score(layer: int, places: Sequence[int]) -> list[float]:
        if not plans:
            plans.append(EvaluationPlan(model, drawn, asked, seed=seed))
        here, some = work.at(layer), [drawn[i] for i in places]

        def edit(members: Sequence[int]) -> list[Any]:
            part = [some[m] for m in members]
            try:
                return list(here.each_safely(part))
            except UserError as error:  # every fact fails alike: the layer's fault
                return [error] * len(part)

        def what(member: int) -> str:
            return f"fact '{some[member].id}' at layer {layer}"

        everyone = [list(range(len(some)))]
        edits = [one for _, part in in_smaller_batches(everyone, edit, what) for one in part]
        failures.extend(edit for edit in edits if isinstance(edit, UserError))
        found = overall_by_fact(plans[0].score(edits, facts=places), names)
        return [found.get(fact.id, math.nan) for fact in some]

    try:
        with memory_errors(f"memory ran out in verifying layers of {model.name}"):
            tell = None if progress is None else progress.on_progress
            choice = race(layers, len(drawn), score, seed=seed, on_progress=tell)
    except OutOfMemory:
        raise
    except UserError as error:
        raise (failures[0] if failures else error) from error
    return replace(
        choice,
        method=editor.name,
        facts=tuple(fact.id for fact in drawn),
        seconds=time.perf_counter() - start,
        warnings=(*choice.warnings, *_lacking(drawn, names)),
    )


def best_layers(ranking: LayerRanking, k: int, *, spacing: int = 1) -> list[int]:
    """The ``k`` best layers within the fences, best first, however many candidates were listed.

    Args:
        ranking: of a locate run.
        k: how many layers.
        spacing: layers at least so far apart are taken first. Neighbours score alike, so a race
            among layers spread over the depth has more to choose from for the same edits. Where
            too few are so far apart, the best of the others fill up.
    """
    kept = [one for one in ranking.layers if one.kept and one.layer != ranking.golden_layer]
    rest = sorted(kept, key=lambda one: (-one.score, one.layer))
    order = [ranking.golden_layer, *(one.layer for one in rest)]
    spread: list[int] = []
    for layer in order:
        if all(abs(layer - other) >= spacing for other in spread):
            spread.append(layer)
    spread = spread[:k]
    others = [layer for layer in order if layer not in spread]
    return [*spread, *others[: k - len(spread)]]


def with_neighbours(layers: Sequence[int], n_layers: int) -> list[int]:
    """The layers and those just below and above each of them, as far as the model has them."""
    near = [one for layer in layers for one in (layer - 1, layer + 1) if 0 <= one < n_layers]
    return list(dict.fromkeys([*layers, *near]))


def _drawn(facts: Sequence[Fact], metrics: Sequence[str], count: int, seed: int) -> list[Fact]:
    """The facts to race on: most kinds of probes first, shuffled among equals, ids once."""
    distinct = list({fact.id: fact for fact in facts}.values())
    order = np.random.default_rng(seed).permutation(len(distinct))
    shuffled = [distinct[i] for i in order]
    return sorted(shuffled, key=lambda fact: -len(_kinds(fact, metrics)))[:count]


def _kinds(fact: Fact, metrics: Sequence[str]) -> set[str]:
    there = {
        "rewrite": True,
        "rephrase": bool(fact.rephrasings),
        "locality": bool(fact.locality),
        "portability": bool(fact.portability),
    }
    return {name for name in metrics if there.get(name, True)}


def _lacking(facts: Sequence[Fact], metrics: Sequence[str]) -> list[str]:
    """What the facts cannot tell."""
    found = []
    for name, probes in (("rephrase", "rephrasings"), ("locality", "locality probes")):
        without = sum(name not in _kinds(fact, metrics) for fact in facts)
        if name in metrics and without:
            found.append(f"{without} of the {len(facts)} facts have no {probes}")
    return found
