"""Second moments of keys: C = E[k kᵀ] per layer, all layers in one pass over a text."""

from goldenlayers.statistics.collect import key_statistics
from goldenlayers.statistics.moments import KeyStatistics, MissingLayerError

__all__ = ["KeyStatistics", "MissingLayerError", "key_statistics"]
