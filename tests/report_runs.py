"""Made-up runs of every kind, with hostile texts wherever a run holds text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from comparing import write_run

from goldenlayers.checking import Check, Probed
from goldenlayers.checking.probes import Part
from goldenlayers.locating.base import Scoring
from goldenlayers.locating.building import RankingBuilder
from goldenlayers.truth import Truth, to_json

EVIL = "<script>window.evil=1</script>\"'&{{7*7}}<img src=x onerror=window.evil=2>"
L, B = 6, 12
MODEL = {"name": f"model {EVIL}", "fingerprint": "w2-aa", "dtype": "float32"}
DATA = {"name": f"data {EVIL}", "sha256": "b" * 64, "facts": B}
ORIGIN: dict[str, Any] = {"model": MODEL, "data": DATA}


def sweep(place: Path, name: str = "swept", editor: str = "rome", best: int = 2) -> Path:
    rng = np.random.default_rng(best)
    rows = [
        {
            "fact": f"fact {f} {EVIL}", "layer": layer, "metric": metric, "probe": 0,
            "score": float(np.clip(80 - 9 * abs(layer - best) + rng.normal(0, 9), 0, 100)),
        }
        for f in range(B)
        for layer in range(L)
        for metric in ("rewrite", "locality")
    ]  # fmt: skip
    summary = to_json(Truth.from_rows(rows)) | {
        "method": editor, "model": MODEL["name"], "fingerprint": "w2-aa", "data": DATA["name"],
        "n_layers": L, "seconds": 1.5,
    }  # fmt: skip
    files = {"scores.jsonl": rows, "summary.json": summary}
    return write_run(place, name, "sweep", files, settings={"seed": 0, "note": EVIL}, **ORIGIN)


def choice(place: Path, name: str = "located") -> Path:
    rng = np.random.default_rng(0)
    rows = [
        {"fact": f"p{i}", "phi": [1 + (j == 2) + 20 * (j == 5) + rng.random() for j in range(L)]}
        for i in range(9)
    ]
    ranking = RankingBuilder("lga", L, Scoring(), bootstrap=50).update(rows).result(model=EVIL)
    files = {"per_fact.jsonl": rows, "ranking.json": ranking.to_json()}
    return write_run(place, name, "locate", files, settings={"method": "lga"}, **ORIGIN)


def comparison(place: Path, name: str = "compared") -> Path:
    choices = [
        {"name": name, "layer": layer, "score": 70.0, "regret": lost, "variant": variant,
         "regret_interval": [lost - 2, lost + 2], "seconds": 1.0}
        for name, layer, lost, variant in (
            ("golden layer", 2, 0.0, ""), ("oracle", None, -8.0, ""),
            (f"lga {EVIL}", 3, 4.5, "tukey"), ("lga raw", 5, 14.5, "raw"))
    ]  # fmt: skip
    found = {
        "choices": choices, "metric": "overall", "warnings": [f"a word {EVIL}"],
        "sweep": {"run": "swept", "model": MODEL["name"], "data": DATA["name"], "method": "rome",
                  "fingerprint": "w2-aa"},
    }  # fmt: skip
    return write_run(place, name, "compare", {"compare.json": found}, settings={})


def edit(place: Path, name: str = "edited") -> Path:
    parts: tuple[tuple[Part, bool, float], ...] = (
        ("prompt", True, 0.9), ("rephrase", True, 0.8),
        ("neighbours", False, 0.7), ("unrelated", True, 0.02),
    )  # fmt: skip
    probes = tuple(
        Probed(fact="f", part=part, prompt=f"{part} {EVIL}", made=False, ok=ok, p_before=0.01,
               p_after=after, before=f"old {EVIL}", after=f"new {EVIL}")
        for part, ok, after in parts
    )  # fmt: skip
    fact = {"id": "f", "subject": f"sub {EVIL}", "prompt": f"p {EVIL}", "target": f"t {EVIL}"}
    record = {"facts": [fact], "layers": [2], "method": f"rome {EVIL}", "base_name": EVIL}
    files = {"delta.json": record, "check.json": Check(probes=probes).to_json()}
    return write_run(place, name, "edit", files, settings={}, **ORIGIN)


def evaluation(place: Path, name: str = "evaluated") -> Path:
    one = {"mean": 60.0, "se": 2.0, "low": 50.0, "high": 70.0, "scored": 9, "unscored": 1}
    ages = [
        {"age": [a, a + 1], "facts": 2, "rewrite": 90.0 - 20 * a, "rewrite_at_once": 95.0}
        for a in (0, 2)
    ]
    found = {
        "metrics": {"rewrite": one, f"x {EVIL}": one | {"mean": 5000.0}}, "overall": one,
        "method": "rome", "mode": "sequential", "layer": 2, "n_facts": 9, "retention": ages,
    }  # fmt: skip
    return write_run(place, name, "evaluate", {"summary.json": found}, settings={}, **ORIGIN)


def study(place: Path, name: str = "study") -> Path:
    value = {"value": 60.0, "low": 55.0, "high": 65.0, "n": 9}
    found = {
        "metrics": ["rewrite"], "left": ["a/b/c"], "failed": {f"m/{EVIL}": f"why {EVIL}"},
        "means": [
            {"editor": f"e {EVIL}", "at": "1/2", "cells": ["c"], "metrics": {"rewrite": value}}],
        "choices": {"noise_floor": 1.0, "means": [
            {"choice": f"c {EVIL}", "cells": 1, "regret": value, "worst": 3.0,
             "worst_against_published": None}]},
    }  # fmt: skip
    return write_run(place, name, "study", {"summary.json": found}, settings={})


def every(place: Path) -> list[Path]:
    """A run of every kind."""
    place.mkdir(exist_ok=True)
    made = [make(place) for make in (sweep, choice, comparison, edit, evaluation, study)]
    return [*made, sweep(place, "other <b>sweep<b>", "memit", best=4)]
