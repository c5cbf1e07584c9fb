"""The rule of the race: which layer is tried on which facts next, and which one is chosen.

Scores in, a layer out; no model is needed, so the rule can be replayed on a sweep. NumPy only.

What is believed of the layers follows from a model of the scores. The edit of fact i at layer l
scores

    y = a_i + w_l + noise,

where a_i is how easy the fact is and w what the layer is worth: a Gaussian process over the depth,
so that neighbours are alike, with something of its own for each layer. Before any edit one layer is
expected to be the best, and layers far from it to lose ``prior`` points. Edits overrule that as far
as they are many and agree: a lead that rests on little is drawn back.

The layer to try next is drawn by what is believed: where the best layer may be, most is tried.

Sources: top-two Thompson sampling, Russo 2016 (arXiv 1602.08448); Gaussian processes, Rasmussen and
Williams 2006, chapter 2 (equations 2.25 and 2.26).

Shapes: N facts, K layers, n scores, S draws. A place is a layer's place among those that may be
tried.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from goldenlayers.evaluation.bootstrap import Floats
from goldenlayers.truth.table import Interval

Scorer = Callable[[int, range], Sequence[float]]
"""Place of a layer, facts → each fact's score after its own edit there; NaN where unscored."""

EDITS = 100  # at most, whatever the depth
FACTS = 3  # tried at a layer at a time
MOST_FACTS = 32  # that a race may use
GRID = 10  # layers to begin with, evenly spaced; fewer than
_MANY = 5  # stay away from both ends
ENOUGH = 0.5  # points for which no edit is made, and the expected layer is not left
DRAWS = 1000  # of what may be true of the layers

# In points of 100; docs/results/golden-layers.md says on which sweeps they were set.
PRIOR = 6.0  # that a layer far from the expected one is expected to lose
SPREAD = 4.0  # standard deviation of the layers' worth
ALONE = 0.1  # share of its variance that neighbours do not have in common
REACH = 0.15  # of the depth, over which layers are alike
NOISES = (6.0, 9.0, 13.0, 20.0, 30.0)  # standard deviations of one edit's score: the likeliest
_EASE = 30.0  # of the facts' levels, and
_LEVEL = 100.0  # of their mean: so wide that the scores alone decide


class TimeUp(Exception):  # noqa: N818 - no error: what is done is kept
    """The time of the race is over; raised by a :data:`Scorer`."""


@dataclass(frozen=True, eq=False)
class Belief:
    """What is believed of the layers' worth: its mean (K,) and covariance (K, K), in points.

    ``level`` is the mean of the facts' levels; ``level + mean`` what the layers are expected to
    score on them. NaN without any score.
    """

    mean: Floats
    covariance: Floats
    level: float

    def draws(self, count: int, rng: np.random.Generator) -> Floats:
        """What may be true of the layers, (S, K)."""
        values, vectors = np.linalg.eigh(self.covariance)
        root = vectors * np.sqrt(np.clip(values, 0.0, None))
        return self.mean + rng.standard_normal((count, len(self.mean))) @ root.T

    def lead(self, place: int, over: int, facts: int = 0) -> Interval:
        """What a place is ahead of another, and the interval that holds it with 95 %."""
        c = self.covariance
        variance = float(c[place, place] + c[over, over] - 2 * c[place, over])
        value, reach = float(self.mean[place] - self.mean[over]), 1.96 * math.sqrt(max(0, variance))
        return Interval(value, value - reach, value + reach, facts)


def believe(table: Floats, home: int, prior: float = PRIOR) -> Belief:
    """What scores (N, K) say of the layers; NaN where nothing was scored.

    Args:
        table: the scores, in points of 100.
        home: place that is expected to be the best.
        prior: points that a place far from it is expected to lose.
    """
    width = table.shape[1]
    depth = np.arange(width) / max(1, width - 1)
    near = np.exp(-((depth[:, None] - depth) ** 2) / (2 * REACH**2))  # (K, K)
    kernel = SPREAD**2 * ((1 - ALONE) * near + ALONE * np.eye(width))
    expected = prior * (near[home] - 1)  # (K,)
    facts, places = np.nonzero(~np.isnan(table))
    if not len(facts):
        return Belief(expected, kernel, math.nan)
    scores = table[facts, places]  # (n,)
    across = kernel[:, places]  # (K, n)
    among = kernel[np.ix_(places, places)] + _EASE**2 * (facts[:, None] == facts) + _LEVEL**2
    left = scores - float(scores.mean()) - expected[places]
    noise = _likeliest(among, left)
    solved = np.linalg.solve(
        among + noise**2 * np.eye(len(left)), np.column_stack([left, across.T])
    )  # (n, 1 + K)
    mean = expected + across @ solved[:, 0]
    # The facts' levels, each by its own scores.
    own = [float((table[i] - mean)[~np.isnan(table[i])].mean()) for i in np.unique(facts)]
    return Belief(mean, kernel - across @ solved[:, 1:], math.fsum(own) / len(own))


def _likeliest(among: Floats, left: Floats) -> float:
    """The noise under which the scores are likeliest: Rasmussen and Williams, equation 5.8."""
    values, vectors = np.linalg.eigh(among)
    squares = (vectors.T @ left) ** 2
    variances = np.clip(values, 0.0, None) + np.square(NOISES)[:, None]  # (5, n)
    return NOISES[int((squares / variances + np.log(variances)).sum(axis=1).argmin())]


@dataclass(frozen=True, eq=False)
class Raced:
    """What a race found.

    Attributes:
        place: the choice.
        home: the place that was expected to be the best before any edit.
        table: (N, K) scores; NaN where nothing was tried, or could be scored.
        edits: that were made.
        why: it ended, a sentence.
        prior: see :func:`believe`.
        interrupted: whether Ctrl-C ended it.
    """

    place: int
    home: int
    table: Floats
    edits: int
    why: str
    prior: float = PRIOR
    interrupted: bool = False

    @cached_property
    def belief(self) -> Belief:
        """What the scores say of the layers."""
        return believe(self.table, self.home, self.prior)

    @property
    def tried(self) -> NDArray[np.bool_]:
        """Which places have a score, (K,)."""
        return np.asarray((~np.isnan(self.table)).any(axis=0))

    def scores(self) -> Floats:
        """By place what the layer is expected to score on the facts of the race, (K,); NaN where
        nothing was scored.
        """
        belief = self.belief
        return np.where(self.tried, belief.level + belief.mean, math.nan)

    def wins(self, seed: int = 0) -> Floats:
        """How likely each place is to be the best of those that can be chosen, (K,)."""
        able = _able(self.table)
        if able.sum() < 2:  # nothing was compared: what is expected tells
            able[:] = True
        draws = self.belief.draws(DRAWS, np.random.default_rng(seed))
        best = np.where(able, draws, -np.inf).argmax(axis=1)
        return np.bincount(best, minlength=len(able)) / DRAWS

    def alike(self) -> list[int]:
        """Places that cannot be told from the choice: its lead over them may be chance (95 %)."""
        belief = self.belief
        return [
            i
            for i in np.flatnonzero(_able(self.table)).tolist()
            if i != self.place and not belief.lead(self.place, i).low > 0
        ]

    def gain(self, over: int) -> Interval:
        """What the choice is ahead of a place, in points, and its 95 % interval."""
        facts = int((~np.isnan(self.table[:, self.place])).sum())
        return self.belief.lead(self.place, over, facts)


def race_on(
    score: Scorer,
    n_facts: int,
    n_places: int,
    home: int,
    *,
    edits: int = EDITS,
    also: int | None = None,
    closed: Collection[int] = (),
    prior: float = PRIOR,
    left: Callable[[], int] | None = None,
) -> Raced:
    """Race the layers.

    1. The layer that is expected to be the best, the one named by ``also``, and others, evenly
       spaced, ``GRID`` + 1 in all, are tried on the first ``FACTS`` facts, as far as half of the
       edits go.
    2. A layer is drawn by how likely it is to be the best; every second time another one than the
       likeliest to be drawn. It is tried on its next ``FACTS`` facts. And so on, until the edits or
       the facts are used up, or the layer that would be chosen is expected to lose less than
       ``ENOUGH`` points against the best.
    3. :func:`decide` chooses.

    A budget that lets fewer than three layers into the first round makes none: the expected layer
    is taken.

    Args:
        score: does the work.
        n_facts: N; of more than ``MOST_FACTS`` the first are used.
        n_places: K.
        home: place that is expected to be the best.
        edits: that may be made.
        also: a place to try in any case: what the choice is compared with.
        closed: places where nothing can be edited.
        prior: see :func:`believe`.
        left: asked before each step how many edits there is still time for.
    """
    table = np.full((min(n_facts, MOST_FACTS), n_places), np.nan)
    tried = [0] * n_places
    rng = np.random.default_rng(0)
    spent, why, interrupted = 0, "", False
    asked, late = edits, False
    room = max(edits // (2 * FACTS), min(edits // FACTS, 3))
    named = (home,) if also is None else (home, also)
    first = _grid(n_places, named, min(room, GRID + 1), closed)
    if len(first) < min(3, n_places - len(closed)):
        first, why = [home], "the budget is too small to try other layers"
    elif n_places - len(closed) == 1:
        why = "there is no other layer"
    alone = bool(why)
    try:
        while not (alone and not first):
            if left is not None:
                edits = min(edits, spent + left())
                late = late or edits < asked
            # Where every edit has failed, no other is tried.
            dead = [
                i in closed or (n > 0 and bool(np.isnan(table[:n, i]).all()))
                for i, n in enumerate(tried)
            ]
            open_places = [i for i, n in enumerate(tried) if n < len(table) and not dead[i]]
            if not open_places or spent >= edits:
                used = "the facts are used up" if not open_places else "the edits are used up"
                why = why or ("the time is over" if late and open_places else used)
                break
            place = first.pop(0) if first else _next(table, home, prior, dead, open_places, rng)
            if place is None:
                why = f"the choice is expected to lose less than {ENOUGH:g} points"
                break
            facts = range(tried[place], min(len(table), tried[place] + FACTS))
            facts = facts[: edits - spent]
            table[facts.start : facts.stop, place] = score(place, facts)
            tried[place], spent = facts.stop, spent + len(facts)
    except TimeUp:
        why = "the time is over"
    except KeyboardInterrupt:
        if first:
            raise
        why, interrupted = "it was interrupted", True
    table = table[: max(tried, default=0)]
    return Raced(decide(table, home, prior), home, table, spent, why, prior, interrupted)


def decide(table: Floats, home: int, prior: float = PRIOR) -> int:
    """The place to choose by scores (N, K), NaN where nothing was scored: the one that is believed
    to be worth most, among those scored on at least ``FACTS`` facts (on all, where there are
    fewer). The expected one stays unless another is worth ``ENOUGH`` points more.

    Args:
        table: the scores.
        home: place that is expected to be the best.
        prior: see :func:`believe`.
    """
    return _choice(believe(table, home, prior), table, home)


def _choice(belief: Belief, table: Floats, home: int) -> int:
    able = _able(table)
    if not able.any():
        return home
    worth = np.where(able, belief.mean, -np.inf)
    best = int(worth.argmax())
    return best if worth[best] >= worth[home] + ENOUGH else home


def replay(table: Floats, home: int, **rule: float) -> Raced:
    """The race on a sweep's scores.

    Args:
        table: (N, K), see :func:`goldenlayers.racing.table_of`.
        home: place that is expected to be the best.
        rule: ``edits``, ``also`` and ``prior`` of :func:`race_on`.
    """
    return race_on(
        lambda place, facts: table[facts.start : facts.stop, place].tolist(),
        len(table),
        table.shape[1],
        home,
        **rule,  # type: ignore[arg-type]
    )


def _grid(
    n_places: int, named: Sequence[int], room: int, closed: Collection[int] = ()
) -> list[int]:
    """The places that are named, and evenly spaced ones of all depths: ``room`` in all, as far as
    there are so many.

    A few of them stay away from both ends, where layers are seldom good.
    """
    found = list(dict.fromkeys(named))
    free = [i for i in range(n_places) if i not in closed and i not in found]
    count = min(len(free), max(0, room - len(found)))
    ends = 0 if count >= min(_MANY, len(free)) else 1
    spaced = np.linspace(0, len(free) - 1, count + 2 * ends)[ends : count + ends]
    return [*found, *(free[i] for i in spaced.round().astype(int).tolist())][:room]


def _next(
    table: Floats,
    home: int,
    prior: float,
    dead: Sequence[bool],
    open_places: Sequence[int],
    rng: np.random.Generator,
) -> int | None:
    """The place to try next; None where the choice is good enough."""
    belief = believe(table, home, prior)
    draws = np.where(dead, -np.inf, belief.draws(DRAWS, rng))
    choice = _choice(belief, table, home)
    if float((draws.max(axis=1) - draws[:, choice]).mean()) < ENOUGH:
        return None
    tops = np.array(open_places)[draws[:, open_places].argmax(axis=1)].tolist()
    likeliest = tops[0]
    if rng.random() < 0.5:
        return next((top for top in tops if top != likeliest), likeliest)
    return likeliest


def _able(table: Floats) -> NDArray[np.bool_]:
    """Which places were scored on enough of the facts to be chosen, (K,)."""
    return (~np.isnan(table)).sum(axis=0) >= max(1, min(FACTS, len(table)))
