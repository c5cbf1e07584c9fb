"""The tracing heat map: what is in it, that it comes out the same each time, and odd grids."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from xml.etree import ElementTree

import numpy as np
import pytest

from goldenlayers.errors import UserError
from goldenlayers.locating.grid import ROLES, TracingGrid, mean_by_role
from goldenlayers.report.pictures import tracing_figure

TOKENS = ("<s>", "The", "mother", "tongue", "of", "Dani", "elle", "Darr", "ieux", "is", "$x$")


def grid_of(n_layers: int = 18, **changes) -> TracingGrid:
    layers = np.arange(n_layers)
    effect = np.zeros((len(TOKENS), n_layers))
    effect[8] = 0.5 * np.exp(-((layers - n_layers * 0.35) ** 2) / 8)
    effect[6] = -0.1
    effect[10] = 0.6 / (1 + np.exp(-(layers - n_layers * 0.8)))
    base = TracingGrid(
        tokens=TOKENS,
        effect=effect,
        subject=(5, 9),
        lookup=8,
        clean=0.81,
        corrupted=0.02,
        kind="mlp",
        window=10,
        samples=10,
        sigma=0.3,
        answer="French",
        model="tiny <&> $y$",
    )
    return dataclasses.replace(base, **changes)


def text_of(path) -> str:
    root = ElementTree.parse(path).getroot()
    return " | ".join(
        "".join(node.itertext()).strip() for node in root.iter() if "text" in node.tag
    )


def test_tokens_layers_and_settings_are_named(tmp_path):
    svg, _, png = tracing_figure(grid_of(), tmp_path / "grid")
    assert png.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    text = text_of(svg)
    for part in (
        "Causal tracing in tiny <&> $y$: answer 'French'",
        "p = 0.81 clean, 0.02 with noise on the subject",
        "middle of the 10 layers whose MLP output is restored",
        "indirect effect",
        *TOKENS,
        "17",
    ):
        assert part in text, part
    assert svg.read_text("utf-8").count("font-weight: 700") == 4  # the subject's tokens
    plain = tracing_figure(grid_of(kind="block", window=1, subject=(0, 0)), tmp_path / "b", ["svg"])
    assert "layer whose block output is restored" in text_of(plain[0])
    assert "font-weight: 700" not in plain[0].read_text("utf-8")


def test_the_same_grid_gives_the_same_bytes(tmp_path):
    first, second = (tracing_figure(grid_of(), tmp_path / n)[0].read_bytes() for n in "ab")
    assert first == second
    shifted = grid_of(effect=np.roll(grid_of().effect, 1, axis=1))
    assert tracing_figure(shifted, tmp_path / "c", ["svg"])[0].read_bytes() != first


@pytest.mark.parametrize("effect", [np.zeros((11, 1)), np.zeros((11, 60)), np.full((11, 4), 0.3)])
def test_odd_grids_are_drawn(tmp_path, effect, recwarn):
    *_, png = tracing_figure(grid_of(effect=effect), tmp_path / "g")
    assert png.stat().st_size > 5000
    assert not [w for w in recwarn if "glyph" in str(w.message) or "layout" in str(w.message)]


def test_mean_by_role_counts_every_prompt_once(tmp_path):
    one = grid_of(4, effect=np.arange(44.0).reshape(11, 4) / 44)
    # Another prompt, whose subject is one token at its end: it has only a last subject token.
    two = grid_of(
        4, tokens=("a", "b"), effect=np.array([[9.0] * 4, [1.0] * 4]), subject=(1, 2), lookup=1
    )
    mean = mean_by_role([one, two])
    assert mean.tokens == ROLES and mean.n_facts == 2 and mean.answer == ""
    np.testing.assert_allclose(mean.effect[0], one.effect[5])
    np.testing.assert_allclose(mean.effect[1], one.effect[6:8].mean(0))
    np.testing.assert_allclose(mean.effect[2], (one.effect[8] + 1.0) / 2)
    np.testing.assert_allclose(mean.effect[3], one.effect[9])
    assert np.isnan(mean.effect[4]).all()  # nothing between the next token and the last
    np.testing.assert_allclose(mean.effect[5], one.effect[10])
    text = text_of(tracing_figure(mean, tmp_path / "mean")[0])
    assert "mean of 2 facts" in text and "last subject token" in text
    again = TracingGrid.from_json(mean.to_json())
    np.testing.assert_array_equal(again.effect, mean.effect)
    assert again.to_json() == mean.to_json()


def test_what_is_no_grid_is_the_users_error(tmp_path):
    with pytest.raises(UserError, match="at least one"):
        mean_by_role([])
    with pytest.raises(UserError, match="differ"):
        mean_by_role([grid_of(4), grid_of(5)])
    with pytest.raises(UserError, match="not a tracing grid"):
        TracingGrid.from_json({"schema": 1})
    with pytest.raises(UserError, match="not a tracing grid"):
        TracingGrid.from_json(grid_of().to_json() | {"tokens": ["one"]})
    with pytest.raises(UserError, match="format 'gif'"):
        tracing_figure(grid_of(), tmp_path / "r", ["gif"])


def test_neither_matplotlib_nor_torch_comes_with_the_import():
    code = (
        "import sys, goldenlayers.report.pictures, goldenlayers.locating.grid\n"
        "print([m for m in ('torch', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
