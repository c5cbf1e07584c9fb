"""Losses from the head's input, with logits only where they are needed and never all at once.

Shapes: N rows (positions to predict from), D model width, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from goldenlayers.models.layers import LayerMap

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
    distinct, expand = torch.unique(same_as, return_inverse=True)
    result = _TokenNLL.apply(hidden, targets, layers, distinct, expand)
    assert isinstance(result, Tensor)
    return result


def wide(x: Tensor) -> Tensor:
    """Half-precision numbers as float32; others as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def argmax_rows(layers: LayerMap, hidden: Tensor) -> Tensor:
    """The most probable next token (N,) after each row of ``hidden`` (N, D)."""
    with torch.no_grad():
        parts = [
            layers.logits(hidden[part]).argmax(-1)
            for part in _chunks(len(hidden), layers.vocab_size)
        ]
    return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=torch.long)
