"""Rows of finished studies, kept small: one compressed file for each model and data set.

    python tools/results/kept.py STUDY_FOLDER docs/results/cells/clear

From the run folders below STUDY_FOLDER, as `golden study` writes them. A file holds, for each
editor, the score and the soft score of every probe at every layer, and the score of the untouched
model; see :func:`unpack`. And the layers that the study's methods chose, by method. Editors that a
file has already stay in it: a study may be of some of them.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from goldenlayers.store import RunFolder

Row = dict[str, Any]
Cell = dict[str, Any]


def pack(folder: Path) -> Cell | None:
    """The finished sweeps and evaluations of a model on a data set; None without any."""
    editors: dict[str, Any] = {}
    cell: Cell = {}
    for path in sorted(p for p in folder.iterdir() if (p / "config.yaml").is_file()):
        if path.name.endswith(".part"):
            continue
        run = RunFolder.open(path)
        summary = run.json("summary.json")
        rows = run.rows("scores.jsonl")
        layers = sorted({row.get("layer", -1) for row in rows})
        probes: dict[tuple[Any, ...], list[float | None]] = {}
        softs: dict[tuple[Any, ...], list[float | None]] = {}
        before: dict[tuple[Any, ...], float | None] = {}
        for row in rows:
            key = row["fact"], row["metric"], row["probe"], row.get("kind", "")
            scores = probes.setdefault(key, [None] * len(layers))
            scores[layers.index(row.get("layer", -1))] = _short(row["score"])
            if "before" in row:
                before[key] = _short(row["before"])
            if "soft" in row:
                soft = softs.setdefault(key, [None] * len(layers))
                soft[layers.index(row.get("layer", -1))] = _short(row["soft"], 1)
        editors[path.name] = {
            "layers": layers,
            "seconds": summary.get("seconds"),
            "probes": [
                [*key, before.get(key), scores, *([softs[key]] if key in softs else [])]
                for key, scores in probes.items()
            ],
        }
        settings = run.config["settings"]
        cell = {
            "model": folder.parent.name,
            "data": folder.name,
            "n_layers": summary.get("n_layers", cell.get("n_layers")),
            "facts": settings["limit"],
            "seed": settings["seed"],
            "settings": settings["set"] or cell.get("settings", {}),
            "package": run.config.get("package"),
        }
    if not editors:
        return None
    chosen = {
        path.name: RunFolder.open(path).json("ranking.json")["golden_layer"]
        for path in sorted(folder.glob("locate/*"))
        if (path / "ranking.json").is_file() and not path.name.endswith(".part")
    }
    return {**cell, "choices": chosen, "editors": editors}


def _short(score: float | None, digits: int = 3) -> float | None:
    return score if score is None else round(score, digits)


def unpack(cell: Cell) -> Iterator[tuple[str, list[Row]]]:
    """Each editor's rows, as a sweep has them; of in-context all have layer -1."""
    for name, one in cell["editors"].items():
        rows = []
        for fact, metric, probe, kind, before, scores, *more in one["probes"]:
            softs = more[0] if more else [None] * len(scores)
            for layer, score, soft in zip(one["layers"], scores, softs, strict=True):
                row: Row = {"fact": fact, "layer": layer, "metric": metric, "probe": probe}
                row |= {"kind": kind} if kind else {}
                row["score"] = score
                if before is not None and score is not None:
                    row["before"] = before
                if soft is not None:
                    row["soft"] = soft
                rows.append(row)
        yield name, rows


def load(folder: Path) -> list[Cell]:
    """All cells kept in a folder, in the order of their names."""
    return [json.loads(gzip.decompress(path.read_bytes())) for path in sorted(folder.glob("*.gz"))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("study", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for folder in sorted(args.study.glob("*/*")):
        if folder.is_dir() and folder.parent.name != "study" and (cell := pack(folder)):
            target = args.out / f"{cell['model']}-{cell['data']}.json.gz"
            if target.exists():
                old = json.loads(gzip.decompress(target.read_bytes()))
                cell = old | {name: old[name] | cell[name] for name in ("editors", "choices")}
            text = json.dumps(cell, separators=(",", ":")).encode()
            target.write_bytes(gzip.compress(text, mtime=0))
            print(target, len(text), target.stat().st_size, ", ".join(cell["editors"]))


if __name__ == "__main__":
    main()
