"""Sums of k kᵀ over many tokens for many layers at once, and how far their means have settled.

Accumulating is apart from the result: sums are updated here, frozen by :meth:`MomentSums.mean`.

Shapes: B rows (texts of equal length), T tokens, F MLP width, S width of the sketch.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

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
