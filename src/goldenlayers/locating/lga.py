"""Layer Gradient Analysis and gradient saliency: one row per fact, from gradients alone.

Sources: LGA, Datta, Liu, Chhabra, arXiv 2602.20207, section 5.1 and appendix A; saliency, the
SaLEM-style baseline (mean |∇_{θ_L} ℓ(Q ∪ K')|). Shapes: B facts, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from goldenlayers.errors import UserError
from goldenlayers.facts import Fact
from goldenlayers.locating.base import Loss, Row, Scope, Tokens
from goldenlayers.locating.gradients import observe_factors, only, pair_products
from goldenlayers.progress import in_smaller_batches
from goldenlayers.tokens import Encoding, length_batches

if TYPE_CHECKING:
    from torch import Tensor

    from goldenlayers.locating.gradients import _Input
    from goldenlayers.models import Model
    from goldenlayers.models.layers import Matrix


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
    yield from backing_off(lengths, batch_size, run)


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
    sizes = [
        sum(m.in_features * m.out_features for m in block.matrices(scope))
        for block in model.layers.blocks
    ]

    def run(members: list[int]) -> list[Row]:
        total = torch.zeros(len(members), len(sizes), dtype=torch.float64)

        def on_factors(layer: int, _matrix: Matrix, source: _Input, g: Tensor) -> None:
            x = source.x.reshape(g.shape[0], g.shape[1], -1)
            half = g.dtype in (torch.float16, torch.bfloat16)
            x, g = (x.float(), g.float()) if half else (x, g)
            for b in range(len(members)):
                total[b, layer] += float((g[b].T @ x[b]).abs().sum())

        some = [encoded[i] for i in members]
        observe_factors(model, some, scope, loss, only(tokens, some, on_factors))
        scores = total / torch.tensor(sizes, dtype=torch.float64)
        return [_row(facts[i]) | {"phi": scores[b].tolist()} for b, i in enumerate(members)]

    yield from backing_off([len(e) for e in encoded], batch_size, run)


def backing_off(
    lengths: Sequence[int], batch_size: int, run: Callable[[list[int]], list[Row]]
) -> Iterator[list[Row]]:
    """Run length-sorted batches, halving the batch for good whenever memory runs out.

    Raises:
        UserError: a single fact does not fit.
    """
    if batch_size < 1:
        raise UserError(f"the batch size is {batch_size}", expected="1 or more")
    batches = length_batches(lengths, batch_size)
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
