"""ROME and R-ROME: one fact, one rank-one change of one down projection.

Sources: Meng et al. 2022 (arXiv 2202.05262); Gupta et al. 2024 (arXiv 2403.07175).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from goldenlayers.delta import LowRank, WeightDelta
from goldenlayers.editors.base import Workbench
from goldenlayers.editors.updates import LowRankUpdate, r_rome_update, rome_update
from goldenlayers.editors.values import Value
from goldenlayers.errors import UserError
from goldenlayers.facts import Fact


@dataclass(frozen=True)
class Rome:
    """The editor ``rome``, or ``r-rome`` with the prefix-averaged key in every place."""

    name: str = "rome"
    averaged: bool = False
    needs_statistics: bool = True
    edits_together: bool = False

    def each(self, bench: Workbench, facts: Sequence[Fact], layer: int) -> list[WeightDelta]:
        """One delta per fact, each made on the model as it is."""
        values = bench.values(facts, layer)
        covariance = bench.covariance(layer)
        means = torch.stack([v.keys.mean(0) for v in values], dim=1)  # (F, B)
        directions = covariance.solve(means)  # all facts in one solve
        deltas = []
        for b, value in enumerate(values):
            update = self._update(bench, layer, value, directions[:, b])
            down = bench.model.layers[layer].down
            change = LowRank(update.left.float(), update.right.float())
            deltas.append(
                bench.delta(
                    {down.parameter_name: change}, self.name, [layer], [value.fact], [value]
                )
            )
        return deltas

    def together(self, bench: Workbench, facts: Sequence[Fact], layer: int) -> WeightDelta:
        """One fact only: several rank-one edits made side by side would disturb one another."""
        if len(facts) != 1:
            raise UserError(
                f"{self.name} edits one fact at a time, not {len(facts)} together",
                fix="Use --mode sequential, or memit, emmet, alphaedit or pmet for a batch",
            )
        return self.each(bench, facts, layer)[0]

    def _update(
        self, bench: Workbench, layer: int, value: Value, direction: torch.Tensor
    ) -> LowRankUpdate:
        covariance = bench.covariance(layer)
        k_star = value.keys.mean(0)
        if self.averaged:
            return r_rome_update(
                covariance, k_star, value.target, value.values.mean(0), direction=direction
            )
        return rome_update(
            covariance,
            k_star,
            value.keys[0],
            value.target,
            value.values[0],
            direction=direction,
        )
