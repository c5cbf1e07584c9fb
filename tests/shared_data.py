"""The public data files: in ``GOLDENLAYERS_SHARED``, or in ``shared`` beside the repository."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def _folder() -> Path:
    given = os.environ.get("GOLDENLAYERS_SHARED")
    root = Path(given) if given else Path(__file__).resolve().parents[2] / "shared"
    return root / "data" if (root / "data").is_dir() else root


DATA = _folder()
needs_data = pytest.mark.skipif(
    not (DATA / "counterfact").is_dir(),
    reason="no shared data: GOLDENLAYERS_SHARED names its folder",
)
