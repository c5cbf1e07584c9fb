"""How an MLP's raw output joins the residual stream, and which raw change adds a wanted amount.

Most models add the down projection's output as it is. Gemma 2/3, OLMo 2 and GLM-4 normalise it
first and Granite scales it, so a change wanted in the residual stream (MEMIT's r) is not the change
to write.

Shapes: B facts, D model width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from goldenlayers.models.model import Model

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
        inside = raw.to(parameter.device, parameter.dtype)
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
