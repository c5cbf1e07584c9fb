"""Choose the layer: ``locate`` runs one method over the facts and ranks the layers."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

from goldenlayers.errors import DataError, UserError, near_matches
from goldenlayers.locating.fences import Fence
from goldenlayers.locating.ranking import LayerRanking, LayerScore, RankingBuilder

if TYPE_CHECKING:
    from goldenlayers.covariance import Covariance
    from goldenlayers.facts import Fact
    from goldenlayers.locating.gradients import Loss, Scope
    from goldenlayers.models.model import Model

__all__ = ["METHODS", "LayerRanking", "LayerScore", "RankingBuilder", "locate"]

Method = Literal["lga", "transfer", "cma", "saliency", "middle", "published"]
METHODS: tuple[str, ...] = ("lga", "transfer", "cma", "saliency", "middle", "published")

# Published ROME/MEMIT settings edit layer 5 of 28-32 layer models and 17 of 48 for GPT-2 XL; as a
# fraction of depth: 5/28 .. 5/32 and 17/48.
_PUBLISHED_DEPTH = 5 / 30
_PUBLISHED_DEEP = (48, 17 / 48)

# What stands in for probes that the data does not have, by the field of a row that tells of it.
_STAND_INS = {
    "prefixed": "no rephrasing that holds the subject; their prompt behind sampled prefixes stood "
    "in",
    "borrowed": "no locality probe; prompts of other facts stood in",
}

# The options that only some methods have; with the values that change nothing for the others.
_OPTIONS: dict[str, tuple[tuple[str, ...], tuple[Any, ...]]] = {
    "scope": (("lga", "saliency"), ("mlp",)),
    "loss": (("lga", "saliency"), ("sequence",)),
    "known": (("lga", "transfer", "cma", "saliency"), (False,)),
    "fence": (("lga",), ("tukey", "none")),
    "kappa": (("lga",), (1.0,)),
    "reach": (("transfer",), (False,)),
    "align": (("transfer",), (False,)),
}


def check_options(method: str, options: Mapping[str, Any]) -> None:
    """Refuse what the method would pass over without a word.

    ``options`` has all of scope, loss, known, fence, kappa, reach and align.

    Raises:
        UserError: an unknown method, scope, loss or fence; an option of other methods; a width of
            fences that are not there.
    """
    if method not in METHODS:
        raise UserError(f"unknown method '{method}'", fix=near_matches(method, METHODS))
    from goldenlayers.locating.gradients import Loss, Scope

    for name, kind in {"scope": Scope, "loss": Loss, "fence": Fence}.items():
        if options[name] not in get_args(kind):
            near = near_matches(str(options[name]), get_args(kind))
            raise UserError(f"unknown {name} '{options[name]}'", fix=near)
    for name, (methods, idle) in _OPTIONS.items():
        if options[name] not in idle and method not in methods:
            raise UserError(
                f"{name} is for the method {' or '.join(methods)}, not {method}",
                fix=f"Leave out {name}, or choose another method",
            )
    if options["kappa"] != 1.0 and options["fence"] != "tukey":
        raise UserError(
            f"kappa is for the fence tukey, not {options['fence']}", fix="Leave out one of them"
        )


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
        on_dropped: told the facts left out with the reason: too long for the model's context, not
            known to the model, or no edits since the model's own answer is the new one. The ranking
            counts them, too.

    Returns:
        The ranking. When interrupted (Ctrl-C) after at least one batch, that of the facts done so
        far, with a warning that says so.

    Raises:
        UserError: unknown method, an option that the method does not have, no facts, no known
            facts, scores that tell no layer from another.
    """
    check_options(
        method,
        {
            "scope": scope,
            "loss": loss,
            "known": known,
            "fence": fence,
            "kappa": kappa,
            "reach": reach,
            "align": align,
        },
    )
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
    todo, dropped = _prepare(model, facts, method, known=known)
    if dropped and on_dropped is not None:
        on_dropped(dropped)
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
    stand_ins: Counter[str] = Counter()
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
                stand_ins.update(name for name in _STAND_INS for row in rows if row.get(name))
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
        dropped=Counter(error.reason for error in dropped),
        why_not=lambda: _why_not(model),
    )
    if method == "cma" and n_layers <= 10:
        from goldenlayers.locating.tracing import usual_window

        ranking = ranking.warned(
            f"Causal tracing restores 10 layers together, but the model has {n_layers}: here it "
            f"restored {usual_window(n_layers)}."
        )
    for name, count in stand_ins.items():
        ranking = ranking.warned(f"{count} of the {len(builder)} facts have {_STAND_INS[name]}.")
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
) -> tuple[list[Fact], list[DataError]]:
    """The facts that the method can work with, and the others with the reason."""
    from goldenlayers.decoding import settle_joints
    from goldenlayers.locating.known import fill_old_answers, known_facts

    if not facts:
        raise UserError("there are no facts to locate with", expected="at least one fact")
    todo, dropped = _fitting(model, settle_joints(model, facts))
    if not todo:
        raise dropped[0]
    if known or method == "cma":  # tracing follows an answer that the model gives
        todo = known_facts(model, todo, on_dropped=dropped.extend)
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
    return todo, dropped


def _fitting(model: Model, facts: Sequence[Fact]) -> tuple[list[Fact], list[DataError]]:
    """The facts whose texts fit the model's context, and the others with the reason."""
    from goldenlayers.tokens import TooLongError

    fitting: list[Fact] = []
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
        from goldenlayers.locating.transfer import transfer_rows

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
        from goldenlayers.locating.tracing import tracing_rows

        return tracing_rows(model, facts, seed=seed, batch_size=batch_size, known=False)
    from goldenlayers.locating.lga import lga_rows, saliency_rows

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
