"""Keys, values and block outputs at the lookup token, on whatever the model is right now; the texts
put before prompts to read them there; and what a raw MLP output adds to the residual stream.

Most models add the down projection's output as it is. Gemma 2/3, OLMo 2 and GLM-4 normalise it
first and Granite scales it, so a change wanted in the residual stream (MEMIT's r) is not the change
to write (:class:`Contribution`).

Source of the texts: ROME's context templates (Meng et al. 2022, arXiv 2202.05262, section 3.1): the
edit should hold whatever stands before the question.

Shapes: B facts, D model width, F MLP width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from goldenlayers.decoding import sample
from goldenlayers.editors.partial_forward import by_row
from goldenlayers.editors.values import fact_prompts
from goldenlayers.errors import check_seed
from goldenlayers.facts import Fact
from goldenlayers.hooks import capture, final_hidden
from goldenlayers.models.offload import runs_on
from goldenlayers.tokens import length_batches, pad_ids

if TYPE_CHECKING:
    from goldenlayers.models import Model

_STEPS = 300


@dataclass(frozen=True, eq=False)
class Contribution:
    """m ↦ scale · norm(m): what raw MLP outputs m (B, D) add to the residual stream."""

    norm: nn.Module | None
    scale: float

    @classmethod
    def of(cls, model: Model, layer: int) -> Contribution:
        """That of a layer of a model."""
        config = model.config.get_text_config()
        scale = getattr(config, "residual_multiplier", None)
        return cls(model.layers[layer].mlp_output_norm, 1.0 if scale is None else float(scale))

    def __call__(self, raw: Tensor) -> Tensor:
        """What ``raw`` (B, D) adds, (B, D)."""
        if self.norm is None:
            return raw * self.scale
        parameter = next(self.norm.parameters(), raw)
        inside = raw.to(runs_on(self.norm), parameter.dtype)
        return self.norm(inside).to(raw.dtype).to(raw.device) * self.scale

    def raw_change(self, raw: Tensor, wanted: Tensor) -> Tensor:
        """The change u (B, D) of ``raw`` for which ``self(raw + u) − self(raw)`` is ``wanted``.

        Exact without a norm. A norm fixes the length of what it lets through, so the wanted amount
        can be out of reach: u then comes as near as Adam gets in a fixed number of steps, each
        fact for itself.
        """
        if self.norm is None:
            return wanted / self.scale
        goal = (self(raw) + wanted).detach()
        length = raw.norm(dim=1, keepdim=True).clamp_min(1e-12)  # (B, 1)
        size = (wanted**2).sum(1).clamp_min(1e-30)
        with torch.enable_grad():
            change = torch.zeros_like(raw, requires_grad=True)  # in lengths of raw
            adam = torch.optim.Adam([change], lr=0.02, betas=(0.9, 0.99))
            for _ in range(_STEPS):
                gap = ((self(raw + change * length) - goal) ** 2).sum(1) / size
                adam.zero_grad()
                gap.sum().backward()
                adam.step()
        return (change * length).detach()


def sample_prefixes(model: Model, count: int, n_tokens: int, seed: int = 0) -> list[str]:
    """The empty prefix and ``count`` sampled ones of ``n_tokens`` tokens, each ending in ". ".

    Line breaks become spaces and quotation is left as it comes; a text that shows nothing is
    dropped, so there may be fewer.
    """
    check_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    texts = sample(model, count, n_tokens, generator) if count else []
    prefixes = [""]
    for text in texts:
        flat = " ".join(text.split()).rstrip(" .,;:")
        if flat:
            prefixes.append(flat + ". ")
    return prefixes


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


_BATCH = 32  # rows per forward pass


@torch.no_grad()
def lookup_states(
    model: Model,
    facts: Sequence[Fact],
    prefixes: Sequence[str],
    layer: int,
    top: nn.Module,
    select: Callable[[list[int]], None] | None = None,
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
    dtype = torch.promote_types(model.dtype, torch.float32)
    keys = torch.zeros(len(facts), down.in_features, dtype=dtype)
    values = torch.zeros(len(facts), down.out_features, dtype=dtype)
    tops = torch.zeros(len(facts), model.layers.d_model, dtype=dtype)
    for members in length_batches([len(encoding) for _, _, encoding in rows], _BATCH):
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
