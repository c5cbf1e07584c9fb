"""From one score per fact and layer to a ranking of the layers.

Legend: N facts, L layers, R bootstrap resamples. Everything is float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from goldenlayers.errors import UserError, check_number, check_seed
from goldenlayers.locating.base import Scoring
from goldenlayers.locating.ranking import (
    LayerRanking,
    LayerScore,
    choose,
    clear,
    counted,
    keep,
    left_out,
    refuse_alike,
    shares,
    ties,
    tukey_fences,
)

Array = NDArray[np.float64]

MOST_RESAMPLES = 100_000
_CHUNK = 8 * 1024 * 1024  # resampled scores are built in pieces of so many numbers (64 MiB)


class RankingBuilder:
    """Collects per-fact scores, then ranks the layers.

    Args:
        method: the method's name as it stands in the ranking ("lga", "saliency", ...).
        n_layers: L.
        scoring: how phi becomes S_L and a choice; default LGA's.
        bootstrap: resamples of the facts, 0 for none; the whole choice, fences included, is redone
            on each.
        top_k: how many candidates to name.
        seed: of the resampling.
        without: layers that have nothing to score: they take no part.

    Raises:
        UserError: a setting out of its range.
    """

    def __init__(
        self,
        method: str,
        n_layers: int,
        scoring: Scoring | None = None,
        *,
        bootstrap: int = 1000,
        top_k: int = 5,
        seed: int = 0,
        without: Sequence[int] = (),
    ) -> None:
        check_number("bootstrap", bootstrap, 0, MOST_RESAMPLES)
        check_number("top_k", top_k, 1, 10**6)
        check_number("n_layers", n_layers, 1, 10**6)
        check_seed(seed)
        self.method, self.n_layers, self.scoring = method, n_layers, scoring or Scoring()
        self.bootstrap, self.top_k, self.seed = bootstrap, top_k, seed
        self.there = np.array([i for i in range(n_layers) if i not in without], dtype=np.intp)
        self._facts: list[str] = []
        self._values: dict[str, list[Array]] = {
            name: [] for name in ("phi", "cosine", "norm_old", "norm_new")
        }
        self._generated: list[bool] = []
        self._unscored: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._facts)

    def update(self, rows: Iterable[Mapping[str, Any]]) -> RankingBuilder:
        """Add per-fact rows: {"fact": id, "phi": [L numbers], ...}; other keys are optional.

        "cosine", "norm_old" and "norm_new" are L numbers or None. None within a list means "not a
        number", as JSON has it: a fact with such a phi is left out and counted; "unscored" may say
        why.

        Raises:
            UserError: a row without "fact" or "phi", or with another number of layers.
        """
        for row in rows:
            if "fact" not in row or "phi" not in row:
                raise UserError(f"a row has the fields {sorted(row)}", expected="'fact' and 'phi'")
            arrays = {name: self._array(row, name) for name in self._values}
            for name, array in arrays.items():
                self._values[name].append(array)
            self._facts.append(str(row["fact"]))
            self._generated.append(bool(row.get("old_is_generated", False)))
            if reason := row.get("unscored"):
                self._unscored[str(reason)] = self._unscored.get(str(reason), 0) + 1
        return self

    def _array(self, row: Mapping[str, Any], name: str) -> Array:
        """Field ``name`` of a row as (L,) float64, NaN where the row has None."""
        value = row.get(name)
        if value is None and name != "phi":
            return np.full(self.n_layers, np.nan)
        try:
            array = np.asarray(value, dtype=np.float64)
        except (TypeError, ValueError):
            array = np.empty(0)
        if array.shape != (self.n_layers,):
            raise UserError(
                f"fact {row['fact']}: '{name}' is not a list of {self.n_layers} numbers",
                expected="one number per layer of the same model",
            )
        return array

    def result(
        self,
        *,
        seconds: float | None = None,
        peak_memory_bytes: int | None = None,
        model: str = "",
        data: str = "",
        dropped: Mapping[str, int] | None = None,
        why_not: Callable[[], tuple[str, str]] = lambda: ("", ""),
    ) -> LayerRanking:
        """Rank the layers. The order in which rows came does not matter, whatever the batches were.

        ``dropped`` counts facts that were left out before, by the reason; ``why_not`` tells
        (cause, remedy) of scores that are not finite, and is asked only when some are.

        Raises:
            UserError: no fact, no fact with finite scores, or scores that tell no layer from
                another.
        """
        if not self._facts:
            raise UserError("there is no fact to rank layers by", expected="at least one fact")
        everything = np.stack(self._values["phi"])  # (N, L)
        finite = np.flatnonzero(np.isfinite(everything[:, self.there]).all(axis=1))
        n_unscored = len(everything) - len(finite)
        cause, remedy = why_not() if n_unscored else ("", "")
        if not len(finite):
            raise UserError(
                f"none of the {n_unscored} facts has finite scores at every layer"
                + (f": {cause}" if cause else ""),
                fix=remedy,
            )
        why = f": {cause}. {remedy}" if cause else ""
        # Sums and resamples depend on the order of the rows in their last bits: put them in order.
        order = sorted(finite, key=lambda i: (self._facts[i], everything[i].tolist()))
        phi = everything[order]  # (N, L)
        there = np.zeros(self.n_layers, dtype=np.bool_)
        there[self.there] = True
        phi[:, ~there] = 0.0
        with np.errstate(over="ignore", invalid="ignore"):
            scores = self._reduce(phi[None])  # (1, L)
        if not np.isfinite(scores).all():
            raise UserError("the scores are too large to add up in float64")
        kept = self._kept(scores)
        refuse_alike(scores[0, there], kept[0, there])
        golden = int(choose(scores, kept)[0])
        ranked = np.argsort(-np.where(kept, scores, -np.inf)[0], kind="stable")
        drawn = self._drawn(phi)
        wins = None if drawn is None else shares(drawn, self._kept(drawn)) / len(drawn)
        ends = None if drawn is None else np.quantile(drawn, (0.025, 0.975), axis=0)  # (2, L)
        fenced = self.scoring.fence == "tukey"
        means: dict[str, Any] = {
            name: self._mean(name, order) for name in ("cosine", "norm_old", "norm_new")
        }
        layers = tuple(
            LayerScore(
                layer=i,
                score=float(scores[0, i]) if there[i] else None,
                kept=bool(kept[0, i]),
                positive=float((phi[:, i] > 0).mean()) if there[i] else None,
                wins=None if wins is None else float(wins[i]),
                low=None if ends is None or not there[i] else float(ends[0, i]),
                high=None if ends is None or not there[i] else float(ends[1, i]),
                **{name: values[i] for name, values in means.items()},
            )
            for i in range(self.n_layers)
        )
        return LayerRanking(
            method=self.method,
            golden_layer=golden,
            candidates=tuple(int(i) for i in ranked if kept[0, i])[: self.top_k],
            layers=layers,
            n_facts=len(phi),
            n_unscored=n_unscored,
            n_generated=sum(self._generated[i] for i in order),
            seconds=seconds,
            peak_memory_bytes=peak_memory_bytes,
            fence=self.scoring.fence or "none",
            kappa=float(self.scoring.kappa) if fenced else None,
            fences=tukey_fences(scores[0, there], self.scoring.kappa) if fenced else None,
            reduce=self.scoring.reduce,
            bootstrap=self.bootstrap,
            seed=self.seed,
            model=model,
            data=data,
            warnings=(
                *left_out(len(everything), dropped or {}),
                *ties(scores[0], kept[0], phi[:, there]),
                *_no_part(np.flatnonzero(~there).tolist()),
                *self._warnings(golden, wins, len(phi), n_unscored, why),
            ),
            n_given=len(everything) + sum((dropped or {}).values()),
            dropped=dict(dropped or {}),
        )

    def _reduce(self, phi: Array) -> Array:
        """Scores (R, L) of phi (R, N, L); the facts are added one after the other in every row."""
        return phi.sum(axis=1) if self.scoring.reduce == "sum" else phi.mean(axis=1)

    def _kept(self, scores: Array) -> NDArray[np.bool_]:
        kept = np.zeros(scores.shape, dtype=np.bool_)
        kept[:, self.there] = keep(scores[:, self.there], self.scoring.fence, self.scoring.kappa)
        return kept

    def _mean(self, name: str, order: list[Any]) -> list[float | None]:
        """Mean over facts (L,) of a diagnostic; where no fact has it, None."""
        values = np.stack(self._values[name])[order]  # (N, L)
        there = np.isfinite(values)
        count = there.sum(axis=0)
        total = np.where(there, values, 0.0).sum(axis=0)
        return [float(t / c) if c else None for t, c in zip(total, count, strict=True)]

    def _drawn(self, phi: Array) -> Array | None:
        """Scores (R, L) on resamples of the facts; None without resampling."""
        n, n_layers = phi.shape
        if not self.bootstrap or n < 2:
            return None
        generator = np.random.default_rng(self.seed)
        drawn = np.empty((self.bootstrap, n_layers))
        step = max(1, _CHUNK // (n * n_layers))
        for start in range(0, self.bootstrap, step):
            count = min(step, self.bootstrap - start)
            some = phi[generator.integers(0, n, size=(count, n))]  # (count, N, L)
            drawn[start : start + count] = self._reduce(some)
        return drawn

    def _warnings(
        self, golden: int, wins: Array | None, n: int, n_unscored: int, why: str
    ) -> Iterable[str]:
        reasons, unknown = self._unscored, n_unscored - sum(self._unscored.values())
        for reason, count in reasons.items():
            yield f"{counted(count, 'fact')} of {n + n_unscored} took no part: {reason}."
        if unknown > 0:
            yield (
                f"{counted(unknown, 'fact')} of {n + n_unscored} had scores that are not finite "
                f"numbers and took no part{why}."
            )
        repeated = n + n_unscored - len(set(self._facts))
        if repeated:
            yield f"{counted(repeated, 'row')} repeat the id of another fact; all were counted."
        enough = self.scoring.enough
        more = f"Use more proxy facts (about {enough} or more), or check with another method."
        order = [] if wins is None else [int(i) for i in np.argsort(-wins, kind="stable")]
        shaky = f"The choice is not stable with {counted(n, 'fact')}: "
        unstable = wins is not None and (
            order[0] != golden or not clear(wins[golden], wins[order[1:2]].max(initial=0.0))
        )
        if n >= enough:  # who has followed an advice need not hear it
            more = "Check with another method."
        if wins is not None and wins[order[0]] < 0.5:
            shares = (f"layer {i} wins {100 * wins[i]:.0f} %" for i in order[:3] if wins[i] > 0)
            yield (
                f"{shaky}no layer wins half of the {self.bootstrap} resamples "
                f"({', '.join(shares)}). {more}"
            )
        elif wins is not None and order[0] != golden:
            yield (
                f"{shaky}layer {golden} has the best score, but of the resamples layer {order[0]} "
                f"wins {100 * wins[order[0]]:.0f} %, layer {golden} {100 * wins[golden]:.0f} %. "
                f"{more}"
            )
        elif wins is not None and not clear(wins[golden], wins[order[1:2]].max(initial=0.0)):
            yield (
                f"{shaky}of the resamples layer {golden} wins {100 * wins[golden]:.0f} %, layer "
                f"{order[1]} {100 * wins[order[1]]:.0f} %. {more}"
            )
        if n < enough:
            text = f"Only {counted(n, 'fact')}: few for '{self.method}'."
            yield text if unstable else f"{text} {more}"


def _no_part(layers: Sequence[int]) -> Iterable[str]:
    if layers:
        which = (
            f"Layer {layers[0]} takes"
            if len(layers) == 1
            else (f"Layers {', '.join(map(str, layers))} take")
        )
        yield f"{which} no part: nothing there is scored, or could be edited."
