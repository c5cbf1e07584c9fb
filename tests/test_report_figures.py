"""Figures: what is in them, that they come out the same each time, and odd rankings."""

from __future__ import annotations

import re
import subprocess
import sys
from xml.etree import ElementTree

import numpy as np
import pytest

from goldenlayers.errors import UserError
from goldenlayers.locating.base import Scoring
from goldenlayers.locating.building import RankingBuilder
from goldenlayers.locating.ranking import LayerRanking
from goldenlayers.report.figures import ranking_figure


def ranking_of(scores, n=4, method="lga", **scoring) -> LayerRanking:
    noise = np.random.default_rng(0).normal(size=(n, len(scores))) * 1e-3
    phi = np.asarray(scores, dtype=np.float64) / n + noise - noise.mean(axis=0)
    builder = RankingBuilder(method, len(scores), Scoring(**scoring), bootstrap=50)
    builder.update({"fact": str(i), "phi": list(row)} for i, row in enumerate(phi))
    return builder.result(model="tiny <&> $x$", data="starter")


def text_of(path) -> str:
    root = ElementTree.parse(path).getroot()
    return " | ".join(
        "".join(node.itertext()).strip() for node in root.iter() if "text" in node.tag
    )


WAVE = list(np.cos(np.arange(28) / 9) * 50)


def test_outliers_are_cut_and_named_and_the_golden_layer_is_marked(tmp_path):
    ranking = ranking_of([6500.0, *WAVE, -2500.0])
    svg, pdf, png = ranking_figure(ranking, tmp_path / "ranking")
    assert (svg.name, png.name) == ("ranking.svg", "ranking.png")
    assert pdf.read_bytes()[:5] == b"%PDF-"
    assert png.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    text = text_of(svg)
    golden = ranking.golden_layer
    assert golden == 1 and f"Golden layer {golden} of 30 in tiny <&> $x$" in text
    for part in (
        "Layer Gradient Analysis (LGA) · 4 facts of starter · Tukey fences, κ = 1",
        f"golden layer: {golden}",
        "left out (outside the fences)",
        "upper fence",
        "lower fence",
        "6,500",
        "-2,500",
        "the product of two losses' gradients in nats²",
        "Whiskers: 95 %",
        "wins (% of 50",
        "layer (0 = nearest the input)",
    ):
        assert part in text, part
    # The axis is scaled to the kept layers: no tick near the outliers.
    ticks = [float(t.replace("−", "-")) for t in re.findall(r"(?<=\| )−?\d+(?= \|)", text)]
    assert max(ticks) <= 200 and min(ticks) >= -300
    # Control: without outliers nothing is left out or cut.
    plain = text_of(ranking_figure(ranking_of(WAVE), tmp_path / "plain", ["svg"])[0])
    assert "left out" not in plain and "6,500" not in plain


def test_the_same_ranking_gives_the_same_bytes_whatever_the_users_settings(tmp_path):
    import matplotlib

    ranking = ranking_of([6500.0, *WAVE])
    formats = ("svg", "png", "pdf")
    first = [p.read_bytes() for p in ranking_figure(ranking, tmp_path / "a", formats)]
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red"}):
        second = [p.read_bytes() for p in ranking_figure(ranking, tmp_path / "b", formats[:2])]
        assert matplotlib.rcParams["font.size"] == 30
    assert first[:2] == second
    assert b"<dc:date>" not in first[0] and b"CreationDate" not in first[2]
    other = ranking_figure(ranking_of(WAVE), tmp_path / "c", ["svg"])
    assert other[0].read_bytes() != first[0]


def test_whiskers_and_layers_that_might_be_golden_as_well(tmp_path):
    # Two layers with nearly the same scores, by other facts.
    first = np.random.default_rng(0).normal(1, 1, 30)
    rows = [
        {"fact": f"{i:02}", "phi": [one, other + 0.01, 0.1]}
        for i, (one, other) in enumerate(zip(first, first[::-1], strict=True))
    ]
    builder = RankingBuilder("novel", 3, Scoring(fence=None), bootstrap=200).update(rows)
    ranking = builder.result()
    low, high = np.array([[row.low, row.high] for row in ranking.layers]).T
    scores = np.array([row.score for row in ranking.layers])
    assert (low <= scores).all() and (scores <= high).all() and (low < high)[:2].all()
    # As the normal distribution has it.
    spread = np.std([row["phi"][0] for row in rows]) * 30**0.5
    assert (high - low)[0] == pytest.approx(2 * 1.96 * spread, rel=0.25)
    other = 1 - ranking.golden_layer
    share = round(100 * (ranking.layers[other].wins or 0))
    text = " ".join(text_of(ranking_figure(ranking, tmp_path / "r", ["svg"])[0]).split(" | "))
    assert f"layer {other} ({share} %)" in text and 20 < share < 80
    # Control: a choice that wins them all has no rivals.
    plain = text_of(ranking_figure(ranking_of(WAVE), tmp_path / "p", ["svg"])[0])
    assert "Might be golden" not in plain
    assert LayerRanking.from_json(ranking.to_json()) == ranking


@pytest.mark.parametrize(
    ("ranking", "expected"),
    [
        (ranking_of([3.0]), "Golden layer 0 of 1"),
        (ranking_of([0.0] * 12), "Golden layer"),
        (ranking_of([-5.0, -3.0, -9.0, -7.0]), "golden layer: 1"),
        (ranking_of([1e4 + i / 5 for i in range(12)]), "[axis without zero]"),
        (ranking_of([i * 1e-9 for i in range(12)], n=1), "10⁻⁸ nats²"),
        (ranking_of(WAVE * 2, fence="none"), "golden layer: "),
        (ranking_of(WAVE, method="novel"), "score (novel)"),
        (LayerRanking.fixed("middle", 30, 15), "Golden layer 15 of 30"),
    ],
)
def test_odd_rankings_are_drawn(tmp_path, ranking, expected, recwarn):
    svg, _, png = ranking_figure(ranking, tmp_path / "r")
    assert expected in text_of(svg) and png.stat().st_size > 5000
    assert not [w for w in recwarn if "glyph" in str(w.message) or "layout" in str(w.message)]


def test_unknown_format_is_the_users_error(tmp_path):
    with pytest.raises(UserError, match="format 'gif'"):
        ranking_figure(ranking_of(WAVE), tmp_path / "r", ["gif"])


def test_neither_matplotlib_nor_torch_comes_with_the_import(tmp_path):
    code = (
        "import sys, goldenlayers.report.figures, goldenlayers.report, "
        "goldenlayers.locating.ranking, goldenlayers.store\n"
        "print([m for m in ('torch', 'matplotlib', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    code = (
        "import sys\n"
        "from goldenlayers.locating.ranking import LayerRanking\n"
        "from goldenlayers.report.figures import ranking_figure\n"
        "ranking_figure(LayerRanking.fixed('middle', 3, 1), sys.argv[1], ['svg'])\n"
        "print('matplotlib.pyplot' in sys.modules)"
    )
    stem = str(tmp_path / "r")
    done = subprocess.run(
        [sys.executable, "-c", code, stem], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"
