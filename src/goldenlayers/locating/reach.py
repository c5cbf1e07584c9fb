"""What backward passes add to key transfer: can an edit bring the answer about, and does what
brings it about in the prompt do so in a rephrasing?

Key transfer sees where an edit arrives, not what it does there. g_L = ∂ℓ/∂v_L, of the new answer's
loss ℓ by the MLP's output v_L at the lookup token, tells both: its length how far ℓ can be moved,
its direction whether prompt and rephrasing want the same change.

Shapes: B texts of a batch, D model width, L layers, N facts, P rephrasings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from goldenlayers.hooks import observe
from goldenlayers.locating.base import Row
from goldenlayers.locating.lga import backing_off, observe_factors
from goldenlayers.locating.methods import Transfer
from goldenlayers.tokens import Encoding

if TYPE_CHECKING:
    from goldenlayers.facts import Fact
    from goldenlayers.models import Model
    from goldenlayers.models.layers import Matrix


@dataclass(frozen=True, slots=True, eq=False)
class Reach:
    """Of every fact: ``reach`` (N, L) in nats, the new answer's mean NLL per token (N,), float64.

    ``slopes`` holds, layer by layer, the unit vectors g/‖g‖ (N, D); zero where g vanishes. None
    unless asked for: they take as much memory as the facts' hidden states, 4 L D bytes a fact.
    """

    reach: Tensor
    losses: Tensor
    slopes: list[Tensor] | None

    def share(self, fact: int) -> Tensor:
        """min(1, reach/ℓ) of a fact, (L,): how much of the answer's loss an edit can take away."""
        return (self.reach[fact] / self.losses[fact]).clamp(max=1.0)


@dataclass(frozen=True, slots=True, eq=False)
class Weights:
    """What the reach and the alignment make of key transfer; all counts in full without them.

    ``cosines`` holds, fact by fact, a row of L numbers for each of its rephrasings.
    """

    reach: Reach | None
    cosines: list[Tensor] | None
    counts: list[int]

    @classmethod
    def measure(
        cls,
        model: Model,
        facts: Sequence[Fact],
        rephrasings: Sequence[Sequence[Encoding]],
        how: Transfer,
    ) -> Weights:
        """``rephrasings``, fact by fact, have the new answers behind them if ``align`` is asked."""
        counts = [len(mine) for mine in rephrasings]
        if not how.reach and not how.align:
            return cls(None, None, counts)
        asking = [model.encoder.fact(fact, fact.target) for fact in facts]
        found = measure_reach(model, asking, how.clamp, how.batch_size, keep_slopes=how.align)
        if found.slopes is None:
            return cls(found, None, counts)
        texts = [text for mine in rephrasings for text in mine]
        owners = [i for i, count in enumerate(counts) for _ in range(count)]
        cosines = alignment(model, texts, owners, found.slopes, how.batch_size)
        return cls(found, list(cosines.split(counts)), counts)

    def of(self, fact: int) -> Sequence[Tensor | None]:
        """What the transfer to each rephrasing of a fact counts for, (L,) each."""
        return [None] * self.counts[fact] if self.cosines is None else list(self.cosines[fact])

    def phi(self, fact: int, transfer: Tensor, interference: Tensor) -> Tensor:
        """The fact's score by layer, (L,)."""
        if self.reach is None:
            return transfer - interference
        share = self.reach.share(fact)
        if self.cosines is None:
            return transfer * share - interference
        # Locality cannot fall below nothing, whatever spills.
        return share * (1 + transfer) - (share * interference).clamp(max=1.0)

    def columns(self, fact: int) -> Row:
        """Further fields of the fact's row."""
        reach = loss = mean = None
        if self.reach is not None:
            reach, loss = self.reach.reach[fact].tolist(), float(self.reach.losses[fact])
        if self.cosines is not None and self.counts[fact]:
            mean = self.cosines[fact].mean(0).tolist()
        return {"reach": reach, "loss": loss, "alignment": mean}


def measure_reach(
    model: Model,
    encodings: Sequence[Encoding],
    clamp: float,
    batch_size: int,
    *,
    keep_slopes: bool = False,
) -> Reach:
    """reach_L = ‖∂ℓ/∂v_L‖ · ``clamp`` · ‖v_L‖ of prompts with their new answers.

    It is the first-order change of ℓ by a change of v_L within the radius that ROME allows.
    """
    n, n_layers = len(encodings), len(model.layers)
    reach = torch.zeros(n, n_layers, dtype=torch.float64)
    slopes = [torch.empty(0)] * n_layers if keep_slopes else None

    def on_slopes(members: list[int], layer: int, g: Tensor, v: Tensor) -> None:
        size = g.norm(dim=-1)
        reach[members, layer] = size.double() * clamp * v.norm(dim=-1).double()
        if slopes is not None:
            if not len(slopes[layer]):
                slopes[layer] = torch.empty(n, g.shape[-1])
            slopes[layer][members] = _unit(g)

    losses = _observed(model, encodings, batch_size, on_slopes)
    return Reach(reach, losses, slopes)


def alignment(
    model: Model,
    encodings: Sequence[Encoding],
    facts: Sequence[int],
    slopes: Sequence[Tensor],
    batch_size: int,
) -> Tensor:
    """cos(g, g') of rephrasings with their answers and the prompts of their facts, (P, L) float64.

    1: what brings the answer about in the prompt does so in the rephrasing; 0: it does nothing
    there, to first order.

    Args:
        model: a loaded model.
        encodings: P rephrasings, each with its fact's new answer.
        facts: the fact (a row of the ``slopes``) of each.
        slopes: see :class:`Reach`.
        batch_size: texts per pass, halved when memory runs out.
    """
    found = torch.zeros(len(encodings), len(model.layers), dtype=torch.float64)

    def on_slopes(members: list[int], layer: int, g: Tensor, _v: Tensor) -> None:
        own = slopes[layer][[facts[m] for m in members]]
        found[members, layer] = (own * _unit(g)).sum(-1).double()

    _observed(model, encodings, batch_size, on_slopes)
    return found


def _unit(g: Tensor) -> Tensor:
    """g/‖g‖; 0 where g is 0: in the last block a subject in mid-prompt does nothing."""
    largest = g.abs().amax(dim=-1, keepdim=True)
    scaled = g / largest  # squares of small slopes would vanish
    return torch.where(largest == 0, 0.0, scaled / scaled.norm(dim=-1, keepdim=True))


def _observed(
    model: Model,
    encodings: Sequence[Encoding],
    batch_size: int,
    on_slopes: Callable[[list[int], int, Tensor, Tensor], None],
) -> Tensor:
    """``on_slopes(members, layer, g, v)``, both (B, D) at the lookup tokens, for every layer.

    Returns the mean NLL (N,) of the answers, in nats per token, float64. Numbers are taken in
    float32.
    """
    downs = {block.index: block.down.module for block in model.layers.blocks}
    losses = torch.zeros(len(encodings), dtype=torch.float64)

    def run(members: list[int]) -> list[Row]:
        part = [encodings[i] for i in members]
        rows = torch.arange(len(part))
        lookup = torch.tensor([e.lookup for e in part])
        outputs: dict[int, Tensor] = {}

        def keep(layer: int, _x: Tensor, y: Tensor) -> None:
            shaped = y.detach().reshape(len(part), -1, y.shape[-1])
            outputs[layer] = shaped[rows, lookup].float().cpu()

        def on_factors(layer: int, matrix: Matrix, _source: object, g: Tensor) -> None:
            if matrix.experts:  # beside the shared one
                return
            on_slopes(members, layer, g[rows, lookup].float().cpu(), outputs[layer])

        with observe(downs, keep):
            nll = observe_factors(model, part, "down", "answer", on_factors)
        losses[members] = nll.double().cpu()
        return []

    for _ in backing_off([len(e) for e in encodings], batch_size, run):
        pass
    return losses
