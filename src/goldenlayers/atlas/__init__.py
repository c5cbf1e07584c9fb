"""The atlas: golden layers that sweeps have measured, by model, editor and kind of fact.

``entries.json`` beside this file holds the entries. docs/editing.md says how one is added.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from goldenlayers.durable import read_text_file, write_text
from goldenlayers.errors import UserError
from goldenlayers.evaluation.bootstrap import nan_mean
from goldenlayers.records import json_text, made, parse_json
from goldenlayers.truth.table import Interval, Truth, nearest

if TYPE_CHECKING:
    from goldenlayers.comparing import SweepRun
    from goldenlayers.editors import Editor
    from goldenlayers.models import Model

ATLAS = Path(__file__).with_name("entries.json")
SCHEMA = 1
_LEAST = 20  # facts behind an entry that decides for others
_EFFORT = ("steps", "prefixes", "prefix_tokens")  # of a value search; they decide no layer


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What one sweep says of a model and an editor.

    Attributes:
        model: its name.
        fingerprint: of its weights.
        n_layers: of the model.
        editor: its name.
        settings: those of the editor that are not at their default.
        kind: of fact: the name of the data.
        data_sha256: of the data.
        n_facts: that were swept.
        layer: the golden layer.
        overall: mean Overall there, and its 95 % interval.
        lead: points ahead of the published depth, and their interval; (0, 0, 0) at that depth.
        wins: share of the resamples of the facts in which the layer is golden.
        layers: that were swept.
        leads: points ahead of the published depth, by layer.
        errors: their standard errors, paired by fact.
        command: that measured it.
    """

    model: str
    fingerprint: str
    n_layers: int
    editor: str
    settings: dict[str, Any] = field(default_factory=dict)
    kind: str
    data_sha256: str
    n_facts: int
    layer: int
    overall: tuple[float, float, float]
    lead: tuple[float, float, float]
    wins: float
    layers: tuple[int, ...]
    leads: tuple[float, ...]
    errors: tuple[float, ...]
    command: str

    @property
    def place(self) -> tuple[str, str, str, str]:
        """What there is one entry for: weights, editor, its settings, kind of fact."""
        return self.fingerprint, self.editor, json_text(self.settings), self.kind


def read_atlas(path: Path | None = None) -> list[Entry]:
    """The entries of an atlas; by default of the one in the package.

    Raises:
        UserError: no atlas, or a damaged one.
    """
    path = ATLAS if path is None else path
    record = parse_json(read_text_file(path), path)
    rows = record.get("entries") if isinstance(record, dict) else None
    if not isinstance(rows, list) or record.get("schema") != SCHEMA:
        raise UserError(f"{path} is no atlas", expected=f"schema {SCHEMA} and a list of entries")
    entries = []
    for number, row in enumerate(rows):
        where = f"{path}, entry {number}"
        one = made(Entry, row if isinstance(row, Mapping) else {}, where)
        if not 0 <= one.layer < one.n_layers:
            raise UserError(f"{where}: layer {one.layer} of {one.n_layers}")
        if not len(one.layers) == len(one.leads) == len(one.errors):
            raise UserError(f"{where}: its layers, leads and errors are not as many")
        if one.place in (other.place for other in entries):
            raise UserError(f"{where} repeats another one", expected="one per editor and data")
        entries.append(one)
    return entries


def known_of(model: Model) -> list[Entry]:
    """The entries of these weights."""
    mine = model.fingerprint()
    return [one for one in read_atlas() if one.fingerprint == mine]


@dataclass(frozen=True)
class Known:
    """What the atlas knows of some weights and an editor: an entry for each kind of fact, the one
    with the most facts first.
    """

    entries: tuple[Entry, ...]

    @property
    def best(self) -> tuple[int, Interval]:
        """See :func:`shared_layer`."""
        tables = [
            dict(zip(one.layers, zip(one.leads, one.errors, strict=True), strict=True))
            for one in self.entries
        ]
        facts = sum(one.n_facts for one in self.entries)
        return shared_layer(tables, self.published, facts)

    @property
    def published(self) -> int:
        """The published depth, or the swept layer that stands for it."""
        from goldenlayers.locating import published_layer

        return nearest(self.entries[0].layers, published_layer(self.entries[0].n_layers))

    @property
    def advised(self) -> int:
        """The layer to edit: the best one where the interval of its lead over the published depth
        is above 0, else that depth. The best of many layers is in part luck.
        """
        layer, lead = self.best
        return layer if lead.low > 0 else self.published

    def sentence(self) -> str:
        """What it says, in words."""
        layer, lead = self.best
        kinds = " and of ".join(one.kind for one in self.entries)
        whose = f"for {self.entries[0].editor} on these weights with facts of {kinds}"
        if layer == self.published:
            own = ", ".join(f"{one.layer} of {one.kind} {one.lead[0]:+.1f}" for one in self.entries)
            text = f"the published depth: measured {whose}, no layer is better with all"
            text += f" (the best: {own} points)"
        else:
            ahead = f"{lead.value:+.1f} points ({lead.low:+.1f} to {lead.high:+.1f})"
            if self.advised == layer:
                return f"measured {whose}, {ahead} from the published depth, behind it with none"
            text = f"the published depth: measured {whose}, layer {layer} is {ahead} from it, "
            text += "too little to leave it"
        return f"{text}; golden locate --method race finds yours"


def shared_layer(
    tables: Sequence[Mapping[int, tuple[float, float]]], published: int, facts: int = 0
) -> tuple[int, Interval]:
    """The layer with the greatest mean lead over the published depth, among those that are behind
    it with no kind of facts; with that lead and its 95 % interval.

    Args:
        tables: for each kind, layer → (lead, standard error), in points.
        published: the published depth, where there is no other.
        facts: behind the tables.
    """
    shared = set.intersection(*(set(one) for one in tables))
    leads = {
        layer: math.fsum(one[layer][0] for one in tables) / len(tables)
        for layer in sorted(shared)
        if min(one[layer][0] for one in tables) >= 0
    }
    best = max(leads, key=lambda layer: leads[layer], default=published)
    if not leads or leads[best] <= 0:
        return published, Interval(0.0, 0.0, 0.0, facts)
    reach = 1.96 * math.hypot(*(one[best][1] for one in tables)) / len(tables)
    return best, Interval(leads[best], leads[best] - reach, leads[best] + reach, facts)


def leads_of(truth: Truth, home: int) -> dict[int, tuple[float, float]]:
    """By swept layer the points ahead of one of them, paired by fact, and their standard error."""
    table = truth.table()
    gaps = table - table[:, [truth.layers.index(home)]]
    many = np.maximum(2, (~np.isnan(gaps)).sum(axis=0))
    mean = nan_mean(gaps)
    errors = np.sqrt(nan_mean((gaps - mean) ** 2) / (many - 1))
    short = np.nan_to_num(np.stack([mean, errors], 1), nan=-100.0).round(2).tolist()
    return {layer: (lead, error) for layer, (lead, error) in zip(truth.layers, short, strict=True)}


def found_for(model: Model, editor: Editor, sha256: str = "") -> Known | None:
    """What there is for these weights and this editor; None if nothing, and for a model in a chat:
    the atlas is of plain prompts.

    Args:
        model: a loaded model.
        editor: with its settings, which must be the entry's; but for how long values are searched,
            which layers are ranked alike by.
        sha256: of data that are to be judged: no entry measured on these serves.
    """
    if model.chat:
        return None
    own = _of_kind(changed_settings(editor))
    fits = [
        one
        for one in known_of(model)
        if one.editor == editor.name
        and _of_kind(one.settings) == own
        and one.data_sha256 != sha256
        and one.n_facts >= _LEAST
        and one.n_layers == len(model.layers)
    ]
    # Of sweeps that differ in effort alone, the one with the most facts speaks for a kind.
    best = {one.kind: one for one in sorted(fits, key=lambda one: one.n_facts)}
    kept = sorted(best.values(), key=lambda one: (-one.n_facts, one.kind))
    return Known(tuple(kept)) if kept else None


def changed_settings(editor: Editor) -> dict[str, Any]:
    """The settings of an editor that are not at their default."""
    return {
        f.name: getattr(editor, f.name)
        for f in dataclasses.fields(editor)
        if getattr(editor, f.name) != f.default
    }


def _of_kind(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in _EFFORT}


def entry_of(sweep: SweepRun, editor: Editor, command: str) -> Entry:
    """The entry that a finished sweep makes.

    Args:
        sweep: of every layer, or of some.
        editor: with its settings.
        command: that made the sweep.

    Raises:
        UserError: it does not say which model it swept, or has nothing to rank.
    """
    from goldenlayers.locating import published_layer

    if not sweep.fingerprint or not sweep.data_sha256 or sweep.n_layers is None:
        raise UserError(f"the sweep '{sweep.run}' does not say what it swept", fix="Sweep again")
    truth, n_layers = sweep.truth, sweep.n_layers
    layer = truth.golden_layer()
    home = truth.nearest(published_layer(n_layers))
    lead, place = truth.regret(home), truth.layers.index(layer)
    leads, errors = zip(*leads_of(truth, home).values(), strict=True)
    low, high = truth.intervals()[place].tolist()
    overall = (float(truth.means()[place]), low, high)
    if any(value != value for value in (*overall, lead.low)):
        raise UserError(f"the sweep '{sweep.run}' has too few facts for an interval")
    return Entry(
        model=Path(sweep.model).name,
        fingerprint=sweep.fingerprint,
        n_layers=n_layers,
        editor=sweep.editor,
        settings=changed_settings(editor),
        kind=sweep.data,
        data_sha256=sweep.data_sha256,
        n_facts=len(truth.facts),
        layer=layer,
        overall=_rounded(overall),
        lead=_rounded((lead.value, lead.low, lead.high)),
        wins=round(truth.wins()[layer], 3),
        layers=truth.layers,
        leads=leads,
        errors=errors,
        command=command,
    )


def add_entry(path: Path, entry: Entry) -> None:
    """Put an entry into an atlas, in place of one of the same weights, editor and data.

    Raises:
        UserError: what stands at ``path`` is no atlas, or cannot be written.
    """
    others = [one for one in read_atlas(path) if one.place != entry.place] if path.exists() else []
    entries = sorted([*others, entry], key=lambda one: (one.model, one.place[1:]))
    rows = ",\n".join(json_text(dataclasses.asdict(one)) for one in entries)
    write_text(path, f'{{"schema": {SCHEMA}, "entries": [\n{rows}\n]}}\n')


def _rounded(values: Sequence[float]) -> tuple[float, float, float]:
    one, low, high = (round(value, 2) for value in values)
    return one, low, high
