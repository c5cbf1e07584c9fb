"""The layer that ``--layer`` names: a number, the published depth, a run's golden layer, or auto.

Auto is a race with the very editor on starter facts about other subjects, run once and kept; where
the atlas has the model and the editor, its layer, at no cost.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from goldenlayers.commands import shared
from goldenlayers.commands.options import default_settings, flag, never_recorded
from goldenlayers.durable import disk_errors, read_text_file, write_text
from goldenlayers.errors import UserError
from goldenlayers.progress import Progress, progress
from goldenlayers.records import entry, json_text, parse_json
from goldenlayers.shown import put, result, say, warn

if TYPE_CHECKING:
    from goldenlayers.comparing import SweepRun
    from goldenlayers.datasets import FactSet
    from goldenlayers.editors import Editor
    from goldenlayers.facts import Fact
    from goldenlayers.locating import Race
    from goldenlayers.locating.ranking import LayerRanking
    from goldenlayers.models import Model

LAYERS = """a layer number (negative ones count from the end), auto, published, or the folder of
a finished run of golden locate or sweep (golden edit: or each)"""
_FEWEST = 12  # proxy facts
_VERSION = 8  # of what is kept: to be raised when the race's scores change, or what may be kept


def with_layer(config: Any, layer: int) -> Any:
    """The config with the layer that was meant, as a run records it."""
    return dataclasses.replace(config, layer=str(layer), budget=None)


def check_budget(config: Any) -> None:
    """Refuse a ``--budget`` that is no time, or where no layer is looked for.

    Raises:
        UserError: it is.
    """
    if config.budget is None:
        return
    from goldenlayers.locating.race import seconds_of

    seconds_of(config.budget)
    if config.layer != "auto":
        raise UserError("--budget is for --layer auto", fix="Leave one of them out")


def pick_layer(
    config: Any, model: Model, editor: Editor, facts: Sequence[Fact], sha256: str = ""
) -> int:
    """The layer ``--layer`` names.

    Args:
        config: of the command.
        model: its model.
        editor: that is to edit.
        facts: that are to be edited, or judged: none about their subjects chooses the layer.
        sha256: of the data they come from; an atlas entry of the same data is not used.

    Raises:
        UserError: not a layer of the model, and no run that names one.
    """
    from goldenlayers.locating import published_on

    text = config.layer
    if re.fullmatch("-?[0-9]{1,18}", text):
        return model.layers[int(text)].index
    if text == "published":
        layer = published_on(model)
        say(f"Layer {layer}: the published depth")
        return layer
    if text != "auto":
        return _of_run(text, model, editor, facts)
    from goldenlayers.atlas import found_for

    if (known := found_for(model, editor, sha256)) is not None:
        say(f"Layer {known.advised}: {known.sentence()}")
        return known.advised
    if not editor.carries_over:
        layer = published_on(model)
        say(
            f"Layer {layer}: the published depth. By {editor.name} the layer that suits one kind "
            "of facts may harm another, so starter facts choose none: golden locate --method race "
            "does, on facts of your own kind"
        )
        return layer
    return _raced(config, model, editor, facts)


def _of_run(text: str, model: Model, editor: Editor, facts: Sequence[Fact]) -> int:
    """The golden layer of a finished run of ``golden locate`` or ``golden sweep``."""
    from goldenlayers.commands.deciding import facts_of_run
    from goldenlayers.comparing import LocateRun, SweepRun
    from goldenlayers.comparing.runs import other_form, other_weights
    from goldenlayers.prompts import plain_subject
    from goldenlayers.store import RunFolder

    try:
        path = Path(text).expanduser()
        there = bool(text) and path.exists()
    except (OSError, RuntimeError):  # it can be no file's name
        path, there = Path(), False
    if not there:
        raise UserError(f"--layer is '{text}'", expected=" ".join(LAYERS.split()))
    folder = RunFolder.open(path)
    folder.require("locate", "sweep", expected="a run of golden locate or golden sweep")
    run = (SweepRun if folder.kind == "sweep" else LocateRun).read(folder)
    if isinstance(run, SweepRun):
        layer = run.truth.golden_layer()
        share = run.truth.wins()[layer]
        by = f"the sweep with {run.editor} (the best in {share:.0%} of resamples)"
        other = run.editor
    else:
        layer, by = run.ranking.golden_layer, run.ranking.method
        other = run.settings.get("editor") if run.method == "race" else None
    if isinstance(other, str) and other != editor.name:
        warn(f"{path} chose the layer for {other}, and {editor.name} edits")
    for warning in other_weights(
        f"run '{path}'", run.fingerprint, "this model", model.fingerprint(),
        fix="Give a run on this model",
    ):  # fmt: skip
        warn(warning)
    for warning in other_form(f"run '{path}'", run.in_chat, "this command", model.chat):
        warn(warning)
    try:
        used = {(plain_subject(fact.subject), fact.prompt) for fact in facts_of_run(folder)}
    except UserError as error:
        warn(f"whether {path} chose the layer with these very facts is not known: {error.found}")
        used = set()
    if both := sum((plain_subject(fact.subject), fact.prompt) in used for fact in facts):
        warn(f"{both} of the facts are among those that {path} chose the layer with")
    say(f"Layer {layer}: the golden layer of {path}, by {by}")
    return model.layers[layer].index


def _raced(config: Any, model: Model, editor: Editor, facts: Sequence[Fact]) -> int:
    from goldenlayers.locating import Race
    from goldenlayers.models.cache import models_root

    proxy = _proxy(facts)
    folder = models_root(config.cache_dir).parent / "golden"

    def place(how: Race) -> Path:
        return folder / f"{_key(config, model, how, proxy)[:32]}.json"

    how = Race(editor=editor, budget=config.budget)
    # What was chosen without haste is better than what a budget allows.
    ranking = _kept(place(Race(editor=editor))) or (config.budget and _kept(place(how))) or None
    if ranking is None:
        ranking, path = _race(config, model, how, proxy), place(how)
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        record = json_text(ranking.to_json())
        write_text(path, json_text({"sha256": _sha256(record), "ranking": record}))
    say(*ranking.notes)
    for warning in ranking.warnings:
        warn(warning)
    return ranking.golden_layer


def _proxy(facts: Sequence[Fact]) -> FactSet:
    """Starter facts, none of which is about a subject of ``facts``.

    Raises:
        UserError: too few are left.
    """
    from goldenlayers.datasets import load_facts

    pool = load_facts("starter")
    left = pool.without((), [fact.subject for fact in facts])
    if len(left) < _FEWEST:
        raise UserError(
            f"only {len(left)} starter facts are left to choose a layer with, the others are about "
            "subjects that are to be edited",
            fix="Use fewer facts (--limit), or give --layer N (golden locate finds one)",
        )
    return left


def _race(config: Any, model: Model, how: Race, proxy: FactSet) -> LayerRanking:
    from goldenlayers.commands.deciding import statistics_of
    from goldenlayers.locating import locate

    say(
        f"No layer is known for {how.editor.name} on {model.name}: it is chosen once, by real "
        "edits of starter facts (--layer published takes the depth of published settings at once)"
    )
    statistics = statistics_of(config, model, how.editor, how.layers(model))
    with progress("choosing the layer", "edits", estimate=False) as bar:
        tell = Progress(on_progress=bar, on_note=say)
        ranking = locate(model, proxy, how, statistics=statistics, progress=tell)
    if ranking.interrupted:  # then the command that needs it ends, too
        raise KeyboardInterrupt
    return ranking


def _key(config: Any, model: Model, how: Race, proxy: FactSet) -> str:
    """Hash of all that decides the choice.

    Of the facts only those count that the race may use: leaving out others changes nothing.
    """
    from goldenlayers.commands.shared import inputs_of
    from goldenlayers.racing import drawn
    from goldenlayers.statistics.cache import model_settings

    options = [how.label, how.editor.to_json()]
    text = [config.statistics, inputs_of(config).get("statistics")]
    ids = [fact.id for fact in drawn(proxy)]
    found_by = [_VERSION, options, text, config.seed, ids, proxy.sha256, model_settings(model)]
    found_by += ["chat"] if model.chat else []
    return _sha256(json_text(found_by))


def _kept(path: Path) -> LayerRanking | None:
    """The ranking that is kept there; None where there is none, or it is not what was kept."""
    from goldenlayers.locating.ranking import LayerRanking

    if not path.exists():
        return None
    try:
        record = parse_json(read_text_file(path), path)
        text = entry(record if isinstance(record, dict) else {}, "ranking", str, path)
        if record.get("sha256") != _sha256(text):
            raise UserError(f"{path} has changed since it was written")
        return LayerRanking.from_json(text)
    except UserError as error:
        warn(f"the kept golden layer cannot be used, so it is chosen again: {error}")
        return None


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def to_atlas(path: Path, run: Path, sweep: SweepRun) -> None:
    """Put the sweep's golden layer into an atlas, with the command that measured it."""
    from goldenlayers.atlas import add_entry, entry_of
    from goldenlayers.commands import options_of
    from goldenlayers.commands.deciding import editor_of
    from goldenlayers.store import RunFolder

    settings = shared.recorded_settings(options_of("sweep"), RunFolder.open(run).config)
    if settings["chat"]:
        raise UserError(f"{run} was swept with --chat, and an atlas is of plain prompts")
    recorded = argparse.Namespace(**settings)
    entry = entry_of(sweep, editor_of(recorded), _command(settings))
    add_entry(path, entry)
    say(f"{path}: layer {entry.layer} for {entry.editor} on {entry.model}, {entry.kind}")


def _command(settings: Mapping[str, Any]) -> str:
    """The ``golden sweep`` that has these settings; files by their names alone."""
    from goldenlayers.commands import options_of

    kind = options_of("sweep")
    usual, here = default_settings(kind), (*never_recorded(kind), "joints", "model", "data")
    words = ["golden sweep", *(Path(settings[name]).name for name in ("model", "data"))]
    for name, value in settings.items():
        if name in here or value in (usual.get(name), None, [], {}):
            continue
        many = [x for pair in value.items() for x in pair] if isinstance(value, dict) else value
        many = many if isinstance(many, list) else [] if many is True else [many]
        words += [flag(name), *(Path(str(one)).name for one in many)]
    return " ".join(words)


def show_atlas(model: Model) -> None:
    """The golden layers that were measured for these weights, and by which commands."""
    from goldenlayers.atlas import found_for, known_of
    from goldenlayers.editors import EDITORS, make_editor
    from goldenlayers.report import show, table

    entries = known_of(model)
    result(atlas=entries)
    if not entries:
        put(f"The atlas has no golden layer of these weights ({len(model.layers)} layers).")
        return
    rows = [
        (
            one.editor + "".join(f" {name} {value}" for name, value in one.settings.items()),
            one.kind,
            one.n_facts,
            one.layer,
            "{:.1f} ({:.1f} to {:.1f})".format(*one.overall),
            "{:+.1f} ({:+.1f} to {:+.1f})".format(*one.lead),
        )
        for one in entries
    ]
    columns = ("editor", "facts of", "facts", "layer", "Overall", "against the published depth")
    show(table("Golden layers in the atlas", columns, rows))
    put(*(f"  {one.command}" for one in entries))
    names = [name for name in dict.fromkeys(one.editor for one in entries) if name in EDITORS]
    taken = [(name, found_for(model, make_editor(name))) for name in names]
    if said := [f"{known.advised} for {name}" for name, known in taken if known is not None]:
        put(f"--layer auto takes layer {', '.join(said)}.")
