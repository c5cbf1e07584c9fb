"""The locate-then-edit editors.

ROME and R-ROME: one fact, one rank-one change of one down projection. MEMIT, PMET, EMMET and
AlphaEdit: many facts in one solve, spread over one layer or several. All of these find each fact's
value at the last layer, then write, layer by layer, a share of what is still missing, on the keys
of the model as edited so far. They differ in the solve. Each can stay clear of neighbours
(:mod:`goldenlayers.editors.clearing`); clear-rome does so unasked.

Sources: ROME, Meng et al. 2022 (arXiv 2202.05262); R-ROME, Gupta et al. 2024 (arXiv 2403.07175);
MEMIT, Meng et al. 2023 (arXiv 2210.07229), algorithm 1; PMET, Li et al. 2024 (arXiv 2308.08742);
EMMET, Gupta et al. 2024 (arXiv 2403.14236); AlphaEdit, Fang et al. 2025 (arXiv 2410.02355).

Shapes: B facts, D model width, F MLP width. Keys and values in the solves are columns.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, nn

from goldenlayers.delta import LowRank, WeightDelta, applied_per_example
from goldenlayers.editors.base import Clearing, Editor, ValueSearch
from goldenlayers.editors.clearing import Near, by_template, stay_clear
from goldenlayers.editors.lookup_states import Contribution, key_weights, lookup_states
from goldenlayers.editors.updates import (
    alphaedit_update,
    append_keys,
    emmet_update,
    memit_update,
    null_space_projector,
    r_rome_update,
    rome_update,
    spread_residual,
)
from goldenlayers.errors import UserError
from goldenlayers.facts import Fact
from goldenlayers.shown import shown

if TYPE_CHECKING:
    from goldenlayers.editors.editing import Editing
    from goldenlayers.editors.values import Value
    from goldenlayers.statistics.moments import Covariance


@dataclass(frozen=True, kw_only=True)
class Rome(Clearing, ValueSearch, Editor):
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
        deltas: list[WeightDelta | None] = [None] * len(values)
        for b in by_template([[b] for b in range(len(values))], facts):
            value, u = values[b], directions[:, b]
            near = stay_clear(work, work.layer, [value.fact], means[:, b : b + 1])
            told: dict[str, float] = {}
            if near is not None:
                u, plain = near.metric.solve(means[:, b]), u
                key = self._written_on(value)
                told = {"neighbours": len(near.names)}
                if near.others.shape[1]:
                    told |= {"overlap_rome": near.overlap(plain, key)}
                    told |= {"overlap": near.overlap(u, key)}
            change = self._update(covariance, value, u).as_float32()
            names = () if near is None else near.names
            changes = {down.parameter_name: change}
            deltas[b] = work.delta(changes, [value.fact], [value], told, names)
        return [delta for delta in deltas if delta is not None]

    def together(self, work: Editing, facts: Sequence[Fact]) -> WeightDelta:
        """One fact only: several rank-one edits made side by side would disturb one another."""
        (delta,) = self.each(work, facts)
        return delta

    def _written_on(self, value: Value) -> Tensor:
        """The key (F,) that gets all of the value."""
        return value.keys[0]

    def _update(self, covariance: Covariance, value: Value, direction: Tensor) -> LowRank:
        return rome_update(
            covariance,
            value.keys.mean(0),
            self._written_on(value),
            value.target,
            value.values[0],
            direction=direction,
        )


@dataclass(frozen=True, kw_only=True)
class RRome(Rome):
    """R-ROME: the averaged key in every place."""

    name: ClassVar[str] = "r-rome"

    def _written_on(self, value: Value) -> Tensor:
        """The mean key."""
        return value.keys.mean(0)

    def _update(self, covariance: Covariance, value: Value, direction: Tensor) -> LowRank:
        keys, values = value.keys.mean(0), value.values.mean(0)
        return r_rome_update(covariance, keys, value.target, values, direction=direction)


@dataclass(frozen=True, kw_only=True)
class ClearRome(Rome):
    """ROME's value in a direction clear of the keys that the prompt has with other names."""

    name: ClassVar[str] = "clear-rome"

    neighbours: int = 128
    """Stay clear of so many names, those of the package's pool that are nearest to the subject."""


@dataclass(frozen=True, kw_only=True)
class LeastSquares(Clearing, ValueSearch, Editor):
    """What the four editors share; they differ in :meth:`solve`."""

    layers_before: int = 0
    """Spread the edit over this many more layers, ending with the chosen one."""

    needs_statistics: ClassVar[bool] = True
    edits_together: ClassVar[bool] = True
    spread: ClassVar[Literal["memit", "pmet"]] = "memit"
    with_attention: ClassVar[bool] = False
    remembers_keys: ClassVar[bool] = False

    @abstractmethod
    def solve(self, work: Editing, layer: int, K: Tensor, R: Tensor, near: Near | None) -> LowRank:
        """The update of a layer for keys (F, B) whose values are to change by (D, B).

        ``near`` are the names to stay clear of.
        """

    def layers(self, layer: int) -> list[int]:
        """The layers that an edit at ``layer`` writes to, ascending."""
        return list(range(max(0, layer - self.layers_before), layer + 1))

    def each(self, work: Editing, facts: Sequence[Fact]) -> list[WeightDelta]:
        """One delta per fact, each made on the model as it is."""
        return self._edit(work, facts, [[i] for i in range(len(facts))], remember=False)

    def together(self, work: Editing, facts: Sequence[Fact]) -> WeightDelta:
        """One delta that holds all facts."""
        everyone = [list(range(len(facts)))]
        (delta,) = self._edit(work, facts, everyone, remember=self.remembers_keys)
        return delta

    def _edit(
        self, work: Editing, facts: Sequence[Fact], groups: list[list[int]], *, remember: bool
    ) -> list[WeightDelta]:
        """One delta per group of facts; groups do not see one another's edits.

        ``remember`` keeps the keys, for later batches to leave alone.
        """
        values = work.values(facts, with_attention=self.with_attention)
        layers = self.layers(work.layer)
        changes: list[dict[str, LowRank]] = [{} for _ in groups]
        told: list[dict[str, float]] = [{} for _ in groups]
        names: list[list[str]] = [[] for _ in groups]
        wanted = self._wanted(work, values)  # (B, D)
        top, adds = self._top(work)
        before: Tensor | None = None  # what stands there without the edit
        for i, at in enumerate(layers):
            down = work.model.layers[at].down
            if len(layers) == 1:
                # One layer: the wanted change is δ itself, on keys that were seen already.
                weights = key_weights(len(values[0].keys))
                keys = torch.stack([weights @ v.keys.double() for v in values])  # (B, F)
                residual = torch.stack([v.delta for v in values])  # (B, D)
            else:
                with self._so_far(work, facts, groups, changes) as select:
                    states = lookup_states(work.model, facts, work.prefixes, at, top, select)
                now = adds(states.top)
                before = now if before is None else before
                missing = wanted - (now - before)
                share = spread_residual(missing, i, len(layers), self.spread)
                contribution = Contribution.of(work.model, at)
                residual = contribution.raw_change(states.values, share)
                keys = states.keys
            for g in by_template(groups, facts):
                members, change, K = groups[g], changes[g], keys[groups[g]].T
                near = stay_clear(work, at, [facts[i] for i in members], K)
                update = self.solve(work, at, K, residual[members].T, near)
                if near is not None:
                    told[g] = {"neighbours": len(near.names)}
                    names[g] += near.names
                for text in update.warnings:
                    warnings.warn(shown(f"{self.name} at layer {at}: {text}"), stacklevel=2)
                change[down.parameter_name] = update.as_float32()
                if remember:
                    work.previous_keys[at] = append_keys(work.previous_keys.get(at), K)
        return [
            work.delta(change, [facts[i] for i in members], [values[i] for i in members], of, clear)
            for members, change, of, clear in zip(groups, changes, told, names, strict=True)
        ]

    def _wanted(self, work: Editing, values: Sequence[Value]) -> Tensor:
        """What each fact's edit should add to the residual stream at the last layer, (B, D)."""
        contribution = Contribution.of(work.model, work.layer)
        before = torch.stack([v.values[0] for v in values])
        after = torch.stack([v.target for v in values])
        return contribution(after) - contribution(before)

    def _top(self, work: Editing) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
        """Whose output tells how much of what is wanted has come, and what it adds to the stream.

        The last block's output; PMET's MLP output, since the attention's part is not written.
        """
        block = work.model.layers[work.layer]
        if self.with_attention:
            return block.down.module, Contribution.of(work.model, work.layer)
        return block.module, lambda output: output

    @contextmanager
    def _so_far(
        self,
        work: Editing,
        facts: Sequence[Fact],
        groups: list[list[int]],
        changes: list[dict[str, LowRank]],
    ) -> Iterator[Callable[[list[int]], None] | None]:
        """The model as edited so far: every group's facts see their own group's change.

        What is yielded is called, before each batch, with the fact of each of its rows.
        """
        if not changes[0]:
            yield None
            return
        group_of = {i: g for g, members in enumerate(groups) for i in members}
        deltas = [work.delta(change, []) for change in changes]
        with applied_per_example(work.model, deltas, force=True) as selection:
            yield lambda rows: selection.select([group_of[i] for i in rows])


@dataclass(frozen=True, kw_only=True)
class Memit(LeastSquares):
    """MEMIT."""

    name: ClassVar[str] = "memit"

    memit_lambda: float = 0.1
    """Weight of what is kept, in MLP widths (a mean key of the text weighs one)."""

    memit_lambda_absolute: bool = False
    """Take memit_lambda in tokens of the statistics' text, as published (15000)."""

    def solve(self, work: Editing, layer: int, K: Tensor, R: Tensor, near: Near | None) -> LowRank:
        """Least squares, weighed against the keys of the text."""
        covariance = work.covariance(layer) if near is None else near.metric
        # λ stands beside kᵀC⁻¹k, which is F for the mean key of the text: so F is its natural unit.
        unit = 1.0 if self.memit_lambda_absolute else float(covariance.size)
        return memit_update(covariance, K, R, self.memit_lambda * unit)


@dataclass(frozen=True, kw_only=True)
class Pmet(Memit):
    """PMET: MEMIT's solve, values found with the attention's output free to move, too."""

    name: ClassVar[str] = "pmet"
    spread: ClassVar[Literal["memit", "pmet"]] = "pmet"
    with_attention: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class Emmet(LeastSquares):
    """EMMET: the wanted values are met exactly, at the least price for the text's keys."""

    name: ClassVar[str] = "emmet"

    emmet_lambda: float = 0.0
    """How far the equality may give way; 0 holds it exactly."""

    def solve(self, work: Editing, layer: int, K: Tensor, R: Tensor, near: Near | None) -> LowRank:
        """Equality-constrained least squares."""
        covariance = work.covariance(layer) if near is None else near.metric
        return emmet_update(covariance, K, R, self.emmet_lambda)


@dataclass(frozen=True, kw_only=True)
class AlphaEdit(LeastSquares):
    """AlphaEdit: writes only in directions that the text's keys hardly use."""

    name: ClassVar[str] = "alphaedit"
    remembers_keys: ClassVar[bool] = True

    null_space: float = 0.1
    """The directions that may be edited hold this share of the text's key energy."""

    null_space_absolute: bool = False
    """Take null_space as an absolute eigenvalue, as published."""

    l2: float = 0.1
    """Weight of the update's size, as a share of the text's mean squared key."""

    l2_absolute: bool = False
    """Take l2 in squared key units, as published (10)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.null_space_absolute and self.null_space > 1:
            raise UserError(
                f"null_space is {self.null_space}",
                expected="a share of the text's key energy, at most 1",
                fix="For an eigenvalue, as published, also set null_space_absolute",
            )

    def solve(self, work: Editing, layer: int, K: Tensor, R: Tensor, near: Near | None) -> LowRank:
        """Least squares in the null space, beside the keys of earlier batches and of neighbours."""
        covariance = work.covariance(layer)
        if self.null_space_absolute:
            projector = null_space_projector(covariance, self.null_space, absolute=True)
        else:
            threshold = energy_threshold(covariance.eigh()[0], self.null_space)
            projector = null_space_projector(covariance, threshold)
        # l2 is published in squared key units (10, beside keys of Llama-3); as a share of the mean
        # squared key of the text it means the same on every model.
        energy = float(covariance.matrix(with_ridge=False).trace())
        l2 = self.l2 if self.l2_absolute else self.l2 * energy
        previous = work.previous_keys.get(layer)
        if near is not None:
            # What is least here is l2·‖ΔW‖² on the directions P, so keys are counted in that norm:
            # one alone weighs 1 + λ times what it weighed, as in the other editors.
            lengths = projector.apply(near.keys).norm(dim=0).clamp_min(1e-30)
            beside = near.keys * ((self.clear_weight * l2) ** 0.5 / lengths)
            previous = append_keys(previous, beside)
        return alphaedit_update(projector, K, R, previous, l2)


def energy_threshold(eigenvalues: Tensor, share: float) -> float:
    """The threshold, in mean eigenvalues, below which directions hold ``share`` of the energy.

    ``eigenvalues`` (F,) ascend. The published threshold (0.02, absolute) keeps nearly all
    directions of one model and none of another; a share of tr(C) always keeps some.
    """
    reached = eigenvalues.cumsum(0) <= share * eigenvalues.sum()
    count = max(1, int(reached.sum()))
    above = eigenvalues[min(count, len(eigenvalues) - 1)]
    return float((eigenvalues[count - 1] + above) / 2 / eigenvalues.mean())
