"""FT-M and FT-L: Adam on one down projection, its changes bounded for FT-L.

Sources: FT-L, Zhu et al. 2020 (arXiv 2012.00363), constrained fine-tuning with an L∞ bound; FT-M,
the same without the bound, cross-entropy on the answer tokens with the prompt masked. FT-L as
released with ROME and in EasyEdit predicts every answer token from the prompt's last position
(``prompt_last``), which is another loss where the answer has several tokens.

Shapes: G groups of facts (a weight change each), N rows, T tokens, D model width, F MLP width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from goldenlayers.delta import Dense, WeightDelta
from goldenlayers.editors.base import Workbench
from goldenlayers.editors.partial_forward import Tails, by_row
from goldenlayers.facts import Fact
from goldenlayers.hooks import final_hidden, observe, resume_from
from goldenlayers.losses import token_nll
from goldenlayers.models.broken import not_a_number
from goldenlayers.tokens import Encoding, length_batches

if TYPE_CHECKING:
    from goldenlayers.models.model import Model

# Weight changes trained side by side: each needs itself, its gradient and two moments.
_NUMBERS_AT_ONCE = 1 << 25
# Tokens of one pass: gradients of many facts for one change are added up over passes.
_TOKENS_AT_ONCE = 4096


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
        if bench.on_done is not None:
            bench.on_done(len(facts))
        return bench.delta({down.parameter_name: Dense(change)}, self.name, [layer], facts)

    def _train(
        self, bench: Workbench, facts: Sequence[Fact], layer: int, group: list[int]
    ) -> list[Tensor]:
        """Train the change (D, F) of each group; a group stops when its loss is low enough."""
        model, s = bench.model, bench.settings
        down = model.layers[layer].down
        encodings = [model.encoder.fact(fact, fact.target) for fact in facts]
        n_groups = max(group) + 1
        device = model.device
        member = torch.tensor(group, device=device)
        size = torch.bincount(member, minlength=n_groups)
        last = self.bounded and s.prompt_last
        passes = [_Pass(model, layer, encodings, part, last) for part in _parts(encodings)]
        weight = down.oriented(down.weight)
        rms = float(weight.detach().float().pow(2).mean().sqrt())
        rate = s.ft_lr if s.lr_absolute else s.ft_lr * rms
        bound = (s.epsilon if s.lr_absolute else s.epsilon * rms) if self.bounded else None
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        change = torch.zeros(n_groups, *weight.shape, dtype=dtype, device=device)
        first, second = torch.zeros_like(change), torch.zeros_like(change)
        running = torch.ones(n_groups, dtype=torch.bool, device=device)
        for step in range(s.steps):
            change.requires_grad_(True)
            loss = torch.zeros(n_groups, dtype=dtype, device=device)
            g = torch.zeros_like(change)
            for one in passes:
                mine = member[one.facts]
                per_fact = one.nll(
                    change[mine] if n_groups > 1 else change.expand(len(mine), -1, -1)
                )
                share = per_fact.to(dtype) / size[mine]
                loss = loss.index_add(0, mine, share.detach())
                g += torch.autograd.grad(share.sum(), change)[0]
            if not bool(torch.isfinite(loss).all()):
                raise not_a_number(
                    model.hf,
                    f"{self.name} at layer {layer} gives a loss that is not a number",
                    otherwise="Lower the step size",
                )
            running &= loss >= s.stop_loss
            if not bool(running.any()):
                change = change.detach()
                break
            with torch.no_grad():
                first.lerp_(g, 0.1)
                second.lerp_(g * g, 0.001)
                mean = first / (1 - 0.9 ** (step + 1))
                square = second / (1 - 0.999 ** (step + 1))
                moved = change - rate * mean / (square.sqrt() + 1e-8)
                if bound is not None:
                    moved.clamp_(-bound, bound)
                change = torch.where(running[:, None, None], moved, change.detach())
        return [change[g].detach().cpu() for g in range(n_groups)]


class _Pass:
    """Facts whose rows run together. ``facts`` (N,) are their places among all of them.

    With ``last`` every answer token is predicted from the prompt's last position.
    """

    def __init__(
        self,
        model: Model,
        layer: int,
        encodings: Sequence[Encoding],
        places: Sequence[int],
        last: bool,
    ) -> None:
        some = [encodings[i] for i in places]
        self.model, self.layer, self.down = model, layer, model.layers[layer].down.module
        self.tails = Tails(model, [e.asking for e in some], layer, {}, reuse=False)
        device = self.tails.ids.device
        self.facts = torch.tensor(places, device=device)
        cells = [
            (b, e.n_prompt - 1 + (0 if last else t))
            for b, e in enumerate(some)
            for t in range(len(e.answer_ids))
        ]
        self._cells = [torch.tensor(part, device=device) for part in zip(*cells, strict=True)]
        self._wanted = torch.tensor([i for e in some for i in e.answer_ids], device=device)
        self._counts = torch.tensor([len(e.answer_ids) for e in some], device=device)

    def nll(self, change: Tensor) -> Tensor:
        """Mean NLL of each fact's answer tokens (N,), with ``change`` (N, D, F) of the matrix."""
        ids = self.tails.ids

        def add(_key: int, x: Tensor, y: Tensor) -> Tensor:
            inputs = by_row(x, ids).to(change.dtype)  # (N, T, F)
            extra = torch.bmm(inputs, change.transpose(1, 2))  # (N, T, D)
            return (by_row(y, ids) + extra.to(y.dtype)).reshape(y.shape)

        with resume_from(self.model, self.layer, self.tails.entering), observe({0: self.down}, add):
            hidden = final_hidden(self.model, ids)
        rows, columns = self._cells
        nll = token_nll(self.model.layers, hidden[rows, columns], self._wanted)
        return nll.new_zeros(len(self.facts)).index_add(0, rows, nll) / self._counts


def _parts(encodings: Sequence[Encoding]) -> Iterator[list[int]]:
    """Facts of similar length whose rows together hold at most ``_TOKENS_AT_ONCE`` tokens."""
    lengths = [len(e) for e in encodings]
    yield from length_batches(lengths, max(1, _TOKENS_AT_ONCE // max(lengths)))


FT_M = FineTune("ft-m", bounded=False)
FT_L = FineTune("ft-l", bounded=True)
