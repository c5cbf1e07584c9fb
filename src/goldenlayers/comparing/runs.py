"""Finished runs as they are compared, and their origin: a locate run with its ranking and the rows
that it came from, a sweep with its truth.

A sweep is what choices are judged by, and its own golden layer is a choice for other facts, other
data and other editors. Shapes: N proxy facts, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from goldenlayers.errors import UserError
from goldenlayers.evaluation.rows import each_once, problem, refuse_wrong
from goldenlayers.evaluation.scoring import ScoreRow
from goldenlayers.locating.base import LayerMethod
from goldenlayers.locating.methods import recorded_method
from goldenlayers.locating.ranking import LayerRanking
from goldenlayers.records import entry, short
from goldenlayers.runfiles import CONFIG
from goldenlayers.store import RunFolder
from goldenlayers.truth import Truth

Floats = NDArray[np.float64]

RANKING, ROWS, VERIFIED = "ranking.json", "per_fact.jsonl", "verified.json"
_PER_LAYER = ("phi", "cosine", "norm_old", "norm_new")


@dataclass(frozen=True, eq=False)
class LocateRun:
    """One locate run.

    Attributes:
        run: name of its folder, for messages and to tell equal choices apart.
        ranking: what it chose.
        rows: its rows, one per fact, sorted by fact; [] for methods that look at no facts.
        settings: of the run ("scope", "loss", "reach", ...).
        data_sha256: hash of the proxy facts' source; "" if unknown.
        fingerprint: of the model's weights; "" if unknown.
        verified: ``verified.json`` of ``locate --verify``, if the run has one.
    """

    run: str
    ranking: LayerRanking
    rows: Sequence[Mapping[str, Any]] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    data_sha256: str = ""
    fingerprint: str = ""
    verified: Mapping[str, Any] | None = None

    @classmethod
    def read(cls, folder: RunFolder) -> LocateRun:
        """The run that stands in a folder of ``golden locate``.

        Raises:
            UserError: the folder of another command, or a damaged one.
        """
        folder.require("locate")
        config, where = folder.config, folder.file(CONFIG)
        try:
            ranking = LayerRanking.from_json(folder.json(RANKING))
        except UserError as error:
            raise UserError(
                f"{folder.file(RANKING)}: {error.found}", expected=error.expected, fix=error.fix
            ) from error
        depth = len(ranking.layers)
        verified = None
        if folder.file(VERIFIED).is_file():
            verified = folder.json(VERIFIED)
            named = verified.get("layer") if isinstance(verified, dict) else None
            if type(named) is not int or named not in range(depth):
                raise UserError(f"{folder.file(VERIFIED)} names no layer", fix="Locate again")
            entry(verified, "seconds", float, folder.file(VERIFIED), None)
        rows = folder.read_rows(ROWS)
        refuse_wrong(rows, lambda row: _ranking_problem(row, depth), folder.file(ROWS))
        if rows and len(rows) != ranking.n_facts + ranking.n_unscored:
            raise UserError(
                f"{folder.file(ROWS)} has {len(rows)} rows, and the ranking is of "
                f"{ranking.n_facts + ranking.n_unscored} facts",
                fix="Put the files back as they were, or locate again",
            )
        return cls(
            run=folder.path.name,
            ranking=ranking,
            rows=sorted(rows, key=lambda row: row["fact"]),
            settings=entry(config, "settings", dict[str, Any], where, {}),
            data_sha256=entry(config.get("data", {}), "sha256", str, where, ""),
            fingerprint=entry(config.get("model", {}), "fingerprint", str, where, ""),
            verified=verified,
        )

    @property
    def method(self) -> str:
        """The method's name."""
        return self.ranking.method

    @cached_property
    def how(self) -> LayerMethod:
        """The method with the run's options.

        Raises:
            UserError: the settings hold an option that the method cannot take.
        """
        try:
            return recorded_method(self.method, self.settings)
        except UserError as error:
            raise UserError(f"run '{self.run}': {error}") from error

    @property
    def scope(self) -> str | None:
        """Which weights the gradients were of; None for methods without."""
        return getattr(self.how, "scope", None)

    @property
    def loss(self) -> str | None:
        """Which loss the gradients were of; None for methods without."""
        return getattr(self.how, "loss", None)

    @property
    def fence(self) -> str | None:
        """The fence of the ranking; None for methods without fences."""
        return None if self.how.scoring.fence is None else self.ranking.fence

    @property
    def label(self) -> str:
        """The method with what tells its settings apart, the fence left out."""
        return self.how.label

    @property
    def facts(self) -> tuple[str, ...]:
        """Ids of the proxy facts of the rows."""
        return tuple(str(row["fact"]) for row in self.rows)

    def array(self, name: str) -> Floats:
        """Field ``name`` of every row as (N, L), NaN where there is no number.

        Raises:
            UserError: a row with another number of layers than the ranking.
        """
        wide = len(self.ranking.layers)
        found = np.full((len(self.rows), wide), np.nan)
        for i, row in enumerate(self.rows):
            values = row.get(name)
            if values is None:
                continue
            if not isinstance(values, list) or len(values) != wide:
                raise UserError(
                    f"run '{self.run}', fact {row.get('fact')}: '{name}' is not a list of "
                    f"{wide} numbers",
                    expected="one number per layer of the ranking",
                )
            found[i] = [math.nan if value is None else value for value in values]
        return found

    def order(self) -> list[int]:
        """All layers within the fences, best first; of equal scores the shallower one first."""
        kept = [one for one in self.ranking.layers if one.kept]
        return [one.layer for one in sorted(kept, key=lambda one: (-one.score, one.layer))]


def _ranking_problem(row: Mapping[str, Any], depth: int) -> str:
    """What is wrong with a row of ``per_fact.jsonl`` in a run that ranks ``depth`` layers."""
    if not isinstance(row.get("fact"), str):
        return f"'fact' is {short(row.get('fact'))}, not an id"
    for name in _PER_LAYER:
        values = row.get(name)
        if values is None:
            continue
        if not isinstance(values, list) or len(values) != depth:
            return f"'{name}' is not a list of {depth} numbers"
        for value in values:
            if value is not None and not (type(value) in (int, float) and math.isfinite(value)):
                return f"'{name}' holds {short(value)}"
    return ""


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
    refuse_wrong(rows, each_once(_score_problem), where)
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


def _score_problem(row: ScoreRow) -> str:
    return problem(row) or ("" if "layer" in row else "it names no layer")
