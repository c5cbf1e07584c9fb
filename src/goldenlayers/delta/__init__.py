"""What an edit changed: small factors per weight matrix, to apply, undo, add, save and share."""

from goldenlayers.delta.batched import Selection, applied_per_example
from goldenlayers.delta.core import Norms, WeightDelta
from goldenlayers.delta.factors import Dense, LowRank

__all__ = ["Dense", "LowRank", "Norms", "Selection", "WeightDelta", "applied_per_example"]
