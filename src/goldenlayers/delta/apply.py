"""Adding a delta to a model's weights, for a while or for good.

While deltas are applied, the weights are the untouched ones plus the sum of all deltas in force,
rounded once; each touched parameter's own tensor is put aside and put back, so nothing is
recomputed on the way out and every bit returns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from goldenlayers.delta.factors import Dense, LowRank
from goldenlayers.delta.targets import Target, find_targets, hf_of
from goldenlayers.errors import UserError
from goldenlayers.models.identity import fingerprint, old_fingerprints
from goldenlayers.models.model import comparable

if TYPE_CHECKING:
    from goldenlayers.models.model import Model

Changes = Mapping[str, LowRank | Dense]


@dataclass(eq=False)
class _Level:
    """One delta in force, and the tensors that stood in its place when it came."""

    changes: Changes
    targets: dict[str, Target]
    before: dict[str, Tensor]


@dataclass(eq=False)
class _State:
    """All deltas in force on one model, outermost first, and the fingerprint from before them."""

    fingerprint: str | None
    levels: list[_Level] = field(default_factory=list)

    def base(self, target: Target) -> Tensor:
        """The parameter's untouched tensor."""
        for level in self.levels:
            if target.name in level.before:
                return level.before[target.name]
        return target.parameter.data

    def value(self, target: Target, extra: list[LowRank | Dense]) -> Tensor:
        """The untouched tensor plus every delta in force plus ``extra``."""
        changes = [lvl.changes[target.name] for lvl in self.levels if target.name in lvl.changes]
        return target.changed(self.base(target), changes + extra)

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """The untouched weights for a moment."""
        targets = {name: t for level in self.levels for name, t in level.targets.items()}
        now = {name: target.parameter.data for name, target in targets.items()}
        for target in targets.values():
            target.parameter.data = self.base(target)
        try:
            yield
        finally:
            for name, target in targets.items():
                target.parameter.data = now[name]

    def enter(self, changes: Changes, targets: dict[str, Target]) -> _Level:
        # All sums first: a failure must leave the model as it was.
        new = {name: self.value(target, [changes[name]]) for name, target in targets.items()}
        level = _Level(changes, targets, {n: t.parameter.data for n, t in targets.items()})
        self.levels.append(level)
        for name, target in targets.items():
            target.parameter.data = new[name]
        return level

    def leave(self, level: _Level) -> None:
        """Take one level out; it need not be the innermost."""
        position = self.levels.index(level)
        later = self.levels[position + 1 :]
        del self.levels[position]
        for name, target in level.targets.items():
            inner = next((other for other in later if name in other.before), None)
            if inner is None:
                target.parameter.data = level.before[name]
            else:
                inner.before[name] = level.before[name]
                target.parameter.data = self.value(target, [])


_IN_FORCE: WeakKeyDictionary[nn.Module, _State] = WeakKeyDictionary()


def deltas_in_force(model: Model | nn.Module) -> int:
    """How many deltas are applied to the model right now."""
    state = _IN_FORCE.get(hf_of(model))
    return len(state.levels) if state else 0


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
    return state.base(target) if state else target.parameter.data


def base_fingerprint(model: Model | nn.Module) -> str:
    """Fingerprint of the model's untouched weights, whatever deltas are in force on it."""
    state = _IN_FORCE.get(hf_of(model))
    if state is None:
        return _fingerprint(model)
    if state.fingerprint is None:
        with state.suspended():
            state.fingerprint = _fingerprint(model)
    return state.fingerprint


def _fingerprint(model: Model | nn.Module) -> str:
    return fingerprint(model) if isinstance(model, nn.Module) else model.fingerprint()


def _is_base(model: Model | nn.Module, expected: str) -> bool:
    """Whether ``expected``, of an older version, names the model's untouched weights."""
    with untouched(model):
        if isinstance(model, nn.Module):
            return expected in old_fingerprints(model)
        return model.is_known_as(expected)


def check_base(
    model: Model | nn.Module, expected: str, *, name: str, force: bool, verify: bool
) -> str | None:
    """Refuse a model other than the delta's. Returns the model's own fingerprint if looked at.

    Args:
        model: a ``Model`` or a plain transformers model.
        expected: the delta's base fingerprint; "" when it was made without a base.
        name: the base's name, for the message.
        force: go on although the fingerprints differ.
        verify: look at a plain transformers model's weights too.
    """
    if isinstance(model, nn.Module) and not verify:
        return None
    hf_of(model)  # says so when it is no model at all
    # Asked for even when nothing is compared: inside ``applied`` a Model could not compute it.
    found = base_fingerprint(model)
    known = not expected or found == expected or force
    if not known and not comparable(expected, found):
        known = _is_base(model, expected)
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
        new = {
            name: target.changed(target.parameter.data, [changes[name]])
            for name, target in targets.items()
        }
        for name, target in targets.items():
            target.parameter.data.copy_(new[name])
    if not isinstance(model, nn.Module):
        model.forget_fingerprint()
