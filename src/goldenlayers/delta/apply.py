"""Adding a delta to a model's weights, for a while or for good.

While deltas are applied, the weights are the untouched ones plus the sum of all deltas in force,
rounded once; each touched parameter's own tensor is put aside and put back, so nothing is
recomputed on the way out and every bit returns.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from goldenlayers.delta.factors import Dense, LowRank, working_dtype
from goldenlayers.errors import UserError, near_matches
from goldenlayers.models.identity import fingerprint, old_fingerprints
from goldenlayers.models.model import comparable

if TYPE_CHECKING:
    from goldenlayers.models.model import Model

SUFFIX = ".weight"


@dataclass(frozen=True, eq=False)
class Target:
    """One weight matrix that a delta changes. ``transposed``: stored (in, out), as Conv1D does."""

    name: str
    module: nn.Module
    parameter: nn.Parameter
    transposed: bool

    @property
    def path(self) -> str:
        """The module's path, without ``.weight``."""
        return self.name.removesuffix(SUFFIX)

    def changed(self, base: Tensor, changes: list[LowRank | Dense]) -> Tensor:
        """``base`` as stored plus the changes: summed in float32 or wider, rounded once."""
        dtype = working_dtype(base, *(part for change in changes for part in tensors_of(change)))
        total = base.to(dtype, copy=True)
        for change in changes:
            parts = [part.to(base.device, dtype) for part in tensors_of(change)]
            if len(parts) == 1:
                total += parts[0].T if self.transposed else parts[0]
            else:
                left, right = reversed(parts) if self.transposed else parts
                total.addmm_(left, right.T)  # (out, R) @ (R, in), or the other way round
        result = total.to(base.dtype)
        if not torch.isfinite(result).all():
            raise UserError(
                f"with the delta added, '{self.name}' holds values too large for {base.dtype}",
                fix="Scale the delta down, or load the model in float32",
            )
        return result


def tensors_of(change: LowRank | Dense) -> tuple[Tensor, ...]:
    """(left, right), or (value,)."""
    return (change.left, change.right) if isinstance(change, LowRank) else (change.value,)


def hf_of(model: Model | nn.Module) -> nn.Module:
    """The transformers model inside a ``Model``, or the module itself."""
    hf = model if isinstance(model, nn.Module) else getattr(model, "hf", None)
    if not isinstance(hf, nn.Module):
        raise UserError(
            f"a delta cannot be applied to a {type(model).__name__}",
            expected="a goldenlayers Model or a transformers model",
        )
    return hf


class TargetFinder:
    """Looks up changed parameters in one model and checks that the changes fit."""

    def __init__(self, hf: nn.Module) -> None:
        self.hf = hf
        self._owners = Counter(
            id(parameter)
            for module in hf.modules()
            for parameter in module._parameters.values()
            if parameter is not None
        )

    def find(self, name: str, change: LowRank | Dense) -> Target:
        """The matrix ``name`` and how it is stored.

        Raises:
            UserError: no such parameter, not a linear map, another shape, shared with another
                module (tied embeddings), quantised, or not in memory.
        """
        path = name.removesuffix(SUFFIX)
        try:
            module = self.hf.get_submodule(path)
        except AttributeError:
            module = None
        parameter = module._parameters.get("weight") if module is not None else None
        if path == name or module is None or parameter is None:
            raise UserError(
                f"the model ({type(self.hf).__name__}) has no weight matrix '{name}'",
                fix=near_matches(name, _likely_names(self.hf, name))
                or "Load the model that the delta was made on",
            )
        if not isinstance(module, nn.Linear | Conv1D):
            raise UserError(
                f"'{name}' belongs to a {type(module).__name__}",
                expected="a linear map (torch.nn.Linear or transformers' Conv1D)",
            )
        if parameter.is_meta or not parameter.is_floating_point():
            state = "not in memory" if parameter.is_meta else f"stored as {parameter.dtype}"
            raise UserError(
                f"'{name}' is {state}, so nothing can be added to it",
                fix="Load the model in float32, float16 or bfloat16 on one device",
            )
        if self._owners[id(parameter)] > 1:
            raise UserError(
                f"'{name}' is shared with another module (tied embeddings?), "
                "so a change would act on both",
                fix="Edit a matrix inside a block, or load the model with untied embeddings",
            )
        transposed = isinstance(module, Conv1D)
        stored = (parameter.shape[0], parameter.shape[1])
        shape = stored[::-1] if transposed else stored
        if change.shape != shape:
            raise UserError(
                f"the delta's change of '{name}' is {change.shape} (out, in)",
                expected=f"{shape}, the model's",
                fix="Load the model that the delta was made on",
            )
        return Target(name, module, parameter, transposed)


def find_targets(hf: nn.Module, changes: Mapping[str, LowRank | Dense]) -> dict[str, Target]:
    """``TargetFinder.find`` for every change of one delta."""
    finder = TargetFinder(hf)
    return {name: finder.find(name, change) for name, change in changes.items()}


def _likely_names(hf: nn.Module, name: str) -> list[str]:
    """Weight matrices whose path ends like ``name``: near matches among all would be slow."""
    tail = name.split(".")[-2:]
    return [known for known, _ in hf.named_parameters() if known.split(".")[-2:] == tail]


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
    return state.base(target) if state else target.parameter.data


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
        new = {
            name: target.changed(target.parameter.data, [changes[name]])
            for name, target in targets.items()
        }
        for name, target in targets.items():
            target.parameter.data.copy_(new[name])
    if not isinstance(model, nn.Module):
        model.forget_fingerprint()
