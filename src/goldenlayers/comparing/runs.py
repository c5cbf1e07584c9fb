"""Finished locate runs as they are compared: the ranking, the rows it came from, and their origin.

Shapes: N proxy facts, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from goldenlayers.errors import UserError
from goldenlayers.evaluation.rows import refuse_wrong
from goldenlayers.locating.base import LayerMethod
from goldenlayers.locating.methods import recorded_method
from goldenlayers.locating.ranking import LayerRanking
from goldenlayers.models.model import comparable
from goldenlayers.records import entry, short
from goldenlayers.runfiles import CONFIG
from goldenlayers.store import RunFolder

if TYPE_CHECKING:
    from goldenlayers.comparing.sweeps import SweepRun

Floats = NDArray[np.float64]

RANKING, ROWS = "ranking.json", "per_fact.jsonl"
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
        refuse_wrong(rows, lambda row: _problem(row, depth), folder.file(ROWS))
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
        return [one.layer for one in sorted(kept, key=lambda one: (-one.value, one.layer))]


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
        found += other_weights(
            f"run '{one.run}'", one.fingerprint, "the sweep", sweep.fingerprint,
            fix="Locate with the sweep's model",
        )  # fmt: skip
        if truth.layers[-1] >= len(one.ranking.layers):
            raise UserError(
                f"run '{one.run}' ranks {len(one.ranking.layers)} layers, but the sweep has layer "
                f"{truth.layers[-1]}",
                expected="runs on the same model",
            )
        both = _shared(one.facts, truth.facts)
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


def _problem(row: Mapping[str, Any], depth: int) -> str:
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


def _shared(proxy: Collection[str], test: Collection[str]) -> list[str]:
    return sorted(set(proxy) & set(test))
