"""The heat map of causal tracing: which token's state at which layer brings the answer back."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from goldenlayers.report.figures import OKABE_ITO, save, style, tick_step, title
from goldenlayers.shown import shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from goldenlayers.locating.grid import TracingGrid

_KINDS = {"mlp": "MLP output", "attention": "attention output", "block": "block output"}
_MISSING = "#DDDDDD"
_LONGEST = 24  # characters of a token's label


def tracing_figure(
    grid: TracingGrid, path_stem: str | os.PathLike[str], formats: Sequence[str] = ("svg", "png")
) -> list[Path]:
    """Draw the indirect effect by token (rows, read downwards) and layer (columns).

    White is no effect, on the way to blue the answer comes back, to vermillion it is pushed
    further away; equal depths of both colours are equal sizes. Subject tokens are bold; a star
    marks the best layer of the lookup token. Roles that no prompt has are grey and crossed out.
    Returns the paths written.

    Raises:
        UserError: an unknown format.
    """
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    n_tokens, n_layers = grid.effect.shape
    with style():
        labels = [_label(token) for token in grid.tokens]
        width = 2.6 + 0.065 * max(len(label) for label in labels) + 0.2 * n_layers
        size = (min(11.0, max(5.4, width)), min(14.0, 1.7 + 0.21 * max(n_tokens, 4)))
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        axes.set_facecolor(_MISSING)
        ends = [OKABE_ITO["vermillion"], "white", OKABE_ITO["blue"]]
        colours = LinearSegmentedColormap.from_list("effect", ends)
        largest = _largest(grid)
        image = axes.imshow(
            np.ma.masked_invalid(grid.effect),
            cmap=colours,
            vmin=-largest,
            vmax=largest,
            aspect="auto",
            interpolation="nearest",
        )
        for row in np.flatnonzero(np.isnan(grid.effect).all(axis=1)):
            axes.axhline(int(row), color="#555555", linewidth=0.8)
        axes.set_yticks(range(n_tokens), labels)
        for row, label in enumerate(axes.get_yticklabels()):
            if grid.subject[0] <= row < grid.subject[1]:
                label.set_fontweight("bold")
        starred = _mark_best(axes, grid)
        axes.set_xticks(range(0, n_layers, tick_step(n_layers)))
        key = "bold: the subject's tokens" + ("; star: its last token's best layer" * starred)
        axes.set_xlabel(f"{_restored(grid)}\n({key})")
        axes.set_title(_title(figure, grid), loc="left", fontsize=10)
        axes.spines[:].set(visible=True, linewidth=0.5)
        bar = figure.colorbar(image, ax=axes, aspect=14, pad=0.02)
        bar.outline.set_linewidth(0.5)  # pyright: ignore[reportCallIssue]
        bar.set_label("indirect effect\n(probability of the answer)")
        return save(figure, path_stem, formats)


def _largest(grid: TracingGrid) -> float:
    sizes = np.abs(grid.effect[~np.isnan(grid.effect)])
    return float(sizes.max()) if sizes.size and sizes.max() > 0 else 1.0


def _mark_best(axes: Axes, grid: TracingGrid) -> bool:
    """Put a star on the lookup token's best layer, unless all are alike."""
    row = grid.effect[grid.lookup]
    if np.isnan(row).all() or not np.nanmax(row) > np.nanmin(row):
        return False
    best = int(np.nanargmax(row))
    look = {"markersize": 9, "color": OKABE_ITO["yellow"], "markeredgecolor": "black"}
    axes.plot([best], [grid.lookup], marker="*", markeredgewidth=0.7, **look)
    return True


def _restored(grid: TracingGrid) -> str:
    what = _KINDS.get(grid.kind, grid.kind)
    if grid.window > 1:
        return f"middle of the {grid.window} layers whose {what} is restored"
    return f"layer whose {what} is restored (0 = nearest the input)"


def _title(figure: Figure, grid: TracingGrid) -> str:
    name = f" in {grid.model}" if grid.model else ""
    facts = f"mean of {grid.n_facts} facts" if grid.n_facts > 1 else f"answer '{grid.answer}'"
    change = f"p = {grid.clean:.3g} clean, {grid.corrupted:.3g} with noise on the subject"
    return title(figure, f"Causal tracing{name}: {facts}", change)


def _label(token: str) -> str:
    flat = shown(" ".join(token.split()) or token)
    return flat if len(flat) <= _LONGEST else flat[: _LONGEST - 1] + "…"
