"""Choose the layer: ``locate`` runs one method over the facts and ranks the layers."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from goldenlayers.errors import DataError, UserError
from goldenlayers.locating.base import LayerMethod, Scoring, Work, published_on
from goldenlayers.locating.methods import (
    CMA,
    LGA,
    METHODS,
    Fixed,
    Race,
    Saliency,
    Transfer,
    make_method,
    published_layer,
)
from goldenlayers.progress import Progress
from goldenlayers.progress import progress as progress_bar

if TYPE_CHECKING:
    import torch

    from goldenlayers.facts import Fact
    from goldenlayers.locating.ranking import LayerRanking
    from goldenlayers.models import Model
    from goldenlayers.statistics.moments import Covariance

__all__ = [
    "CMA",
    "LGA",
    "METHODS",
    "Fixed",
    "LayerMethod",
    "Race",
    "Saliency",
    "Scoring",
    "Transfer",
    "Work",
    "locate",
    "make_method",
    "published_layer",
    "published_on",
]


def locate(
    model: Model,
    facts: Sequence[Fact],
    method: str | LayerMethod = "lga",
    *,
    seed: int = 0,
    bootstrap: int = 1000,
    top_k: int = 5,
    statistics: Mapping[int, Covariance] | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> LayerRanking:
    """Rank the layers of ``model`` by ``method`` over ``facts``; no weight is changed.

    Args:
        model: a loaded model.
        facts: the proxy facts. Missing old answers are filled with the model's own greedy
            continuation and marked as such, where the method needs them.
        method: ``LGA(scope="down")`` and the like, or a name in ``METHODS``.
        seed: of the resampling, and of what the method draws.
        bootstrap: resamples of the facts, 0 for none.
        top_k: how many candidates to name.
        statistics: key statistics of the layers that the method reads (transfer, race); collected
            from the text of the package (and cached) when left out.
        progress: ``on_rows`` is called with each batch's rows, ``on_progress`` with the facts done
            and in all, ``on_dropped`` with the error of each fact left out; ``chunk`` is the batch
            size. Without it there is a bar on a terminal.
        options: of the method; see its class.

    Returns:
        The ranking. When interrupted (Ctrl-C) after at least one batch, that of the facts done so
        far, with a warning that says so.

    Raises:
        UserError: unknown method, an option that the method does not have, no facts, no known
            facts, scores that tell no layer from another.
    """
    from goldenlayers.locating.building import RankingBuilder
    from goldenlayers.locating.ranking import LayerRanking
    from goldenlayers.models import check_model

    how = make_method(method, **options)
    model = check_model(model)
    n_layers, data = len(model.layers), getattr(facts, "name", "")
    layer = how.fixed_layer(n_layers)
    without = how.unscored(model)
    if len(without) == n_layers:
        raise UserError(
            f"{how.name} has nothing to score in any layer of {model.name}",
            fix="Choose another scope or kind",
        )
    if layer is not None:
        nearest = model.layers.nearest(layer)
        return LayerRanking.fixed(
            how.name, n_layers, nearest, top_k=top_k, model=model.name, data=data
        )
    tell = progress or Progress()
    if tell.chunk is not None:
        how = make_method(how, batch_size=tell.chunk)
    start = time.perf_counter()
    todo, dropped = _prepare(model, facts, how)
    if tell.on_dropped is not None:
        for error in dropped:
            tell.on_dropped(error)
    if statistics is None and (reads := how.statistics_layers(model)):
        from goldenlayers.editors.routing import layer_statistics

        began = time.perf_counter()
        statistics = layer_statistics(model, reads, seed=seed)
        start += time.perf_counter() - began  # not counted: they serve every later call
    builder = RankingBuilder(
        how.name,
        n_layers,
        how.scoring,
        bootstrap=bootstrap,
        top_k=top_k,
        seed=seed,
        without=without,
    )
    gpus = _gpus(model)
    if gpus:
        import torch

        for gpu in gpus:
            torch.cuda.reset_peak_memory_stats(gpu)
    plain: list[dict[str, Any]] = []  # the rows without their lists
    interrupted = False
    with ExitStack() as stack:
        if progress is None:
            bar = progress_bar(f"locating with {how.name}", "facts")
            tell = Progress(on_progress=stack.enter_context(bar))
        work = Work(model, todo, seed, statistics or {})
        ranking = how.ranking(work, tell, top_k)
        try:
            if ranking is None:
                tell.tell(0, len(todo))
            for rows in () if ranking else how.rows(work):
                builder.update(rows)
                plain += [{k: v for k, v in r.items() if not isinstance(v, list)} for r in rows]
                tell.rows(rows)
                tell.tell(len(builder), len(todo))
        except KeyboardInterrupt:
            if not len(builder):
                raise
            interrupted = True
    told: dict[str, Any] = {
        "seconds": time.perf_counter() - start,
        "peak_memory_bytes": _peak_memory(gpus),
        "model": model.name,
        "data": data,
        "dropped": Counter(error.reason for error in dropped),
    }
    if ranking is not None:
        return dataclasses.replace(ranking, **told)
    ranking = builder.result(**told, why_not=lambda: _why_not(model))
    for warning in how.warnings(n_layers, plain):
        ranking = ranking.warned(warning)
    if interrupted:
        ranking = dataclasses.replace(ranking, interrupted=True).warned(
            f"Interrupted after {len(builder)} of {len(todo)} facts, the longest ones first: "
            "this ranks the finished ones only."
        )
    return ranking


def _why_not(model: Model) -> tuple[str, str]:
    from goldenlayers.models.weights import why_not_a_number

    return why_not_a_number(model.hf)


def _prepare(
    model: Model, facts: Sequence[Fact], how: LayerMethod
) -> tuple[list[Fact], list[DataError]]:
    """The facts that the method can work with, and the others with the reason."""
    from goldenlayers.decoding import settle_joints
    from goldenlayers.locating.known import fill_old_answers, known_facts

    if not facts:
        raise UserError("there are no facts to locate with", expected="at least one fact")
    todo, dropped = _within_context(model, settle_joints(model, facts))
    if not todo:
        raise dropped[0]
    if how.known_only:
        todo = known_facts(model, todo, on_dropped=dropped.extend)
        if not todo:
            raise UserError(
                f"the model gives the old answer of none of the {len(facts)} facts",
                fix="Use other facts, or a larger model"
                + (", or leave out --known" if getattr(how, "known", False) else ""),
            )
    elif how.fills_old_answers:
        todo, no_edits = fill_old_answers(model, todo)
        dropped += no_edits
        if not todo:
            raise dropped[0]
    return todo, dropped


def _within_context(model: Model, facts: Sequence[Fact]) -> tuple[list[Fact], list[DataError]]:
    """The facts whose texts fit the model's context, and the others with the reason."""
    from goldenlayers.tokens import TooLongError

    kept: list[Fact] = []
    dropped: list[DataError] = []
    for fact in facts:
        try:
            for answer in (fact.target, fact.target_old or ""):
                model.encoder.fact(fact, answer)
        except TooLongError as error:
            problem = f"fact '{fact.id}' is too long: {error}"
            reason = "too long for the model's context"
            dropped.append(DataError(problem, field="prompt", reason=reason))
        else:
            kept.append(fact)
    return kept, dropped


def _gpus(model: Model) -> set[torch.device]:
    """The GPUs that the model's layers run on."""
    from goldenlayers.models.offload import runs_on

    devices = {runs_on(block.module) for block in model.layers} | {model.device}
    return {device for device in devices if device.type == "cuda"}


def _peak_memory(gpus: set[torch.device]) -> int | None:
    """Bytes in use at most: of the GPUs since they were reset, else of the process so far."""
    if gpus:
        import torch

        return sum(map(torch.cuda.max_memory_allocated, gpus))
    try:
        import resource
        import sys
    except ImportError:  # Windows has no resource module
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
