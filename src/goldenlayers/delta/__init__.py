"""What an edit changed: small factors per weight matrix, to apply, undo, add, save and share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from goldenlayers.delta.apply import Target, TargetFinder, check_base, hf_of
from goldenlayers.delta.core import Norms, WeightDelta
from goldenlayers.delta.factors import Dense, LowRank, working_dtype
from goldenlayers.errors import UserError
from goldenlayers.hooks import observe

if TYPE_CHECKING:
    from goldenlayers.models.model import Model


__all__ = ["Dense", "LowRank", "Norms", "Selection", "WeightDelta", "applied_per_example"]


class Selection:
    """Which delta each sequence of the next batches carries; -1 for none."""

    def __init__(self, count: int, rows: Tensor) -> None:
        self._count = count
        self.rows = rows

    def select(self, indices: Tensor | Sequence[int]) -> None:
        """Set the delta of each sequence: ``indices`` (B,) into the list of deltas, -1 for none.

        Raises:
            UserError: not one list of whole numbers from -1 to the number of deltas less one.
        """
        rows = torch.as_tensor(indices).detach().cpu()
        if rows.numel() == 0:
            rows = rows.long()
        if rows.dim() != 1 or rows.is_floating_point() or rows.dtype == torch.bool:
            raise UserError(
                f"the selection has shape {tuple(rows.shape)} and type {rows.dtype}",
                expected="one whole number per sequence",
            )
        if rows.numel() and (int(rows.min()) < -1 or int(rows.max()) >= self._count):
            raise UserError(
                f"the selection runs from {int(rows.min())} to {int(rows.max())}",
                expected=f"-1 (no delta) to {self._count - 1}",
            )
        self.rows = rows.long()


class _Bank:
    """All changes of one matrix: low-rank ones stacked and padded, dense ones one by one."""

    def __init__(self, target: Target, changes: dict[int, LowRank | Dense], count: int) -> None:
        self.path = target.path
        device = target.parameter.device
        self.dense: dict[int, Tensor] = {}
        self.slots = torch.full((count + 1,), -1)  # delta -> place in the stack; the last is "none"
        low = {i: change for i, change in changes.items() if isinstance(change, LowRank)}
        for index, change in changes.items():
            if isinstance(change, Dense):
                self.dense[index] = change.value.to(device)  # (out, in)
        if not low:
            return
        factors = [tensor for change in low.values() for tensor in (change.left, change.right)]
        dtype = working_dtype(*factors)
        rank = max(change.rank for change in low.values())
        out_features, in_features = next(iter(low.values())).shape
        self.left = torch.zeros(len(low), out_features, rank, dtype=dtype, device=device)
        self.right = torch.zeros(len(low), in_features, rank, dtype=dtype, device=device)
        for slot, (index, change) in enumerate(low.items()):
            self.slots[index] = slot
            self.left[slot, :, : change.rank] = change.left.to(device, dtype)
            self.right[slot, :, : change.rank] = change.right.to(device, dtype)

    def __call__(self, rows: Tensor, x: Tensor, y: Tensor) -> Tensor | None:
        """The module's output with each sequence's change added; None if no sequence has one."""
        slots = self.slots[rows]  # (B,)
        low = torch.nonzero(slots >= 0).flatten()
        dense = [i for i in rows.unique().tolist() if i in self.dense]
        if not len(low) and not dense:
            return None
        x = self._by_sequence(x, len(rows))  # (B, T, in)
        shape, dtype = y.shape, y.dtype
        y = y.reshape(len(rows), -1, y.shape[-1])  # (B, T, out)
        if len(low):
            left, right = self.left[slots[low]], self.right[slots[low]]  # (b, out, R), (b, in, R)
            wide = working_dtype(x, left)
            where = low.to(x.device)
            thin = torch.bmm(x[where].to(wide), right.to(wide))  # (b, T, R)
            y = y.to(wide).index_add(0, where, torch.bmm(thin, left.to(wide).mT))
        for index in dense:
            value = self.dense[index]
            wide = working_dtype(x, value)
            where = torch.nonzero(rows == index).flatten().to(x.device)
            y = y.to(wide).index_add(0, where, x[where].to(wide) @ value.to(wide).T)
        return y.to(dtype).reshape(shape)

    def _by_sequence(self, x: Tensor, sequences: int) -> Tensor:
        # OPT runs its MLP on (B·T, in): sequences stay in order, so the rows can be told apart.
        fits = x.shape[0] == sequences if x.dim() > 2 else x.shape[0] % max(sequences, 1) == 0
        if not fits:
            raise UserError(
                f"'{self.path}' was given activations of shape {tuple(x.shape)}, "
                f"but deltas were selected for {sequences} sequences",
                fix="Call select() with one index per sequence before each forward pass",
            )
        return x.reshape(sequences, -1, x.shape[-1])


@contextmanager
def applied_per_example(
    model: Model | nn.Module,
    deltas: Sequence[WeightDelta | None],
    *,
    repeats: int | Sequence[int] = 1,
    force: bool = False,
    verify: bool = False,
) -> Iterator[Selection]:
    """Give every sequence of a batch its own delta; the weights themselves stay as they are.

    At first sequence b carries the delta that ``repeats`` says: each delta in turn for so many
    sequences. ``select`` on the object yielded sets another mapping before any forward pass.
    Dense changes work too, at the cost of one matrix product per distinct delta in the batch.
    Matrices that see other rows than whole sequences (experts behind a router) are refused.

    Args:
        model: a ``Model`` or a plain transformers model, as for ``WeightDelta.applied``.
        deltas: N deltas; None stands for the untouched model.
        repeats: sequences per delta, one number or N.
        force: as for ``WeightDelta.applied``.
        verify: as for ``WeightDelta.applied``.

    Raises:
        UserError: a delta does not belong to the model, or a batch has another number of
            sequences than were selected.
    """
    hf = hf_of(model)
    for delta in deltas:
        if delta is not None:
            check_base(
                model, delta.base_fingerprint, name=delta.base_name, force=force, verify=verify
            )
    counts = [repeats] * len(deltas) if isinstance(repeats, int) else list(repeats)
    if len(counts) != len(deltas) or any(count < 0 for count in counts):
        raise UserError(
            f"repeats is {repeats} for {len(deltas)} deltas",
            expected="a number of sequences for each delta",
        )
    rows = torch.arange(len(deltas)).repeat_interleave(torch.tensor(counts, dtype=torch.long))
    selection = Selection(len(deltas), rows)
    finder = TargetFinder(hf)
    banks: dict[str, _Bank] = {}
    modules: dict[str, nn.Module] = {}
    for name, changes in _by_parameter(deltas).items():
        target = [finder.find(name, change) for change in changes.values()][-1]
        if "experts" in target.path.split("."):
            raise UserError(
                f"'{name}' belongs to an expert, which sees single tokens in the router's order",
                fix="Apply such deltas one at a time with 'applied'",
            )
        modules[name] = target.module
        banks[name] = _Bank(target, changes, len(deltas))
    with observe(modules, lambda name, x, y: banks[name](selection.rows, x, y)):
        yield selection


def _by_parameter(deltas: Sequence[WeightDelta | None]) -> dict[str, dict[int, LowRank | Dense]]:
    found: dict[str, dict[int, LowRank | Dense]] = {}
    for index, delta in enumerate(deltas):
        for name, change in delta.changes.items() if delta is not None else ():
            found.setdefault(name, {})[index] = change
    return found
