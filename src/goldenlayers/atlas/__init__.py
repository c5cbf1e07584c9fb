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

from goldenlayers.durable import read_text_file, write_text
from goldenlayers.errors import UserError
from goldenlayers.records import json_text, made, parse_json

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
    command: str

    @property
    def place(self) -> tuple[str, str, str, str]:
        """What there is one entry for: weights, editor, its settings, kind of fact."""
        return self.fingerprint, self.editor, json_text(self.settings), self.kind

    @property
    def advised(self) -> int:
        """The layer to edit: the golden one where its lead over the published depth has an interval
        above 0, else that depth. The best of many layers is in part luck.
        """
        from goldenlayers.locating import published_layer

        return self.layer if self.lead[1] > 0 else published_layer(self.n_layers)

    def sentence(self) -> str:
        """What it says, in words."""
        value, low, high = self.lead
        ahead = f"{value:+.1f} points ({low:+.1f} to {high:+.1f}) from the published depth"
        golden = f"golden in {100 * self.wins:.0f} % of resamples, {ahead}"
        if self.advised != self.layer:
            golden = f"layer {self.layer} is {golden}: too little to leave it"
        return (
            f"measured for {self.editor} on these weights with {self.n_facts} facts of {self.kind} "
            f"({golden})"
        )


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
    def lead(self) -> tuple[float, float, float]:
        """Mean lead over the published depth, with its interval, of one golden layer of all."""
        leads, n = [one.lead for one in self.entries], len(self.entries)
        value = math.fsum(lead[0] for lead in leads) / n
        reach = math.hypot(*((high - low) / 2 for _, low, high in leads)) / n
        return value, value - reach, value + reach

    @property
    def advised(self) -> int:
        """The layer to edit: the one that all kinds of facts share, where their mean lead over the
        published depth has an interval above 0, or that all advise; else the published depth.
        """
        from goldenlayers.locating import published_layer

        advised = {one.advised for one in self.entries}
        golden = {one.layer for one in self.entries}
        if len(golden) == 1 and self.lead[1] > 0:
            return golden.pop()
        return advised.pop() if len(advised) == 1 else published_layer(self.entries[0].n_layers)

    def sentence(self) -> str:
        """What it says, in words."""
        first, kinds = self.entries[0], [one.kind for one in self.entries]
        if len(self.entries) == 1:
            return first.sentence()
        if len({one.layer for one in self.entries}) == 1:
            value, low, high = self.lead
            more = "" if self.advised == first.layer else ": too little to leave it"
            return (
                f"on these weights layer {first.layer} was the best for {first.editor} with facts "
                f"of {' and of '.join(kinds)}, {value:+.1f} points ({low:+.1f} to {high:+.1f}) "
                f"from the published depth{more}"
            )
        found = ", ".join(f"{one.layer} of {one.kind} {one.lead[0]:+.1f}" for one in self.entries)
        return (
            f"the published depth, since on these weights the best layer for {first.editor} "
            f"depends on the kind of fact ({found} points from that depth); golden locate "
            "--method race finds yours"
        )


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
    home = min(truth.layers, key=lambda one: abs(one - published_layer(n_layers)))
    lead, place = truth.regret(home), truth.layers.index(layer)
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
        command=command,
    )


def add_entry(path: Path, entry: Entry) -> None:
    """Put an entry into an atlas, in place of one of the same weights, editor and data.

    Raises:
        UserError: what stands at ``path`` is no atlas, or cannot be written.
    """
    others = [one for one in read_atlas(path) if one.place != entry.place] if path.exists() else []
    entries = sorted([*others, entry], key=lambda one: (one.model, one.place[1:]))
    rows = [dataclasses.asdict(one) for one in entries]
    write_text(path, json_text({"schema": SCHEMA, "entries": rows}, indent=1) + "\n")


def _rounded(values: Sequence[float]) -> tuple[float, float, float]:
    one, low, high = (round(value, 2) for value in values)
    return one, low, high
