"""The truth a layer choice is judged by, from the rows of a sweep; no model is needed."""

from __future__ import annotations

from goldenlayers.truth.generalisation import Transfer, TransferMatrix, split_half, transfer_matrix
from goldenlayers.truth.numbers import Interval
from goldenlayers.truth.record import to_json
from goldenlayers.truth.table import OVERALL, Truth

__all__ = [
    "OVERALL",
    "Interval",
    "Transfer",
    "TransferMatrix",
    "Truth",
    "split_half",
    "to_json",
    "transfer_matrix",
]
