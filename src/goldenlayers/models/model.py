"""A model in hand: the transformers model, its tokenizer and its layer map."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from goldenlayers.models.layers import LayerMap
    from goldenlayers.tokens import TextEncoder

_CHUNK = 1 << 24  # elements hashed at a time: bounds the extra memory to some 100 MB


@dataclass(eq=False)
class Model:
    """A causal language model in evaluation mode with frozen weights.

    Make one with :func:`goldenlayers.models.load` or, from a transformers model that you already
    hold, with :meth:`wrap`.

    Attributes:
        name: what the user called it.
        hf: the transformers model; no parameter requires a gradient.
        tokenizer: its tokenizer.
        layers: where its blocks and their matrices are.

    """

    name: str
    hf: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    layers: LayerMap
    _fingerprint: str | None = field(default=None, repr=False)

    @classmethod
    def wrap(
        cls,
        hf_model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str = "custom",
        layer_paths: Mapping[str, str] | None = None,
    ) -> Model:
        """Take over a transformers model: sets evaluation mode and freezes every parameter.

        Args:
            hf_model: a decoder-only language model with its head.
            tokenizer: its tokenizer.
            name: what reports call the model.
            layer_paths: module paths that override what the layer map would find.

        Raises:
            UserError: the model has no decoder blocks that the layer map can find.

        """
        from goldenlayers.models.layers import LayerMap

        hf_model.eval()
        hf_model.requires_grad_(False)
        layers = LayerMap.of(hf_model, layer_paths)
        return cls(name=name, hf=hf_model, tokenizer=tokenizer, layers=layers)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.hf.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return next(p.dtype for p in self.hf.parameters() if p.is_floating_point())

    @property
    def config(self) -> PretrainedConfig:
        """The transformers configuration."""
        return self.hf.config

    @property
    def n_layers(self) -> int:
        """Number of decoder blocks."""
        return len(self.layers)

    @cached_property
    def encoder(self) -> TextEncoder:
        """Turns texts into tokens with their spans, within the model's context."""
        from goldenlayers.tokens import TextEncoder, context_length

        return TextEncoder(self.tokenizer, context_length(self.config))

    def fingerprint(self) -> str:
        """SHA-256 over all weights, the same in several number formats: see :func:`hash_weights`.

        Computed once and kept: code that changes weights calls :meth:`forget_fingerprint`.
        """
        if self._fingerprint is None:
            self._fingerprint = hash_weights(self.hf)
        return self._fingerprint

    def forget_fingerprint(self) -> None:
        """Say that the weights have changed, so that the fingerprint is computed anew."""
        self._fingerprint = None


def hash_weights(hf_model: PreTrainedModel) -> str:
    """SHA-256 over the names, shapes and values of all weights, as hexadecimal text.

    Values are rounded to bfloat16 first, so that the same checkpoint loaded in float32, float64
    or bfloat16 has one fingerprint (float16 rounds differently). Tied weights count once.
    """
    import torch

    digest = hashlib.sha256()
    for name, parameter in sorted(hf_model.named_parameters()):  # tied weights come once
        digest.update(f"{name} {tuple(parameter.shape)}\n".encode())
        values = parameter.detach().reshape(-1)
        for start in range(0, values.numel(), _CHUNK):
            piece = values[start : start + _CHUNK].to(torch.bfloat16).cpu().contiguous()
            digest.update(piece.view(torch.int16).numpy().data)  # numpy has no bfloat16
    return digest.hexdigest()
