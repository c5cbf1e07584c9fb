"""Keys, values and block outputs at the lookup token, on whatever the model is right now.

Shapes: B facts, D model width, F MLP width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from goldenlayers.editors.partial_forward import by_row
from goldenlayers.editors.values import fact_prompts
from goldenlayers.facts import Fact
from goldenlayers.hooks import capture, final_hidden
from goldenlayers.tokens import length_batches, pad_ids

if TYPE_CHECKING:
    from goldenlayers.models.model import Model


@dataclass(frozen=True, eq=False)
class LookupStates:
    """At each fact's lookup token: ``keys`` (B, F), the down projection's input, averaged over
    prompts by :func:`key_weights`; ``values`` (B, D), its output for the bare prompt; ``top``
    (B, D), the output of the top module for the bare prompt.
    """

    keys: Tensor
    values: Tensor
    top: Tensor


def key_weights(n_prompts: int) -> Tensor:
    """What each prompt's key weighs in a fact's key, (P,): the bare one half, the others the rest.

    Keys are averaged within each kind of context, then over the kinds, and the bare prompt is a
    kind by itself: so the released code of MEMIT, EMMET, AlphaEdit and PMET (``compute_ks``). ROME
    and R-ROME weigh all prompts alike.
    """
    if n_prompts == 1:
        return torch.ones(1, dtype=torch.float64)
    return torch.tensor([0.5, *[0.5 / (n_prompts - 1)] * (n_prompts - 1)], dtype=torch.float64)


@torch.no_grad()
def lookup_states(
    model: Model,
    facts: Sequence[Fact],
    prefixes: Sequence[str],
    layer: int,
    top: nn.Module,
    select: Callable[[list[int]], None] | None = None,
    *,
    batch_size: int = 32,
) -> LookupStates:
    """Run every fact's prompts (bare first); read layer ``layer``'s projection and ``top``.

    ``select`` is told, before each batch, which fact each of its rows belongs to.
    """
    rows = [
        (i, p, encoding)
        for i, fact in enumerate(facts)
        for p, encoding in enumerate(fact_prompts(model, fact, prefixes, ""))
    ]
    down = model.layers[layer].down
    weights = key_weights(len(rows) // len(facts)).tolist()
    dtype = torch.float64 if down.weight.dtype == torch.float64 else torch.float32
    keys = torch.zeros(len(facts), down.in_features, dtype=dtype)
    values = torch.zeros(len(facts), down.out_features, dtype=dtype)
    tops = torch.zeros(len(facts), model.layers.d_model, dtype=dtype)
    for members in length_batches([len(encoding) for _, _, encoding in rows], batch_size):
        part = [rows[r] for r in members]
        batch = pad_ids([encoding.ids for _, _, encoding in part], model.device)
        if select is not None:
            select([i for i, _, _ in part])
        with (
            capture({"key": down.module}, inputs=True) as given,
            capture({"value": down.module, "top": top}) as gave,
        ):
            final_hidden(model, batch.ids)
        key, value, out = (by_row(x, batch.ids) for x in (given["key"], gave["value"], gave["top"]))
        for b, (i, p, encoding) in enumerate(part):
            assert encoding.lookup is not None  # held by fact_prompts
            keys[i] += weights[p] * key[b, encoding.lookup].cpu()
            if p == 0:
                values[i] = value[b, encoding.lookup].cpu()
                tops[i] = out[b, encoding.lookup].cpu()
    return LookupStates(keys, values, tops)
