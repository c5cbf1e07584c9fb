"""Many short texts through the model at once, logits only at the positions that are read.

Texts that are the same, or the beginning of another, share one row; rows of similar length share a
batch, each with its own edit; and an edit of block L runs from block L on, from kept states of the
untouched model.

Shapes: B rows, T tokens, D model width, L layers, V vocabulary, N positions read.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from goldenlayers.hooks import UNABLE, capture, final_hidden, resume_from, wide
from goldenlayers.models.offload import runs_on
from goldenlayers.progress import in_smaller_batches
from goldenlayers.tokens import Encoding, pad_ids

if TYPE_CHECKING:
    from goldenlayers.delta import Selection
    from goldenlayers.models import Model
    from goldenlayers.models.layers import LayerMap

Ids = tuple[int, ...]
Top = tuple[tuple[int, float], ...]
"""The likeliest next tokens at a position, each with its probability."""

_CHUNK_NUMBERS = 1 << 23  # numbers in one chunk of logits
_TOP = 8  # tokens that tell how much of a prediction is left; the others count as one
_STATE_BYTES = 1 << 29  # for the kept states of the untouched model
_AUTO_TOKENS = {"cpu": 512, "cuda": 32768}
_AUTO_TOKENS_ELSEWHERE = 4096


@dataclass(frozen=True, slots=True, eq=False)
class Reading:
    """What to read of one text: arg-max, with ``nll`` that of ``targets``, KL to ``reference``.

    ``positions`` index ``ids``; at position t the prediction of token t+1 is read. ``targets`` is
    empty or one token per position; ``reference`` (D,) the head's input of the untouched model at
    the last position. ``top`` is what the untouched model found likeliest at each position: how
    much of it is left is read; with ``keep_top`` it is what is read. ``carrier`` is the place of
    the edit in the selection, -1 for none.
    """

    ids: Ids
    positions: Ids
    targets: Ids = ()
    nll: bool = False
    carrier: int = -1
    reference: Tensor | None = None
    keep_hidden: bool = False
    top: tuple[Top, ...] = ()
    keep_top: bool = False

    @classmethod
    def of_answer(cls, whole: Encoding) -> Reading:
        """A prompt with an answer behind it: the arg-max along the answer, and its NLL."""
        places = tuple(range(whole.n_prompt - 1, len(whole) - 1))
        return cls(whole.ids[:-1], places, whole.answer_ids, nll=True)


@dataclass(frozen=True, slots=True, eq=False)
class Read:
    """What was read: arg-max tokens, mean NLL in nats, KL in nats, the head's input (D,), the
    likeliest tokens at each position, and how much of them is left, from 0 to 1.
    """

    tokens: Ids
    targets: Ids = ()
    nll: float | None = None
    kl: float | None = None
    hidden: Tensor | None = None
    top: tuple[Top, ...] = ()
    left: float | None = None


class States:
    """Inputs of some blocks of the untouched model, for every text of a pass.

    As many evenly spaced blocks are kept as the budget allows.
    """

    def __init__(self, model: Model, n_tokens: int, budget: int = _STATE_BYTES) -> None:
        size = n_tokens * model.layers.d_model * model.dtype.itemsize
        stride = max(1, -(-len(model.layers) * size // max(budget, 1)))
        self.layers = tuple(range(stride, len(model.layers), stride))
        self._rows: dict[int, list[Tensor]] = {layer: [] for layer in self.layers}  # (T, D) each
        self._place: dict[Ids, int] = {}

    def add(self, rows: Sequence[Ids], found: dict[int, Tensor]) -> None:
        """Keep the states of a batch: ``found`` maps a layer to its input (B, T, D)."""
        # All copied before any is kept: memory may run out, and half a batch would be misplaced.
        kept = {
            layer: [found[layer][b, : len(ids)].clone() for b, ids in enumerate(rows)]
            for layer in self.layers
        }
        start = len(next(iter(self._rows.values()))) if self._rows else 0
        self._place.update({ids: start + b for b, ids in enumerate(rows)})
        for layer, parts in kept.items():
            self._rows[layer] += parts

    def alias(self, ids: Ids, row: Ids) -> None:
        """Say that ``ids`` is the beginning of ``row``."""
        self._place[ids] = self._place[row]

    def start(self, layer: int, rows: Iterable[Ids]) -> int:
        """The deepest kept block from which a pass with block ``layer`` changed may begin."""
        usable = [kept for kept in self.layers if kept <= layer]
        return usable[-1] if usable and all(ids in self._place for ids in rows) else 0

    def inputs(self, layer: int, rows: Sequence[Ids]) -> Tensor:
        """The block's input (B, T, D), zero behind each row's end."""
        parts = [self._rows[layer][self._place[ids]] for ids in rows]
        width = max(len(ids) for ids in rows)
        hidden = parts[0].new_zeros(len(rows), width, parts[0].shape[-1])
        for b, (part, ids) in enumerate(zip(parts, rows, strict=True)):
            hidden[b, : len(ids)] = part[: len(ids)]
        return hidden


@dataclass(frozen=True, slots=True, eq=False)
class Pass:
    """How texts go through the model, beside the deltas in force on it.

    Attributes:
        batch_size: rows per batch; None fits the batch to the device. Halved if memory runs out.
        selection: is set to the edit that each row of a batch carries.
        first_layer: the first block that any edit changes; with ``states`` the pass begins there.
        states: states of the untouched model: to begin from, or with ``keep`` to be filled.
        keep: fill ``states`` in this pass (of the untouched model).
    """

    batch_size: int | None = None
    selection: Selection | None = None
    first_layer: int = 0
    states: States | None = None
    keep: bool = False


@torch.no_grad()
def read(model: Model, readings: Sequence[Reading], how: Pass) -> list[Read]:
    """Read every text once, batched.

    Args:
        model: the model, with whatever is applied to it.
        readings: what to read.
        how: in which batches and under which edits.

    Returns:
        One result per reading, in their order. It does not depend on the batches.

    Raises:
        OutOfMemory: memory runs out on a single row.
    """
    rows, home = merge(readings)
    of_row: list[list[int]] = [[] for _ in rows]
    for i, r in enumerate(readings):
        of_row[home[r.carrier, r.ids]].append(i)
    results: list[Read | None] = [None] * len(readings)

    def run(members: list[int]) -> tuple[list[int], list[Read]]:
        mine = [(b, i) for b, m in enumerate(members) for i in of_row[m]]
        asked = [(b, readings[i]) for b, i in mine]
        return [i for _, i in mine], _read_batch(model, [rows[m] for m in members], asked, how)

    parts = batches([len(ids) for _, ids in rows], how.batch_size, model.device.type)
    for _, (places, found) in in_smaller_batches(parts, run, lambda m: _named(rows[m][1])):
        for i, one in zip(places, found, strict=True):
            results[i] = one
    if how.keep and how.states is not None:
        for r in readings:
            how.states.alias(r.ids, rows[home[r.carrier, r.ids]][1])
    return [one for one in results if one is not None]


def merge(
    readings: Iterable[Reading],
) -> tuple[list[tuple[int, Ids]], dict[tuple[int, Ids], int]]:
    """Distinct (carrier, text) rows, and the row each reading is read from.

    With causal attention the beginning of a text is computed alike whatever follows it.
    """
    rows: list[tuple[int, Ids]] = []
    home: dict[tuple[int, Ids], int] = {}
    # In descending order the longer of two texts stands right before its own beginning.
    for carrier, ids in sorted({(r.carrier, r.ids) for r in readings}, reverse=True):
        same = rows and rows[-1][0] == carrier and rows[-1][1][: len(ids)] == ids
        if not same:
            rows.append((carrier, ids))
        home[carrier, ids] = len(rows) - 1
    return rows, home


def batches(lengths: Sequence[int], batch_size: int | None, device: str) -> Iterator[list[int]]:
    """Rows in batches of similar length, longest first; None: as many as the device takes well."""
    budget = _AUTO_TOKENS.get(device, _AUTO_TOKENS_ELSEWHERE)
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    while order:
        size = batch_size or max(1, budget // lengths[order[0]])
        yield order[:size]
        del order[:size]


def _read_batch(
    model: Model, rows: list[tuple[int, Ids]], readings: list[tuple[int, Reading]], how: Pass
) -> list[Read]:
    """One result per reading; beside each stands the row it is read from."""
    texts = [ids for _, ids in rows]
    batch = pad_ids(texts, model.device)  # (B, T)
    if how.selection is not None:
        how.selection.select([carrier for carrier, _ in rows])
    states = how.states
    with contextlib.ExitStack() as stack:
        found: dict[int, Tensor] = {}
        if states is not None and how.keep:
            blocks = {layer: model.layers[layer].module for layer in states.layers}
            found = stack.enter_context(capture(blocks, inputs=True))
        elif states is not None and (start := states.start(how.first_layer, texts)):
            stack.enter_context(resume_from(model, start, states.inputs(start, texts)))
        hidden = final_hidden(model, batch.ids)  # (B, T, D)
    cells: dict[tuple[int, int], int] = {}
    for b, reading in readings:
        for t in reading.positions:
            cells.setdefault((b, t), len(cells))
    where = torch.tensor(list(cells), device=hidden.device)  # (N, 2)
    at = hidden[where[:, 0], where[:, 1]]  # (N, D)
    asked = {
        (cells[b, t], target)
        for b, reading in readings
        if reading.nll
        for t, target in zip(reading.positions, reading.targets, strict=True)
    }
    asked |= {
        (cells[b, t], token)
        for b, reading in readings
        for t, top in zip(reading.positions, reading.top, strict=False)
        for token, _ in top
    }
    best = {cells[b, t] for b, reading in readings if reading.keep_top for t in reading.positions}
    tokens, nll, tops = head(model.layers, at, sorted(asked), best)
    results = []
    for b, reading in readings:
        mine = [cells[b, t] for t in reading.positions]
        mean = kl = left = None
        if reading.top:
            left = sum(
                overlap(top, [math.exp(-nll[c, token]) for token, _ in top])
                for c, top in zip(mine, reading.top, strict=True)
            ) / len(mine)
        if reading.nll:
            parts = [nll[c, target] for c, target in zip(mine, reading.targets, strict=True)]
            mean = sum(parts) / len(parts)
        last = at[mine[-1]]
        if reading.reference is not None:
            kl = divergence(model.layers, reading.reference, last)
        hidden_kept = last.clone() if reading.keep_hidden else None
        said = tuple(tokens[c] for c in mine)
        top = tuple(tops[c] for c in mine) if reading.keep_top else ()
        results.append(Read(said, reading.targets, mean, kl, hidden_kept, top, left))
    if states is not None and how.keep:
        # Last, so that a batch that ran out of memory leaves nothing behind.
        states.add(texts, found)
    return results


def overlap(top: Top, now: Sequence[float]) -> float:
    """Σ min(p, q) of two distributions by the tokens of ``top``, the others taken as one: how much
    of what was likely is left.
    """
    before = [p for _, p in top]
    parts = [min(p, q) for p, q in zip(before, now, strict=True)]
    return sum(parts) + max(0.0, min(1 - sum(before), 1 - sum(now)))


def head(
    layers: LayerMap,
    hidden: Tensor,
    asked: Sequence[tuple[int, int]],
    best: Collection[int] = (),
) -> tuple[list[int], dict[tuple[int, int], float], dict[int, Top]]:
    """Arg-max token of every row of ``hidden`` (N, D), −log p for each (row, token) asked, and the
    likeliest tokens of the rows in ``best``.

    A row that holds NaN or infinities has the token -1.
    """
    hidden = hidden.to(runs_on(layers.head))
    size = max(1, _CHUNK_NUMBERS // max(1, layers.vocab_size))
    tokens: list[int] = []
    nll: dict[tuple[int, int], float] = {}
    tops: dict[int, Top] = {}
    place = 0
    for start in range(0, len(hidden), size):
        logits = layers.logits(hidden[start : start + size])  # (n, V)
        finite = torch.isfinite(hidden[start : start + size]).all(-1)
        tokens += torch.where(finite, logits.argmax(-1), -1).tolist()
        for row in (row for row in range(start, start + len(logits)) if row in best):
            values, ids = wide(logits[row - start]).softmax(-1).topk(min(_TOP, logits.shape[-1]))
            tops[row] = tuple(zip(ids.tolist(), values.tolist(), strict=True))
        stop = place
        while stop < len(asked) and asked[stop][0] < start + size:
            stop += 1
        mine, place = asked[place:stop], stop
        if not mine:
            continue
        distinct = sorted({row for row, _ in mine})
        index = {row: i for i, row in enumerate(distinct)}
        some = wide(logits[[row - start for row in distinct]])
        norm = some.logsumexp(-1)
        at = torch.tensor([index[row] for row, _ in mine], device=some.device)
        target = torch.tensor([token for _, token in mine], device=some.device)
        values = norm[at] - some[at, target]
        nll.update(zip(mine, values.tolist(), strict=True))
    return tokens, nll, tops


def divergence(layers: LayerMap, before: Tensor, after: Tensor) -> float:
    """KL(p_before ‖ p_after) in nats of the next-token distributions behind two (D,) states."""
    log_p, log_q = wide(layers.logits(torch.stack([before, after]))).double().log_softmax(-1)
    return max(0.0, float((log_p.exp() * (log_p - log_q)).sum()))


def states_hold(model: Model, states: States, rows: Sequence[Ids]) -> bool:
    """Whether passes that begin at a kept state end where whole passes end, for these rows.

    Some families carry more than the hidden state from block to block; they run whole passes.
    """
    if not states.layers or not rows:
        return False

    def hold(members: list[int]) -> bool:
        some = [rows[m] for m in members]
        batch = pad_ids(some, model.device)
        whole = final_hidden(model, batch.ids)
        for layer in {states.layers[0], states.layers[-1]}:
            with resume_from(model, layer, states.inputs(layer, some)):
                resumed = final_hidden(model, batch.ids)
            for b, ids in enumerate(some):
                a, c = whole[b, : len(ids)].float(), resumed[b, : len(ids)].float()
                bound = (1e-3 if model.dtype.itemsize >= 4 else 3e-2) * float(a.abs().max())
                if not float((a - c).abs().max()) <= bound:
                    return False
        return True

    everyone = [list(range(len(rows)))]
    try:
        return all(ok for _, ok in in_smaller_batches(everyone, hold, lambda m: _named(rows[m])))
    except (*UNABLE, KeyError):
        return False


def _named(ids: Ids) -> str:
    return f"a text of {len(ids)} tokens"
