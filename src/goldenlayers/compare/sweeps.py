"""Finished sweeps as they are compared: their truth and its origin.

A sweep is what choices are judged by, and its own golden layer is a choice for other facts, other
data and other editors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from goldenlayers.compare.runs import other_weights
from goldenlayers.errors import UserError
from goldenlayers.store import RunFolder
from goldenlayers.truth import OVERALL, Truth

SCORES, SUMMARY = "scores.jsonl", "summary.json"


@dataclass(frozen=True, eq=False)
class SweepRun:
    """One finished sweep.

    Attributes:
        run: name of its folder.
        truth: its scores.
        editor: what edited; "" if unknown, as all that follows.
        data: name of the facts' source.
        data_sha256: hash of it.
        model: name of the model.
        fingerprint: of the model's weights.
        seconds: what the sweep took; None if unknown.
        n_layers: of the model (the sweep may have been of some); None if unknown.
    """

    run: str
    truth: Truth
    editor: str = ""
    data: str = ""
    data_sha256: str = ""
    model: str = ""
    fingerprint: str = ""
    seconds: float | None = None
    n_layers: int | None = None

    @classmethod
    def read(cls, folder: RunFolder) -> SweepRun:
        """The sweep that stands in a folder of ``golden sweep``.

        Raises:
            UserError: the folder of another command, or a damaged one.
        """
        if folder.kind != "sweep":
            raise UserError(
                f"{folder.path} is a run of '{folder.kind}'", expected="a run of golden sweep"
            )
        config, summary = folder.config, folder.json(SUMMARY)
        data, model = config.get("data") or {}, config.get("model") or {}
        return cls(
            run=folder.path.name,
            truth=truth_of(folder),
            editor=summary.get("method", ""),
            data=data.get("name", ""),
            data_sha256=data.get("sha256", ""),
            model=model.get("name", ""),
            fingerprint=model.get("fingerprint", ""),
            seconds=summary.get("seconds"),
            n_layers=summary.get("n_layers"),
        )

    @property
    def label(self) -> str:
        """The folder's name, and the editor and the data where they are known."""
        said = " on ".join(part for part in (self.editor, self.data) if part)
        return f"{self.run} ({said})" if said else self.run


def truth_of(folder: RunFolder) -> Truth:
    """The truth of a sweep's folder."""
    seed = (folder.config.get("settings") or {}).get("seed", 0)
    return Truth.from_rows(folder.rows(SCORES), seed=seed)


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
        found += other_weights(
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
