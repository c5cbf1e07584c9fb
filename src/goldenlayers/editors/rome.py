"""ROME and R-ROME: one fact, one rank-one change of one down projection.

Sources: Meng et al. 2022 (arXiv 2202.05262); Gupta et al. 2024 (arXiv 2403.07175).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from goldenlayers.delta import LowRank, WeightDelta
from goldenlayers.editors.base import Editor, ValueSearch
from goldenlayers.editors.updates import r_rome_update, rome_update
from goldenlayers.facts import Fact

if TYPE_CHECKING:
    from goldenlayers.covariance import Covariance
    from goldenlayers.editors.editing import Editing
    from goldenlayers.editors.values import Value


@dataclass(frozen=True, kw_only=True)
class Rome(ValueSearch, Editor):
    """ROME: the averaged key gives the direction, the bare prompt's key gets the value."""

    name: ClassVar[str] = "rome"
    needs_statistics: ClassVar[bool] = True

    def each(self, work: Editing, facts: Sequence[Fact]) -> list[WeightDelta]:
        """One delta per fact, each made on the model as it is."""
        values = work.values(facts)
        covariance = work.covariance(work.layer)
        means = torch.stack([v.keys.mean(0) for v in values], dim=1)  # (F, B)
        directions = covariance.solve(means)  # all facts in one solve
        down = work.model.layers[work.layer].down
        deltas = []
        for b, value in enumerate(values):
            change = self._update(covariance, value, directions[:, b]).as_float32()
            deltas.append(work.delta({down.parameter_name: change}, [value.fact], [value]))
        return deltas

    def together(self, work: Editing, facts: Sequence[Fact]) -> WeightDelta:
        """One fact only: several rank-one edits made side by side would disturb one another."""
        (delta,) = self.each(work, facts)
        return delta

    def _update(self, covariance: Covariance, value: Value, direction: torch.Tensor) -> LowRank:
        return rome_update(
            covariance,
            value.keys.mean(0),
            value.keys[0],
            value.target,
            value.values[0],
            direction=direction,
        )


@dataclass(frozen=True, kw_only=True)
class RRome(Rome):
    """R-ROME: the averaged key in every place."""

    name: ClassVar[str] = "r-rome"

    def _update(self, covariance: Covariance, value: Value, direction: torch.Tensor) -> LowRank:
        keys, values = value.keys.mean(0), value.values.mean(0)
        return r_rome_update(covariance, keys, value.target, values, direction=direction)
