"""The answers at the top of a page: which layer, how sure, and what another one costs."""

from __future__ import annotations

from collections.abc import Sequence

from goldenlayers.comparing.runs import LocateRun, SweepRun
from goldenlayers.locating import published_layer
from goldenlayers.report.page.parts import Card, interval, listed, number
from goldenlayers.report.page.runs import named
from goldenlayers.store import RunFolder
from goldenlayers.truth import OVERALL

ALIKE = "cannot be told from it"
_MOST = 6  # sweeps that a choice is held to in its answer


def title_of(metric: str) -> str:
    """A metric as it is called in a sentence."""
    return "Overall" if metric == OVERALL else metric.replace("_", " ")


def sweep_card(folder: RunFolder, one: SweepRun) -> Card | None:
    """The golden layer of a sweep, how sure it is, and what another costs."""
    truth, metric = one.truth, one.truth.leading
    if metric is None:
        return None
    golden = truth.golden_layer(metric)
    share = truth.wins(metric)[golden]
    name = title_of(metric)
    mean = truth.means(metric)[truth.layers.index(golden)]
    lost = {layer: truth.regret(layer, metric) for layer in truth.layers}
    alike = [
        layer for layer, r in lost.items() if layer != golden and r.low == r.low and r.low <= 0
    ]
    sure = (
        f"It is the best layer in {100 * share:.0f} % of resamples of the {len(truth.facts)} facts."
    )
    if alike:
        sure += f" {layers_in_words(alike)} {ALIKE}."
    rest = {layer: r for layer, r in lost.items() if r.value == r.value and layer != golden}
    costs = []
    usual = None if one.n_layers is None else truth.nearest(published_layer(one.n_layers))
    if usual in rest:
        costs.append(f"layer {usual}, the published depth, {_points(lost[usual].value)}")
    if rest:
        random = sum(r.value for r in rest.values()) / (len(rest) + 1)
        worst = max(rest, key=lambda layer: rest[layer].value)
        costs.append(f"a layer drawn at random {_points(random)}")
        costs.append(f"the worst, layer {worst}, {_points(rest[worst].value)}")
    cost = f"Of {name}, " + ", ".join(costs) + "." if costs else "Only this layer was swept."
    return Card(
        about(folder, one.editor),
        f"Layer {golden}" + (f" of {one.n_layers}" if one.n_layers else ""),
        f"Every fact was edited at each of {len(truth.layers)} layers with {one.editor or '?'}: "
        f"{name} {number(float(mean))} here.",
        sure,
        cost,
    )


def _points(value: float) -> str:
    verb = "costs" if value > -0.05 else "gains"
    return f"{verb} {number(abs(value))} points"


def _judged(one: LocateRun, sweeps: Sequence[SweepRun]) -> str:
    """What a choice loses against the golden layers of some sweeps; "" of none."""
    golden, found = one.ranking.golden_layer, []
    for sweep in sweeps:
        truth, metric = sweep.truth, sweep.truth.leading
        same = one.fingerprint and one.fingerprint == sweep.fingerprint
        if not same or metric is None or golden not in truth.layers:
            continue
        lost = truth.regret(golden, metric)
        own = " (some of its own facts judge it)" if set(one.facts) & set(truth.facts) else ""
        ends = interval(lost.low, lost.high)
        found.append(
            f"With {sweep.editor or '?'} on {sweep.data or '?'} it costs {number(lost.value)} "
            f"points of {title_of(metric)} ({ends or 'interval unknown'}) against layer "
            f"{truth.golden_layer(metric)}{own}."
        )
    return " ".join(found[:_MOST]) + " And so on." * (len(found) > _MOST)


def layers_in_words(layers: Sequence[int]) -> str:
    """One layer or several, as the beginning of a sentence."""
    return f"Layer{'s' * (len(layers) > 1)} {listed(layers)}"


def about(folder: RunFolder, how: str) -> str:
    """Model, facts, and by what: what tells an answer from the next."""
    parts = [named(folder, "model"), named(folder, "data"), how]
    return " · ".join(part for part in parts if part) or folder.path.name


def choice_card(folder: RunFolder, one: LocateRun, sweeps: Sequence[SweepRun]) -> Card:
    """The layer that a method chose, how sure it is, and what it costs by the sweeps that there
    are of the same weights.
    """
    ranking = one.ranking
    wins = ranking.layers[ranking.golden_layer].wins
    if wins is None:
        sure = "The method looks at no resamples: it cannot say."
    else:
        others = [
            row.layer for row in sorted(ranking.layers, key=lambda row: -(row.wins or 0))
            if (row.wins or 0) >= 0.05 and row.layer != ranking.golden_layer
        ]  # fmt: skip
        share = f"{100 * wins:.0f} %"
        sure = f"It wins {share} of resamples of {ranking.n_facts} facts"
        if ranking.evidence is not None:
            sure = f"By edits of {ranking.n_facts} facts it is the best in {share} of resamples"
        sure += f"; {layers_in_words(others).lower()} may be golden, too." if others else "."
        sure += "" if ranking.firm else " That is not firm: take it as a guess."
    known = ranking.evidence
    if judged := _judged(one, sweeps):
        cost = judged
    elif (
        known is not None and known.gain[0] is not None and ranking.golden_layer != known.published
    ):
        cost = (
            f"The published depth, layer {known.published}, is {number(known.gain[0])} points "
            f"behind ({interval(*known.gain[1:]) or 'interval unknown'})."
        )
    elif known is not None and ranking.golden_layer == known.published:
        cost = "It is the published depth: no other layer was clearly ahead."
    else:
        cost = "Not measured: no edit was made. A sweep or a race with your editor tells."
    return Card(
        about(folder, one.label),
        f"Layer {ranking.golden_layer} of {len(ranking.layers)}",
        f"Chosen by {one.label} on {ranking.n_facts} facts.",
        sure,
        cost,
    )
