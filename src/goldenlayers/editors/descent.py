"""How the value search steps: quasi-Newton by default, by Adam as published settings take it.

Both walk for many facts at once, each by itself: a fact's numbers never touch another's.

Shapes: B facts, S sites that are changed, D the width of one, W = S·D.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

_PAIRS = 6  # steps and slopes that a fact's curvature is read from
_LONGEST = 2.0  # step, in lengths of the clean value


class Descent(Protocol):
    """Where to look next for each fact, and the best place found.

    ``trial`` and ``best`` map each site to changes (B, D); ``loss`` and ``nll`` (B,) are those of
    ``best``.
    """

    loss: Tensor
    nll: Tensor

    @property
    def trial(self) -> dict[str, Tensor]:
        """Where to look next."""
        ...

    @property
    def best(self) -> dict[str, Tensor]:
        """Where it was best."""
        ...

    def take(self, loss: Tensor, nll: Tensor, slopes: Sequence[Tensor]) -> None:
        """Take the loss and NLL (B,) at ``trial`` over, and move on by the loss's ``slopes``,
        (B, D) a site; without them nothing is tried next.
        """
        ...

    def keep(self, facts: Tensor) -> None:
        """Go on with ``facts`` (indices) alone."""
        ...


class QuasiNewton:
    """L-BFGS steps within a trust region, one radius a fact.

    A step is taken where the loss falls; else it is tried again, shorter. Changes are counted in
    lengths of the clean values, so that sites of other sizes are of one measure.

    Args:
        size: lengths (B,) of each site's clean value.
        longest: the longest change (B,) of each site.
        width: D.
        first: length of the first step, in lengths of the clean value.

    Source: Nocedal and Wright, Numerical Optimization (2006), algorithms 4.1 and 7.4.
    """

    def __init__(
        self,
        size: Mapping[str, Tensor],
        longest: Mapping[str, Tensor],
        width: int,
        first: float = 1.0,
    ) -> None:
        self._size = torch.stack(list(size.values()), dim=1)  # (B, S)
        self._longest = torch.stack(list(longest.values()), dim=1) / self._size
        self._sites = tuple(size)
        self._at = self._size.new_zeros(len(self._size), len(self._sites) * width)  # (B, W)
        self._tried = self._asked = self._slope = self._at
        self._radius = torch.full_like(self._size[:, 0], first)
        self.loss = torch.full_like(self._radius, torch.inf)
        self.nll = self.loss
        self._pairs: list[tuple[Tensor, Tensor, Tensor]] = []  # s, y (B, W) and 1 / sᵀy (B,) or 0

    def _of_sites(self, x: Tensor) -> dict[str, Tensor]:
        parts = x.unflatten(1, (len(self._sites), -1)) * self._size[:, :, None]
        return dict(zip(self._sites, parts.unbind(1), strict=True))

    @property
    def trial(self) -> dict[str, Tensor]:
        """The changes to look at."""
        return self._of_sites(self._tried)

    @property
    def best(self) -> dict[str, Tensor]:
        """The changes with the least loss so far."""
        return self._of_sites(self._at)

    @torch.no_grad()
    def take(self, loss: Tensor, nll: Tensor, slopes: Sequence[Tensor]) -> None:
        """See :class:`Descent`."""
        better = loss < self.loss  # never where it is not a number
        if slopes:
            slope = torch.cat(
                [g * n[:, None] for g, n in zip(slopes, self._size.T, strict=True)], 1
            )
            if bool(self.loss.isfinite().any()):
                self._learn(loss, slope, better)
            self._slope = torch.where(better[:, None], slope, self._slope)
        self._at = torch.where(better[:, None], self._tried, self._at)
        self.loss = torch.where(better, loss, self.loss)
        self.nll = torch.where(better, nll, self.nll)
        if slopes:
            self._propose()

    def _learn(self, loss: Tensor, slope: Tensor, better: Tensor) -> None:
        """The radius by how well the last step was foretold, and one more pair."""
        foretold = -(self._asked * self._slope).sum(1)
        share = (self.loss - loss) / foretold.clamp_min(1e-30)
        asked = self._asked.norm(dim=1)
        at_rim = asked >= 0.99 * self._radius
        # Of a full step to the least of a parabola, half of what its start's slope foretells comes.
        grown = torch.where((share > 0.5) & at_rim, 2 * self._radius, self._radius)
        grown = torch.where(share < 0.1, 0.7 * self._radius, grown)
        shrunk = 0.35 * torch.minimum(self._radius, asked)
        self._radius = torch.where(better, grown, shrunk).clamp_max(_LONGEST)
        s, y = self._tried - self._at, slope - self._slope
        curve = (s * y).sum(1)
        sound = curve > 1e-8 * s.norm(dim=1) * y.norm(dim=1)  # never where it is not a number
        s, y = (torch.where(sound[:, None], part, 0.0) for part in (s, y))
        self._pairs = [*self._pairs, (s, y, torch.where(sound, 1 / curve, 0.0))][-_PAIRS:]

    def _propose(self) -> None:
        length = self._slope.norm(dim=1).clamp_min(1e-30)
        along = self._radius / length  # down the slope, to the rim
        q, shares = self._slope, []
        for s, y, inverse in reversed(self._pairs):
            shares.append(inverse * (s * q).sum(1))
            q = q - shares[-1][:, None] * y
        scale = along
        if self._pairs:
            s, y, inverse = self._pairs[-1]
            scale = torch.where(inverse > 0, (s * y).sum(1) / y.square().sum(1), along)
        q = q * scale[:, None]
        for (s, y, inverse), share in zip(self._pairs, reversed(shares), strict=True):
            q = q + s * (share - inverse * (y * q).sum(1))[:, None]
        downhill = (q * self._slope).sum(1) > 0
        asked = -torch.where(downhill[:, None], q, self._slope * along[:, None])
        rim = self._radius / asked.norm(dim=1).clamp_min(1e-30)
        self._asked = asked * rim.clamp_max(1.0)[:, None]
        by_site = (self._at + self._asked).unflatten(1, (len(self._sites), -1))
        over = self._longest / by_site.norm(dim=2).clamp_min(1e-30)
        self._tried = (by_site * over.clamp_max(1.0)[:, :, None]).flatten(1)

    def keep(self, facts: Tensor) -> None:
        """See :class:`Descent`."""
        self._size, self._longest = self._size[facts], self._longest[facts]
        self._at, self._tried = self._at[facts], self._tried[facts]
        self._asked, self._slope = self._asked[facts], self._slope[facts]
        self._radius, self.loss, self.nll = (x[facts] for x in (self._radius, self.loss, self.nll))
        self._pairs = [(s[facts], y[facts], inverse[facts]) for s, y, inverse in self._pairs]


class Adam:
    """Adam (betas 0.9, 0.999; Kingma and Ba 2015), written out so that facts can leave.

    Args:
        rate: length of a step per coordinate, (B,) of each site.
        longest: the longest change (B,) of each site; longer ones are projected back.
        width: D.
    """

    def __init__(
        self, rate: Mapping[str, Tensor], longest: Mapping[str, Tensor], width: int
    ) -> None:
        self._rate, self._longest = dict(rate), dict(longest)
        self.trial = {name: r.new_zeros(len(r), width) for name, r in rate.items()}
        self.best = self.trial
        self._first = {name: torch.zeros_like(x) for name, x in self.trial.items()}
        self._second = {name: torch.zeros_like(x) for name, x in self.trial.items()}
        self._step = 0
        self.loss = self.nll = torch.full_like(next(iter(rate.values())), math.inf)

    @torch.no_grad()
    def take(self, loss: Tensor, nll: Tensor, slopes: Sequence[Tensor]) -> None:
        """See :class:`Descent`. The last place counts for the best."""
        self.loss, self.nll = loss, nll
        self.best = {name: x.detach() for name, x in self.trial.items()}
        self._step += 1
        moved = {}
        for (name, change), g in zip(self.trial.items(), slopes, strict=False):
            self._first[name].lerp_(g, 0.1)
            self._second[name].lerp_(g * g, 0.001)
            mean = self._first[name] / (1 - 0.9**self._step)
            square = self._second[name] / (1 - 0.999**self._step)
            to = change - self._rate[name][:, None] * mean / (square.sqrt() + 1e-8)
            length = to.norm(dim=1).clamp_min(1e-30)
            moved[name] = to * (self._longest[name] / length).clamp_max(1.0)[:, None]
        self.trial = moved or self.trial

    def keep(self, facts: Tensor) -> None:
        """See :class:`Descent`."""
        for store in (self._rate, self._longest, self._first, self._second, self.trial, self.best):
            for name in store:
                store[name] = store[name][facts]
        self.loss, self.nll = self.loss[facts], self.nll[facts]
