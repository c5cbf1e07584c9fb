"""The rule of the race: which layers are tried on which facts, and which one is chosen.

Scores in, a layer out; no model is needed, so the rule can be replayed on a sweep. NumPy only.

What limits a choice by edits is how many facts two layers are compared on, and how many layers can
win by luck: single differences scatter by twelve points (docs/results/golden-layers.md). So few
layers are tried, all on the same facts, and one of them is taken in place of the published depth
only where it is clearly ahead.

Shapes: N facts, K layers. A place is a layer's place in the table of scores.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from goldenlayers.evaluation.bootstrap import Floats, nan_mean, resampled_means
from goldenlayers.truth.table import Interval, best_place, eligible_means, estimate, level

Scorer = Callable[[int, range], Sequence[float]]
"""Place of a layer, facts → each fact's score after its own edit there; NaN where unscored."""

EDITS = 96  # at most, whatever the depth
FACTS = 3  # of a round: each layer is tried on them before any is tried on the next ones
FEWEST = 6  # facts that each layer is compared on; with a budget for less nothing is compared
ENOUGH = 24  # facts at which
MARGIN = 2.0  # points are a clear lead; with fewer facts it takes more
RESAMPLES = 2000  # of the facts


def few_layers(n_layers: int, depths: Iterable[float]) -> list[int]:
    """The layers at some shares of the depth, the last at most."""
    return [min(n_layers - 1, round(n_layers * share)) for share in depths]


def margin(facts: int) -> float:
    """Points by which a layer must be ahead on so many facts: its lead's error falls with their
    root.
    """
    return MARGIN * math.sqrt(max(1.0, ENOUGH / max(1, facts)))


def decide(table: Floats, home: int) -> int:
    """The place to choose by scores (N, K), NaN where nothing was scored.

    The place with the greatest mean lead over ``home``, paired by fact, where that is more than
    the :func:`margin`; else ``home``. Where that one could not be scored, the best of the others.
    Places scored on less than half of the facts cannot be chosen.
    """
    means = eligible_means(table)
    if math.isnan(means[home]):
        best = best_place(table)
        return home if best is None else best
    leads = table - table[:, [home]]
    mean = np.where(np.isnan(means), np.nan, nan_mean(leads))
    best = int(np.nanargmax(level(mean)))
    pairs = int((~np.isnan(leads[:, best])).sum())
    return best if mean[best] > margin(pairs) else home


@dataclass(frozen=True, eq=False)
class Raced:
    """What a race found.

    Attributes:
        place: the choice.
        home: the published depth's place.
        table: (N, K) scores; NaN where nothing was tried, or could be scored.
        edits: that were made.
        why: it ended, a sentence.
        interrupted: whether Ctrl-C ended it.
    """

    place: int
    home: int
    table: Floats
    edits: int
    why: str
    interrupted: bool = False

    @cached_property
    def tried(self) -> NDArray[np.bool_]:
        """Which places have a score, (K,)."""
        return np.asarray((~np.isnan(self.table)).any(axis=0))

    def scores(self) -> Floats:
        """By place the mean score, (K,), NaN where nothing was scored: the choice's, and from there
        by the mean differences of pairs, so that a fact which is missing somewhere tilts nothing.
        """
        mine = self.table[:, self.place]
        return nan_mean(mine) + nan_mean(self.table - mine[:, None])

    def wins(self, seed: int = 0) -> Floats:
        """Share of the resamples of the facts in which each place has the best mean, (K,)."""
        able = ~np.isnan(eligible_means(self.table))
        if not able.any():
            return np.eye(self.table.shape[1])[self.home]
        drawn = resampled_means(self.table, RESAMPLES, seed)
        drawn = np.where(able & ~np.isnan(drawn), level(drawn), -np.inf)
        return np.bincount(drawn.argmax(axis=1), minlength=len(able)) / RESAMPLES

    def alike(self, seed: int = 0) -> list[int]:
        """Places that cannot be told from the choice: its lead over them, or theirs over it, may be
        chance (95 %).
        """
        able = np.flatnonzero(~np.isnan(eligible_means(self.table)))
        gains = {i: self.gain(i, seed) for i in able.tolist() if i != self.place}
        return [i for i, gain in gains.items() if not (gain.low > 0 or gain.high < 0)]

    def gain(self, over: int, seed: int = 0) -> Interval:
        """What the choice is ahead of a place, in points, paired by fact, and its 95 % interval."""
        return estimate(self.table[:, self.place] - self.table[:, over], RESAMPLES, seed)


def race_on(
    score: Scorer,
    n_facts: int,
    n_places: int,
    places: Iterable[int],
    home: int,
    *,
    edits: int = EDITS,
    left: Callable[[], int] | None = None,
) -> Raced:
    """Race some layers: round by round each is tried on the same ``FACTS`` facts, until the edits,
    the time or the facts are used up; then :func:`decide` chooses. Where every edit of a layer
    fails in the first round, no other is made there. With edits for fewer than ``FEWEST`` facts at
    each layer only ``home`` is tried, in one round.

    Args:
        score: does the work.
        n_facts: N, taken in their order.
        n_places: K.
        places: that are tried, beside ``home``.
        home: the published depth's place.
        edits: that may be made.
        left: asked before each round how many edits there is still time for.
    """
    racing = list(dict.fromkeys((home, *places)))
    table = np.full((n_facts, n_places), np.nan)
    facts = min(n_facts, edits // len(racing))
    spent, done, interrupted = 0, 0, False
    why = "the facts are used up" if facts == n_facts else "the edits are used up"
    if len(racing) > 1 and facts < min(FEWEST, n_facts):
        racing, why = [home], "the budget is too small to compare layers"
    elif len(racing) == 1:
        why = "there is no other layer"
    if len(racing) == 1:
        facts = min(FACTS, n_facts, edits)
    try:
        while done < facts:
            some = range(done, min(facts, done + FACTS))
            if left is not None:
                some = some[: left() // len(racing)]
            if not some:
                why = "the time is over"
                break
            for place in racing.copy():
                table[some.start : some.stop, place] = score(place, some)
                spent += len(some)
                if not done and np.isnan(table[: some.stop, place]).all():
                    racing.remove(place)
            if not racing:
                why = "no edit could be scored"
                break
            done = some.stop
    except KeyboardInterrupt:
        if not done:
            raise
        why, interrupted = "it was interrupted", True
    scored = np.flatnonzero((~np.isnan(table)).any(axis=1))
    table = table[: int(scored.max(initial=-1)) + 1]
    return Raced(decide(table, home), home, table, spent, why, interrupted)


def replay(table: Floats, places: Iterable[int], home: int, edits: int = EDITS) -> Raced:
    """The race on a sweep's scores.

    Args:
        table: (N, K), see :func:`goldenlayers.racing.table_of`.
        places: see :func:`race_on`, as are the others.
        home: of the published depth.
        edits: that may be made.
    """
    return race_on(
        lambda place, facts: table[facts.start : facts.stop, place].tolist(),
        len(table),
        table.shape[1],
        places,
        home,
        edits=edits,
    )
