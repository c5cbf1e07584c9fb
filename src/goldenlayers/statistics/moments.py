"""Second moments of keys: running sums of k kᵀ, and the statistics as the editors use them.

Accumulating is apart from the result: :class:`MomentSums` is updated, :class:`KeyStatistics` reads
what became of it, a covariance per layer, factorised on demand.

Shapes: B rows (texts of equal length), T tokens, F MLP width, S width of the sketch.
"""

from __future__ import annotations

import math
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from goldenlayers.covariance import DEFAULT_RIDGE, Covariance
from goldenlayers.errors import UserError

# Only the upper half of K Kᵀ is computed, in strips of this many rows; narrower strips waste less
# on the diagonal blocks but multiply more slowly.
STRIP = 192
SKETCH = 8
MEMORY_LIMIT = 4 << 30


@dataclass
class LayerSum:
    """The running sums of one layer.

    Attributes:
        total: (F, F) float64, the sum of k kᵀ; only the strips on and above the diagonal hold it.
        sketch: (S, F) float64, the sum over rows of y = Σ_t (Ωk) kᵀ, i.e. Ω times the total.
        squares: the sum over rows of ‖y‖², from which the spread between rows follows.
        open_rows: (B, S, F) float64, y of the rows of the unfinished batch.
    """

    total: Tensor
    sketch: Tensor
    squares: float = 0.0
    open_rows: Tensor | None = None


@dataclass
class MomentSums:
    """Sums of k kᵀ for several layers, fed batch by batch with rows of equally many tokens.

    Products are taken in float32 (float64 for a float64 model) and added up in float64. The
    relative error of a layer's mean is estimated on the way: Ω holds S random sign vectors, each
    row of text gives one independent estimate y of ΩC, and the standard error of their mean over
    ‖ΩC‖ stands for ‖Ĉ − C‖/‖C‖ in the Frobenius norm (E‖ΩA‖² = S‖A‖²).

    Args of :meth:`empty`:
        widths: F of each layer.
        memory_limit: bytes; larger sums are kept in files under ``folder`` instead of in memory.
    """

    layers: dict[int, LayerSum]
    n_tokens: int = 0
    n_rows: int = 0
    files: tempfile.TemporaryDirectory[str] | None = field(default=None, repr=False)

    @classmethod
    def empty(
        cls,
        widths: Mapping[int, int],
        *,
        memory_limit: int = MEMORY_LIMIT,
        folder: Path | None = None,
    ) -> MomentSums:
        files: tempfile.TemporaryDirectory[str] | None = None
        if 8 * sum(width * width for width in widths.values()) > memory_limit:
            files = tempfile.TemporaryDirectory(prefix="sums-", suffix=".part", dir=folder)

        def zeros(layer: int, width: int) -> Tensor:
            if files is None:
                return torch.zeros(width, width, dtype=torch.float64)
            path = Path(files.name) / f"{layer}.bin"
            mapped = np.memmap(path, dtype=np.float64, mode="w+", shape=(width, width))
            return torch.from_numpy(mapped)

        layers = {
            layer: LayerSum(zeros(layer, width), torch.zeros(SKETCH, width, dtype=torch.float64))
            for layer, width in widths.items()
        }
        return cls(layers, files=files)

    def add(self, layer: int, keys: Tensor) -> None:
        """Add keys (B, T, F) of the batch in hand; may be called again for its later tokens."""
        mine = self.layers[layer]
        if keys.dtype != torch.float64:
            keys = keys.float()
        keys = keys.contiguous()
        n_rows, n_tokens, width = keys.shape
        flat = keys.view(-1, width)  # (B·T, F)
        for start in range(0, width, STRIP):
            stop = min(start + STRIP, width)
            product = flat[:, start:stop].T @ flat[:, start:]  # (strip, F - start)
            mine.total[start:stop, start:] += product.cpu()
        # Few, long rows first: several times faster than the same products transposed.
        short = _signs(width).to(keys) @ flat.T  # (S, B·T)
        short = short.view(SKETCH, n_rows, n_tokens).transpose(0, 1)  # (B, S, T)
        rows = torch.bmm(short, keys).double().cpu()  # (B, S, F)
        mine.open_rows = rows if mine.open_rows is None else mine.open_rows + rows

    def end_batch(self, n_tokens: int) -> None:
        """Count the batch in hand, in which every layer saw ``n_tokens`` keys."""
        n_rows = 0
        for mine in self.layers.values():
            rows = mine.open_rows
            assert rows is not None
            mine.sketch += rows.sum(0)
            mine.squares += float(rows.square().sum())
            mine.open_rows = None
            n_rows = len(rows)
        self.n_rows += n_rows
        self.n_tokens += n_tokens

    def error(self, layer: int) -> float:
        """Estimated ‖Ĉ − C‖/‖C‖ of the layer's mean so far; infinite with fewer than 2 rows."""
        mine = self.layers[layer]
        if self.n_rows < 2:
            return math.inf
        mean = mine.sketch / self.n_rows
        norm = float(mean.square().sum())
        spread = max(0.0, mine.squares / self.n_rows - norm) / (self.n_rows - 1)
        return math.sqrt(spread / norm) if norm > 0 else math.inf

    def mean_error(self) -> float:
        """:meth:`error` averaged over the layers."""
        return sum(self.error(layer) for layer in self.layers) / len(self.layers)

    def mean(self, layer: int) -> Tensor:
        """C = E[k kᵀ] of a layer, (F, F) float64, exactly symmetric."""
        upper = torch.triu(self.layers[layer].total)
        upper += torch.triu(upper, 1).T
        return upper.div_(self.n_tokens)

    def close(self) -> None:
        """Remove the files that held the sums, if any did."""
        if self.files is not None:
            self.layers.clear()
            self.files.cleanup()


def _signs(width: int) -> Tensor:
    """Ω: (S, F) of ±1, always the same for a width."""
    generator = torch.Generator().manual_seed(width)
    return torch.randint(0, 2, (SKETCH, width), generator=generator).float().mul_(2).sub_(1)


# Covariances kept in memory: a factorised one of F = 1536 takes 38 MB, of F = 14336 3.3 GB.
KEEP_BYTES = 2 << 30


class MissingLayerError(UserError, KeyError):
    """The statistics do not hold this layer."""

    def __str__(self) -> str:
        return str(self.args[0])  # KeyError would quote the message


@dataclass(eq=False, repr=False)
class KeyStatistics(Mapping[int, Covariance]):
    """Layer → :class:`~goldenlayers.covariance.Covariance` of the down projection's input.

    A layer is read from disk (memory-mapped) when first asked for. Covariances with their factors
    are kept up to ``keep_bytes``, the least recently used one is dropped first, and the last one
    used always stays.

    Attributes:
        layers: in rising order.
        read: gives a layer's C, (F, F); can be sent to another process if that is.
        n_tokens: how many tokens the means are over (0: no statistics at all, C is the identity).
        source: what text it was, in words.
        settled: whether collecting stopped early because the estimate had settled.
        errors: layer → estimated ‖Ĉ − C‖/‖C‖ (Frobenius).
        ridge: share of the mean diagonal that every covariance adds to its diagonal.
        folder: where it is cached, None if nowhere.
        keep_bytes: bounds the covariances that are kept in memory.
    """

    layers: tuple[int, ...]
    read: Callable[[int], Tensor]
    n_tokens: int
    source: str
    settled: bool = False
    errors: Mapping[int, float] = field(default_factory=dict)
    ridge: float = DEFAULT_RIDGE
    folder: Path | None = None
    keep_bytes: int = KEEP_BYTES
    _kept: OrderedDict[int, Covariance] = field(default_factory=OrderedDict, init=False)

    @classmethod
    def identity(cls, widths: Mapping[int, int]) -> KeyStatistics:
        """C = I for each layer of width F: what an editor does without statistics."""
        read = partial(_identity, dict(widths))
        return cls(tuple(sorted(widths)), read, 0, "none (identity)", ridge=0.0)

    @property
    def is_identity(self) -> bool:
        """Whether there are no statistics at all: C is the identity."""
        return self.n_tokens == 0

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
            self._kept[layer] = Covariance.from_matrix(self.read(layer), self.ridge)
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
