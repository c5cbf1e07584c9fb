"""Models: where they come from, how they are cached, and how they are laid out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from goldenlayers.models.model import Model
from goldenlayers.models.packaged import ModelRow, clear_cache, list_models, verify_cache
from goldenlayers.models.sources import load, locate, resolve_device

if TYPE_CHECKING:
    from goldenlayers.models.layers import Block, LayerMap, Matrix

__all__ = [
    "Block",
    "LayerMap",
    "Matrix",
    "Model",
    "ModelRow",
    "clear_cache",
    "list_models",
    "load",
    "locate",
    "resolve_device",
    "verify_cache",
]


def __getattr__(name: str) -> Any:
    """Import the layer map's classes when they are asked for: they need torch."""
    if name in ("Block", "LayerMap", "Matrix"):
        from goldenlayers.models import layers

        return getattr(layers, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
