"""Short texts sampled from the model itself, to be put before a prompt.

Source: ROME's context templates (Meng et al. 2022, arXiv 2202.05262, section 3.1): the edit should
hold whatever stands before the question.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from goldenlayers.decoding import sample
from goldenlayers.errors import check_seed

if TYPE_CHECKING:
    from goldenlayers.models.model import Model


def sample_prefixes(model: Model, count: int, n_tokens: int, seed: int = 0) -> list[str]:
    """The empty prefix and ``count`` sampled ones of ``n_tokens`` tokens, each ending in ". ".

    Line breaks become spaces and quotation is left as it comes; a text that shows nothing is
    dropped, so there may be fewer.
    """
    check_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    texts = sample(model, count, n_tokens, generator) if count else []
    prefixes = [""]
    for text in texts:
        flat = " ".join(text.split()).rstrip(" .,;:")
        if flat:
            prefixes.append(flat + ". ")
    return prefixes
