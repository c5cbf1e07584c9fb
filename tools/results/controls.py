"""Why LGA ranks layers as it does: its scores beside scores that know nothing of the edit.

    python tools/results/controls.py --model gemma3-270m --data starter counterfact_500

For the study's proxy facts, LGA is run again with each fact's two answers replaced by those of
another fact. If the layers are ranked the same, the ranking does not come from the facts to be
edited. The rank correlations are kept in docs/results/cells/earlier/controls.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from cells import DATA, ROOT
from earlier_record import PROXY, STUDY

import goldenlayers.models as models
from goldenlayers.datasets import load_facts
from goldenlayers.evaluation.bootstrap import spearman
from goldenlayers.facts import Fact
from goldenlayers.locating import LGA, locate
from goldenlayers.locating.known import known_facts
from goldenlayers.progress import Progress

PATH = STUDY / "controls.json"
TEST = 10


def proxy_facts(model: Any, data: str, shared: Path) -> list[Fact]:
    """The study's proxy facts: starter facts are such as the model knows; behind the test facts,
    about other subjects, those with the most kinds of probes first.
    """
    source = DATA[data] if data == "starter" else str(shared / DATA[data])
    drawn = list(load_facts(source, limit=600, seed=0, skip_invalid=True))
    if data == "starter":
        drawn = known_facts(model, drawn)
    drawn.sort(key=lambda f: -(bool(f.rephrasings) + bool(f.locality) + bool(f.portability)))
    distinct = {fact.subject.casefold(): fact for fact in reversed(drawn)}
    kept = [fact for fact in drawn if distinct[fact.subject.casefold()] is fact]
    return [fact for fact in kept[TEST : TEST + PROXY] if fact.target_old is not None]


def swapped(facts: list[Fact]) -> list[Fact]:
    """Every fact with the answers of another one (the list turned by a third)."""
    known = [f for f in facts if f.target_old is not None]
    turn = len(known) // 3
    others = known[turn:] + known[:turn]
    return [
        dataclasses.replace(f, target_old=o.target_old, target=o.target)
        for f, o in zip(known, others, strict=True)
    ]


def scores(model: Any, facts: list[Fact], loss: Any) -> tuple[list[float], list[float], int]:
    """S_L, the summed products of the gradients' norms, and the golden layer."""
    rows: list[dict[str, Any]] = []
    progress = Progress(on_rows=rows.extend)
    found = locate(model, facts, LGA(loss=loss), progress=progress, bootstrap=0)
    norms = np.sum([np.multiply(r["norm_old"], r["norm_new"]) for r in rows], axis=0)
    return [one.score for one in found.layers], norms.tolist(), found.golden_layer


def main() -> None:
    parser = argparse.ArgumentParser(description="Compute the controls that are missing.")
    parser.add_argument("--model", default="gemma3-270m")
    parser.add_argument("--data", nargs="+", default=["starter", "counterfact_500"])
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared" / "data")
    args = parser.parse_args()
    record = json.loads(PATH.read_text(encoding="utf-8")) if PATH.exists() else {}
    model = models.load(args.model)
    for data in args.data:
        proxy = proxy_facts(model, data, args.shared)
        for loss in ("sequence", "answer"):
            name = f"{args.model} {data} {loss}"
            if name in record:
                continue
            own, norms, layer = scores(model, proxy, loss)
            other, _, other_layer = scores(model, swapped(proxy), loss)
            record[name] = {
                "model": args.model,
                "data": data,
                "loss": loss,
                "facts": len(proxy),
                "layer": layer,
                "layer_with_other_answers": other_layer,
                "correlation_with_other_answers": spearman(own, other),
                "correlation_with_norms": spearman(own, norms),
            }
            print(name, record[name], flush=True)
            PATH.write_text(json.dumps(record) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
