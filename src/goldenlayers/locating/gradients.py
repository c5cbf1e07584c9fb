"""Inner products of weight gradients from their factors, without one weight gradient.

For y_t = W x_t a sample's weight gradient is Σ_t g_t x_tᵀ with g_t = ∂ℓ/∂y_t, so for the old and
the new text of one fact ⟨∇_W ℓ_old, ∇_W ℓ_new⟩ = Σ_{t,s} (g_t·g'_s)(x_t·x'_s) = sum((GG'ᵀ)∘(XX'ᵀ)).
One forward and one backward to the activations of a batch give all layers at once.

Shapes: B facts, T tokens, D/F widths, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from goldenlayers.errors import UserError
from goldenlayers.hooks import final_hidden, graph_from_embedding, observe, token_nll
from goldenlayers.locating.base import Loss, Scope, Tokens
from goldenlayers.tokens import Encoding, pad_ids

if TYPE_CHECKING:
    from goldenlayers.models import Model
    from goldenlayers.models.layers import Matrix

# float16 gradients of a mean loss underflow below 6e-8; a power of two shifts them exactly.
_HALF_LOSS_SCALE = 2.0**12


@dataclass(frozen=True, slots=True, eq=False)
class PairProducts:
    """Per fact: ⟨∇old, ∇new⟩, ‖∇old‖², ‖∇new‖², each (B, L) float64, and both NLLs (B,)."""

    inner: Tensor
    old_squared: Tensor
    new_squared: Tensor
    old_nll: Tensor
    new_nll: Tensor


class _Input:
    """One input tensor, shared by the matrices that read it (gate and up, query, key and value)."""

    def __init__(self, x: Tensor) -> None:
        self.x: Tensor = x
        self.gram: Tensor | None = None


OnFactors = Callable[[int, "Matrix", _Input, Tensor], None]


def only(tokens: Tokens, encodings: Sequence[Encoding], on_factors: OnFactors) -> OnFactors:
    """``on_factors`` told of the factors of some tokens alone; those of the others are zero.

    What is left of Σ_t g_t x_tᵀ is the exact share of these tokens in the weight gradient. The
    backward pass itself is that of the whole text.

    Args:
        tokens: "all"; "no-sink", all but the first; "lookup", the subject's last alone.
        encodings: the texts, B.
        on_factors: see :func:`observe_factors`.
    """
    if tokens == "all":
        return on_factors
    width = max(map(len, encodings)) - 1  # the last token predicts nothing
    keep = torch.zeros(len(encodings), width, 1)
    for row, encoding in enumerate(encodings):
        if tokens == "no-sink":
            keep[row, 1:] = 1.0
        elif encoding.lookup is not None:
            keep[row, encoding.lookup] = 1.0

    def some(layer: int, matrix: Matrix, source: _Input, g: Tensor) -> None:
        on_factors(layer, matrix, source, g * keep.to(g))

    return some


def observe_factors(
    model: Model,
    encodings: Sequence[Encoding],
    scope: Scope,
    loss: Loss,
    on_factors: OnFactors,
    *,
    same_as: Callable[[int, int], tuple[int, int]] | None = None,
) -> Tensor:
    """One forward and one backward; ``on_factors(layer, matrix, input, g)`` for every matrix.

    ``g`` (B, T, out) is ∂ℓ/∂y of each sequence's own mean loss, zero at padding; factors are freed
    as soon as the call returns, from the last layer to the first. ``same_as(row, position)`` names
    an equal (row, position) to predict from, so that the head is evaluated once for both. Returns
    the mean NLL (B,) of each sequence, in nats per token.
    """
    # The last token predicts nothing, so its gradient is zero at every layer: it need not be run.
    batch = pad_ids([e.ids[:-1] for e in encodings], model.device)
    n, width = batch.ids.shape
    starts = [0 if loss == "sequence" else e.n_prompt - 1 for e in encodings]
    cells = [(b, t) for b, e in enumerate(encodings) for t in range(starts[b], len(e) - 1)]
    number = {cell: i for i, cell in enumerate(cells)}
    twins = [number.get(same_as(*cell), i) if same_as else i for i, cell in enumerate(cells)]
    rows, columns = (torch.tensor(part, device=model.device) for part in zip(*cells, strict=True))
    wanted = torch.tensor([encodings[b].ids[t + 1] for b, t in cells], device=model.device)
    counts = torch.tensor(
        [len(e) - 1 - start for e, start in zip(encodings, starts, strict=True)],
        device=model.device,
    )
    matrices = {
        (block.index, i): matrix
        for block in model.layers.blocks
        for i, matrix in enumerate(block.matrices(scope))
    }
    modules = {key: matrix.module for key, matrix in matrices.items()}
    scale = _HALF_LOSS_SCALE if model.dtype == torch.float16 else 1.0
    latest: dict[int, _Input] = {}
    seen: set[tuple[int, int]] = set()

    def on_forward(key: tuple[int, int], x: Tensor, y: Tensor) -> None:
        layer, matrix = key[0], matrices[key]
        if key in seen:
            raise UserError(
                f"{matrix.path} runs twice in one forward pass",
                expected="every weight matrix to be used once",
                fix="Choose another --scope, or report the model family",
            )
        seen.add(key)
        # Matrices that read the same tensor share its Gram matrix.
        shared = latest.get(layer)
        if shared is None or shared.x is not x:
            shared = latest[layer] = _Input(x)

        def on_backward(g: Tensor) -> None:
            on_factors(layer, matrix, shared, g.reshape(n, width, -1) / scale)

        y.register_hook(on_backward)

    with torch.enable_grad(), graph_from_embedding(model), observe(modules, on_forward):
        hidden = final_hidden(model, batch.ids)
        latest.clear()
        nll = token_nll(
            model.layers, hidden[rows, columns], wanted, torch.tensor(twins, device=model.device)
        )
        per_sequence = nll.new_zeros(n).index_add(0, rows, nll) / counts
        (per_sequence.sum() * scale).backward()
    return per_sequence.detach()


def pair_products(
    model: Model,
    old: Sequence[Encoding],
    new: Sequence[Encoding],
    *,
    scope: Scope = "mlp",
    loss: Loss = "sequence",
    tokens: Tokens = "all",
) -> PairProducts:
    """Gram products of the old and new gradients of B facts for every layer.

    With ``tokens`` of the gradients only the share of some tokens counts: see :func:`only`.

    Products are taken in float32, or in the model's own precision where that is higher. Source:
    LGA's φ (Datta, Liu, Chhabra, arXiv 2602.20207, section 5.1).
    """
    # Old and new text of a fact stand side by side, so (2B, T, ·) becomes (B, 2T, ·) by a view.
    pairs = [e for both in zip(old, new, strict=True) for e in both]
    n_facts = len(old)
    shared = [_common_prefix(a.ids, b.ids) for a, b in zip(old, new, strict=True)]

    def same_as(row: int, position: int) -> tuple[int, int]:
        # Same tokens up to and including the predicted one: same hidden state, same loss.
        return (row - row % 2, position) if position + 1 < shared[row // 2] else (row, position)

    totals = torch.zeros(3, n_facts, len(model.layers), dtype=torch.float64)

    def on_factors(layer: int, _matrix: Matrix, source: _Input, g: Tensor) -> None:
        if source.gram is None:
            source.gram = _gram(source.x.reshape(g.shape[0], g.shape[1], -1), n_facts)
        product = source.gram * _gram(g, n_facts)
        width = g.shape[1]
        blocks = product.view(n_facts, 2, width, 2, width).sum((2, 4)).double().cpu()
        totals[0, :, layer] += blocks[:, 0, 1]
        totals[1, :, layer] += blocks[:, 0, 0]
        totals[2, :, layer] += blocks[:, 1, 1]

    some = only(tokens, pairs, on_factors)
    nll = observe_factors(model, pairs, scope, loss, some, same_as=same_as).double().cpu()
    return PairProducts(totals[0], totals[1], totals[2], nll[0::2], nll[1::2])


def _gram(factor: Tensor, n_facts: int) -> Tensor:
    """(2B, T, ·) → (B, 2T, 2T) inner products of all token pairs of one fact."""
    if factor.dtype in (torch.float16, torch.bfloat16):
        factor = factor.float()
    flat = factor.reshape(n_facts, -1, factor.shape[-1])
    return flat @ flat.transpose(1, 2)


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    for i, (left, right) in enumerate(zip(a, b, strict=False)):
        if left != right:
            return i
    return min(len(a), len(b))
