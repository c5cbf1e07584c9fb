"""One forward pass over three tokens: what the tree of a model's modules does not tell.

Which modules ran and in which order, what they were given and gave, the norm before the head, and
what happens between the head and the logits. The hooks are gone afterwards.

Shapes: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from goldenlayers.errors import UserError
from goldenlayers.models.offload import not_loaded, runs_on
from goldenlayers.models.weights import not_a_number

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PASSES_ON = (nn.Dropout, nn.Identity)


@dataclass(frozen=True)
class LogitTransform:
    """What happens to the head's output: times ``scale``, then ``cap`` · tanh(logits / ``cap``)."""

    scale: float = 1.0
    cap: float | None = None
    says: str = ""

    def __call__(self, logits: Tensor) -> Tensor:
        """Final logits, of the head's output's shape (..., V)."""
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.cap is not None:
            logits = torch.tanh(logits / self.cap) * self.cap
        return logits


@dataclass(frozen=True, eq=False)
class _Call:
    module: nn.Module
    given: Tensor | None
    returned: Tensor | None
    in_tuple: bool


@dataclass(frozen=True, eq=False)
class Trial:
    """What the pass showed. Calls are in the order in which they returned."""

    calls: tuple[_Call, ...]
    final_norm: nn.Module | None
    vocab_size: int
    transform: LogitTransform

    def order(self, module: nn.Module) -> int | None:
        """When ``module`` returned, counted from 0; None when it did not run."""
        return next((i for i, call in enumerate(self.calls) if call.module is module), None)

    def returns_tuple(self, module: nn.Module) -> bool:
        """Whether ``module`` handed on a tuple rather than a tensor."""
        return any(call.in_tuple for call in self.calls if call.module is module)

    def works_by_token(self, module: nn.Module) -> bool:
        """Whether what ``module`` gives for a token depends on that token alone.

        Tried on what it was given in the pass: with the tokens in another order, the outputs must
        come in that order.
        """
        given = next((call.given for call in self.calls if call.module is module), None)
        if given is None or given.dim() < 2:
            return False
        try:
            with torch.no_grad():
                one, other = (_first(module(x)) for x in (given, given.flip(-2)))
        except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError):
            return False
        if one is None or other is None or not one.shape == other.shape == given.shape:
            return False
        return _close(one, other.flip(-2))

    def output_norm(self, block: nn.Module, down: nn.Module) -> nn.Module | None:
        """The module of ``block`` that is given the very tensor that ``down`` returned.

        Dropout, which passes the tensor on in eval mode, is looked through.
        """
        inside = set(block.modules())
        start = self.order(down)
        if start is None:
            return None
        flow = [self.calls[start].returned]
        for call in self.calls[start + 1 :]:
            if call.module not in inside or not any(call.given is t for t in flow):
                continue
            if isinstance(call.module, _PASSES_ON):
                flow.append(call.returned)
            else:
                return call.module
        return None


def run_trial(model: PreTrainedModel, blocks: Sequence[nn.Module], head: nn.Module) -> Trial:
    """Run ``model`` once, without gradients, and record every module's call.

    Raises:
        UserError: the pass fails, blocks do not run once each in order, the model is not causal,
            or its logits do not follow from the head's output by a scale and a soft cap.
    """
    name = type(model).__name__
    if not_loaded(model):
        raise UserError(f"the weights of {name} are not loaded", fix="Load the weights first")
    ids = _token_ids(model)
    calls: list[_Call] = []

    def record(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        returned = _first(output)
        if module is head and returned is not None:
            returned = returned.clone()  # what scales the logits in place must not reach it
        given = _first((*args, *kwargs.values()))
        calls.append(_Call(module, given, returned, isinstance(output, tuple)))

    handles = [m.register_forward_hook(record, with_kwargs=True) for m in model.modules()]
    try:
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits  # (2, 3, V)
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError) as error:
        raise UserError(
            f"{name} cannot run on three tokens: {error}", expected="a causal language model"
        ) from error
    finally:
        for handle in handles:
            handle.remove()

    at: dict[nn.Module, int] = {block: i for i, block in enumerate(blocks)}
    ran = [at[call.module] for call in calls if call.module in at]
    if ran != list(range(len(blocks))):
        raise UserError(
            f"the layers of {name} ran in the order {ran}",
            expected=f"each of the {len(blocks)} layers once, from first to last",
        )
    last = next(i for i, call in enumerate(calls) if call.module is blocks[-1])
    end = next((i for i, call in enumerate(calls) if call.module is head and i > last), None)
    if end is None:
        raise UserError(
            f"the head of {name} did not run after the last layer",
            fix="Give the path of the language-model head as the layer path 'head'",
        )
    scores = calls[end].returned
    if scores is None or scores.shape != logits.shape:
        raise UserError(f"the logits of {name} are not of its head's shape")
    norms = [
        call.module
        for call in calls[last + 1 : end]
        if not any(call.module.children())
        and not isinstance(call.module, _PASSES_ON)
        and all(parameter.dim() == 1 for parameter in call.module.parameters())
    ]
    if not bool(torch.isfinite(logits).all()):
        raise not_a_number(model, f"{name} predicts values that are not a number")
    if not _close(logits[0, :2], logits[1, :2]):
        raise UserError(
            f"{name} is not causal: its prediction at a token depends on later tokens",
            expected="a decoder-only language model",
        )
    return Trial(
        calls=tuple(calls),
        final_norm=norms[-1] if norms else None,
        vocab_size=logits.shape[-1],
        transform=_transform(model, scores.to(logits.device), logits),
    )


def _token_ids(model: PreTrainedModel) -> Tensor:
    """Two rows of three plain tokens (2, 3): none stands for an image, a sound or padding."""
    config = model.config
    text = config.get_text_config()
    special = {
        value
        for part in (config, text)
        for key, value in vars(part).items()
        if key.endswith(("token_id", "token_index")) and isinstance(value, int)
    }
    embedding = model.get_input_embeddings()
    size = int(embedding.weight.shape[0]) if isinstance(embedding, nn.Embedding) else 256
    plain = [i for i in range(min(size, 64)) if i not in special] or [0]
    a, b, c, d = (plain * 4)[:4]
    return torch.tensor([[a, b, c], [a, b, d]], device=runs_on(embedding))


def _first(values: Any) -> Tensor | None:
    some = values if isinstance(values, tuple | list) else (values,)
    return next((value for value in some if isinstance(value, Tensor)), None)


def _error(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max())


def _close(a: Tensor, b: Tensor) -> bool:
    # Two rows of one batch may be rounded differently: in half precision that shows.
    tolerance = 0.1 if b.dtype in (torch.bfloat16, torch.float16) else 0.01
    return _error(a, b) <= tolerance * max(1.0, float(b.abs().max()))


def _transform(model: PreTrainedModel, scores: Tensor, logits: Tensor) -> LogitTransform:
    """The scale and cap, of those the config names, that turn ``scores`` into ``logits``.

    The same name means a factor in one family and a divisor in another, and a class may ignore
    what its config holds: so every reading is tried on the trial's own numbers.
    """
    config = model.config.get_text_config()
    scales = {"": 1.0}
    for key in ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier"):
        value = getattr(config, key, None)
        if isinstance(value, int | float) and value not in (0, 1):
            scales |= {f"times {key} {value:g}": float(value)}
            scales |= {f"divided by {key} {value:g}": 1.0 / float(value)}
    cap = getattr(config, "final_logit_softcapping", None)
    caps = {f"soft cap {cap:g}": float(cap), "": None} if cap else {"": None}
    readings = [
        LogitTransform(scale, limit, ", ".join(word for word in (how, bound) if word))
        for how, scale in scales.items()
        for bound, limit in caps.items()
    ]
    best = min(readings, key=lambda reading: _error(reading(scores), logits))
    if not _close(best(scores), logits):
        raise UserError(
            f"the logits of {type(model).__name__} are not its head's output, nor that output "
            "scaled or capped as its config says",
            expected="a language model whose logits come from its head",
        )
    return best
