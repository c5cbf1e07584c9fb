"""The rows that facts are optimised by, run in parts of similar length so that little is padding.

A row is a fact's prompt with its new answer behind one prefix, or the prompt at which the model is
to go on saying what it says of the subject (the KL term). Only the tokens from the lookup token on
are run again and again, and of a KL row the lookup token alone: what follows it is not read.

Shapes: N rows of a part, B facts of all parts, S tokens of the longest tail, D model width, V
vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from goldenlayers.editors.partial_forward import Tails
from goldenlayers.hooks import token_nll, wide
from goldenlayers.tokens import Encoding

if TYPE_CHECKING:
    from goldenlayers.models import Model

# What running one more part costs whatever its size (the weights are read once more), counted in
# tokens of the pass: measured flat between 100 and 200 on a CPU with two small models; far more on
# a GPU, where starting a kernel is dear.
_OVERHEAD = {"cpu": 128}
_OVERHEAD_ELSEWHERE = 2048


@dataclass(frozen=True, eq=False)
class Row:
    """A text, the fact (its place among the B) that it belongs to, and which of its prompts it is.

    ``prompt`` is None for the KL row.
    """

    encoding: Encoding
    fact: int
    prompt: int | None

    @property
    def run(self) -> Encoding:
        """The tokens that have to be run."""
        if self.prompt is not None:
            return self.encoding.asking
        return self.encoding.until_lookup

    @property
    def tail(self) -> int:
        """How many of them there are from the lookup token on."""
        return len(self.run) - (self.run.lookup or 0)


class Part:
    """Rows of similar length, run as one batch. ``rows`` are those that are still active."""

    def __init__(
        self,
        model: Model,
        layer: int,
        rows: Sequence[Row],
        sites: Mapping[str, nn.Module],
        beside: Mapping[str, nn.Module],
        *,
        reuse: bool,
    ) -> None:
        self._layers, self._sites, self.rows = model.layers, sites, list(rows)
        watched = {**sites, **beside}
        self.tails = Tails(model, [row.run for row in rows], layer, watched, reuse=reuse)
        self._index()
        self._kl_clean = self._kl_log_probs(self.tails.clean)

    def _index(self) -> None:
        """Which cells of the tails are read, and for whom."""
        device, starts = self.tails.ids.device, self.tails.start.tolist()
        answers = [() if r.prompt is None else r.encoding.answer_ids for r in self.rows]
        cells = [
            (n, row.encoding.n_prompt - starts[n] + i - 1, token, 1.0 / len(answers[n]))
            for n, row in enumerate(self.rows)
            for i, token in enumerate(answers[n])
        ]
        n, column, token, weight = zip(*cells, strict=True) if cells else ((), (), (), ())
        self._cells = (
            torch.tensor(n, dtype=torch.long, device=device),
            torch.tensor(column, dtype=torch.long, device=device),
        )
        self._wanted = torch.tensor(token, dtype=torch.long, device=device)
        self._weight = torch.tensor(weight, device=device)
        self._fact = torch.tensor([row.fact for row in self.rows], device=device)  # (N,)
        self._kl = torch.tensor(
            [n for n, row in enumerate(self.rows) if row.prompt is None],
            dtype=torch.long,
            device=device,
        )

    def _kl_log_probs(self, hidden: Tensor) -> Tensor:
        """Log-probabilities after the KL rows' lookup token, (KL rows, V)."""
        column = self.tails.column.to(self._kl.device)[self._kl]
        return wide(self._layers.logits(hidden[self._kl, column])).log_softmax(-1)

    def add_losses(self, delta: Mapping[str, Tensor], nll: Tensor, kl: Tensor) -> None:
        """Run the rows with ``delta[site]`` (B, D) added, and add to ``nll`` (B,) each prompt
        row's mean NLL of its answer's tokens and to ``kl`` (B,) KL(edited ‖ clean) of KL rows.
        """
        hidden = self.tails.run(
            {self._sites[name]: change[self._fact] for name, change in delta.items()}
        )
        n, column = self._cells
        if len(n):
            each = token_nll(self._layers, hidden[n, column], self._wanted)
            nll.index_add_(0, self._fact[n], (each * self._weight).to(nll.dtype))
        if len(self._kl):
            clean, now = self._kl_clean, self._kl_log_probs(hidden)
            kl.index_add_(0, self._fact[self._kl], (now.exp() * (now - clean)).sum(-1).to(kl.dtype))

    def keep(self, place: Mapping[int, int]) -> bool:
        """Keep the rows of the facts in ``place``, which gives their new numbers; False if none."""
        kept = [n for n, row in enumerate(self.rows) if row.fact in place]
        if not kept:
            return False
        alive = [i for i, n in enumerate(self._kl.tolist()) if self.rows[n].fact in place]
        self._kl_clean = self._kl_clean[alive]
        self.rows = [dataclasses.replace(self.rows[n], fact=place[self.rows[n].fact]) for n in kept]
        self.tails = self.tails.select(torch.tensor(kept))
        self._index()
        return True


def split(widths: Sequence[int], overhead: int) -> list[list[int]]:
    """Indices of rows in parts, so that the padded tokens of all parts and ``overhead`` per part
    are least.
    """
    order = sorted(range(len(widths)), key=lambda i: (-widths[i], i))
    starts = [i for i in range(len(order)) if not i or widths[order[i]] != widths[order[i - 1]]]
    ends = [*starts[1:], len(order)]
    # best[j]: least cost of all rows before ends[j - 1], and where its last part starts.
    best: list[tuple[int, int]] = [(0, 0)]
    for j in range(1, len(starts) + 1):
        best.append(
            min(
                (
                    best[i][0] + widths[order[starts[i]]] * (ends[j - 1] - starts[i]) + overhead,
                    i,
                )
                for i in range(j)
            )
        )
    parts: list[list[int]] = []
    j = len(starts)
    while j:
        i = best[j][1]
        parts.append(order[starts[i] : ends[j - 1]])
        j = i
    return parts[::-1]


def parts_of(
    model: Model,
    layer: int,
    rows: Sequence[Row],
    sites: Mapping[str, nn.Module],
    beside: Mapping[str, nn.Module],
    *,
    reuse: bool,
) -> list[Part]:
    """``rows`` in parts; without ``reuse`` whole rows are run each time.

    Changes go to the outputs of ``sites``; of the modules ``beside`` the clean output is kept, too.
    """
    widths = [row.tail if reuse else len(row.run) for row in rows]
    overhead = _OVERHEAD.get(model.device.type, _OVERHEAD_ELSEWHERE)
    return [
        Part(model, layer, [rows[i] for i in members], sites, beside, reuse=reuse)
        for members in split(widths, overhead)
    ]
