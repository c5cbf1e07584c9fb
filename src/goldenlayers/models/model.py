"""A model in hand: the transformers model, its tokenizer and its layer map."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from goldenlayers.errors import UserError

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from goldenlayers.models.layers import LayerMap
    from goldenlayers.tokens import TextEncoder

KIND = "w2-"  # every fingerprint begins so; older versions hashed values rounded to bfloat16


def comparable(one: str, other: str) -> bool:
    """Whether two fingerprints are of one kind, so that they differ only where weights differ."""
    return one.startswith(KIND) == other.startswith(KIND)


def check_model(model: object) -> Model:
    """``model``, if it is one of ours.

    Raises:
        UserError: it is not, such as a transformers model as it stands.
    """
    if isinstance(model, Model):
        return model
    raise UserError(
        f"the model is a {type(model).__name__}",
        expected="a model that gl.load gave, or gl.Model.wrap",
        fix="Wrap a transformers model with its tokenizer: gl.Model.wrap(model, tokenizer)",
    )


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
        folder: the checkpoint it was loaded from, None for a model made in memory.
    """

    name: str
    hf: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    layers: LayerMap
    folder: Path | None = None
    _fingerprint: str | None = field(default=None, repr=False)
    _old_fingerprints: set[str] | None = field(default=None, repr=False)

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
        """Names the weights: see :mod:`goldenlayers.models.weights`.

        The same in every number format that the checkpoint is loaded in. Computed once and kept:
        code that changes weights calls :meth:`forget_fingerprint`.
        """
        from goldenlayers.models.weights import fingerprint

        if self._fingerprint is None:
            self._fingerprint = fingerprint(self.hf, self.folder)
        return self._fingerprint

    def is_known_as(self, fingerprint: str) -> bool:
        """Whether these are the weights that ``fingerprint`` names, also one of older versions."""
        from goldenlayers.models.weights import old_fingerprints

        if comparable(fingerprint, mine := self.fingerprint()):
            return fingerprint == mine
        if self._old_fingerprints is None:
            self._old_fingerprints = set(old_fingerprints(self.hf, self.folder))
        return fingerprint in self._old_fingerprints

    def forget_fingerprint(self) -> None:
        """Say that the weights have changed, so that the fingerprint is computed anew."""
        self._fingerprint = self._old_fingerprints = None
