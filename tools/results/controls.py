"""Why LGA ranks layers as it does: its scores beside scores that know nothing of the edit.

    python tools/results/controls.py --model gemma3-270m --data starter counterfact_500

For the study's proxy facts, LGA is run again with each fact's two answers replaced by those of
another fact. If the layers are ranked the same, the ranking does not come from the facts to be
edited. The rank correlations are kept in docs/results/study/controls.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from cells import ROOT
from study import STUDY
from study_choices import draw, write

import goldenlayers.models as models
from goldenlayers.evaluation.bootstrap import spearman
from goldenlayers.facts import Fact
from goldenlayers.locating import LGA, locate
from goldenlayers.progress import Progress

PATH = STUDY / "controls.json"


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
        proxy = [f for f in draw(model, data, args.shared).proxy if f.target_old is not None]
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
            write(PATH, record)


if __name__ == "__main__":
    main()
