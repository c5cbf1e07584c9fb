"""Results that other batches, or another processor, gave: equal, but for the last digits."""

from __future__ import annotations

from typing import Any

import pytest


def alike(wanted: Any, *, rel: float = 1e-3, abs: float = 1e-4) -> Any:
    """``wanted`` for an ``==``: floats at any depth may be a little off, all else is equal.

    A row's sums depend in their last bits on the rows beside it, on the threads and on the
    processor's instructions, and an editor's steps enlarge that. What tests tell apart (another
    edit, another fact, none) moves a score by several percent at least.
    """
    if isinstance(wanted, float):
        return pytest.approx(wanted, rel=rel, abs=abs, nan_ok=True)
    if isinstance(wanted, dict):
        return {key: alike(value, rel=rel, abs=abs) for key, value in wanted.items()}
    if isinstance(wanted, list | tuple):
        return type(wanted)(alike(value, rel=rel, abs=abs) for value in wanted)
    return wanted
