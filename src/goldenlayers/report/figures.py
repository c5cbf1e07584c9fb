"""Figures from finished results. Matplotlib is imported on use, and never through pyplot.

The same result gives the same bytes: fixed ids in the SVG, no date, the user's settings left out.
Text stays text in the SVG, so that it can be searched and read aloud.
"""

from __future__ import annotations

import contextlib
import math
import os
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from goldenlayers.durable import disk_errors
from goldenlayers.errors import UserError
from goldenlayers.locating.methods import recorded_method
from goldenlayers.report import n_facts
from goldenlayers.shown import shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from goldenlayers.locating.ranking import LayerRanking, LayerScore

# Okabe and Ito's palette, told apart by every kind of colour vision; here also by lightness.
OKABE_ITO = {
    "orange": "#E69F00",
    "sky blue": "#56B4E9",
    "bluish green": "#009E73",
    "yellow": "#F0E442",
    "blue": "#0072B2",
    "vermillion": "#D55E00",
    "reddish purple": "#CC79A7",
    "black": "#000000",
}
_KEPT, GOLD, _GREY = OKABE_ITO["sky blue"], OKABE_ITO["yellow"], "#555555"
STAR: dict[str, Any] = {
    "marker": "*",
    "markersize": 13,
    "color": GOLD,
    "markeredgecolor": "black",
    "markeredgewidth": 0.8,
    "linestyle": "none",
    "zorder": 6,
}
"""The golden layer's mark in every figure; with ``fillstyle`` none where it is not firm."""
_BARS: dict[str, dict[str, Any]] = {
    "kept": {"color": _KEPT, "edgecolor": "black", "linewidth": 0.5},
    "golden": {"color": GOLD, "edgecolor": "black", "linewidth": 1.0},
    "left out": {"facecolor": "white", "edgecolor": _GREY, "hatch": "////", "linewidth": 0.8},
}
_POINTS: dict[str, dict[str, Any]] = {
    "kept": {"marker": "o", "markersize": 6, "color": _KEPT, "markeredgecolor": "black"},
    "golden": STAR,
    "left out": {"marker": "D", "markersize": 5, "color": "white", "markeredgecolor": "black"},
}
FORMATS = ("svg", "pdf", "png")
_LONG = {
    "lga": "Layer Gradient Analysis (LGA)",
    "cma": "causal mediation analysis (CMA)",
    "transfer": "key transfer analysis",
    "race": "a race of real edits",
    "saliency": "gradient saliency",
}
_DATELESS = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {"Software": None}}
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Within it matplotlib's own defaults hold, so that output is reproducible."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "svg.hashsalt": "goldenlayers",
                "svg.fonttype": "none",
                "pdf.fonttype": 42,
                "font.size": 9,
                "axes.spines.top": False,
                "axes.spines.right": False,
                "hatch.linewidth": 0.7,
                "text.parse_math": False,  # a dollar sign in a name begins no formula
            }
        )
        yield


def title(figure: Figure, *lines: str) -> str:
    """The lines of a title, broken where the figure ends; whatever they hold, each is one text."""
    width = int(11.5 * figure.get_figwidth()) - 8  # characters of size 10
    found = []
    for line in lines:
        parts = textwrap.wrap(shown(line, 4 * width), width, break_on_hyphens=False)
        found += parts or [" "]
    return "\n".join(found)


def save(figure: Figure, stem: str | os.PathLike[str], formats: Sequence[str]) -> list[Path]:
    """Write a figure as ``stem.svg``, ``stem.png`` ...; call within ``style()``. Returns the paths.

    Each is there whole or not at all.

    Raises:
        UserError: an unknown format; the disk is full or cannot be written to.
    """
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        # What a terminal may not be shown, XML may not hold either.
        text.set_text("\n".join(map(shown, text.get_text().split("\n"))))
    paths = []
    for name in formats:
        if name not in FORMATS:
            raise UserError(f"unknown picture format '{name}'", expected="svg, png or pdf")
        path = Path(f"{os.fspath(stem)}.{name}")
        with disk_errors(path), warnings.catch_warnings():
            # Signs that the font does not have are boxes in the PNG, and text in the SVG.
            warnings.filterwarnings("ignore", message="Glyph .* missing from font")
            try:
                figure.savefig(path, format=name, dpi=160, metadata=_DATELESS[name])
            except BaseException:
                path.unlink(missing_ok=True)
                raise
        paths.append(path)
    return paths


def ranking_figure(
    ranking: LayerRanking,
    path_stem: str | os.PathLike[str],
    formats: Sequence[str] = FORMATS,
) -> list[Path]:
    """Draw the scores by layer, and below them how often each layer wins under resampling.

    The golden layer bears a star, a hollow one where the resamples do not agree on it; excluded
    layers are hollow and hatched. Whiskers are 95 % intervals over resamples of the facts. The axis
    ends near the fences: a bar that goes on beyond ends in an arrow and bears its value. Where zero
    is too far away for bars, the scores are points on an axis without zero.

    Raises:
        UserError: an unknown format.
    """
    from matplotlib.figure import Figure

    n_layers = len(ranking.layers)
    has_wins = any(row.wins is not None for row in ranking.layers)
    with style():
        size = (min(11.0, max(6.0, 1.8 + 0.2 * n_layers)), 4.6 if has_wins else 3.6)
        figure = Figure(figsize=size, layout="constrained")
        ratios = [3.2, 1] if has_wins else [1]
        axes = figure.subplots(len(ratios), 1, sharex=True, squeeze=False, height_ratios=ratios)
        top, bottom = axes[0, 0], axes[-1, 0]
        _draw_scores(top, ranking)
        top.set_title(_title(figure, ranking), loc="left", fontsize=10)
        if has_wins:
            _draw_wins(bottom, ranking)
        bottom.set_xlabel("\n".join(["layer (0 = nearest the input)", *_words(figure, ranking)]))
        bottom.set_xticks(range(0, n_layers, tick_step(n_layers)))
        bottom.set_xticks(range(n_layers), minor=True)
        side = 0.8 + max(0, 6 - n_layers) / 2  # a few layers do not become slabs
        bottom.set_xlim(-side, n_layers - 1 + side)
        return save(figure, path_stem, formats)


def _draw_scores(axes: Axes, ranking: LayerRanking) -> None:
    low, high, at_zero = _range(ranking)
    # The power of ten to take out of the axis' numbers, 0 where they are handy as they are.
    power = math.floor(math.log10(max(abs(low), abs(high))))
    power = 0 if -3 <= power <= 4 else power
    scale = 10.0**power
    low, high = low / scale, high / scale
    span = high - low
    rows = [row for row in ranking.layers if row.score is not None]
    scores = {row.layer: row.value / scale for row in rows}
    place = "the last block" if ranking.fence == "last" else "outside the fences"
    names = {
        "kept": "kept",
        "golden": f"golden layer: {ranking.golden_layer}" + " (not firm)" * (not ranking.firm),
        "left out": f"left out ({place})",
    }
    axes.set_ylim(low, high)
    for kind, name in names.items():
        layers = [row.layer for row in rows if _kind(row, ranking) == kind]
        inside = [layer for layer in layers if low <= scores[layer] <= high]
        heights = [min(max(scores[layer], low), high) for layer in layers]
        if layers and at_zero:
            # The golden layer's name stands beside the star in the legend.
            label = None if kind == "golden" else name
            axes.bar(layers, heights, 0.72, label=label, **_BARS[kind])
        if layers and kind == "golden" and at_zero:
            end = ranking.layers[ranking.golden_layer].high
            above = max(heights[0], 0.0, min((end or 0.0) / scale, high))
            inside, heights = layers, [above + 0.045 * span]
        elif not at_zero:
            heights = [scores[layer] for layer in inside]
        if layers and (kind == "golden" or not at_zero):
            look = {"linestyle": "none", "markeredgewidth": 0.7, "zorder": 4, "clip_on": False}
            look |= _POINTS[kind]
            if kind == "golden" and not ranking.firm:  # a star that is not full
                look["fillstyle"] = "none"
            axes.plot(inside, heights, label=name, **look)
    for row in rows:
        if row.low is not None and row.high is not None and low <= scores[row.layer] <= high:
            ends = [max(row.low / scale, low), min(row.high / scale, high)]
            axes.plot([row.layer] * 2, ends, color="black", linewidth=0.9, zorder=3)
        if not low <= scores[row.layer] <= high:
            _draw_cut(axes, row, up=scores[row.layer] > high)
    if at_zero:
        axes.axhline(0, color="black", linewidth=0.8)
    for fence, name in zip(ranking.fences or (), ("lower fence", "upper fence"), strict=False):
        at = fence / scale
        if low <= at <= high and len(set(ranking.fences or ())) == 2:
            axes.axhline(at, color=_GREY, linestyle=(0, (5, 3)), linewidth=0.9, zorder=0.5)
            note_beside(axes, at, name)
    label, unit = recorded_method(ranking.method, {}).axis
    label = label or f"score ({ranking.method})"
    factor = f"10{str(power).translate(_SUPERSCRIPT)}" if power else ""
    if factor or unit:
        label += f"\n({' '.join(part for part in (factor, unit) if part)})"
    axes.set_ylabel(label if at_zero else f"{label}\n[axis without zero]")
    axes.ticklabel_format(axis="y", style="plain", useOffset=False)
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1.0),
        ncols=3,
        frameon=False,
        fontsize=8,
        borderaxespad=0.1,
        handlelength=1.4,
    )


def note_beside(axes: Axes, value: float, text: str, color: str = _GREY) -> None:
    """A word at the right edge, at the height of a line that is drawn there."""
    axes.annotate(
        text,
        (1.0, value),
        xycoords=axes.get_yaxis_transform(),
        xytext=(3, 0),
        textcoords="offset points",
        va="center",
        fontsize=7.5,
        color=color,
        annotation_clip=False,
    )


def tick_step(n: int) -> int:
    """Every how many of ``n`` layers bear their number."""
    return next(step for step in (1, 2, 4, 5, 10, 20, 50, 100) if n / step <= 26)


def _draw_cut(axes: Axes, row: LayerScore, *, up: bool) -> None:
    """An arrow at the end of the axis for a score that lies beyond it, with its value."""
    low, high = axes.get_ylim()
    axes.plot(
        [row.layer],
        [high if up else low],
        marker="^" if up else "v",
        markersize=7,
        color="white",
        markeredgecolor="black",
        clip_on=False,
        zorder=5,
    )
    axes.text(
        row.layer,
        high - 0.05 * (high - low) if up else low + 0.05 * (high - low),
        _short(row.value),
        rotation=90,
        ha="center",
        va="top" if up else "bottom",
        fontsize=7.5,
        zorder=5,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
    )


def _draw_wins(axes: Axes, ranking: LayerRanking) -> None:
    for row in ranking.layers:
        if row.wins:
            axes.bar(row.layer, 100 * row.wins, 0.72, **_BARS[_kind(row, ranking)])
    axes.axhline(50, color=_GREY, linestyle=(0, (1, 2)), linewidth=0.9)
    axes.set_ylim(0, 100)
    axes.set_yticks([0, 50, 100])
    axes.set_ylabel(f"wins (% of {ranking.bootstrap}\nresamples)")


def _words(figure: Figure, ranking: LayerRanking) -> list[str]:
    """What stands below: what the unit is, the whiskers, and which layers might be golden, too."""
    golden = ranking.golden_layer
    found = []
    if recorded_method(ranking.method, {}).axis[1] == "nats²":
        found.append("A loss is measured in nats, the product of two losses' gradients in nats².")
    if any(row.low is not None for row in ranking.layers):
        found.append("Whiskers: 95 % of the resamples of the facts.")
    others = sorted((r for r in ranking.layers if r.layer != golden), key=lambda r: -(r.wins or 0))
    wins = [
        f"layer {r.layer} ({100 * (r.wins or 0):.0f} %)" for r in others if (r.wins or 0) > 0.05
    ]
    if wins:
        found.append(f"Might be golden as well, by the resamples: {', '.join(wins[:4])}.")
    text = " ".join(found)
    return textwrap.wrap(text, int(13 * figure.get_figwidth())) if text else []


def _kind(row: LayerScore, ranking: LayerRanking) -> str:
    if row.layer == ranking.golden_layer:
        return "golden"
    return "kept" if row.kept else "left out"


def _range(ranking: LayerRanking) -> tuple[float, float, bool]:
    """Ends of the score axis, and whether zero is on it.

    The axis holds the kept scores and the fences near them. Zero is left out where it is so far
    away that the differences could not be seen.
    """
    values = [row.value for row in ranking.layers if row.kept]
    inside = max(values) - min(values)
    for fence in ranking.fences or ():
        if min(values) - inside <= fence <= max(values) + inside:
            values.append(fence)
    least, most = min(values) - inside, max(values) + inside
    for row in ranking.layers:  # whiskers, too, as far as they leave the bars their size
        values += [
            min(max(v, least), most) for v in (row.low, row.high) if row.kept and v is not None
        ]
    low, high = min(values), max(values)
    at_zero = low == high or max(low, -high) <= 5 * (high - low)
    if at_zero:
        low, high = min(low, 0.0), max(high, 0.0)
        if low == high:
            low, high = -1.0, 1.0
    room = 0.1 * (high - low)
    return (low if at_zero and low == 0 else low - room), high + room, at_zero


def _short(value: float) -> str:
    if 100 <= abs(value) < 1e6:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _title(figure: Figure, ranking: LayerRanking) -> str:
    parts = [_LONG.get(ranking.method, ranking.method)]
    if ranking.n_facts:
        parts.append(n_facts(ranking) + (f" of {ranking.data}" if ranking.data else ""))
    if ranking.fences is not None:
        parts.append(f"Tukey fences, κ = {ranking.kappa:g}")
    name = f" in {ranking.model}" if ranking.model else ""
    first = f"Golden layer {ranking.golden_layer} of {len(ranking.layers)}{name}"
    return title(figure, first, " · ".join(parts), "")  # the empty line: room for the legend
