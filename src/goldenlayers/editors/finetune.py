"""FT-M and FT-L: Adam on one down projection, its changes bounded for FT-L.

Sources: FT-L, Zhu et al. 2020 (arXiv 2012.00363), constrained fine-tuning with an L∞ bound; FT-M,
the same without the bound, cross-entropy on the answer tokens with the prompt masked.

Shapes: G groups of facts (a weight change each), N rows, T tokens, D model width, F MLP width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from goldenlayers.delta import Dense, WeightDelta
from goldenlayers.editors.base import Workbench
from goldenlayers.editors.tails import Tails, by_row
from goldenlayers.errors import UserError
from goldenlayers.facts import Fact
from goldenlayers.hooks import final_hidden, observe, resume_from
from goldenlayers.losses import token_nll

# Weight changes trained side by side: each needs itself, its gradient and two moments.
_NUMBERS_AT_ONCE = 1 << 25


@dataclass(frozen=True)
class FineTune:
    """The editors ``ft-m`` and ``ft-l``."""

    name: str
    bounded: bool
    needs_statistics: bool = False
    edits_together: bool = True

    def each(self, bench: Workbench, facts: Sequence[Fact], layer: int) -> list[WeightDelta]:
        """One delta per fact, each trained on the model as it is, many side by side."""
        down = bench.model.layers[layer].down
        at_once = max(1, _NUMBERS_AT_ONCE // (down.in_features * down.out_features))
        deltas: list[WeightDelta] = []
        for start in range(0, len(facts), at_once):
            part = facts[start : start + at_once]
            changes = self._train(bench, part, layer, list(range(len(part))))
            deltas += [
                bench.delta({down.parameter_name: Dense(change)}, self.name, [layer], [fact])
                for fact, change in zip(part, changes, strict=True)
            ]
            if bench.on_done is not None:
                bench.on_done(len(deltas))
        return deltas

    def together(self, bench: Workbench, facts: Sequence[Fact], layer: int) -> WeightDelta:
        """One change trained on all facts."""
        down = bench.model.layers[layer].down
        (change,) = self._train(bench, facts, layer, [0] * len(facts))
        return bench.delta({down.parameter_name: Dense(change)}, self.name, [layer], facts)

    def _train(
        self, bench: Workbench, facts: Sequence[Fact], layer: int, group: list[int]
    ) -> list[Tensor]:
        """Train the change (D, F) of each group; a group stops when its loss is low enough."""
        model, s = bench.model, bench.settings
        down = model.layers[layer].down
        encodings = [model.encoder.fact(fact, fact.target_new) for fact in facts]
        tails = Tails(model, [e.asking for e in encodings], layer, {}, reuse=False)
        device = tails.ids.device
        cells = [(b, t) for b, e in enumerate(encodings) for t in range(e.n_prompt - 1, len(e) - 1)]
        rows, columns = (torch.tensor(part, device=device) for part in zip(*cells, strict=True))
        wanted = torch.tensor([i for e in encodings for i in e.answer_ids], device=device)
        counts = torch.tensor([len(e.answer_ids) for e in encodings], device=device)
        n_groups = max(group) + 1
        member = torch.tensor(group, device=device)
        size = torch.bincount(member, minlength=n_groups)
        weight = down.oriented(down.weight)
        rms = float(weight.detach().float().pow(2).mean().sqrt())
        rate = s.ft_lr if s.lr_absolute else s.ft_lr * rms
        bound = s.epsilon * rms if self.bounded else None
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        change = torch.zeros(n_groups, *weight.shape, dtype=dtype, device=device)
        first, second = torch.zeros_like(change), torch.zeros_like(change)
        running = torch.ones(n_groups, dtype=torch.bool, device=device)
        for step in range(s.steps):
            change.requires_grad_(True)

            def add(_key: int, x: Tensor, y: Tensor, change: Tensor = change) -> Tensor:
                inputs = by_row(x, tails.ids).to(change.dtype)  # (N, T, F)
                mine = change[member] if n_groups > 1 else change.expand(len(member), -1, -1)
                extra = torch.bmm(inputs, mine.transpose(1, 2))  # (N, T, D)
                return (by_row(y, tails.ids) + extra.to(y.dtype)).reshape(y.shape)

            with resume_from(model, layer, tails.entering), observe({0: down.module}, add):
                hidden = final_hidden(model, tails.ids)
            nll = token_nll(model.layers, hidden[rows, columns], wanted)
            per_fact = nll.new_zeros(len(facts)).index_add(0, rows, nll) / counts
            loss = per_fact.new_zeros(n_groups).index_add(0, member, per_fact) / size
            if not bool(torch.isfinite(loss).all()):
                raise UserError(
                    f"{self.name} at layer {layer} gives a loss that is not a number",
                    fix="Load the model with --dtype float32, or lower the step size",
                )
            running &= loss.detach() >= s.stop_loss
            if not bool(running.any()):
                change = change.detach()
                break
            (g,) = torch.autograd.grad(loss.sum(), change)
            with torch.no_grad():
                first.lerp_(g, 0.1)
                second.lerp_(g * g, 0.001)
                mean = first / (1 - 0.9 ** (step + 1))
                square = second / (1 - 0.999 ** (step + 1))
                moved = change - rate * mean / (square.sqrt() + 1e-12)
                if bound is not None:
                    moved.clamp_(-bound, bound)
                change = torch.where(running[:, None, None], moved, change.detach())
        return [change[g].detach().cpu() for g in range(n_groups)]


FT_M = FineTune("ft-m", bounded=False)
FT_L = FineTune("ft-l", bounded=True)
