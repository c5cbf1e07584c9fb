"""The rule of the race: which layers are tried on how many facts, and which one is chosen.

Scores in, a layer out; no model is needed, so the rule can be replayed on a sweep. NumPy only.

Shapes: N facts, K layers, S resamples. A place is a layer's place among those that may be tried.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from goldenlayers.evaluation.bootstrap import Floats
from goldenlayers.truth.table import (
    MIN_COVERAGE,
    Interval,
    eligible_means,
    estimate,
    level,
    nan_mean,
)

Scorer = Callable[[int, range], Sequence[float]]
"""Place of a layer, facts → each fact's score after its own edit there; NaN where unscored."""

EDITS = 120  # at most, whatever the depth
FACTS = 3  # tried in a round at each layer that is still in it
FIRST_SHARE = 0.4  # of the edits may go into the first round
KEPT = 0.5  # of the layers but the published depth stay after a round
PRIOR = 1.0  # standard errors that a layer must be ahead of the published depth
DOUBT = 3.0  # standard errors beyond which two layers differ beyond doubt,
LEAST = 6  # on at least so many facts
MOST_FACTS = 32  # more than these say little about the few layers that are left
RESAMPLES = 1000


class TimeUp(Exception):  # noqa: N818 - no error: what is done is kept
    """The time of the race is over; raised by a :data:`Scorer`."""


@dataclass(frozen=True, eq=False)
class Raced:
    """What a race found.

    Attributes:
        place: the choice.
        home: of the published depth.
        table: (N, K) scores; NaN where nothing was tried, or could be scored.
        edits: that were made.
        rounds: that were finished.
        why: it ended, a sentence.
        prior: see :func:`decide`.
        interrupted: whether Ctrl-C ended it.
    """

    place: int
    home: int
    table: Floats
    edits: int
    rounds: int
    why: str
    prior: float = PRIOR
    interrupted: bool = False

    def scores(self) -> Floats:
        """By place what the layer's mean over all facts would be, (K,): the published depth's mean,
        and the mean difference from it on the facts that both had; NaN where nothing was tried.
        """
        base = self.table[:, self.home]
        if np.isnan(base).all():
            return nan_mean(self.table)
        return nan_mean(base) + nan_mean(self.table - base[:, None])

    def wins(self, seed: int = 0) -> Floats:
        """Share of the resamples of the facts in which each place is chosen, (K,)."""
        n, wide = self.table.shape
        rng, found = np.random.default_rng(seed), np.zeros(wide)
        able = _able(self.table)
        for _ in range(RESAMPLES):
            drawn = self.table[rng.integers(n, size=n)] if n else self.table
            found[decide(drawn, self.home, self.prior, able)] += 1
        return found / RESAMPLES

    def alike(self) -> list[int]:
        """Places that cannot be told from the choice: its lead over them may be chance (95 %)."""
        return [
            i
            for i in np.flatnonzero(_able(self.table)).tolist()
            if i != self.place
            and not difference(self.table[:, self.place], self.table[:, i]).low > 0
        ]

    def gain(self, seed: int = 0) -> Interval:
        """The choice minus the published depth, in points, over the facts that both had."""
        return estimate(self.table[:, self.place] - self.table[:, self.home], 2000, seed)


def race_on(
    score: Scorer,
    n_facts: int,
    n_places: int,
    home: int,
    *,
    edits: int = EDITS,
    prior: float = PRIOR,
    left: Callable[[], int] | None = None,
) -> Raced:
    """Race the layers; at most ``edits`` edits are made, each layer × fact at most once.

    Neighbouring layers can differ as much as distant ones (ROME's curves are spiky), and one fact
    says little. So neither every layer on few facts nor few layers on many will do: the layers are
    halved as the evidence grows (successive halving; Jamieson and Talwalkar, arXiv 1502.07943).

    1. Every s-th layer, the published depth among them, is tried on the first ``FACTS`` facts. s is
       the smallest step with which that takes ``FIRST_SHARE`` of the edits at most.
    2. The better half stays, and so does the published depth. Where layers were skipped, those half
       a step away from the two best come in, and catch up on the facts so far.
    3. All that are left are tried on ``FACTS`` facts more, and so on from 2, until the edits or the
       facts are used up, or until two are left and differ beyond doubt.
    4. :func:`decide` chooses, with the published depth as the layer to beat.

    All layers see the same facts in the same order, so what makes a fact hard cancels out. A budget
    that lets fewer than three layers into the first round makes none: the published depth is taken.

    Args:
        score: does the work.
        n_facts: N; of more than ``MOST_FACTS`` the first are used.
        n_places: K.
        home: place of the published depth.
        edits: that may be made.
        prior: see :func:`decide`.
        left: asked before each round how many edits there is still time for.
    """
    table = np.full((min(n_facts, MOST_FACTS), n_places), np.nan)
    tried = [0] * n_places
    spent, done, rounds, interrupted = 0, 0, 0, False
    room = int(edits * FIRST_SHARE) // FACTS  # layers in the first round
    step = (
        1 if n_places * FACTS <= edits * FIRST_SHARE else max(2, math.ceil(n_places / max(1, room)))
    )
    alive = list(range(home % step, n_places, step))
    if room < min(3, n_places) or not len(table):
        alive, why = [home], "the budget is too small to try other layers"
    else:
        why = "there is no other layer" if len(alive) == 1 else ""

    def bring(places: Sequence[int], to: int) -> None:
        nonlocal spent
        for i in places:
            if facts := range(tried[i], to):
                table[facts.start : to, i] = score(i, facts)
                tried[i], spent = to, spent + len(facts)

    try:
        if len(alive) == 1 and len(table):
            done = min(FACTS, len(table), edits)
            bring(alive, done)
        while len(alive) > 1:
            if left is not None:
                edits = min(edits, spent + left())
            facts = min(FACTS, len(table) - done, (edits - spent) // len(alive))
            if facts < 1:
                why = "the facts are used up" if done == len(table) else "the edits are used up"
                break
            bring(sorted(alive, key=lambda i: (i != home, i)), done + facts)
            done, rounds = done + facts, rounds + 1
            best = _order(table[:done], alive)
            if len(alive) == 2 and _beyond_doubt(table[:done, alive]):
                why = "the two that were left differ beyond doubt"
                break
            others = [i for i in best if i != home]
            alive = sorted({home, *others[: math.ceil(len(others) * KEPT)]})
            if step > 1:
                step = math.ceil(step / 2)
                near = [j for i in best[:2] for j in (i - step, i + step) if 0 <= j < n_places]
                near = [j for j in dict.fromkeys(near) if not tried[j]]
                if len(near) * done <= (edits - spent) // 2:
                    bring(near, done)
                    alive = sorted({*alive, *near})
    except TimeUp:
        why = "the time is over"
    except KeyboardInterrupt:
        if not rounds:
            raise
        why, interrupted = "it was interrupted", True
    table = table[:done]
    place = decide(table, home, prior)
    return Raced(place, home, table, spent, rounds, why, prior, interrupted)


def decide(
    table: Floats, home: int, prior: float = PRIOR, able: NDArray[np.bool_] | None = None
) -> int:
    """The place to choose by scores (N, K): the published depth unless another is clearly ahead.

    Of the paired differences from the published depth let m be a layer's mean and e its standard
    error. The layer with the largest m - ``prior`` · e is chosen if that is above 0: one with few
    facts or a wavering lead must lead by more, and with 0 the best mean wins. A layer scored on
    less than half of the facts, or on fewer than two of them, cannot be chosen.

    Args:
        table: NaN where nothing was scored.
        home: place of the published depth.
        prior: in standard errors, 0 or more.
        able: (K,) which can be chosen, if it was decided before.
    """
    if not table.size:
        return home
    gaps = table - table[:, [home]]  # (N, K)
    known = ~np.isnan(gaps)
    n = known.sum(axis=0)
    if not n[home]:  # it cannot be edited
        means = eligible_means(table)
        return home if np.isnan(means).all() else int(np.nanargmax(level(means)))
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = nan_mean(gaps)
        spread = (np.where(known, gaps - mean, 0.0) ** 2).sum(axis=0) / (n - 1)
        worth = mean - prior * np.sqrt(spread / n)
    able = _able(table) if able is None else able
    worth = level(np.where(able & (n > 1) & ~np.isnan(worth), worth, -np.inf))
    worth[home] = 0.0
    best = int(worth.argmax())
    return best if worth[best] > 0 else home


def replay(table: Floats, layers: Sequence[int], published: int, **rule: float) -> tuple[int, int]:
    """The race on a sweep's scores (N, K) of ``layers``: (the layer it chooses, edits it costs).

    Args:
        table: see :func:`goldenlayers.racing.table_of`.
        layers: the swept layers, ascending; the nearest to the published depth stands for it.
        published: the published depth.
        rule: ``edits`` and ``prior`` of :func:`race_on`.
    """
    home = min(range(len(layers)), key=lambda i: abs(layers[i] - published))
    found = race_on(
        lambda place, facts: table[facts.start : facts.stop, place].tolist(),
        len(table),
        len(layers),
        home,
        **rule,  # type: ignore[arg-type]
    )
    return layers[found.place], found.edits


def _able(table: Floats) -> NDArray[np.bool_]:
    """Which places were scored on enough of the facts to be chosen."""
    known = ~np.isnan(table)
    return known.sum(axis=0) >= max(1.0, MIN_COVERAGE * int(known.any(axis=1).sum()))


def _order(table: Floats, alive: Sequence[int]) -> list[int]:
    """Places of the race, best mean first; equal ones by depth, those that cannot win last."""
    places = sorted(alive)
    means = level(eligible_means(table[:, places]))
    keys = [(math.inf if math.isnan(m) else -m, i) for m, i in zip(means, places, strict=True)]
    return [i for _, i in sorted(keys)]


def _beyond_doubt(pair: Floats) -> bool:
    gaps = pair[:, 0] - pair[:, 1]
    gaps = gaps[~np.isnan(gaps)]
    if len(gaps) < LEAST:
        return False
    return bool(abs(gaps.mean()) > DOUBT * gaps.std(ddof=1) / math.sqrt(len(gaps)))


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
