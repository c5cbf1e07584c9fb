"""Experts of a mixture, made visible: what each of their matrices is given and what it returns.

Transformers keeps a layer's experts stacked in one parameter a matrix, (experts, out, in), and
multiplies them in one call, where no hook can stand. Its own extension point (the experts
implementations) lets a function of ours run the experts instead. While nothing is watched, that
function hands on to the implementation that the model had. While something is, it computes the same
with a module (:class:`Tap`) in the place of each matrix, on which hooks stand as on any other.

Shapes: N tokens, K experts per token, S = N·K slots (token after token), E experts, D model width,
F width of an expert.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

NAME = "goldenlayers"
_PLACE = "_goldenlayers_taps"
_SETTINGS = ("has_gate", "has_bias", "is_transposed", "config")


class Tap(nn.Module):
    """One matrix of the experts, y = x Wᵀ (+ b), as a module that hooks can stand on.

    Of all experts (``expert`` is None): x and y are (S, ·), each slot multiplied by the matrix of
    its expert. Of one: x and y are (N, ·), as if every token went to it, and the routing weight of
    the tokens that do not is 0. It holds no weights of its own.
    """

    def __init__(self, owner: Any, name: str, expert: int | None = None) -> None:
        super().__init__()
        self._owner = (owner,)  # in a tuple, so that it does not count as a part of this module
        self.name, self.expert = name, expert
        self.transposed = bool(owner.is_transposed)
        self.experts, first, second = getattr(owner, name).shape
        sizes = (first, second) if self.transposed else (second, first)
        self.in_features, self.out_features = sizes
        self.slots = torch.empty(0, dtype=torch.long)
        """Of the latest pass: each slot's expert, (S,)."""
        self.routed = torch.empty(0, dtype=torch.bool)
        """Of the latest pass, for one expert: which tokens go to it, (N,)."""

    @property
    def weight(self) -> Tensor:
        """(E, ·, ·) of all experts, (·, ·) of one: as stored, a view."""
        stacked = getattr(self._owner[0], self.name)
        return stacked if self.expert is None else stacked[self.expert]

    @property
    def watched(self) -> bool:
        """Whether a hook stands on it."""
        return bool(self._forward_hooks or self._forward_pre_hooks)

    def of(self, expert: int, x: Tensor) -> Tensor:
        """``x`` (·, in) through the matrix of one expert."""
        owner = self._owner[0]
        weight = getattr(owner, self.name)[expert]
        bias = getattr(owner, f"{self.name}_bias")[expert] if owner.has_bias else None
        return nn.functional.linear(x, weight.T if self.transposed else weight, bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.expert is not None:
            return self.of(self.expert, x)
        width = self.out_features
        order = self.slots.argsort(stable=True)
        hit, counts = self.slots.unique(return_counts=True)  # both in the experts' order
        parts = x[order].split(counts.tolist())
        y = [
            # Beyond the last: no expert at all, which some routers (Zaya's) may choose.
            self.of(expert, part) if expert < self.experts else part.new_zeros(len(part), width)
            for expert, part in zip(hit.tolist(), parts, strict=True)
        ]
        return torch.cat(y)[order.argsort()] if y else x.new_zeros(0, width)


class Taps:
    """The taps of one layer's experts, and where the tokens of the latest pass went."""

    def __init__(self, owner: Any) -> None:
        self._owner = (owner,)
        before = owner.config._experts_implementation
        self.before = "eager" if before == NAME else before  # a configuration that another uses
        self.up = Tap(owner, "gate_up_proj" if owner.has_gate else "up_proj")
        self.down = Tap(owner, "down_proj")
        self.alone: dict[int, Tap] = {}
        self.index = torch.empty(0, 0, dtype=torch.long)
        """Of the latest pass: the experts of each token, (N, K)."""
        self.weights = torch.empty(0, 0)
        """Of the latest pass: what each of them weighs, (N, K)."""

    @property
    def n_experts(self) -> int:
        """E."""
        return self.down.experts

    @property
    def per_token(self) -> int:
        """K."""
        return self.index.shape[-1]

    def one(self, expert: int) -> Tap:
        """The tap of one expert's down projection."""
        return self.alone.setdefault(expert, Tap(self._owner[0], "down_proj", expert))

    @property
    def watched(self) -> bool:
        """Whether a hook stands on any tap."""
        return any(tap.watched for tap in (self.up, self.down, *self.alone.values()))

    def inner(self, between: Tensor) -> Tensor:
        """The down projection's input from the other's output."""
        owner = self._owner[0]
        return owner._apply_gate(between) if owner.has_gate else owner.act_fn(between)

    def run(self, x: Tensor) -> Tensor:
        """The experts' output (N, D) for x (N, D), through the taps."""
        owner, (n, k) = self._owner[0], self.index.shape
        slots = self.up.slots = self.down.slots = self.index.reshape(-1)
        y = self.down(self.inner(self.up(x.repeat_interleave(k, 0))))  # (S, D)
        for expert, tap in self.alone.items():
            if tap.watched:
                tap.routed = (self.index == expert).any(1)
                all_tokens = tap(self.inner(self.up.of(expert, x))).repeat_interleave(k, 0)
                y = torch.where((slots == expert)[:, None], all_tokens, y)
        if getattr(owner, "has_post_expert_norm", False):
            y = owner.post_expert_norm(y)
        weights = self.weights * (self.index < self.n_experts)
        return (y * weights.reshape(-1, 1)).view(n, k, -1).sum(1).to(x.dtype)


def _forward(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    taps: Taps | None = self.__dict__.get(_PLACE)
    if taps is not None:
        taps.index, taps.weights = top_k_index, top_k_weights
        if taps.watched:
            return taps.run(hidden_states)
    eager: Any = getattr(type(self).forward, "__wrapped__", None)
    # The grouped product knows no float64; the loop that every family has does.
    wide = hidden_states.dtype == torch.float64
    before = "eager" if taps is None or wide else taps.before
    return ALL_EXPERTS_FUNCTIONS.get(before, eager)(self, hidden_states, top_k_index, top_k_weights)


ALL_EXPERTS_FUNCTIONS.register(NAME, _forward)


def can_be_watched(module: nn.Module) -> bool:
    """Whether a module holds stacked experts that transformers lets another function run."""
    down = getattr(module, "down_proj", None)
    return (
        isinstance(down, nn.Parameter)
        and down.dim() == 3
        and all(hasattr(module, name) for name in _SETTINGS)
        and hasattr(type(module).forward, "__wrapped__")
    )


def taps_of(module: nn.Module) -> Taps:
    """The taps of an experts module; made, and the model told to use them, when first asked for."""
    taps: Taps | None = module.__dict__.get(_PLACE)
    if taps is None:
        taps = Taps(module)
        module.__dict__[_PLACE] = taps
    return taps


def switch_on(modules: list[Any]) -> None:
    """Have these experts run by the function above."""
    for module in modules:
        taps_of(module)  # all of them first: they share a configuration, and note what it says
    for module in modules:
        module.config._experts_implementation = NAME
