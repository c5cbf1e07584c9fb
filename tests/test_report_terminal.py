"""Tables as they appear in a terminal of a given width, without colour."""

from __future__ import annotations

import io

import numpy as np
import pytest
from rich.console import Console

from goldenlayers.locating.base import Scoring
from goldenlayers.locating.building import RankingBuilder
from goldenlayers.locating.ranking import Evidence, LayerRanking, LayerScore
from goldenlayers.report import show, show_ranking, table
from goldenlayers.report.figures import ranking_figure


def printed(what, width=80, encoding="utf-8") -> list[str]:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding)
    console = Console(file=file, width=width)
    show_ranking(what, console) if isinstance(what, LayerRanking) else show(what, console)
    file.flush()
    return raw.getvalue().decode(encoding).splitlines()


def ranking_of(scores, n=20) -> LayerRanking:
    builder = RankingBuilder("lga", len(scores), bootstrap=100)
    phi = np.tile(np.asarray(scores, dtype=np.float64) / n, (n, 1))
    builder.update(
        {"fact": str(i), "phi": list(row), "cosine": [0.25] * len(row)} for i, row in enumerate(phi)
    )
    return builder.result(seconds=2.0, model="tiny", data="starter")


def line_of(lines: list[str], layer: int) -> str:
    return next(line for line in lines if line.strip(" |").startswith(f"{layer} "))


@pytest.mark.parametrize("width", [48, 60, 80, 120])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_every_layer_has_one_line_that_fits(width, encoding):
    scores = [6500.0, *(np.cos(np.arange(46) / 15) * 50), -2500.0]
    lines = printed(ranking_of(scores), width, encoding)
    assert max(len(line) for line in lines) <= width
    assert not any("…" in line for line in lines)
    for layer in range(48):
        line_of(lines, layer)
    golden = line_of(lines, 1)
    assert "golden" in golden and ("*" if encoding == "ascii" else "★") in golden
    assert "100 %" in golden
    assert sum("golden" in line for line in lines) == 1
    for layer, arrow in ((0, ">▶"), (47, "<◀")):
        assert "left out" in line_of(lines, layer)
        assert any(mark in line_of(lines, layer) for mark in arrow)
    assert "#2" in line_of(lines, 2)
    assert "Golden layer 1 of 48 in tiny, lga" in lines[0]
    assert any(line.startswith("Warning: Only 20 facts") for line in lines)


@pytest.mark.parametrize(("lone", "star"), [(11, "☆"), (17, "★")])
def test_a_choice_that_resamples_do_not_agree_on_has_no_full_star(tmp_path, lone, star):
    """Of 21 facts some prefer layer 1, the others layer 3."""
    phi = np.array([[0.0, 1.0, 0, 0.0]] * lone + [[0.0, 0.0, 0, 1.0]] * (21 - lone))
    builder = RankingBuilder("saliency", 4, Scoring(fence=None, enough=20))
    builder.update({"fact": str(i), "phi": list(row)} for i, row in enumerate(phi))
    ranking = builder.result()
    lines = printed(ranking)
    assert ranking.golden_layer == 1 and f"{star} golden" in line_of(lines, 1)
    drawn = ranking_figure(ranking, tmp_path / "r", ["svg"])[0].read_text("utf-8")
    said = " ".join(lines)
    assert ranking.firm == (star == "★") == ("(not firm)" not in drawn)
    assert ("of the resamples layer 1 wins" in said or "no layer wins" in said) != ranking.firm
    # Who uses as many facts as advised is not told to use more.
    assert "Use more proxy facts" not in said


def test_other_fences_and_layers_with_higher_scores_are_named():
    lines = printed(ranking_of([1.0, 2, 3, 4, 5, 6, 13.0, 50.0]), width=200)
    said = " ".join(lines)
    assert "Without fences the choice is layer 7, with kappa 1.5 layer 6." in said
    assert "Left out by the fences, with higher scores: 7, 6." in said


def test_a_race_shows_the_layers_that_were_tried():
    known = Evidence("rome", 0, 9, (2.0, -1.0, 5.0), (2,), "the edits are used up", 1, 2)
    layers = [LayerScore(i, s, kept=s is not None, wins=w, facts=n) for i, s, w, n in (
        (0, 60.0, 0.3, 3), (1, 62.0, 0.6, 3), (2, 61.0, 0.1, 3), (3, None, 0.0, 0),
    )]  # fmt: skip
    ranking = LayerRanking("race", 1, (1,), tuple(layers), n_facts=3, seconds=4.0, evidence=known)
    lines = printed(ranking, width=120)
    assert [line_of(lines, i).split()[1] for i in range(3)] == ["60", "62", "61"]
    assert not any(line.strip().startswith("3 ") for line in lines) and "facts" in lines[2]
    said = " ".join(lines)
    for part in (
        "Layer 1 was chosen by 9 edits with rome in 4 s (the edits are used up)",
        "; of 3 it is the best in 60 % of resamples.",
        "It was ahead of the published depth, layer 0, by 2.0 points (-1.0 to +5.0).",
        "It cannot be told from layer 2.",
        "If only answers about the edited subject had to stay it were layer 1, if only",
    ):
        assert part in said, said


def test_bars_grow_with_the_score_and_start_at_one_zero():
    lines = printed(ranking_of([4.0, 2.0, 0.0, -2.0, -4.0]))
    bars = [line_of(lines, layer) for layer in range(5)]
    full = [bar.count("█") for bar in bars]
    assert full[0] > full[1] > full[2] == 0 < full[3] < full[4]
    assert abs(full[0] - 2 * full[1]) <= 1
    zero = bars[0].index("█")
    assert bars[1].index("█") == zero
    assert bars[3].rindex("█") == bars[4].rindex("█") == zero - 1


def test_small_rankings_and_fixed_choices():
    assert "★ golden" in line_of(printed(ranking_of([3.0])), 0)
    assert "★ golden" in line_of(printed(ranking_of([0.0, -1.0])), 0)
    lines = printed(LayerRanking.fixed("middle", 12, 6))
    assert "★ golden" in line_of(lines, 6) and "wins" not in "".join(lines[:4])
    assert any("looks at no fact" in line for line in lines)


def test_table_shows_text_as_it_is():
    rows = [["[red]x[/red]", 0.123456, 3], ["b", None, 100000], ["c", float("nan"), 1]]
    text = "\n".join(printed(table("Scores [bold]", ["name", "value", "n"], rows)))
    assert "[red]x[/red]" in text and "0.1235" in text and "100000" in text
    assert "nan" not in text and "Scores [bold]" in text
