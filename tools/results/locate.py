"""docs/results/locate.md: LGA on two models and two public data sets, with the commands.

    python tools/results/locate.py            # run the commands, then write the page
    python tools/results/locate.py --render   # write the page from the runs kept before

Each run's ranking.json and picture are kept in docs/results/locate/.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from goldenlayers.locating.ranking import LayerRanking
from goldenlayers.report.figures import ranking_figure

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / "docs" / "results" / "locate"
MODELS = ("gemma3-270m", "smollm2-135m")
DATA = (
    "counterfact/counterfact_500.json",
    "KnowEdit/ZsRE/ZsRE-test-all.json",
)


NOT_FIRM = (
    "The choice is not firm (☆): it wins less than half of the resamples of the facts, or hardly "
    "more than the next layer."
)


def command(model: str, data: str, out: Path | str) -> list[str]:
    return [
        "golden",
        "locate",
        model,
        f"../shared/data/{data}",
        *("--limit", "100", "--skip-invalid", "--out", str(out)),
    ]


def run(model: str, data: str) -> None:
    """Run one command and keep its ranking and picture."""
    name = f"{model}-{Path(data).stem}"
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        words = command(model, data, out)
        subprocess.run(
            [str(Path(sys.executable).with_name(words[0])), *words[1:]], check=True, cwd=ROOT
        )
        KEPT.mkdir(parents=True, exist_ok=True)
        shutil.copy(out / "ranking.json", KEPT / f"{name}.json")
        shutil.copy(out / "ranking.svg", KEPT / f"{name}.svg")


def section(model: str, data: str) -> str:
    """The table of one run."""
    name = f"{model}-{Path(data).stem}"
    r: dict[str, Any] = json.loads((KEPT / f"{name}.json").read_text(encoding="utf-8"))
    ranking = LayerRanking.from_json(r)
    golden, star = r["golden_layer"], "★" if ranking.firm else "☆"
    lines = [
        f"## {model}, {Path(data).stem}",
        "",
        "    " + " ".join(command(model, data, f"runs/{name}")),
        "",
        f"Golden layer **{golden}** of {len(r['layers'])}; candidates "
        f"{', '.join(map(str, r['candidates']))}; {r['n_facts']} facts in {r['seconds']:.0f} s.",
        "",
        *ranking.notes,
        *([] if ranking.firm else [NOT_FIRM]),
        "",
        f"![Scores by layer](locate/{name}.svg)",
        "",
        "| layer | score | within the fences | mean cosine | share of resamples won |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in r["layers"]:
        mark = f" {star}" if row["layer"] == golden else ""
        lines.append(
            f"| {row['layer']}{mark} | {row['score']:.4g} | {'yes' if row['kept'] else 'no'} "
            f"| {row['cosine']:.3f} | {100 * row['wins']:.0f} % |"
        )
    return "\n".join(lines)


def draw(model: str, data: str) -> None:
    """The picture as it is drawn today."""
    stem = KEPT / f"{model}-{Path(data).stem}"
    text = stem.with_suffix(".json").read_text(encoding="utf-8")
    ranking_figure(LayerRanking.from_json(text), stem, formats=("svg",))


def page() -> str:
    head = (
        "# LGA on public data\n\n"
        "Written by `python tools/results/locate.py`. The rankings and pictures of the runs are in "
        "`locate/`. Seconds were measured on 2 cores that other work shared."
    )
    parts = [section(model, data) for model in MODELS for data in DATA]
    return "\n\n".join([head, *parts]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Run LGA on public data and write the page.")
    parser.add_argument("--render", action="store_true", help="only draw and write the page")
    render = parser.parse_args().render
    for model in MODELS:
        for data in DATA:
            if not render:
                run(model, data)
            draw(model, data)
    (ROOT / "docs" / "results" / "locate.md").write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
