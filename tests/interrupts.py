"""Ctrl-C at a chosen moment."""

from __future__ import annotations

from typing import Any

import pytest

from goldenlayers.locating.building import RankingBuilder


def stop_locating_at_the_second_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first batch of facts is ranked, the second is interrupted."""
    real = RankingBuilder.update

    def stop(self: RankingBuilder, rows: Any) -> Any:
        if len(self):
            raise KeyboardInterrupt
        return real(self, rows)

    monkeypatch.setattr(RankingBuilder, "update", stop)
