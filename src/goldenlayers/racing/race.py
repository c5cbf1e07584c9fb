"""Successive halving over candidate layers, whatever scores them. NumPy only.

Source: Jamieson and Talwalkar 2016, arXiv 1502.07943. Shapes: N facts, K candidate layers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from goldenlayers.errors import UserError
from goldenlayers.truth.table import Interval, eligible_means, estimate, level, nan_mean, plain

Floats = NDArray[np.float64]
Scorer = Callable[[int, Sequence[int]], Sequence[float]]
"""Layer, places of facts → each fact's score after its own edit there; NaN where unscored."""

PER_ROUND = 4
# Below so many facts a difference is never beyond doubt, however alike the facts speak: that all
# of five have one sign happens by chance once in 16 times, of three once in four.
_LEAST = 5
_RESAMPLES = 2000


@dataclass(frozen=True)
class Evidence:
    """What the race found out about one layer.

    Attributes:
        layer: the layer.
        n_facts: facts that were edited there; ``mean.n`` of them were scored.
        mean: mean Overall (0 to 100) and its 95 % bootstrap interval over these facts.
        behind: the chosen layer's score minus this one's, over the facts scored at both, with the
            95 % interval of paired differences (Student's t); NaN below two facts.
        dropped_in: the round after which it was dropped, from 1; None if it stayed to the end.
    """

    layer: int
    n_facts: int
    mean: Interval
    behind: Interval
    dropped_in: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values; NaN becomes None."""
        mean, behind = self.mean.to_json(), self.behind.to_json()
        return {
            "layer": self.layer,
            "n_facts": self.n_facts,
            "mean": mean["value"],
            "interval": [mean["low"], mean["high"]],
            "scored": mean["n"],
            "behind": behind["value"],
            "behind_interval": [behind["low"], behind["high"]],
            "dropped_in": self.dropped_in,
        }


@dataclass(frozen=True)
class VerifiedChoice:
    """The layer that won, and why it is believed to be the best of the candidates.

    Attributes:
        layer: the choice.
        evidence: one row per candidate, best first: those that lasted longer come first.
        rounds: rounds that were run.
        n_edits: edits that were made, over all layers and facts.
        seconds: wall-clock time, key statistics included if they had to be collected.
        stopped_because: a sentence.
        method: the editor.
        facts: ids of the facts that the race had, in their order.
        seed: of the choice of facts, of prefixes and statistics, and of the intervals.
        warnings: what to know before leaning on it.
    """

    layer: int
    evidence: tuple[Evidence, ...]
    rounds: int
    n_edits: int
    seconds: float
    stopped_because: str
    method: str = ""
    facts: tuple[str, ...] = ()
    seed: int = 0
    warnings: tuple[str, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """The value of ``verified.json``."""
        return {
            "schema": 1,
            "layer": self.layer,
            "method": self.method,
            "evidence": [one.to_json() for one in self.evidence],
            "rounds": self.rounds,
            "n_edits": self.n_edits,
            "seconds": plain(self.seconds),
            "stopped_because": self.stopped_because,
            "facts": list(self.facts),
            "seed": self.seed,
            "warnings": list(self.warnings),
        }


def race(
    candidates: Sequence[int],
    n_facts: int,
    score: Scorer,
    *,
    confidence: float = 0.95,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> VerifiedChoice:
    """Successive halving over ``candidates`` with at most ``n_facts`` facts each.

    There are ⌈log₂ K⌉ stages; by the end of stage i every layer still in the race has been tried
    on the first ⌈N·i / stages⌉ facts, at most ``PER_ROUND`` more in a round. After each stage but
    the last the worse half (⌊k/2⌋ of k) is dropped. After any round the race ends if the leader is
    better than every other layer still in it: if, over at least five facts scored at both, the
    paired t interval of the difference lies above 0, with ``confidence`` over all these rivals
    together (Bonferroni). That the question is put after each round is not corrected for.

    Equal means go to the shallower layer. A layer scored on less than half of the facts that some
    layer was scored on cannot win.

    Args:
        candidates: layers, in any order.
        n_facts: N.
        score: does the work; called once per round and layer, with facts it has not had there.
        confidence: what "beyond doubt" means.
        seed: of the bootstrap intervals in the evidence.
        on_progress: told (edits done, edits at most).

    Raises:
        UserError: no candidate, or no edit that could be scored.
    """
    start = time.perf_counter()
    layers = sorted(set(candidates))
    if not layers:
        raise UserError("there are no layers to verify", expected="at least one candidate")
    table = np.full((n_facts, len(layers)), np.nan)  # (N, K)
    tried = [0] * len(layers)
    dropped: dict[int, int] = {}
    alive = list(range(len(layers))) if len(layers) > 1 else []
    stages = max(1, math.ceil(math.log2(len(layers))))
    most = _most_edits(len(layers), n_facts, stages)
    rounds, edits, done = 0, 0, 0
    why = "the facts ran out" if alive else "there is only one candidate"
    for stage in range(1, stages + 1 if alive else 1):
        target = math.ceil(n_facts * stage / stages)
        while done < target and len(alive) > 1:
            places = range(done, min(done + PER_ROUND, target))
            rounds += 1
            for i in alive:
                table[places.start : places.stop, i] = score(layers[i], places)
                tried[i] = places.stop
                edits += len(places)
                if on_progress is not None:
                    on_progress(edits, most)
            done = places.stop
            order = _order(table[:done], alive)
            if _beyond_doubt(table[:done], order, confidence):
                for i in order[1:]:
                    dropped[i] = rounds
                alive = order[:1]
                why = f"layer {layers[alive[0]]} is better beyond doubt"
        if stage < stages and len(alive) > 1:
            order = _order(table[:done], alive)
            keep = order[: len(order) - len(order) // 2]
            dropped |= dict.fromkeys(order[len(keep) :], rounds)
            alive = sorted(keep)
    if edits and np.isnan(table).all():
        raise UserError("no edit could be scored, so no layer can be verified")
    order = _order(table[:done], alive) if len(alive) > 1 else alive or [0]
    worth = level(nan_mean(table))
    out = sorted(dropped, key=lambda i: (-dropped[i], -np.nan_to_num(worth[i], nan=-1), i))
    best = order[0]
    evidence = tuple(
        Evidence(
            layers[i],
            tried[i],
            estimate(table[:, i], _RESAMPLES, seed),
            difference(table[:, best], table[:, i], confidence),
            dropped.get(i),
        )
        for i in [*order, *out]
    )
    return VerifiedChoice(
        layer=layers[best],
        evidence=evidence,
        rounds=rounds,
        n_edits=edits,
        seconds=time.perf_counter() - start,
        stopped_because=why,
        seed=seed,
        warnings=tuple(_doubts(evidence)),
    )


def difference(first: Floats, second: Floats, confidence: float = 0.95) -> Interval:
    """Mean of the paired differences first - second over the facts scored in both, (N,) each.

    The interval is Student's t; NaN below two facts.
    """
    gaps = first - second
    gaps = gaps[~np.isnan(gaps)]
    n = len(gaps)
    if n < 2:
        return Interval(float(gaps.mean()) if n else math.nan, math.nan, math.nan, n)
    mean, se = float(gaps.mean()), float(gaps.std(ddof=1)) / math.sqrt(n)
    reach = t_quantile((1 + confidence) / 2, n - 1) * se
    return Interval(mean, mean - reach, mean + reach, n)


def t_quantile(p: float, freedom: int) -> float:
    """Quantile of Student's t, p ≥ 0.5: exact for 1, 2 and 4 degrees of freedom, else by expansion.

    Cornish-Fisher expansion (Abramowitz and Stegun 26.7.5); at 3 degrees, where it is worst, it is
    within 1 % of the truth for p ≤ 0.975 and 4 % for p ≤ 0.995.
    """
    if freedom == 1:
        return math.tan(math.pi * (p - 0.5))
    if freedom == 2:
        return (2 * p - 1) * math.sqrt(2 / (4 * p * (1 - p)))
    if freedom == 4:
        a = math.sqrt(4 * p * (1 - p))
        return 2 * math.sqrt(math.cos(math.acos(a) / 3) / a - 1)
    z, n = NormalDist().inv_cdf(p), freedom
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / n**k for k, term in enumerate(terms, start=1))


def _order(table: Floats, alive: Sequence[int]) -> list[int]:
    """Columns of the race, best mean first; equal ones by depth, those that cannot win last."""
    places = sorted(alive)
    means = level(eligible_means(table[:, places]))
    keys = [
        (math.inf if math.isnan(mean) else -mean, i) for mean, i in zip(means, places, strict=True)
    ]
    return [i for _, i in sorted(keys)]


def _beyond_doubt(table: Floats, order: Sequence[int], confidence: float) -> bool:
    strict = 1 - (1 - confidence) / max(1, len(order) - 1)
    gaps = [difference(table[:, order[0]], table[:, i], strict) for i in order[1:]]
    return all(gap.n >= _LEAST and gap.low > 0 for gap in gaps)


def _most_edits(k: int, n_facts: int, stages: int) -> int:
    """Edits of a race that is not ended early."""
    total, before = 0, 0
    for stage in range(1, stages + 1 if k > 1 else 1):
        target = math.ceil(n_facts * stage / stages)
        total += k * (target - before)
        k, before = k - k // 2, target
    return total


def _doubts(evidence: Sequence[Evidence]) -> list[str]:
    """Rivals that may be as good, in a sentence."""
    close = [one.layer for one in evidence[1:] if not one.behind.low > 0]
    if not close:
        return []
    few = ", ".join(map(str, close))
    return [f"on so few facts layers {few} cannot be told from the chosen one"]
