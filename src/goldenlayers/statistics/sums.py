"""The running sums of k kᵀ that key statistics come from.

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
    """The running sums of one layer, in float64."""

    # (F, F), the sum of k kᵀ; only the strips on and above the diagonal hold it
    total: Tensor
    sketch: Tensor  # (S, F), the sum over rows of y = Σ_t (Ωk) kᵀ, i.e. Ω times the total
    squares: float = 0.0  # the sum over rows of ‖y‖², from which the spread between rows follows
    open_rows: Tensor | None = None  # (B, S, F), y of the rows of the unfinished batch


@dataclass
class MomentSums:
    """Sums of k kᵀ for several layers, fed batch by batch with rows of equally many tokens.

    Products are taken in float32 (float64 for a float64 model) and added up in float64. The
    relative error of a layer's mean is estimated on the way: Ω holds S random sign vectors, each
    row of text gives one independent estimate y of ΩC, and the standard error of their mean over
    ‖ΩC‖ stands for ‖Ĉ − C‖/‖C‖ in the Frobenius norm (E‖ΩA‖² = S‖A‖²).
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
        device: torch.device | None = None,
    ) -> MomentSums:
        """No sums yet, of layers of width F; more than ``memory_limit`` bytes are in ``folder``.

        They are on ``device`` if that is a GPU with twice the room for them: else every batch
        would send F² numbers a layer to the processor.
        """
        needed = 8 * sum(width * width for width in widths.values())
        on_gpu = device is not None and device.type == "cuda"
        on_gpu = on_gpu and torch.cuda.mem_get_info(device)[0] > 2 * needed
        files: tempfile.TemporaryDirectory[str] | None = None
        if not on_gpu and needed > memory_limit:
            files = tempfile.TemporaryDirectory(prefix="sums-", suffix=".part", dir=folder)

        def zeros(layer: int, width: int) -> Tensor:
            if files is None:
                where = device if on_gpu else None
                return torch.zeros(width, width, dtype=torch.float64, device=where)
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
            mine.total[start:stop, start:] += product.to(mine.total.device)
        generator = torch.Generator().manual_seed(width)  # Ω is always the same for a width
        signs = torch.randint(0, 2, (SKETCH, width), generator=generator).float().mul_(2).sub_(1)
        # Few, long rows first: several times faster than the same products transposed.
        short = signs.to(keys) @ flat.T  # (S, B·T)
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

    def mean(self, layer: int) -> Tensor:
        """C = E[k kᵀ] of a layer, (F, F) float64 on the processor, exactly symmetric."""
        upper = torch.triu(self.layers[layer].total)
        upper += torch.triu(upper, 1).T
        return upper.div_(self.n_tokens).cpu()

    def close(self) -> None:
        """Remove the files that held the sums, if any did."""
        if self.files is not None:
            self.layers.clear()
            self.files.cleanup()
