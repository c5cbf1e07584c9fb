"""Reading and changing activations (above the models, nothing else registers hooks), and losses
from the head's input, with logits only where they are needed and never all at once.

Where a model is spread over devices, a module's activations are on the module's device, and what
these functions give back is where the ids are, unless they say otherwise.

Functions that set hooks are context managers that remove what they set, also after an exception.

Shapes: B sequences, T tokens, D model width, N rows (positions to predict from), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from goldenlayers.models.offload import read_again, runs_on

if TYPE_CHECKING:
    from goldenlayers.models import Model
    from goldenlayers.models.layers import Block, LayerMap


Key = TypeVar("Key", bound=Hashable)

UNABLE = (RuntimeError, ValueError, TypeError, IndexError, AttributeError)
"""What a family raises that does not take the cache it is given."""


def first(output: Any) -> Tensor:
    """The hidden state in what a module returned: blocks of some families return tuples."""
    return output[0] if isinstance(output, tuple | list) else output


def _with_first(output: Any, hidden: Tensor) -> Any:
    if isinstance(output, tuple):
        return (hidden, *output[1:])
    if isinstance(output, list):
        return [hidden, *output[1:]]
    return hidden


@contextmanager
def observe(
    modules: Mapping[Key, nn.Module], fn: Callable[[Key, Tensor, Tensor], Tensor | None]
) -> Iterator[None]:
    """Call ``fn(key, input, output)`` whenever a module has run; a tensor returned replaces the
    output's hidden state. The input is the module's first argument, however it was passed.
    """
    with ExitStack() as stack:
        for key, module in modules.items():

            def hook(
                _module: nn.Module,
                args: tuple[Any, ...],
                kwargs: dict[str, Any],
                output: Any,
                key: Key = key,
            ) -> Any:
                x = args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values())))
                changed = fn(key, x, first(output))
                return None if changed is None else _with_first(output, changed)

            handle = module.register_forward_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)
        yield


@contextmanager
def capture(
    modules: Mapping[Key, nn.Module], *, inputs: bool = False
) -> Iterator[dict[Key, Tensor]]:
    """Collect each module's output (or input) of the last forward pass, as detached copies.

    Copies, since some families go on to change a module's output in place: Falcon adds the
    attention's output to the very tensor that its down projection returned.
    """
    found: dict[Key, Tensor] = {}

    def keep(key: Key, x: Tensor, y: Tensor) -> None:
        found[key] = (x if inputs else y).detach().clone()

    with observe(modules, keep):
        yield found


@contextmanager
def override(module: nn.Module, fn: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replace a module's output by ``fn(output)``."""
    with observe({0: module}, lambda _key, _x, y: fn(y)):
        yield


@contextmanager
def override_input(module: nn.Module, fn: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replace a module's first argument by ``fn(argument)``."""

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (fn(args[0]), *args[1:]), kwargs
        name = "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs))
        return args, {**kwargs, name: fn(kwargs[name])}

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def graph_from_embedding(model: Model) -> Iterator[None]:
    """Let gradients flow to activations although every weight is frozen."""
    # A copy, since some families (CTRL) go on to scale what the embedding gave in place.
    with override(model.layers.embedding, lambda y: y.detach().requires_grad_(True).clone()):
        yield


@contextmanager
def resume_from(model: Model, layer: int, hidden: Tensor) -> Iterator[None]:
    """Make forward passes begin at block ``layer`` with ``hidden`` (B, T, D) as its input.

    The blocks above it are passed over; the ids given to the forward pass only have to have the
    right shape (they still set positions and masks).
    """
    with ExitStack() as stack:
        for i in range(layer):
            stack.enter_context(_passed_over(model.layers[i]))
        stack.enter_context(override_input(model.layers[layer].module, lambda _x: hidden))
        yield


@contextmanager
def _passed_over(block: Block) -> Iterator[None]:
    """Replace a block's forward by the identity on its hidden state."""
    module = block.module

    def identity(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, None) if block.returns_tuple else hidden

    previous = module.__dict__.get("forward")
    module.forward = identity
    try:
        yield
    finally:
        if previous is None:
            del module.forward
        else:
            module.forward = previous


class _ReachedError(Exception):
    """The forward pass has come as far as it should."""


def input_of(model: Model, module: nn.Module, ids: Tensor, **kwargs: Any) -> Tensor:
    """A module's first argument for ``ids`` (B, T); what comes after it in the model is not run.

    It stays on the device that it came from.
    """
    found: list[Tensor] = []

    def stop(hidden: Tensor) -> Tensor:
        found.append(hidden.detach())
        raise _ReachedError

    with override_input(module, stop), suppress(_ReachedError):
        model.hf(input_ids=ids, use_cache="past_key_values" in kwargs, **kwargs)
    return found[0]


def final_hidden(model: Model, ids: Tensor, **kwargs: Any) -> Tensor:
    """The head's input (B, T, D) for ``ids`` (B, T), without computing any logits.

    The head is given an empty slice, so a 262k vocabulary costs nothing; the logits of the
    positions that matter come from ``model.layers.logits``.
    """
    found: list[Tensor] = []

    def take(hidden: Tensor) -> Tensor:
        found.append(hidden)
        return hidden[:, :0]

    with override_input(model.layers.head, take), read_again(model.hf):
        model.hf(input_ids=ids, use_cache="past_key_values" in kwargs, **kwargs)
    return found[0].to(ids.device)


@dataclass(frozen=True, eq=False)
class Past:
    """What rows begin with: the tokens (B, T), and the family's cache of them, where it works."""

    ids: Tensor
    cache: Any


def last_logits(
    model: Model, ids: Tensor, past: Past | None = None, *, again: bool = True
) -> tuple[Tensor, Past]:
    """Logits (B, V) behind the last token of equally long rows, and what a next call goes on from.

    Where a family has no cache, or one that fails, all tokens are run again; not with ``again``
    False, for who must see every token once.
    """

    def run(ids: Tensor, **kwargs: Any) -> Any:
        with override_input(model.layers.head, lambda hidden: hidden[:, -1:]):
            return model.hf(input_ids=ids, **kwargs)

    seen = ids if past is None else torch.cat([past.ids, ids], dim=1)
    if past is None or past.cache is not None:
        try:
            out = run(ids, use_cache=True, past_key_values=None if past is None else past.cache)
            return out.logits[:, -1], Past(seen, getattr(out, "past_key_values", None))
        except UNABLE as error:
            if not again or isinstance(error, torch.OutOfMemoryError):
                raise
    return run(seen, use_cache=False).logits[:, -1], Past(seen, None)


# One chunk of logits: 8M numbers, 32 MB in float32, whatever the vocabulary.
_CHUNK_NUMBERS = 1 << 23


def _chunks(n_rows: int, vocab_size: int) -> list[slice]:
    size = max(1, _CHUNK_NUMBERS // max(1, vocab_size))
    return [slice(start, min(start + size, n_rows)) for start in range(0, n_rows, size)]


class _TokenNLL(torch.autograd.Function):
    """−log p(target) per row. The gradient to each row is taken while its logits exist.

    A row's loss depends on that row alone, so the upstream gradient of a row is one number that
    multiplies its stored gradient: memory is N×D instead of N×V.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        targets: Tensor,
        layers: LayerMap,
        distinct: Tensor,
        expand: Tensor,
    ) -> Tensor:
        rows, wanted = hidden[distinct], targets[distinct]  # (M, D), (M,)
        needs_grad = ctx.needs_input_grad[0]
        gradient = torch.empty_like(rows) if needs_grad else None
        parts: list[Tensor] = []
        for part in _chunks(len(rows), layers.vocab_size):
            with torch.enable_grad():
                leaf = rows[part].detach().requires_grad_(needs_grad)
                logits = layers.logits(leaf)
            values = wide(logits.detach())
            norm = values.logsumexp(-1)
            index = wanted[part, None]
            parts.append(norm - values.gather(1, index)[:, 0])
            if gradient is not None:
                slope = torch.exp(values - norm[:, None])  # softmax minus one-hot
                slope.scatter_add_(1, index, slope.new_full(index.shape, -1.0))
                (gradient[part],) = torch.autograd.grad(logits, leaf, slope.to(logits.dtype))
        if gradient is not None:
            ctx.save_for_backward(gradient, expand)
        return torch.cat(parts)[expand]

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradient, expand = ctx.saved_tensors
        per_row = gradient[expand]
        return (upstream[0].to(per_row.dtype)[:, None] * per_row, None, None, None, None)


def token_nll(
    layers: LayerMap, hidden: Tensor, targets: Tensor, same_as: Tensor | None = None
) -> Tensor:
    """Negative log-likelihood in nats, (N,), of ``targets`` (N,) after ``hidden`` (N, D).

    Differentiable once with respect to ``hidden``; computed in float32 for half-precision models.
    ``same_as`` (N,) names for each row an earlier row with equal hidden state and target (or
    itself): the head is then evaluated once for both, and both get their own gradient.
    """
    if same_as is None:
        same_as = torch.arange(len(targets), device=targets.device)
    there = runs_on(layers.head)  # logits are large: the rest goes to them
    distinct, expand = torch.unique(same_as.to(there), return_inverse=True)
    result = _TokenNLL.apply(hidden.to(there), targets.to(there), layers, distinct, expand)
    assert isinstance(result, Tensor)
    return result.to(hidden.device)


def wide(x: Tensor) -> Tensor:
    """Half-precision numbers as float32; others as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def argmax_rows(layers: LayerMap, hidden: Tensor) -> Tensor:
    """The most probable next token (N,) after each row of ``hidden`` (N, D)."""
    there = hidden.to(runs_on(layers.head))
    with torch.no_grad():
        parts = [
            layers.logits(there[part]).argmax(-1)
            for part in _chunks(len(hidden), layers.vocab_size)
        ]
    found = torch.cat(parts) if parts else there.new_zeros(0, dtype=torch.long)
    return found.to(hidden.device)
