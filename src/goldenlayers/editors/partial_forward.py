"""Recomputing only what an edit can change: from the edited block on, from the lookup token on.

An edit at block L acts at the lookup token. Blocks above L, and every token before the lookup
token, stay as they were; their keys and values in attention are remembered from one clean pass.

Shapes: N rows (prompts), T tokens of a row, P tokens before the latest lookup, S tokens of a tail
(lookup token to the end), D model width, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from goldenlayers.errors import UserError
from goldenlayers.hooks import UNABLE, capture, final_hidden, override, override_input, resume_from
from goldenlayers.tokens import Encoding, pad_ids

if TYPE_CHECKING:
    from goldenlayers.models import Model

# How far a tail's result may lie from the whole pass's, relative to its size: rounding only.
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3}
_TOLERANCE_HALF = 0.1

_RESUMES: WeakKeyDictionary[nn.Module, dict[int, bool]] = WeakKeyDictionary()

Change = Callable[[Tensor], Tensor]


class Tails:
    """Rows of prompts that can be run again and again from block ``layer`` and their lookup token.

    Making one runs the rows once, whole and clean. ``inputs[name]`` and ``outputs[name]`` then
    hold what the watched modules were given and gave at each row's lookup token (N, ·), and
    ``clean`` the head's input at the tail positions (N, S, D).

    Where a family's attention cannot run from remembered keys (its positions follow the mask in
    another way), that shows in a first trial against the clean pass, and rows run whole instead.
    """

    def __init__(
        self,
        model: Model,
        encodings: Sequence[Encoding],
        layer: int,
        watch: Mapping[str, nn.Module],
        *,
        reuse: bool = True,
    ) -> None:
        self.model, self.layer = model, layer
        lookups = [e.lookup for e in encodings]
        assert None not in lookups  # encoder.fact and the prompts' builder hold this
        lookup = torch.tensor([at for at in lookups if at is not None])
        batch = pad_ids([e.ids for e in encodings], model.device)
        rows = torch.arange(len(encodings))
        self._full_ids = batch.ids
        module = model.layers[layer].module
        with torch.no_grad(), capture(watch, inputs=True) as given, capture(watch) as gave:
            entering, undo = _entering(module)
            with undo:
                hidden, past = _remembering(model, batch.ids, reuse)
        if entering[-1].shape[:2] != batch.ids.shape:
            raise UserError(
                f"layer {layer} is given activations of shape {tuple(entering[-1].shape)}",
                expected="(rows, tokens, width): no editor can run a part of this model by itself",
                fix="Its layers can be ranked (golden locate), not edited",
            )

        def at_lookup(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
            ours = ((name, by_row(x, batch.ids)[rows, lookup]) for name, x in found.items())
            return {name: x.to(batch.ids.device) for name, x in ours}

        self.inputs, self.outputs = at_lookup(given), at_lookup(gave)
        self._entering, self._hidden, self._lengths = entering[-1], hidden, batch.lengths
        self._keys_values, reuse = past, bool(past)
        self.lookup = lookup
        self._cut(lookup if reuse and int(lookup.max()) > 0 else torch.zeros_like(lookup))
        if reuse and int(self.start.max()) > 0 and not self._agrees():
            self._keys_values = []
            self._cut(torch.zeros_like(lookup))
        if not self._keys_values and layer > 0:
            self._check_resuming()
        del self._entering, self._hidden

    @property
    def reuses(self) -> bool:
        """Whether the tokens before the lookup token are remembered and not run again."""
        return bool(self._keys_values)

    def __len__(self) -> int:
        return len(self.start)

    def _cut(self, start: Tensor) -> None:
        """Let each row's tail begin at its ``start`` (N,)."""
        self.start = start
        past = int(start.max())
        width = int((self._lengths.cpu() - start).max())
        columns = (start[:, None] + torch.arange(width)).clamp_max(self._full_ids.shape[1] - 1)
        rows = torch.arange(len(start))[:, None]
        self.ids = self._full_ids[rows, columns]  # (N, S)
        self.entering = self._entering[rows, columns]  # (N, S, D)
        self.clean = self._hidden[rows, columns]  # (N, S, D)
        self.positions = (start[:, None] + torch.arange(width)).to(self.ids.device)
        self.column = self.lookup - start  # of the lookup token within the tail
        self._past = [(k[:, :, :past], v[:, :, :past]) for k, v in self._keys_values]
        before = torch.arange(past)[None] < start[:, None]  # (N, P)
        here = torch.ones(len(start), width, dtype=torch.bool)
        self.mask = torch.cat([before, here], dim=1).to(self.ids.device)

    def _check_resuming(self) -> None:
        """Refuse a layer that is handed more than the hidden state; found out once for each."""
        hf = self.model.hf
        if not bool(self.clean.isfinite().all()):
            return  # which is told with the weight that is to blame
        known = _RESUMES.setdefault(hf, {})
        if self.layer not in known:
            known[self.layer] = self._agrees()
        if not known[self.layer]:
            raise UserError(
                f"the layers of {type(hf).__name__} hand on more than their hidden state, so no "
                "editor can run the model from one of them on",
                fix="Its layers can be ranked (golden locate), not edited, but for layer 0",
            )

    def _agrees(self) -> bool:
        try:
            with torch.no_grad():
                again = self.run({})
        except UNABLE:
            return False
        real = self.positions < self._lengths[:, None]
        return agree(again[real], self.clean[real])

    def select(self, keep: Tensor) -> Tails:
        """The same for the rows ``keep`` (indices) only, in that order."""
        other = object.__new__(Tails)
        other.model, other.layer = self.model, self.layer
        for name in ("ids", "entering", "clean", "positions", "mask"):
            setattr(other, name, getattr(self, name)[keep])
        other.start, other.column, other.lookup = (
            self.start[keep],
            self.column[keep],
            self.lookup[keep],
        )
        other._past = [(k[keep], v[keep]) for k, v in self._past]
        other._keys_values = other._past
        other.inputs = {name: x[keep] for name, x in self.inputs.items()}
        other.outputs = {name: x[keep] for name, x in self.outputs.items()}
        return other

    def run(self, changes: Mapping[nn.Module, Tensor]) -> Tensor:
        """The head's input at the tail positions (N, S, D), with ``changes[module]`` (N, ·) added
        to that module's output at each row's lookup token. Differentiable in the changes.
        """

        def adding(change: Tensor) -> Change:
            def add(y: Tensor) -> Tensor:
                cells = (torch.arange(len(self), device=y.device), self.column.to(y.device))
                shaped = y.reshape(len(self), -1, y.shape[-1])
                added = shaped.index_put(cells, change.to(y), accumulate=True)
                return added.reshape(y.shape)

            return add

        kwargs: dict[str, Any] = {}
        if self._past:
            kwargs = continuing(self.model, self._past, self.mask, self.positions)
        with ExitStack() as stack:
            stack.enter_context(resume_from(self.model, self.layer, self.entering))
            for module, change in changes.items():
                stack.enter_context(override(module, adding(change)))
            return final_hidden(self.model, self.ids, **kwargs)


def continuing(
    model: Model, past: Sequence[tuple[Tensor, Tensor]], mask: Tensor, positions: Tensor
) -> dict[str, Any]:
    """What a forward pass of tails (N, S) is given that stand behind ``past`` (P tokens).

    ``mask`` (N, P + S) tells which tokens there are, ``positions`` (N, S) count from the text's
    first token.
    """
    given: dict[str, Any] = {"past_key_values": growing_cache(past), "attention_mask": mask.long()}
    if "position_ids" in inspect.signature(model.hf.forward).parameters:
        given["position_ids"] = positions
    return given


def agree(again: Tensor, whole: Tensor) -> bool:
    """Whether what was run from remembered keys is, but for rounding, that of a whole pass."""
    tolerance = _TOLERANCE.get(whole.dtype, _TOLERANCE_HALF)
    return bool((again - whole).float().norm() <= tolerance * whole.float().norm())


def by_row(x: Tensor, ids: Tensor) -> Tensor:
    """Activations as (N, T, ·): OPT runs its MLP on all tokens in one row."""
    return x.reshape(*ids.shape, x.shape[-1])


def growing_cache(keys_values: Sequence[tuple[Tensor, Tensor]] = ()) -> Any:
    """A cache that holds the keys and values (B, heads, T, ·) of each layer from the first on."""
    # Without a config every layer's cache is a plain growing one, also in models with windows:
    # prompts are far shorter than any window, and the trial run would show if they were not.
    from transformers import DynamicCache

    return DynamicCache(list(keys_values)) if keys_values else DynamicCache()


def _remembering(
    model: Model, ids: Tensor, reuse: bool
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """The head's input (B, T, D), and attention's keys and values if they are to be remembered.

    None of these where layers remember in another way (a state space, a convolution).
    """
    cache = growing_cache()
    try:
        if reuse:
            hidden = final_hidden(model, ids, past_key_values=cache)
            return hidden, [(k[:], v[:]) for k, v, *_ in cache]
    except UNABLE:
        pass
    return final_hidden(model, ids), []


def _entering(module: nn.Module) -> tuple[list[Tensor], Any]:
    """A list that will hold the module's first argument, and the context that fills it."""
    found: list[Tensor] = []

    def keep(hidden: Tensor) -> Tensor:
        found.append(hidden)
        return hidden

    return found, override_input(module, keep)
