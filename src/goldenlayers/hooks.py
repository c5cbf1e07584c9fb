"""Reading and changing activations; nothing else in the package registers hooks.

Every function here is a context manager that removes what it set, also after an exception.

Shapes: B sequences, T tokens, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor, nn

if TYPE_CHECKING:
    from goldenlayers.models.layers import Block
    from goldenlayers.models.model import Model

Key = TypeVar("Key", bound=Hashable)


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
    with override(model.layers.embedding, lambda y: y.detach().requires_grad_(True)):
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
    """A module's first argument for ``ids`` (B, T); what comes after it in the model is not run."""
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

    with override_input(model.layers.head, take):
        model.hf(input_ids=ids, use_cache="past_key_values" in kwargs, **kwargs)
    return found[0]


def last_logits(model: Model, ids: Tensor, past: Any = None) -> tuple[Tensor, Any]:
    """Logits (B, V) behind the last token of equally long rows, and the key-value cache."""
    with override_input(model.layers.head, lambda hidden: hidden[:, -1:]):
        out = model.hf(input_ids=ids, use_cache=True, past_key_values=past)
    return out.logits[:, -1], out.past_key_values
