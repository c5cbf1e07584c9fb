"""Key statistics as the editors use them: a covariance per layer, read and factorised on demand.

Shapes: F MLP width.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from goldenlayers.covariance import DEFAULT_RIDGE, Covariance
from goldenlayers.errors import UserError

# Covariances kept in memory: a factorised one of F = 1536 takes 38 MB, of F = 14336 3.3 GB.
KEEP_BYTES = 2 << 30


class MissingLayerError(UserError, KeyError):
    """The statistics do not hold this layer."""

    def __str__(self) -> str:
        return str(self.args[0])  # KeyError would quote the message


class KeyStatistics(Mapping[int, Covariance]):
    """Layer → :class:`~goldenlayers.covariance.Covariance` of the down projection's input.

    A layer is read from disk (memory-mapped) when first asked for. Covariances with their factors
    are kept up to ``keep_bytes``, the least recently used one is dropped first, and the last one
    used always stays.

    Attributes:
        n_tokens: how many tokens the means are over (0 for the identity).
        settled: whether collecting stopped early because the estimate had settled.
        errors: layer → estimated ‖Ĉ − C‖/‖C‖ (Frobenius).
        source: what text it was, in words.
        ridge: share of the mean diagonal that every covariance adds to its diagonal.
        is_identity: C is the identity: no statistics at all.
        folder: where it is cached, None if nowhere.
    """

    def __init__(
        self,
        layers: Sequence[int],
        read: Callable[[int], Tensor],
        *,
        n_tokens: int,
        source: str,
        settled: bool = False,
        errors: Mapping[int, float] | None = None,
        ridge: float = DEFAULT_RIDGE,
        is_identity: bool = False,
        folder: Path | None = None,
        keep_bytes: int = KEEP_BYTES,
    ) -> None:
        self.layers = tuple(sorted(layers))
        self.n_tokens, self.source, self.settled = n_tokens, source, settled
        self.errors = dict(errors or {})
        self.ridge, self.is_identity, self.folder = ridge, is_identity, folder
        self.keep_bytes = keep_bytes
        self._read = read
        self._kept: OrderedDict[int, Covariance] = OrderedDict()

    @classmethod
    def identity(cls, widths: Mapping[int, int]) -> KeyStatistics:
        """C = I for each layer of width F: what an editor does without statistics."""
        return cls(
            list(widths),
            partial(_identity, dict(widths)),  # can be sent to another process
            n_tokens=0,
            source="none (identity)",
            ridge=0.0,
            is_identity=True,
        )

    def __getitem__(self, layer: int) -> Covariance:
        """The layer's covariance.

        Raises:
            MissingLayerError: the layer was not collected (a KeyError too).
        """
        if layer not in self._kept:
            if layer not in self.layers:
                raise MissingLayerError(
                    f"the key statistics do not hold layer {layer!r}",
                    expected="one of " + ", ".join(map(str, self.layers)),
                )
            self._kept[layer] = Covariance.from_matrix(self._read(layer), self.ridge)
        self._kept.move_to_end(layer)
        # Twice: the factor is as large as the matrix.
        while len(self._kept) > 1 and self.keep_bytes < 2 * sum(
            covariance.moment.nbytes for covariance in self._kept.values()
        ):
            self._kept.popitem(last=False)
        return self._kept[layer]

    def __iter__(self) -> Iterator[int]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __contains__(self, layer: object) -> bool:
        return layer in self.layers

    def describe(self) -> str:
        """In one line: source, tokens, how far the estimate has settled."""
        if self.is_identity:
            return "NO key statistics: C is the identity"
        worst = max(self.errors.values(), default=float("nan"))
        mean = sum(self.errors.values()) / max(1, len(self.errors))
        return (
            f"key statistics of {len(self)} layers from {self.n_tokens} tokens of {self.source}"
            f"{', settled early' if self.settled else ''} "
            f"(relative error about {mean:.1%}, worst layer {worst:.1%}), ridge {self.ridge:g}"
        )

    def __repr__(self) -> str:
        return f"<KeyStatistics: {self.describe()}>"


def _identity(widths: Mapping[int, int], layer: int) -> Tensor:
    return torch.eye(widths[layer])
