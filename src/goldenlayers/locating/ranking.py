"""The layers of a model ranked by a method, and how firm the choice is."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from goldenlayers.errors import UserError, listed
from goldenlayers.locating.base import Fence
from goldenlayers.records import made, parse_json, short

Array = NDArray[np.float64]


def tukey_fences(scores: Array, kappa: float = 1.0) -> tuple[float, float]:
    """q1 - kappa (q3 - q1) and q3 + kappa (q3 - q1) of scores (L,), quartiles by interpolation.

    Source: Datta, Liu, Chhabra (arXiv 2602.20207), section 5.1; ``numpy.quantile``, "linear".
    """
    low, high = _fences(np.asarray(scores, dtype=np.float64)[None], kappa)
    return float(low[0]), float(high[0])


def _fences(scores: Array, kappa: float) -> tuple[Array, Array]:
    """Fences (R,), (R,) of each row of scores (R, L)."""
    q1, q3 = np.quantile(scores, [0.25, 0.75], axis=1, method="linear")
    return q1 - kappa * (q3 - q1), q3 + kappa * (q3 - q1)


def keep(scores: Array, fence: Fence | None, kappa: float) -> NDArray[np.bool_]:
    """Which scores (R, L) lie within their row's fences, the bounds included; "last" leaves out the
    last layer.

    With kappa < 1/2 and two layers nothing may be left; such a row is kept whole.
    """
    if fence != "tukey":
        kept = np.ones(scores.shape, dtype=np.bool_)
        kept[:, -1] = fence != "last" or scores.shape[1] == 1
        return kept
    low, high = _fences(scores, kappa)
    kept = (scores >= low[:, None]) & (scores <= high[:, None])
    return kept | ~kept.any(axis=1, keepdims=True)


def choose(scores: Array, kept: NDArray[np.bool_]) -> NDArray[np.intp]:
    """The best kept layer (R,) of each row (R, L); of ties the first, the shallower."""
    return np.where(kept, scores, -np.inf).argmax(axis=1)


def shares(scores: Array, kept: NDArray[np.bool_]) -> Array:
    """How many of the rows (R, L) each layer (L,) wins; layers that share the best of a row share
    the win.
    """
    scores = np.where(kept, scores, -np.inf)
    best = scores == scores.max(axis=1, keepdims=True)
    return (best / best.sum(axis=1, keepdims=True)).sum(axis=0)


def refuse_alike(scores: Array, kept: NDArray[np.bool_]) -> None:
    """Refuse scores (L,) of which none is better than another.

    Raises:
        UserError: all kept layers, at least two, have the same score but for rounding.
    """
    some = scores[kept]
    if len(some) < 2 or np.ptp(some) > 1e-12 * np.abs(some).max():
        return
    which = f"all {len(some)} layers" + (" within the fences" if len(some) < len(scores) else "")
    raise UserError(
        f"no layer stands out: {which} have the score {float(some[0]):.3g}",
        expected="scores that differ",
        fix="Weights that are zero or damaged do that, answers that the model is certain of, and "
        "numbers too small for float16. Load the model anew in float32, or use other facts",
    )


def left_out(n_scored: int, dropped: Mapping[str, int]) -> Iterable[str]:
    """A sentence if only some of the facts that were given came to be scored."""
    if dropped:
        given = n_scored + sum(dropped.values())
        why = "; ".join(f"{reason}: {count}" for reason, count in dropped.items())
        yield f"Only {n_scored} of the {given} facts could be used. Left out: {why}."


def ties(scores: Array, kept: NDArray[np.bool_], phi: Array) -> Iterable[str]:
    """Sentences if layers share the best score, or if facts tell no layer from another."""
    best = np.flatnonzero(kept & (scores == scores[kept].max()))
    if len(best) > 1:
        names = " and ".join(map(str, best[:5])) + (" and others" if len(best) > 5 else "")
        yield f"Layers {names} share the best score; the one nearest the input is named."
    mute = int((np.ptp(phi, axis=1) == 0).sum()) if len(scores) > 1 else 0
    if mute:
        yield (
            f"{counted(mute, 'fact')} of {len(phi)} score all layers alike and say nothing about "
            "the choice."
        )


def counted(n: int, noun: str) -> str:
    """The number with its noun, in the singular or the plural."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


SCHEMA = 1
# A choice is firm if it wins this many times the resamples of the next layer, and half of all.
_CLEAR = 1.5


@dataclass(frozen=True, slots=True)
class LayerScore:
    """One layer's line in a ranking; None stands for "not measured by this method".

    ``score`` is S_L, None of a layer that a race did not try; ``kept`` tells whether it lies within
    the fences; ``cosine``, ``norm_old`` and ``norm_new`` are means over facts of the two gradients'
    cosine and norms; ``positive`` is the share of facts with phi > 0; ``wins`` the share of
    bootstrap resamples that choose this layer, ``low`` and ``high`` the ends of its score's 95 %
    interval in them; ``facts`` how many of a race's facts were scored there.
    """

    layer: int
    score: float | None
    kept: bool = True
    cosine: float | None = None
    norm_old: float | None = None
    norm_new: float | None = None
    positive: float | None = None
    wins: float | None = None
    facts: int | None = None
    low: float | None = None
    high: float | None = None

    @property
    def value(self) -> float:
        """The score; NaN where there is none."""
        return math.nan if self.score is None else self.score


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a race of real edits knows of its choice.

    Attributes:
        editor: that edited.
        published: the layer at the published depth, which the choice is compared with.
        edits: that were made.
        gain: points that the choice is ahead of the published depth, and their 95 % interval; None
            where one of the two was not tried.
        alike: layers that cannot be told from the choice.
        why: the race ended.
        subject: the layer, if only other questions about the edited subject had to stay.
        neighbour: the layer, if only questions about other subjects had to.
        asked: which of the two sorts of questions were asked, "subject" and "neighbour".
    """

    editor: str
    published: int
    edits: int
    gain: tuple[float | None, float | None, float | None]
    alike: tuple[int, ...]
    why: str
    subject: int
    neighbour: int
    asked: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LayerRanking:
    """The layers of one model scored by one method, and the choice that follows.

    ``candidates`` are the best kept layers, best first (the first is ``golden_layer``); ``fences``
    the lowest and highest score kept, None without a fence; ``seconds`` and ``peak_memory_bytes``
    what the scoring cost, None when not measured; ``warnings`` whole sentences for the reader;
    ``interrupted`` whether only part of the facts came to be scored; ``n_given`` how many facts
    there were before some were ``dropped``, by the reason; ``evidence`` what real edits showed.
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
    evidence: Evidence | None = None

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

    @property
    def firm(self) -> bool:
        """Whether the resamples agree on the choice: it wins half of them, and clearly more than
        any other layer. True without resamples, which say nothing against it.
        """
        wins = {row.layer: row.wins for row in self.layers if row.wins is not None}
        mine = wins.pop(self.golden_layer, None)
        return mine is None or clear(mine, max(wins.values(), default=0.0))

    @property
    def notes(self) -> tuple[str, ...]:
        """What else the reader should know of the choice, whole sentences."""
        found = _other_fences(self) if self.fence == "tukey" else []
        return (*found, *(_said(self, self.evidence) if self.evidence else ()))

    def warned(self, text: str) -> LayerRanking:
        """The same ranking with one more warning, a whole sentence, behind the others."""
        return dataclasses.replace(self, warnings=(*self.warnings, text))

    def to_json(self) -> dict[str, Any]:
        """Plain values for ``ranking.json``: ``json.dumps(..., allow_nan=False)`` accepts them."""
        record = json.loads(json.dumps(dataclasses.asdict(self)))
        return {"schema": SCHEMA, **record, "notes": list(self.notes)}

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


def clear(mine: float, next_best: float) -> bool:
    """Whether shares of the resamples make a choice firm: half of them, and clearly more than the
    next layer has.
    """
    return mine >= 0.5 and mine >= _CLEAR * next_best


def _other_fences(ranking: LayerRanking) -> list[str]:
    """What would be chosen with other fences, and which layers these leave out."""
    scores = np.array([[row.value for row in ranking.layers]])
    raw, wider = (int(choose(scores, keep(scores, fence, 1.5))[0]) for fence in ("none", "tukey"))
    best = scores[0, ranking.golden_layer]
    above = [row.layer for row in ranking.layers if not row.kept and row.value > best]
    above.sort(key=lambda layer: -scores[0, layer])
    text = f"Without fences the choice is layer {raw}, with kappa 1.5 layer {wider}."
    if above:
        text += f" Left out by the fences, with higher scores: {listed(above)}."
    return [text]


def _said(ranking: LayerRanking, known: Evidence) -> list[str]:
    """A race in sentences: what it cost, how sure it is, and whom it serves."""
    golden = ranking.golden_layer
    wins = ranking.layers[golden].wins
    cost = f"{counted(known.edits, 'edit')} with {known.editor}"
    cost += "" if ranking.seconds is None else f" in {ranking.seconds:.0f} s"
    tried = sum(row.score is not None for row in ranking.layers)
    alone = wins is None or tried < 2
    sure = "" if alone else f"; of {tried} it is the best in {100 * (wins or 0):.0f} % of resamples"
    found = [f"Layer {golden} was chosen by {cost} ({known.why}){sure}."]
    value, low, high = known.gain
    if golden == known.published and tried > 1:
        found.append("It is the published depth: no other layer was clearly ahead.")
    elif value is not None and golden != known.published:
        ends = "" if low is None or high is None else f" ({low:+.1f} to {high:+.1f})"
        home = f"the published depth, layer {known.published},"
        found.append(f"It was ahead of {home} by {value:.1f} points{ends}.")
    if known.alike:
        found.append(f"It cannot be told from {_layers(known.alike)}.")
    if len(known.asked) == 1:
        about = "the edited subjects" if "subject" in known.asked else "other subjects"
        found.append(f"Of what must stay only answers about {about} were asked.")
    elif known.subject != known.neighbour:
        found.append(
            f"If only answers about the edited subject had to stay it were layer {known.subject}, "
            f"if only those about others layer {known.neighbour}."
        )
    return found


def _layers(layers: tuple[int, ...]) -> str:
    return f"layer {layers[0]}" if len(layers) == 1 else f"layers {listed(list(layers))}"
