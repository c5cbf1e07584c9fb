"""Facts, settings and editors that the tests of evaluation share."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from goldenlayers import decoding
from goldenlayers.editors import EDITORS, EditSettings
from goldenlayers.errors import UserError
from goldenlayers.evaluation import evaluate, generation, reading
from goldenlayers.facts import Fact, Probe
from goldenlayers.models.model import Model

LAYER = 1
SETTINGS = EditSettings(steps=40, prefixes=1, prefix_tokens=3, lr=0.5, kl_factor=0.0)
PLACES = [("France", "Rome"), ("Italy", "Paris"), ("Brazil", "Ulm"), ("Japan", "gold")]


def facts() -> list[Fact]:
    return [
        Fact(
            id=subject.lower(),
            subject=subject,
            prompt=f"The capital of {subject} is",
            target=answer,
            rephrasings=(f"The capital city of {subject} is",),
            locality=(Probe("The composer of the opera is", "Albert", "neighborhood"),),
        )
        for subject, answer in PLACES
    ]


def run(model: Model, statistics: Any, method: str = "rome", **options: Any) -> Any:
    given = {"layer": LAYER, "settings": SETTINGS, "statistics": statistics, **options}
    return evaluate(model, facts(), method=method, **given)


def means(rows: Any, metric: str) -> float:
    scores = [r["score"] for r in rows if r["metric"] == metric and r["score"] is not None]
    return sum(scores) / len(scores)


class Killed(Exception):  # noqa: N818
    pass


class Choosy:
    """An editor that refuses some facts."""

    needs_statistics = True

    def __init__(self, refuse: set[str], inner: str = "rome") -> None:
        self.refuse, self.name = refuse, inner
        self.inner = EDITORS[inner]
        self.edits_together = self.inner.edits_together

    def each(self, bench: Any, facts: Any, layer: int) -> Any:
        self._look(facts)
        return self.inner.each(bench, facts, layer)

    def together(self, bench: Any, facts: Any, layer: int) -> Any:
        self._look(facts)
        return self.inner.together(bench, facts, layer)

    def _look(self, facts: Any) -> None:
        if any(fact.id in self.refuse for fact in facts):
            raise UserError("the subject's key is abnormal")


class Greedy(Choosy):
    """An editor for which memory suffices for ``most`` facts."""

    def __init__(self, most: int, inner: str = "rome") -> None:
        super().__init__(set(), inner)
        self.most = most

    def _look(self, facts: Any) -> None:
        if len(facts) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")


def tight(monkeypatch: pytest.MonkeyPatch, most: int) -> list[int]:
    """Let forward reading of more than ``most`` rows run out of memory; returns the sizes tried."""
    tried: list[int] = []

    def within(real: Any) -> Any:
        def run(model: Model, ids: Any, *rest: Any, **more: Any) -> Any:
            tried.append(len(ids))
            if len(ids) > most:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return real(model, ids, *rest, **more)

        return run

    for module, name in (
        (reading, "final_hidden"),
        (decoding, "final_hidden"),
        (decoding, "last_logits"),
        (generation, "last_logits"),
    ):
        monkeypatch.setattr(module, name, within(getattr(module, name)))
    return tried
