"""From one score per fact and layer to one chosen layer, with a word on how firm the choice is.

Legend: N facts, L layers, R bootstrap resamples. Everything is float64.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from goldenlayers.errors import UserError, check_number, check_seed
from goldenlayers.locating.base import Scoring
from goldenlayers.locating.fences import (
    choose,
    counted,
    keep,
    left_out,
    refuse_alike,
    shares,
    ties,
    tukey_fences,
)
from goldenlayers.records import made, parse_json, short

Array = NDArray[np.float64]

SCHEMA = 1
MOST_RESAMPLES = 100_000
_CHUNK = 8 * 1024 * 1024  # resampled scores are built in pieces of so many numbers (64 MiB)


@dataclass(frozen=True, slots=True)
class LayerScore:
    """One layer's line in a ranking; None stands for "not measured by this method".

    ``score`` is S_L; ``kept`` tells whether it lies within the fences; ``cosine``, ``norm_old`` and
    ``norm_new`` are means over facts of the two gradients' cosine and norms; ``positive`` is the
    share of facts with phi > 0; ``wins`` the share of bootstrap resamples that choose this layer.
    """

    layer: int
    score: float
    kept: bool = True
    cosine: float | None = None
    norm_old: float | None = None
    norm_new: float | None = None
    positive: float | None = None
    wins: float | None = None


@dataclass(frozen=True, slots=True)
class LayerRanking:
    """The layers of one model scored by one method, and the choice that follows.

    ``candidates`` are the best kept layers, best first (the first is ``golden_layer``); ``fences``
    the lowest and highest score kept, None without a fence; ``seconds`` and ``peak_memory_bytes``
    what the scoring cost, None when not measured; ``warnings`` whole sentences for the reader;
    ``interrupted`` whether only part of the facts came to be scored; ``n_given`` how many facts
    there were before some were ``dropped``, by the reason.
    """

    method: str
    golden_layer: int
    candidates: tuple[int, ...]
    layers: tuple[LayerScore, ...]
    n_facts: int
    n_unscored: int = 0
    n_generated: int = 0
    seconds: float | None = None
    peak_memory_bytes: int | None = None
    fence: str = "none"
    kappa: float | None = None
    fences: tuple[float, float] | None = None
    reduce: str = "sum"
    bootstrap: int = 0
    seed: int = 0
    model: str = ""
    data: str = ""
    warnings: tuple[str, ...] = ()
    interrupted: bool = False
    n_given: int | None = None
    dropped: dict[str, int] = field(default_factory=dict, hash=False)

    @classmethod
    def fixed(
        cls,
        method: str,
        n_layers: int,
        layer: int,
        *,
        top_k: int = 5,
        model: str = "",
        data: str = "",
    ) -> LayerRanking:
        """A choice made without looking at any fact; the layer's neighbours come next.

        Raises:
            UserError: ``layer`` is not one of the model's layers.
        """
        if not 0 <= layer < n_layers:
            raise UserError(f"layer {layer} is out of range", expected=f"0 to {n_layers - 1}")
        scores = 0.0 - np.abs(np.arange(n_layers) - layer).astype(np.float64)
        return cls(
            method=method,
            golden_layer=layer,
            candidates=tuple(int(i) for i in np.argsort(-scores, kind="stable")[:top_k]),
            layers=tuple(LayerScore(i, float(s)) for i, s in enumerate(scores)),
            n_facts=0,
            model=model,
            data=data,
            warnings=(f"The method '{method}' looks at no fact: it names the same layer for any.",),
        )

    def warned(self, text: str) -> LayerRanking:
        """The same ranking with one more warning, a whole sentence, behind the others."""
        return dataclasses.replace(self, warnings=(*self.warnings, text))

    def to_json(self) -> dict[str, Any]:
        """Plain values for ``ranking.json``: ``json.dumps(..., allow_nan=False)`` accepts them."""
        return {"schema": SCHEMA, **json.loads(json.dumps(dataclasses.asdict(self)))}

    @classmethod
    def from_json(cls, value: Mapping[str, Any] | str | bytes) -> LayerRanking:
        """The ranking that ``to_json`` wrote, from its text or its parsed object.

        Raises:
            UserError: not a ranking, a damaged one, or one of a newer schema.
        """
        where = "the layer ranking"
        raw = parse_json(value, where) if isinstance(value, str | bytes) else value
        if not isinstance(raw, Mapping) or "schema" not in raw:
            raise UserError(
                "this is not a layer ranking", expected="the ranking.json of a locate run"
            )
        if raw["schema"] != SCHEMA:
            raise UserError(
                f"the ranking has schema {short(raw['schema'])}",
                expected=f"schema {SCHEMA}",
                fix="Read it with the version of goldenlayers that wrote it, or locate again",
            )
        ranking = made(cls, raw, where)
        places = [row.layer for row in ranking.layers]
        if places != list(range(len(places))) or not places:
            raise UserError(f"{where}: its layers are not numbered from 0")
        for layer in (ranking.golden_layer, *ranking.candidates):
            if layer not in range(len(places)):
                raise UserError(f"{where}: the golden layer {layer} is not among the layers")
        return ranking


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
    ) -> None:
        check_number("bootstrap", bootstrap, 0, MOST_RESAMPLES)
        check_number("top_k", top_k, 1, 10**6)
        check_number("n_layers", n_layers, 1, 10**6)
        check_seed(seed)
        self.method, self.n_layers, self.scoring = method, n_layers, scoring or Scoring()
        self.bootstrap, self.top_k, self.seed = bootstrap, top_k, seed
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
        finite = np.flatnonzero(np.isfinite(everything).all(axis=1))
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
        with np.errstate(over="ignore", invalid="ignore"):
            scores = self._reduce(phi[None])  # (1, L)
        if not np.isfinite(scores).all():
            raise UserError("the scores are too large to add up in float64")
        kept = self._kept(scores)
        refuse_alike(scores[0], kept[0])
        golden = int(choose(scores, kept)[0])
        ranked = np.argsort(-np.where(kept, scores, -np.inf)[0], kind="stable")
        wins = self._wins(phi)
        fenced = self.scoring.fence == "tukey"
        means = {name: self._mean(name, order) for name in ("cosine", "norm_old", "norm_new")}
        layers = tuple(
            LayerScore(
                layer=i,
                score=float(scores[0, i]),
                kept=bool(kept[0, i]),
                positive=float((phi[:, i] > 0).mean()),
                wins=None if wins is None else float(wins[i]),
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
            fences=tukey_fences(scores[0], self.scoring.kappa) if fenced else None,
            reduce=self.scoring.reduce,
            bootstrap=self.bootstrap,
            seed=self.seed,
            model=model,
            data=data,
            warnings=(
                *left_out(len(everything), dropped or {}),
                *ties(scores[0], kept[0], phi),
                *self._warnings(golden, wins, len(phi), n_unscored, why),
            ),
            n_given=len(everything) + sum((dropped or {}).values()),
            dropped=dict(dropped or {}),
        )

    def _reduce(self, phi: Array) -> Array:
        """Scores (R, L) of phi (R, N, L); the facts are added one after the other in every row."""
        return phi.sum(axis=1) if self.scoring.reduce == "sum" else phi.mean(axis=1)

    def _kept(self, scores: Array) -> NDArray[np.bool_]:
        return keep(scores, self.scoring.fence, self.scoring.kappa)

    def _mean(self, name: str, order: list[Any]) -> list[float | None]:
        """Mean over facts (L,) of a diagnostic; where no fact has it, None."""
        values = np.stack(self._values[name])[order]  # (N, L)
        there = np.isfinite(values)
        count = there.sum(axis=0)
        total = np.where(there, values, 0.0).sum(axis=0)
        return [float(t / c) if c else None for t, c in zip(total, count, strict=True)]

    def _wins(self, phi: Array) -> Array | None:
        """Share of resamples (L,) in which each layer is the best one; None without resampling."""
        n, n_layers = phi.shape
        if not self.bootstrap or n < 2:
            return None
        generator = np.random.default_rng(self.seed)
        wins = np.zeros(n_layers)
        step = max(1, _CHUNK // (n * n_layers))
        for start in range(0, self.bootstrap, step):
            count = min(step, self.bootstrap - start)
            scores = self._reduce(phi[generator.integers(0, n, size=(count, n))])  # (count, L)
            wins += shares(scores, self._kept(scores))
        return wins / self.bootstrap

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
        unstable = wins is not None and (wins[order[0]] < 0.5 or order[0] != golden)
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
        if n < enough:
            text = f"Only {counted(n, 'fact')}: few for '{self.method}'."
            yield text if unstable else f"{text} {more}"
