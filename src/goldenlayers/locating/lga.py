"""Layer Gradient Analysis and gradient saliency: one row per fact, from gradients alone.

Sources: LGA, Datta, Liu, Chhabra, arXiv 2602.20207, section 5.1 and appendix A; saliency, the
SaLEM-style baseline (mean |∇_{θ_L} ℓ(Q ∪ K')|). Shapes: B facts, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from goldenlayers.errors import UserError
from goldenlayers.facts import Fact
from goldenlayers.hooks import final_hidden, graph_from_embedding, observe, token_nll
from goldenlayers.locating.base import Loss, Row, Scope, Tokens
from goldenlayers.progress import in_smaller_batches
from goldenlayers.tokens import Encoding, length_batches, pad_ids

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
    """One input tensor, shared by the matrices that read it (gate and up, query, key and value).

    ``experts`` is None; or the rows of x are slots, each for the expert that stands here.
    """

    def __init__(self, x: Tensor, experts: Tensor | None = None) -> None:
        self.x: Tensor = x
        self.experts = experts
        self.gram: Tensor | None = None

    def gram_of(self, sequences: int, n_facts: int) -> Tensor:
        """Inner products of the rows of one fact, 0 where they are for different experts."""
        if self.gram is None:
            self.gram = _gram(self.x.reshape(sequences, -1, self.x.shape[-1]), n_facts)
            if self.experts is not None:
                experts = self.experts.reshape(n_facts, -1)
                self.gram *= experts[:, :, None] == experts[:, None, :]
        return self.gram


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
        here = keep.to(g).repeat_interleave(g.shape[1] // width, 1)  # a token may fill slots
        on_factors(layer, matrix, source, g * here)

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

    ``g`` (B, T, out) is ∂ℓ/∂y of each sequence's own mean loss, zero at padding; for the stacked
    matrices of experts (B, T·K, out), each token as often as it has experts. Factors are freed as
    soon as the call returns, from the last layer to the first. ``same_as(row, position)`` names
    an equal (row, position) to predict from, so that the head is evaluated once for both. Returns
    the mean NLL (B,) of each sequence, in nats per token.
    """
    # The last token predicts nothing, so its gradient is zero at every layer: it need not be run.
    batch = pad_ids([e.ids[:-1] for e in encodings], model.device)
    n = len(encodings)
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
            experts = cast(Tensor, matrix.module.slots) if matrix.experts else None
            shared = latest[layer] = _Input(x, experts)

        def on_backward(g: Tensor) -> None:
            on_factors(layer, matrix, shared, g.reshape(n, -1, g.shape[-1]) / scale)

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
        product = source.gram_of(len(g), n_facts) * _gram(g, n_facts)
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


def lga_rows(
    model: Model,
    facts: Sequence[Fact],
    scope: Scope = "mlp",
    loss: Loss = "sequence",
    tokens: Tokens = "all",
    *,
    batch_size: int = 16,
) -> Iterator[list[Row]]:
    """Yield, batch by batch, one row per fact with φ_L for every layer and its diagnostics.

    Every fact must have its old answer (see ``known.fill_old_answers``). When memory runs out the
    batch is halved and tried again.
    """
    encoded = [(old_text(model, f), model.encoder.fact(f, f.target)) for f in facts]

    def run(members: list[int]) -> list[Row]:
        old, new = zip(*(encoded[i] for i in members), strict=True)
        products = pair_products(model, old, new, scope=scope, loss=loss, tokens=tokens)
        old_norm, new_norm = products.old_squared.sqrt(), products.new_squared.sqrt()
        # A vanishing gradient has no direction: its cosine is NaN, which JSON keeps as null.
        cosine = products.inner / (old_norm * new_norm)
        return [
            _row(facts[i])
            | {
                "phi": products.inner[b].tolist(),
                "cosine": cosine[b].tolist(),
                "norm_old": old_norm[b].tolist(),
                "norm_new": new_norm[b].tolist(),
                "nll_old": float(products.old_nll[b]),
                "nll_new": float(products.new_nll[b]),
            }
            for b, i in enumerate(members)
        ]

    lengths = [max(len(old), len(new)) for old, new in encoded]
    yield from backing_off(lengths, batch_size, run, tokens=tokens_at_once(model) // 2)


def saliency_rows(
    model: Model,
    facts: Sequence[Fact],
    scope: Scope = "mlp",
    loss: Loss = "sequence",
    tokens: Tokens = "all",
    *,
    batch_size: int = 16,
) -> Iterator[list[Row]]:
    """Yield rows whose ``phi`` is the mean absolute weight gradient of the new text per layer.

    One matrix's gradient of one fact exists at a time, formed from its factors.
    """
    encoded = [model.encoder.fact(fact, fact.target) for fact in facts]
    sizes = [sum(m.size for m in block.matrices(scope)) for block in model.layers.blocks]

    def run(members: list[int]) -> list[Row]:
        total = torch.zeros(len(members), len(sizes), dtype=torch.float64)

        def on_factors(layer: int, _matrix: Matrix, source: _Input, g: Tensor) -> None:
            x = source.x.reshape(g.shape[0], g.shape[1], -1)
            half = g.dtype in (torch.float16, torch.bfloat16)
            x, g = (x.float(), g.float()) if half else (x, g)
            experts = source.experts
            for b in range(len(members)):
                if experts is None:
                    total[b, layer] += float((g[b].T @ x[b]).abs().sum())
                    continue
                mine = experts.reshape(len(g), -1)[b]
                for expert in mine.unique():
                    at = mine == expert
                    total[b, layer] += float((g[b][at].T @ x[b][at]).abs().sum())

        some = [encoded[i] for i in members]
        observe_factors(model, some, scope, loss, only(tokens, some, on_factors))
        scores = total / torch.tensor(sizes, dtype=torch.float64)
        return [_row(facts[i]) | {"phi": scores[b].tolist()} for b, i in enumerate(members)]

    lengths = [len(e) for e in encoded]
    yield from backing_off(lengths, batch_size, run, tokens=tokens_at_once(model))


def tokens_at_once(model: Model) -> int:
    """Tokens whose forward and backward pass keeps 30 % of the weights' memory, or 64 MB.

    A block keeps some 14 vectors of the hidden width and 4 of the MLP's for each token until its
    backward pass (norms, residuals, queries, keys, values, both gates, their product). Small
    batches cost little time on a processor: benchmarks/lga.py.
    """
    layers = model.layers
    weights = sum(p.numel() * p.element_size() for p in model.hf.parameters())
    kept = len(layers) * (14 * layers.d_model + 4 * layers.d_mlp) * model.dtype.itemsize
    return int(max(0.3 * weights, 64e6) / kept)


def backing_off(
    lengths: Sequence[int],
    batch_size: int,
    run: Callable[[list[int]], list[Row]],
    *,
    tokens: int | None = None,
) -> Iterator[list[Row]]:
    """Run length-sorted batches, halving the batch for good whenever memory runs out.

    With ``tokens`` a batch of several has at most so many tokens.

    Raises:
        UserError: a single fact does not fit.
    """
    if batch_size < 1:
        raise UserError(f"the batch size is {batch_size}", expected="1 or more")
    batches = length_batches(lengths, batch_size, tokens)
    what = "a single fact of {} tokens".format
    for _, rows in in_smaller_batches(batches, run, lambda i: what(lengths[i]), for_good=True):
        yield rows


def _row(fact: Fact) -> Row:
    return {
        "fact": fact.id,
        "old": fact.target_old,
        "new": fact.target,
        "old_is_generated": fact.target_old_is_generated,
    }


def old_text(model: Model, fact: Fact) -> Encoding:
    """The prompt with its old answer.

    Raises:
        UserError: the fact has none.
    """
    if fact.target_old is None:
        raise UserError(
            f"fact '{fact.id}' has no old answer",
            fix="Fill it with the model's own answer first (locate does so by itself)",
        )
    return model.encoder.fact(fact, fact.target_old)
