"""Finished sweeps as they are compared: their truth and its origin.

A sweep is what choices are judged by, and its own golden layer is a choice for other facts, other
data and other editors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from goldenlayers.comparing.runs import other_weights
from goldenlayers.errors import UserError
from goldenlayers.evaluation.rows import each_once, problem, refuse_wrong
from goldenlayers.evaluation.scoring import ScoreRow
from goldenlayers.records import entry
from goldenlayers.runfiles import CONFIG
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
        folder.require("sweep")
        config, where = folder.config, folder.file(CONFIG)
        data, model = config.get("data", {}), config.get("model", {})
        summary, said = summary_of(folder), folder.file(SUMMARY)
        truth = truth_of(folder)
        n_layers = entry(summary, "n_layers", int, said, None)
        swept = entry(summary, "layers", list[int], said, list(truth.layers))
        counted = entry(summary, "n_facts", int, said, len(truth.facts))
        deep = n_layers is not None and n_layers <= truth.layers[-1]
        if swept != list(truth.layers) or counted != len(truth.facts) or deep:
            raise UserError(
                f"{said} and {folder.file(SCORES)} contradict each other: {counted} facts at "
                f"{len(swept)} layers, and {len(truth.facts)} at {len(truth.layers)}",
                fix="Put the files back as they were, or make the run again",
            )
        return cls(
            run=folder.path.name,
            truth=truth,
            editor=entry(summary, "method", str, said, ""),
            data=entry(data, "name", str, where, ""),
            data_sha256=entry(data, "sha256", str, where, ""),
            model=entry(model, "name", str, where, ""),
            fingerprint=entry(model, "fingerprint", str, where, ""),
            seconds=entry(summary, "seconds", float, said, None),
            n_layers=n_layers,
        )

    def to_json(self) -> dict[str, Any]:
        """Where the truth comes from, and what it cost: the entry in ``compare.json``."""
        names = ("model", "fingerprint", "data", "data_sha256", "seconds", "n_layers")
        named = {name: getattr(self, name) for name in names}
        return {"run": self.run, "method": self.editor, **named}

    @property
    def label(self) -> str:
        """The folder's name, and the editor and the data where they are known."""
        said = " on ".join(part for part in (self.editor, self.data) if part)
        return f"{self.run} ({said})" if said else self.run


def truth_of(folder: RunFolder) -> Truth:
    """The truth of a sweep's folder.

    Raises:
        UserError: a row that cannot be right, is there twice, or is missing.
    """
    seed = entry(folder.config.get("settings", {}), "seed", int, folder.file(CONFIG), 0)
    rows, where = folder.rows(SCORES), folder.file(SCORES)
    refuse_wrong(rows, each_once(_problem), where)
    layers = {row["layer"] for row in rows}
    probes = {(row["fact"], row["metric"], row["probe"]) for row in rows}
    if len(rows) != len(layers) * len(probes):
        raise UserError(
            f"{where} has {len(rows)} rows for {len(probes)} probes at {len(layers)} layers",
            expected=f"{len(layers) * len(probes)} rows",
            fix="Put the file back as it was, or make the run again",
        )
    if seed < 0:
        raise UserError(f"{folder.file(CONFIG)}: 'seed' is {seed}", expected="0 or more")
    return Truth.from_rows(rows, seed=seed)


def summary_of(folder: RunFolder) -> dict[str, Any]:
    """What a sweep's ``summary.json`` says.

    Raises:
        UserError: not an object.
    """
    summary = folder.json(SUMMARY)
    if not isinstance(summary, dict):
        raise UserError(f"{folder.file(SUMMARY)} is no summary", expected="a JSON object")
    return summary


def _problem(row: ScoreRow) -> str:
    return problem(row) or ("" if "layer" in row else "it names no layer")


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
