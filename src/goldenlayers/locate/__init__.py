"""Choose the layer: ``locate`` runs one method over the facts and ranks the layers."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from goldenlayers.errors import DataError, UserError, near_matches
from goldenlayers.locate.fences import Fence
from goldenlayers.locate.ranking import LayerRanking, LayerScore, RankingBuilder

if TYPE_CHECKING:
    from goldenlayers.covariance import Covariance
    from goldenlayers.facts import Fact
    from goldenlayers.locate.gradients import Loss, Scope
    from goldenlayers.models.model import Model

__all__ = ["METHODS", "LayerRanking", "LayerScore", "RankingBuilder", "locate"]

Method = Literal["lga", "transfer", "cma", "saliency", "middle", "published"]
METHODS: tuple[str, ...] = ("lga", "transfer", "cma", "saliency", "middle", "published")

# Published ROME/MEMIT settings edit layer 5 of 28-32 layer models and 17 of 48 for GPT-2 XL; as a
# fraction of depth: 5/28 .. 5/32 and 17/48.
_PUBLISHED_DEPTH = 5 / 30
_PUBLISHED_DEEP = (48, 17 / 48)


def locate(
    model: Model,
    facts: Sequence[Fact],
    method: str = "lga",
    *,
    scope: Scope = "mlp",
    loss: Loss = "sequence",
    known: bool = False,
    fence: Fence = "tukey",
    kappa: float = 1.0,
    top_k: int = 5,
    bootstrap: int = 1000,
    seed: int = 0,
    batch_size: int = 16,
    statistics: Mapping[int, Covariance] | None = None,
    prefixes: Sequence[str] = (),
    reach: bool = False,
    align: bool = False,
    data: str = "",
    on_rows: Callable[[list[dict[str, Any]]], None] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    on_dropped: Callable[[list[DataError]], None] | None = None,
) -> LayerRanking:
    """Rank the layers of ``model`` by ``method`` over ``facts``; no weight is changed.

    Args:
        model: a loaded model.
        facts: the proxy facts. Missing old answers are filled with the model's own greedy
            continuation and marked as such.
        method: one of ``METHODS``.
        scope: weight matrices of a block that gradients are taken of (lga, saliency).
        loss: cross-entropy over the whole text or the answer tokens (lga, saliency).
        known: keep only facts whose old answer the model gives by itself.
        fence: "tukey" leaves outlying layers out (lga), "last" the last block alone, "none" keeps
            all.
        kappa: the fences' width in interquartile ranges.
        top_k: how many candidates to name.
        bootstrap: resamples of the facts, 0 for none.
        seed: of the resampling.
        batch_size: facts per batch; halved when memory runs out.
        statistics: key statistics of every layer (transfer needs them): ``key_statistics(model)``.
        prefixes: texts that stand in for rephrasings where the facts have none (transfer).
        reach: weigh transfer by whether an edit can still bring the answer about (transfer).
        align: that, and by whether rephrasings want the change that the prompt wants (transfer).
        data: name of the facts' source, for the record.
        on_rows: told each batch's per-fact rows as soon as they are there.
        on_progress: told (facts done, facts in all).
        on_dropped: told the facts left out with the reason: too long for the model's context, or
            no edits since the model's own answer is the new one.

    Returns:
        The ranking. When interrupted (Ctrl-C) after at least one batch, that of the facts done so
        far, with a warning that says so.

    Raises:
        UserError: unknown method, no facts, no known facts.
    """
    if method not in METHODS:
        raise UserError(f"unknown method '{method}'", fix=near_matches(method, METHODS))
    n_layers = len(model.layers)
    if method in ("middle", "published"):
        layer = n_layers // 2 if method == "middle" else published_layer(n_layers)
        return LayerRanking.fixed(method, n_layers, layer, top_k=top_k, model=model.name, data=data)
    if method == "transfer" and statistics is None:
        raise UserError(
            "transfer analysis needs the key statistics of every layer",
            fix="Give statistics=key_statistics(model)",
        )
    start = time.perf_counter()
    todo = _prepare(model, facts, method, known=known, on_dropped=on_dropped)
    builder = RankingBuilder(
        method,
        n_layers,
        fence=fence if method == "lga" else "none",
        kappa=kappa,
        reduce="sum" if method == "lga" else "mean",
        bootstrap=bootstrap,
        top_k=top_k,
        seed=seed,
    )
    interrupted = False
    with _PeakMemory(model) as memory:
        try:
            for rows in _rows(
                model,
                todo,
                method,
                scope=scope,
                loss=loss,
                batch_size=batch_size,
                seed=seed,
                statistics=statistics,
                prefixes=prefixes,
                reach=reach,
                align=align,
            ):
                builder.update(rows)
                if on_rows is not None:
                    on_rows(rows)
                if on_progress is not None:
                    on_progress(len(builder), len(todo))
        except KeyboardInterrupt:
            if not len(builder):
                raise
            interrupted = True
    ranking = builder.result(
        seconds=time.perf_counter() - start,
        peak_memory_bytes=memory.peak_bytes,
        model=model.name,
        data=data,
        why_not=lambda: _why_not(model),
    )
    if interrupted:
        ranking = dataclasses.replace(ranking, interrupted=True).warned(
            f"Interrupted after {len(builder)} of {len(todo)} facts, the longest ones first: "
            "this ranks the finished ones only."
        )
    return ranking


def _why_not(model: Model) -> tuple[str, str]:
    from goldenlayers.models.broken import why_not_a_number

    return why_not_a_number(model.hf)


def published_layer(n_layers: int) -> int:
    """The layer that published configurations copy from one another, at this depth."""
    deep, fraction = _PUBLISHED_DEEP
    depth = fraction if n_layers >= deep else _PUBLISHED_DEPTH
    return min(n_layers - 1, round(depth * n_layers))


def _prepare(
    model: Model,
    facts: Sequence[Fact],
    method: str,
    *,
    known: bool,
    on_dropped: Callable[[list[DataError]], None] | None,
) -> list[Fact]:
    from goldenlayers.locate.known import fill_old_answers, known_facts

    if not facts:
        raise UserError("there are no facts to locate with", expected="at least one fact")
    todo, dropped = _fitting(model, facts)
    if not todo:
        raise dropped[0]
    if known or method == "cma":  # tracing follows an answer that the model gives
        todo = known_facts(model, todo)
        if not todo:
            raise UserError(
                f"the model gives the old answer of none of the {len(facts)} facts",
                fix="Use other facts, a larger model, or leave out --known",
            )
    elif method == "lga":
        todo, no_edits = fill_old_answers(model, todo)
        dropped += no_edits
        if not todo:
            raise dropped[0]
    if dropped and on_dropped is not None:
        on_dropped(dropped)
    return todo


def _fitting(model: Model, facts: Sequence[Fact]) -> tuple[list[Fact], list[DataError]]:
    """The facts whose texts fit the model's context, and the others with the reason."""
    from goldenlayers.tokens import TooLongError

    fitting: list[Fact] = []
    dropped: list[DataError] = []
    for fact in facts:
        try:
            for answer in (fact.target_new, fact.target_old or ""):
                model.encoder.fact(fact, answer)
        except TooLongError as error:
            dropped.append(DataError(f"fact '{fact.id}' is too long: {error}", field="prompt"))
        else:
            fitting.append(fact)
    return fitting, dropped


def _rows(
    model: Model,
    facts: Sequence[Fact],
    method: str,
    *,
    scope: Scope,
    loss: Loss,
    batch_size: int,
    seed: int,
    statistics: Mapping[int, Covariance] | None,
    prefixes: Sequence[str],
    reach: bool,
    align: bool,
) -> Iterator[list[dict[str, Any]]]:
    if method == "transfer":
        from goldenlayers.locate.transfer import transfer_rows

        assert statistics is not None  # held by locate
        return transfer_rows(
            model,
            facts,
            statistics,
            batch_size=batch_size,
            seed=seed,
            prefixes=prefixes,
            reach=reach,
            align=align,
        )
    if method == "cma":
        from goldenlayers.locate.tracing import tracing_rows

        return tracing_rows(model, facts, seed=seed, batch_size=batch_size, known=False)
    from goldenlayers.locate.lga import lga_rows, saliency_rows

    run = lga_rows if method == "lga" else saliency_rows
    return run(model, facts, scope=scope, loss=loss, batch_size=batch_size)


class _PeakMemory:
    """Peak memory of a block of work: of the GPU if the model is on one, else of the process."""

    def __init__(self, model: Model) -> None:
        self.device = model.device
        self.peak_bytes: int | None = None

    def __enter__(self) -> _PeakMemory:
        if self.device.type == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats(self.device)
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            import torch

            self.peak_bytes = torch.cuda.max_memory_allocated(self.device)
            return
        try:
            import resource
            import sys
        except ImportError:  # Windows has no resource module
            return
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        self.peak_bytes = peak if sys.platform == "darwin" else peak * 1024
