"""Facts, settings and editors that the tests of evaluation share."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from goldenlayers import decoding
from goldenlayers.editors import Editor, make_editor
from goldenlayers.errors import UserError
from goldenlayers.evaluation import evaluate, generation, reading
from goldenlayers.facts import Fact, Probe
from goldenlayers.models import Model
from goldenlayers.progress import Progress

LAYER = 1
SETTINGS = {
    "adam": True,
    "steps": 40,
    "prefixes": 1,
    "prefix_tokens": 3,
    "lr": 0.5,
    "kl_factor": 0.0,
}
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


def quick(method: str, **settings: Any) -> Editor:
    """An editor with those of ``SETTINGS`` that it has."""
    own = {f.name for f in dataclasses.fields(make_editor(method))}
    return make_editor(method, **{n: v for n, v in SETTINGS.items() if n in own}, **settings)


def run(model: Model, statistics: Any, method: Any = "rome", **options: Any) -> Any:
    """``evaluate`` with quick settings; what ``Progress`` holds may be given as options, too."""
    names = {f.name for f in dataclasses.fields(Progress)}
    progress = Progress(**{name: options.pop(name) for name in names & options.keys()})
    chosen = quick(method) if isinstance(method, str) else method
    given = {"layer": LAYER, "statistics": statistics, **options}
    return evaluate(model, facts(), chosen, progress=progress, **given)


def means(rows: Any, metric: str) -> float:
    scores = [r["score"] for r in rows if r["metric"] == metric and r["score"] is not None]
    return sum(scores) / len(scores)


class Killed(Exception):  # noqa: N818
    pass


class Choosy(Editor):
    """An editor that refuses some facts."""

    needs_statistics = True
    refuse: set[str]
    inner: Editor
    calls: list[int]

    def __init__(self, refuse: set[str], inner: str | Editor = "rome") -> None:
        inner = quick(inner) if isinstance(inner, str) else inner
        vars(self).update(refuse=refuse, inner=inner, calls=[])

    name = property(lambda self: self.inner.name)  # type: ignore[assignment]
    edits_together = property(lambda self: self.inner.edits_together)  # type: ignore[assignment]

    def to_json(self) -> dict[str, Any]:
        return self.inner.to_json()

    def each(self, work: Any, facts: Any) -> Any:
        self._look(facts)
        return self.inner.each(self._inside(work), facts)

    def together(self, work: Any, facts: Any) -> Any:
        self.calls.append(len(facts))
        self._look(facts)
        return self.inner.together(self._inside(work), facts)

    def _inside(self, work: Any) -> Any:
        return dataclasses.replace(work, editor=self.inner)

    def _look(self, facts: Any) -> None:
        if any(fact.id in self.refuse for fact in facts):
            raise UserError("the subject's key is abnormal")


class Greedy(Choosy):
    """An editor for which memory suffices for ``most`` facts."""

    most: int

    def __init__(self, most: int, inner: str = "rome") -> None:
        super().__init__(set(), inner)
        vars(self).update(most=most)

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
