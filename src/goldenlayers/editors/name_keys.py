"""The keys of names in a prompt: what the edited layer would be asked of them there.

Shapes: M names, N rows of a batch, F MLP width, S tokens of a batch, D model width.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from goldenlayers.editors.partial_forward import (
    agree,
    by_row,
    continuing,
    growing_cache,
)
from goldenlayers.facts import Fact
from goldenlayers.hooks import UNABLE, input_of, override_input, resume_from
from goldenlayers.tokens import TooLongError, last_token_in, length_batches, pad_ids

if TYPE_CHECKING:
    from goldenlayers.models import Model

_BATCH = 64  # rows per forward pass


def template(fact: Fact) -> tuple[str, str]:
    """The prompt before and behind the subject's last mention; NUL for earlier mentions."""
    start, end = fact.subject_span
    before = re.sub(rf"(?<!\w){re.escape(fact.subject)}(?!\w)", "\0", fact.prompt[:start])
    return before, fact.prompt[end:]


@dataclass(frozen=True, eq=False)
class Names:
    """Names, each one's tokens up to its last in a prompt, and the keys (M, F) there."""

    names: list[str]
    ids: list[tuple[int, ...]]
    keys: Tensor


def reader(model: Model, prompt: tuple[str, str], listed: Iterable[str]) -> Reader:
    """A reader of the keys of names in a prompt (:func:`template`); those that cannot stand there
    are left out.
    """
    before, behind = prompt
    names, rows = [], []
    for name in dict.fromkeys(listed):
        head = before.replace("\0", name)
        try:
            text = model.encoder.verbatim(head + name + behind)
        except TooLongError:
            continue
        start = text.start + len(head)
        last = last_token_in(text.spans, (start, start + len(name)))
        if last is not None:
            names.append(name)
            # Causal attention: what follows the name does not change its key.
            rows.append(text.ids[: last + 1])
    return Reader(model, names, rows)


class Reader:
    """Reads the names' keys of one prompt, at one layer after the other.

    Each pass goes on from the block that the last one came to, and what all rows begin with is run
    once, where the family's attention allows it: either is tried on one batch.
    """

    def __init__(self, model: Model, names: list[str], rows: list[tuple[int, ...]]) -> None:
        self.model, self.names, self.rows = model, names, rows
        self.batches = list(length_batches([len(row) for row in rows], _BATCH))
        self.states: list[Tensor] = []  # inputs (N, S, D) of block ``at``, batch by batch
        self.at = 0
        self._trial = self._shortest()
        self._head = _common(rows)
        self._continues: bool | None = None if len(self._head) > 1 else False
        self._resumes: bool | None = None

    def _shortest(self) -> int:
        """The batch with the fewest tokens, of those with padding if there are any."""

        def lengths(number: int) -> list[int]:
            return [len(self.rows[m]) for m in self.batches[number]]

        return min(
            range(len(self.batches)),
            key=lambda b: (len(set(lengths(b))) == 1, sum(lengths(b))),
            default=0,
        )

    @torch.no_grad()
    def read(self, layer: int) -> Names:
        """The down projection's input at the last token of each row, on the model as it is."""
        down = self.model.layers[layer].down
        dtype = torch.promote_types(self.model.dtype, torch.float32)
        keys = torch.zeros(len(self.rows), down.in_features, dtype=dtype)
        past = self._past(layer)
        if layer < self.at:
            self.states = []
        elif self.states and self._resumes is None:
            trial = self._trial
            again, whole = (
                self._batch(trial, layer, past, s)[0] for s in (self.states[trial], None)
            )
            self._resumes = agree(again, whole)
        if self._resumes is False:
            self.states = []
        entered = []
        for number, members in enumerate(self.batches):
            state = self.states[number] if self.states else None
            found, entering = self._batch(number, layer, past, state)
            keys[members] = found.to("cpu", dtype)
            entered.append(entering)
        self.states, self.at = ([] if self._resumes is False else entered), layer
        return Names(self.names, self.rows, keys)

    def _batch(
        self,
        number: int,
        layer: int,
        past: Sequence[tuple[Tensor, Tensor]],
        state: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """A batch's keys (N, F), and the input (N, S, D) of their block; from ``state`` on, the
        input of block ``at``, if it is given, and behind ``past``, what all rows begin with.
        """
        model, begin = self.model, len(self._head) if past else 0
        batch = pad_ids([self.rows[m][begin:] for m in self.batches[number]], model.device)
        n, width = batch.ids.shape
        given = {}
        if past:
            repeated = [(k.expand(n, -1, -1, -1), v.expand(n, -1, -1, -1)) for k, v in past]
            mask = torch.ones(n, begin + width, device=model.device)
            positions = torch.arange(begin, begin + width, device=model.device).expand(n, -1)
            given = continuing(model, repeated, mask, positions)
        entering: list[Tensor] = []

        def enter(hidden: Tensor) -> Tensor:
            entering.append(hidden.clone())
            return hidden

        block = model.layers[layer]
        with ExitStack() as stack:
            if state is not None:
                stack.enter_context(resume_from(model, self.at, state))
            stack.enter_context(override_input(block.module, enter))
            found = by_row(input_of(model, block.down.module, batch.ids, **given), batch.ids)
        return found[torch.arange(n), batch.lengths.cpu() - 1], entering[0]

    def _past(self, layer: int) -> Sequence[tuple[Tensor, Tensor]]:
        """Attention's keys and values of what all rows begin with, of the blocks up to ``layer``;
        nothing where the family cannot go on from them.
        """
        if self._continues is False:
            return ()
        past: list[tuple[Tensor, Tensor]] = []
        cache, ids = growing_cache(), torch.tensor([self._head], device=self.model.device)
        down = self.model.layers[layer].down.module
        try:
            input_of(self.model, down, ids, past_key_values=cache)
            past = [(k, v) for k, v, *_ in cache]
            if self._continues is None:
                behind, whole = (self._batch(self._trial, layer, some)[0] for some in (past, ()))
                self._continues = agree(behind, whole)
        except UNABLE:
            self._continues = False
        return past if self._continues else ()


def _common(rows: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """What all rows begin with, less the last token of each."""
    if not rows:
        return ()
    low, high = min(rows), max(rows)
    n = min(len(row) for row in rows) - 1
    return low[: next((i for i in range(n) if low[i] != high[i]), n)]
