"""Layer choices against the truth of a sweep: score, regret, hits, rank correlation and cost."""

from __future__ import annotations

from collections.abc import Sequence

from goldenlayers.comparing.judging import Choice, Comparison, compare
from goldenlayers.comparing.rules import SIZES, Rule, SizeCurve, rules_of, size_curve
from goldenlayers.comparing.runs import LocateRun, SweepRun
from goldenlayers.errors import UserError
from goldenlayers.models.model import comparable
from goldenlayers.truth import OVERALL

__all__ = [
    "SIZES",
    "Choice",
    "Comparison",
    "LocateRun",
    "Rule",
    "SizeCurve",
    "SweepRun",
    "compare",
    "overlap_warnings",
    "rules_of",
    "size_curve",
    "transfer_warnings",
]


def overlap_warnings(
    runs: Sequence[LocateRun], sweep: SweepRun, *, allow_overlap: bool = False
) -> list[str]:
    """Whether the choices may be judged by a sweep's truth: same weights, other facts.

    Args:
        runs: the choices.
        sweep: what they are judged by.
        allow_overlap: warn, in place of refusing, where proxy facts are test facts.

    Returns:
        What the reader has to know.

    Raises:
        UserError: other weights or another number of layers; proxy facts that are test facts.
    """
    found: list[str] = []
    truth, data_sha256 = sweep.truth, sweep.data_sha256
    for one in runs:
        found += _other_weights(
            f"run '{one.run}'", one.fingerprint, "the sweep", sweep.fingerprint,
            fix="Locate with the sweep's model",
        )  # fmt: skip
        if truth.layers[-1] >= len(one.ranking.layers):
            raise UserError(
                f"run '{one.run}' ranks {len(one.ranking.layers)} layers, but the sweep has layer "
                f"{truth.layers[-1]}",
                expected="runs on the same model",
            )
        both = sorted(set(one.facts) & set(truth.facts))
        if not both:
            continue
        same = bool(data_sha256) and data_sha256 == one.data_sha256
        facts = f"{len(both)} of its {len(one.rows)} proxy facts"
        if same and not allow_overlap:
            raise UserError(
                f"run '{one.run}' chose with facts that it is to be judged on: {facts} are facts "
                f"of the sweep (such as {both[0]})",
                expected="proxy facts that are not test facts",
                fix="Locate with other facts, or add --allow-overlap",
            )
        found.append(
            f"run '{one.run}': {facts} are facts of the sweep, so its figures are too good"
            if same
            else f"run '{one.run}': {facts} bear ids of the sweep's facts, in other data; if they "
            "are the same facts its figures are too good"
        )
    return found


def _other_weights(name: str, mine: str, other: str, theirs: str, *, fix: str) -> list[str]:
    """What the reader has to know of the weights of two runs, by their fingerprints ("": unknown).

    Raises:
        UserError: they are not the same.
    """
    if not mine or not theirs or mine == theirs:
        return []
    if not comparable(mine, theirs):
        return [
            f"{name} or {other} was made by an older version, which named weights otherwise: "
            "whether both are of the same weights cannot be told"
        ]
    raise UserError(
        f"{name} was made on other weights than {other} ({mine[:12]} and {theirs[:12]})", fix=fix
    )


def transfer_warnings(sweep: SweepRun, others: Sequence[SweepRun], metric: str) -> list[str]:
    """Whether the golden layers of other sweeps may be judged by this one.

    Args:
        sweep: what they are judged by.
        others: whose layers are judged.
        metric: by which.

    Returns:
        What the reader has to know: facts in common, so that a layer is judged by what it was
        chosen with; an Overall that is made of other metrics.

    Raises:
        UserError: a sweep of other weights, without the metric, or without a layer in common.
    """
    found = []
    for one in others:
        name = f"sweep '{one.label}'"
        found += _other_weights(
            name, one.fingerprint, f"'{sweep.run}'", sweep.fingerprint,
            fix="Compare sweeps of one model: layers of another mean something else",
        )  # fmt: skip
        if metric not in one.truth.metrics:
            raise UserError(f"{name} has no '{metric}'", expected=", ".join(one.truth.metrics))
        if not set(one.truth.layers) & set(sweep.truth.layers):
            raise UserError(
                f"{name} and '{sweep.run}' have no layer in common", fix="Sweep the same layers"
            )
        if metric == OVERALL and set(one.truth.overall_of) != set(sweep.truth.overall_of):
            found.append(
                f"Overall is the mean of {', '.join(one.truth.overall_of)} in {name}, but of "
                f"{', '.join(sweep.truth.overall_of)} in '{sweep.run}': their best layers may "
                "differ for that alone"
            )
        if both := set(one.truth.facts) & set(sweep.truth.facts):
            found.append(_common(one, sweep, name, len(both)))
    return found


def _common(one: SweepRun, sweep: SweepRun, name: str, count: int) -> str:
    facts = f"{count} of its {len(one.truth.facts)} facts"
    if one.data_sha256 and sweep.data_sha256 and one.data_sha256 != sweep.data_sha256:
        return (
            f"{name}: {facts} bear ids of facts of '{sweep.run}', in other data; if they are the "
            "same facts its layer is judged by what it was chosen with"
        )
    text = f"{name} has {facts} in common with '{sweep.run}': its layer is judged by what it was "
    if one.editor and sweep.editor and one.editor != sweep.editor:
        return text + "chosen with, so this compares the editors, not the facts"
    return text + "chosen with, so its figures are too good"
