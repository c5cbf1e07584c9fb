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

from goldenlayers.errors import UserError
from goldenlayers.evaluation.bootstrap import Floats
from goldenlayers.evaluation.rows import each_once, problem, refuse_wrong
from goldenlayers.locating.base import LayerMethod
from goldenlayers.locating.methods import recorded_method
from goldenlayers.locating.ranking import LayerRanking
from goldenlayers.models import comparable
from goldenlayers.records import entry, short
from goldenlayers.runfiles import CONFIG
from goldenlayers.store import RunFolder
from goldenlayers.truth import OVERALL, Truth

RANKING, ROWS = "ranking.json", "per_fact.jsonl"
SCORES, SUMMARY = "scores.jsonl", "summary.json"
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
    """

    run: str
    ranking: LayerRanking
    rows: Sequence[Mapping[str, Any]] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    data_sha256: str = ""
    fingerprint: str = ""

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
        )

    @property
    def method(self) -> str:
        """The method's name."""
        return self.ranking.method

    @property
    def in_chat(self) -> bool:
        """Whether its prompts stood in a chat template."""
        return self.settings.get("chat") is True

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
        return [one.layer for one in sorted(kept, key=lambda one: (-one.value, one.layer))]


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
        in_chat: whether its prompts stood in a chat template.
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
    in_chat: bool = False

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
            in_chat=entry(config, "settings", dict[str, Any], where, {}).get("chat") is True,
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
    no_layer = "it names no layer"
    refuse_wrong(rows, each_once(lambda r: problem(r) or no_layer * ("layer" not in r)), where)
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


def overlap_warnings(
    runs: Sequence[LocateRun], sweep: SweepRun, *, allow_overlap: bool = False
) -> list[str]:
    """Whether the choices may be judged by a sweep's truth: same weights, other facts.

    Returns what the reader has to know, with ``allow_overlap`` of proxy facts that are test facts.

    Raises:
        UserError: other weights or another number of layers; proxy facts that are test facts.
    """
    found: list[str] = []
    truth, data_sha256 = sweep.truth, sweep.data_sha256
    for one in runs:
        found += other_weights(
            f"run '{one.run}'", one.fingerprint, "the sweep", sweep.fingerprint,
            fix="Locate with the sweep's model",
        )  # fmt: skip
        found += other_form(f"run '{one.run}'", one.in_chat, "the sweep", sweep.in_chat)
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


def other_weights(name: str, mine: str, other: str, theirs: str, *, fix: str) -> list[str]:
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


def other_form(name: str, mine: bool, other: str, theirs: bool) -> list[str]:
    """What the reader has to know of the forms that prompts were asked in: in a chat, or plain."""
    if mine == theirs:
        return []
    first, second = ("with", "without") if mine else ("without", "with")
    return [f"{name} was made {first} --chat, {other} is {second} it: its layer is for other texts"]


def transfer_warnings(sweep: SweepRun, others: Sequence[SweepRun], metric: str) -> list[str]:
    """Whether the golden layers of other sweeps may be judged by this one.

    Returns what the reader has to know: facts in common, so that a layer is judged by what it was
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
        found += other_form(name, one.in_chat, f"'{sweep.run}'", sweep.in_chat)
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
