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
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from goldenlayers.delta import Dense, WeightDelta
from goldenlayers.editors.base import Editor
from goldenlayers.editors.partial_forward import Tails, by_row
from goldenlayers.errors import UserError
from goldenlayers.facts import Fact
from goldenlayers.hooks import final_hidden, observe, resume_from, token_nll
from goldenlayers.models.offload import runs_on, value_of
from goldenlayers.models.quantised import stored_as
from goldenlayers.models.weights import not_a_number
from goldenlayers.tokens import Encoding, length_batches

if TYPE_CHECKING:
    from goldenlayers.editors.editing import Editing
    from goldenlayers.models import Model

# Weight changes trained side by side: each needs itself, its gradient and two moments.
_NUMBERS_AT_ONCE = 1 << 25
# Tokens of one pass: gradients of many facts for one change are added up over passes.
_TOKENS_AT_ONCE = 4096


@dataclass(frozen=True, kw_only=True)
class FtM(Editor):
    """FT-M: nothing bounds the change."""

    name: ClassVar[str] = "ft-m"
    edits_together: ClassVar[bool] = True
    race_depths: ClassVar[tuple[float, ...]] = (2 / 3, 1)
    carries_over: ClassVar[bool] = False

    steps: int = 25
    """Most optimisation steps per fact."""

    ft_lr: float = 0.02
    """Size of a step per weight, as a share of the matrix's root mean square."""

    lr_absolute: bool = False
    """Take ft_lr (and ft-l's epsilon) as it stands, as published settings do."""

    stop_loss: float = 0.05
    """A fact is done when its loss is below this."""

    def each(self, work: Editing, facts: Sequence[Fact]) -> list[WeightDelta]:
        """One delta per fact, each trained on the model as it is, many side by side."""
        down = work.model.layers[work.layer].down
        at_once = max(1, _NUMBERS_AT_ONCE // (down.in_features * down.out_features))
        deltas: list[WeightDelta] = []
        for start in range(0, len(facts), at_once):
            part = facts[start : start + at_once]
            changes = self._train(work, part, list(range(len(part))))
            deltas += [
                work.delta({down.parameter_name: Dense(change)}, [fact])
                for fact, change in zip(part, changes, strict=True)
            ]
            if work.on_done is not None:
                work.on_done(len(deltas))
        return deltas

    def together(self, work: Editing, facts: Sequence[Fact]) -> WeightDelta:
        """One change trained on all facts."""
        down = work.model.layers[work.layer].down
        (change,) = self._train(work, facts, [0] * len(facts))
        if work.on_done is not None:
            work.on_done(len(facts))
        return work.delta({down.parameter_name: Dense(change)}, facts)

    def limits(self, rms: float) -> tuple[float | None, bool]:
        """The most that a weight may change, in a matrix of this root mean square; and whether
        every answer token is predicted from the prompt's last position.
        """
        del rms
        return None, False

    def _train(self, work: Editing, facts: Sequence[Fact], group: list[int]) -> list[Tensor]:
        """Train the change (D, F) of each group; a group stops when its loss is low enough."""
        model, layer = work.model, work.layer
        down = model.layers[layer].down
        if method := stored_as(down.module):
            raise UserError(
                f"{self.name} changes every number of '{down.parameter_name}', which is quantised "
                f"({method}): only a low-rank change can act beside it",
                fix="Edit with rome, clear-rome or memit, or load the unquantised model",
            )
        encodings = [model.encoder.fact(fact, fact.target) for fact in facts]
        n_groups = max(group) + 1
        device = runs_on(down.module)  # matrices stay there
        member = torch.tensor(group, device=device)
        size = torch.bincount(member, minlength=n_groups)
        weight = down.oriented(value_of(down.module, "weight"))
        rms = float(weight.detach().float().pow(2).mean().sqrt())
        bound, last = self.limits(rms)
        passes = [_Pass(model, layer, encodings, part, last) for part in _parts(encodings)]
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        change = torch.zeros(n_groups, *weight.shape, dtype=dtype, device=device)
        change.requires_grad_(True)
        adam = torch.optim.Adam([change], lr=self.ft_lr if self.lr_absolute else self.ft_lr * rms)
        running = torch.ones(n_groups, dtype=torch.bool, device=device)
        for _ in range(self.steps):
            loss = torch.zeros(n_groups, dtype=dtype, device=device)
            adam.zero_grad()
            for one in passes:
                mine = member[one.facts.to(device)]
                per_fact = one.nll(
                    change[mine] if n_groups > 1 else change.expand(len(mine), -1, -1)
                )
                share = per_fact.to(device, dtype) / size[mine]
                loss = loss.index_add(0, mine, share.detach())
                share.sum().backward()
            if not bool(torch.isfinite(loss).all()):
                raise not_a_number(
                    model.hf,
                    f"{self.name} at layer {layer} gives a loss that is not a number",
                    otherwise="Lower the step size",
                )
            running &= loss >= self.stop_loss
            if not bool(running.any()):
                break
            stopped = torch.nonzero(~running).flatten()
            with torch.no_grad():
                done = change[stopped]  # a copy: their steps are undone
                adam.step()
                if bound is not None:
                    change.clamp_(-bound, bound)
                change[stopped] = done
        return [change[g].detach().cpu() for g in range(n_groups)]


@dataclass(frozen=True, kw_only=True)
class FtL(FtM):
    """FT-L: no weight changes by more than a bound."""

    name: ClassVar[str] = "ft-l"

    epsilon: float = 0.1
    """Most any weight may change, as a share of the matrix's root mean square."""

    prompt_last: bool = False
    """Predict every token of the answer from the prompt's last position, as published."""

    def limits(self, rms: float) -> tuple[float | None, bool]:
        """As for ``ft-m``."""
        return self.epsilon if self.lr_absolute else self.epsilon * rms, self.prompt_last


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
