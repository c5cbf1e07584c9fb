"""MEMIT, PMET, EMMET and AlphaEdit: many facts in one solve, spread over one layer or several.

All of them find each fact's value at the last layer, then write, layer by layer, a share of what
is still missing, on the keys of the model as edited so far. They differ in the solve.

Sources: MEMIT, Meng et al. 2023 (arXiv 2210.07229), algorithm 1; PMET, Li et al. 2024 (arXiv
2308.08742); EMMET, Gupta et al. 2024 (arXiv 2403.14236); AlphaEdit, Fang et al. 2025 (arXiv
2410.02355).

Shapes: B facts, D model width, F MLP width. Keys and values in the solves are columns.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from goldenlayers.delta import LowRank, WeightDelta, applied_per_example
from goldenlayers.editors.base import Workbench, edited_layers
from goldenlayers.editors.lookup_states import key_weights, lookup_states
from goldenlayers.editors.residual import Contribution
from goldenlayers.editors.updates import (
    LowRankUpdate,
    alphaedit_update,
    append_keys,
    emmet_update,
    memit_update,
    null_space_projector,
    spread_residual,
)
from goldenlayers.editors.values import Value
from goldenlayers.facts import Fact
from goldenlayers.shown import shown

# (workbench, layer, keys (F, B), wanted changes (D, B)) → the layer's update
Solve = Callable[[Workbench, int, Tensor, Tensor], LowRankUpdate]


def _memit(bench: Workbench, layer: int, K: Tensor, R: Tensor) -> LowRankUpdate:
    s = bench.settings
    covariance = bench.covariance(layer)
    # λ stands beside kᵀC⁻¹k, which is F for the mean key of the text: so F is its natural unit.
    unit = 1.0 if s.memit_lambda_absolute else float(covariance.size)
    return memit_update(covariance, K, R, s.memit_lambda * unit)


def _emmet(bench: Workbench, layer: int, K: Tensor, R: Tensor) -> LowRankUpdate:
    return emmet_update(bench.covariance(layer), K, R, bench.settings.emmet_lambda)


def _alphaedit(bench: Workbench, layer: int, K: Tensor, R: Tensor) -> LowRankUpdate:
    s = bench.settings
    covariance = bench.covariance(layer)
    if s.null_space_absolute:
        projector = null_space_projector(covariance, s.null_space, absolute=True)
    else:
        threshold = energy_threshold(covariance.eigh()[0], s.null_space)
        projector = null_space_projector(covariance, threshold)
    # l2 is published in squared key units (10, beside keys of Llama-3); as a share of the mean
    # squared key of the text it means the same on every model.
    energy = float(covariance.matrix(with_ridge=False).trace())
    l2 = s.l2 if s.l2_absolute else s.l2 * energy
    return alphaedit_update(projector, K, R, bench.previous_keys.get(layer), l2)


def energy_threshold(eigenvalues: Tensor, share: float) -> float:
    """The threshold, in mean eigenvalues, below which directions hold ``share`` of the energy.

    ``eigenvalues`` (F,) ascend. The published threshold (0.02, absolute) keeps nearly all
    directions of one model and none of another; a share of tr(C) always keeps some.
    """
    reached = eigenvalues.cumsum(0) <= share * eigenvalues.sum()
    count = max(1, int(reached.sum()))
    above = eigenvalues[min(count, len(eigenvalues) - 1)]
    return float((eigenvalues[count - 1] + above) / 2 / eigenvalues.mean())


@dataclass(frozen=True)
class LeastSquares:
    """The editors ``memit``, ``pmet``, ``emmet`` and ``alphaedit``."""

    name: str
    solve: Solve
    spread: str = "memit"
    with_attention: bool = False
    remembers_keys: bool = False
    needs_statistics: bool = True
    edits_together: bool = True

    def each(self, bench: Workbench, facts: Sequence[Fact], layer: int) -> list[WeightDelta]:
        """One delta per fact, each made on the model as it is."""
        return self._edit(bench, facts, layer, [[i] for i in range(len(facts))], remember=False)

    def together(self, bench: Workbench, facts: Sequence[Fact], layer: int) -> WeightDelta:
        """One delta that holds all facts."""
        everyone = [list(range(len(facts)))]
        (delta,) = self._edit(bench, facts, layer, everyone, remember=self.remembers_keys)
        return delta

    def _edit(
        self,
        bench: Workbench,
        facts: Sequence[Fact],
        layer: int,
        groups: list[list[int]],
        *,
        remember: bool,
    ) -> list[WeightDelta]:
        """One delta per group of facts; groups do not see one another's edits.

        ``remember`` keeps the keys, for later batches to stay clear of.
        """
        values = bench.values(facts, layer, with_attention=self.with_attention)
        layers = edited_layers(layer, bench.settings)
        changes: list[dict[str, LowRank]] = [{} for _ in groups]
        wanted = self._wanted(bench, values, layer)  # (B, D)
        top, adds = self._top(bench, layer)
        before: Tensor | None = None  # what stands there without the edit
        for i, at in enumerate(layers):
            down = bench.model.layers[at].down
            first = i == 0 and at == layer
            if first:
                # One layer: the wanted change is δ itself, on keys that were seen already.
                weights = key_weights(len(values[0].keys))
                keys = torch.stack([weights @ v.keys.double() for v in values])  # (B, F)
                residual = torch.stack([v.delta for v in values])  # (B, D)
            else:
                with self._so_far(bench, facts, groups, changes) as select:
                    states = lookup_states(bench.model, facts, bench.prefixes, at, top, select)
                now = adds(states.top)
                before = now if before is None else before
                missing = wanted - (now - before)
                share = spread_residual(missing, i, len(layers), self.spread)  # type: ignore[arg-type]
                contribution = Contribution.of(bench.model, at)
                residual = contribution.raw_change(states.values, share)
                keys = states.keys
            for members, change in zip(groups, changes, strict=True):
                update = self.solve(bench, at, keys[members].T, residual[members].T)
                for text in update.warnings:
                    warnings.warn(shown(f"{self.name} at layer {at}: {text}"), stacklevel=2)
                change[down.parameter_name] = LowRank(update.left.float(), update.right.float())
                if remember:
                    bench.previous_keys[at] = append_keys(
                        bench.previous_keys.get(at), keys[members].T
                    )
        return [
            bench.delta(
                change, self.name, layers, [facts[i] for i in members], [values[i] for i in members]
            )
            for members, change in zip(groups, changes, strict=True)
        ]

    def _wanted(self, bench: Workbench, values: Sequence[Value], layer: int) -> Tensor:
        """What each fact's edit should add to the residual stream at ``layer``, (B, D)."""
        contribution = Contribution.of(bench.model, layer)
        before = torch.stack([v.values[0] for v in values])
        after = torch.stack([v.target for v in values])
        return contribution(after) - contribution(before)

    def _top(self, bench: Workbench, layer: int) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
        """Whose output tells how much of what is wanted has come, and what it adds to the stream.

        The last block's output; PMET's MLP output, since the attention's part is not written.
        """
        block = bench.model.layers[layer]
        if self.with_attention:
            return block.down.module, Contribution.of(bench.model, layer)
        return block.module, lambda output: output

    def _so_far(
        self,
        bench: Workbench,
        facts: Sequence[Fact],
        groups: list[list[int]],
        changes: list[dict[str, LowRank]],
    ) -> AbstractContextManager[Callable[[list[int]], None] | None]:
        """The model as edited so far: every group's facts see their own group's change."""
        if not changes[0]:
            return nullcontext(None)
        deltas = [bench.delta(change, self.name, [], []) for change in changes]
        group_of = {i: g for g, members in enumerate(groups) for i in members}
        return _Selecting(bench, deltas, [group_of[i] for i in range(len(facts))])


class _Selecting(AbstractContextManager["Callable[[list[int]], None]"]):
    """``applied_per_example`` whose choice is told as fact numbers."""

    def __init__(self, bench: Workbench, deltas: list[WeightDelta], group_of: list[int]) -> None:
        self.context = applied_per_example(bench.model, deltas, force=True)
        self.group_of = group_of

    def __enter__(self) -> Callable[[list[int]], None]:
        selection = self.context.__enter__()

        def select(facts: list[int]) -> None:
            selection.select([self.group_of[i] for i in facts])

        return select

    def __exit__(self, *error: object) -> None:
        self.context.__exit__(*error)  # type: ignore[arg-type]


MEMIT = LeastSquares("memit", _memit)
EMMET = LeastSquares("emmet", _emmet)
ALPHAEDIT = LeastSquares("alphaedit", _alphaedit, remembers_keys=True)
PMET = LeastSquares("pmet", _memit, spread="pmet", with_attention=True)
