"""Adding a delta to a model's weights, for a while or for good; many deltas at once, each to one
sequence of a batch.

While deltas are applied, the weights are the untouched ones plus the sum of all deltas in force,
rounded once; each touched parameter's own tensor is put aside and put back, so nothing is
recomputed on the way out and every bit returns.

Sequences that carry different deltas share one forward pass of the untouched weights: for y = x Wᵀ
a low-rank change adds (x @ right) @ leftᵀ to y. Shapes: B sequences, T tokens, R rank (padded to
the widest), N deltas.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from goldenlayers.delta.factors import (
    Changes,
    Dense,
    LowRank,
    hf_of,
    of_expert,
    working_dtype,
)
from goldenlayers.delta.targets import Target, TargetFinder, find_targets
from goldenlayers.errors import UserError
from goldenlayers.hooks import observe
from goldenlayers.models import comparable
from goldenlayers.models.weights import fingerprint, old_fingerprints

if TYPE_CHECKING:
    from goldenlayers.delta import WeightDelta
    from goldenlayers.models import Model


@dataclass(eq=False)
class _Level:
    """One delta in force, and the states of its matrices when it came."""

    changes: Changes
    targets: dict[str, Target]
    before: dict[str, Any]


@dataclass(eq=False)
class _State:
    """All deltas in force on one model, outermost first, and the fingerprint from before them."""

    fingerprint: str | None
    levels: list[_Level] = field(default_factory=list)

    def base(self, target: Target) -> Any:
        """The matrix's untouched state."""
        for level in self.levels:
            if target.name in level.before:
                return level.before[target.name]
        return target.now()

    def value(self, target: Target, extra: list[LowRank | Dense]) -> Any:
        """The untouched state plus every delta in force plus ``extra``."""
        changes = [lvl.changes[target.name] for lvl in self.levels if target.name in lvl.changes]
        return target.changed(self.base(target), changes + extra)

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """The untouched weights for a moment."""
        targets = {name: t for level in self.levels for name, t in level.targets.items()}
        now = {name: target.now() for name, target in targets.items()}
        for target in targets.values():
            target.put(self.base(target))
        try:
            yield
        finally:
            for name, target in targets.items():
                target.put(now[name])

    def enter(self, changes: Changes, targets: dict[str, Target]) -> _Level:
        # All sums first: a failure must leave the model as it was.
        new = {name: self.value(target, [changes[name]]) for name, target in targets.items()}
        level = _Level(changes, targets, {n: t.now() for n, t in targets.items()})
        self.levels.append(level)
        for name, target in targets.items():
            target.put(new[name])
        return level

    def leave(self, level: _Level) -> None:
        """Take one level out; it need not be the innermost."""
        position = self.levels.index(level)
        later = self.levels[position + 1 :]
        del self.levels[position]
        for name, target in level.targets.items():
            inner = next((other for other in later if name in other.before), None)
            if inner is None:
                target.put(level.before[name])
            else:
                inner.before[name] = level.before[name]
                target.put(self.value(target, []))


_IN_FORCE: WeakKeyDictionary[nn.Module, _State] = WeakKeyDictionary()


def deltas_in_force(model: Model | nn.Module) -> int:
    """How many deltas are applied to the model right now."""
    return len(changes_in_force(model))


def changes_in_force(model: Model | nn.Module) -> tuple[Changes, ...]:
    """What the deltas applied to the model right now change, outermost first."""
    state = _IN_FORCE.get(hf_of(model))
    return tuple(level.changes for level in state.levels) if state else ()


@contextmanager
def untouched(model: Model | nn.Module) -> Iterator[None]:
    """The model without the deltas in force on it, for a moment."""
    state = _IN_FORCE.get(hf_of(model))
    with nullcontext() if state is None else state.suspended():
        yield


def base_weight(hf: nn.Module, target: Target) -> Tensor:
    """The parameter as it is without the deltas in force, as stored."""
    state = _IN_FORCE.get(hf)
    return target.weight(state.base(target) if state else target.now())


def base_fingerprint(model: Model | nn.Module) -> str:
    """Fingerprint of the model's untouched weights, whatever deltas are in force on it."""
    state = _IN_FORCE.get(hf_of(model))
    if state is not None and state.fingerprint is not None:
        return state.fingerprint
    with untouched(model):
        found = fingerprint(model) if isinstance(model, nn.Module) else model.fingerprint()
    if state is not None:
        state.fingerprint = found
    return found


def check_base(
    model: Model | nn.Module, expected: str, *, name: str, force: bool, verify: bool
) -> str | None:
    """Refuse a model other than the delta's. Returns the model's own fingerprint if looked at.

    ``expected`` is the delta's base fingerprint, "" when it was made without a base, and ``name``
    the base's name. ``verify`` looks at a plain transformers model's weights too.
    """
    if isinstance(model, nn.Module) and not verify:
        return None
    hf_of(model)  # says so when it is no model at all
    # Asked for even when nothing is compared: inside ``applied`` a Model could not compute it.
    found = base_fingerprint(model)
    known = not expected or found == expected or force
    if not known and not comparable(expected, found):  # a fingerprint of an older version
        with untouched(model):
            plain = isinstance(model, nn.Module)
            known = expected in old_fingerprints(model) if plain else model.is_known_as(expected)
    if not known:
        raise UserError(
            f"the delta was made on other weights ('{name or 'unnamed'}', {expected[:12]}) than "
            f"this model's ({found[:12]})",
            fix="Load the model the delta was made on, or force it (force=True, --force)",
        )
    return found


@contextmanager
def apply(model: Model | nn.Module, changes: Changes, fingerprint: str | None) -> Iterator[None]:
    """Add ``changes`` to the weights; put every touched tensor back on the way out."""
    hf = hf_of(model)
    targets = find_targets(hf, changes)
    state = _IN_FORCE.get(hf) or _State(fingerprint)
    with torch.no_grad():
        level = state.enter(changes, targets)
    _IN_FORCE[hf] = state
    try:
        yield
    finally:
        with torch.no_grad():
            state.leave(level)
        if not state.levels:
            _IN_FORCE.pop(hf, None)


def merge(model: Model | nn.Module, changes: Changes) -> None:
    """Add ``changes`` to the weights for good.

    Raises:
        UserError: deltas are in force on the model, or a change does not fit.
    """
    hf = hf_of(model)
    if deltas_in_force(hf):
        raise UserError(
            "a delta cannot be merged while others are applied to the model",
            fix="Leave the 'applied' context first, or merge the sum of the deltas",
        )
    targets = find_targets(hf, changes)
    with torch.no_grad():
        new = {name: target.merged([changes[name]]) for name, target in targets.items()}
        for name, target in targets.items():
            target.write(new[name])
    if not isinstance(model, nn.Module):
        model.forget_fingerprint()


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
        device = target.device
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
    force: bool = False,
) -> Iterator[Selection]:
    """Give every sequence of a batch its own delta; the weights themselves stay as they are.

    At first each delta in turn has one sequence. ``select`` on the object yielded sets another
    mapping before any forward pass.
    Dense changes work too, at the cost of one matrix product per distinct delta in the batch.
    Matrices that see other rows than whole sequences (experts behind a router) are refused.

    Args:
        model: a ``Model`` or a plain transformers model, as for ``WeightDelta.applied``.
        deltas: N deltas; None stands for the untouched model.
        force: as for ``WeightDelta.applied``.

    Raises:
        UserError: a delta does not belong to the model, or a batch has another number of
            sequences than were selected.
    """
    hf = hf_of(model)
    for delta in deltas:
        if delta is not None:
            expected, name = delta.base_fingerprint, delta.base_name
            check_base(model, expected, name=name, force=force, verify=False)
    selection = Selection(len(deltas), torch.arange(len(deltas)))
    finder = TargetFinder(hf)
    banks: dict[str, _Bank] = {}
    modules: dict[str, nn.Module] = {}
    for name, changes in _by_parameter(deltas).items():
        target = [finder.find(name, change) for change in changes.values()][-1]
        if of_expert(target.path):
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
