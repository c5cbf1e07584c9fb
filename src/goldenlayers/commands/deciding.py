"""What the commands that edit decide first: the editor and its layer, the joints of prompts and
answers that the characters leave open, and which facts are apart from those of other runs, so that
a layer is never judged on what it was chosen with.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from goldenlayers.commands.options import flag
from goldenlayers.errors import UserError, shortened
from goldenlayers.shown import say

if TYPE_CHECKING:
    from goldenlayers.datasets import FactSet
    from goldenlayers.decoding import Settled
    from goldenlayers.editors import Editor
    from goldenlayers.facts import Fact
    from goldenlayers.models import Model
    from goldenlayers.statistics.moments import Covariance
    from goldenlayers.store import RunFolder


def editor_of(config: Any, model: Model | None = None) -> Editor:
    """The editor of ``--method``, ``--preset`` and ``--set``; a preset needs the model.

    Raises:
        UserError: an unknown editor, preset or setting, a preset of another model or method.
    """
    from goldenlayers.editors import make_editor, preset, read_settings

    editor = make_editor(config.method)
    if config.preset is not None and model is not None:
        editor = preset(config.preset, model).editor
        if editor.name != config.method:
            raise UserError(
                f"preset '{config.preset}' is for {editor.name}, not {config.method}",
                fix=f"Add --method {editor.name}",
            )
    return read_settings(editor, config.set)


def statistics_of(
    config: Any, model: Model, editor: Editor, layers: Sequence[int]
) -> Mapping[int, Covariance] | None:
    """The key statistics of ``--statistics`` that the editor needs at ``layers``."""
    from goldenlayers.editors import statistics_for

    text, cache = config.statistics, config.cache_dir
    return statistics_for(model, editor, layers, seed=config.seed, text=text, cache_dir=cache)


_LINES_BYTES = 1_000_000  # of a file of them
LINES = {"clear_of": "names", "keep": "prompts"}


def with_lines(config: Any) -> Any:
    """The config with the lines of its files in its lists, where a run records them: the names of
    ``--clear-of-file`` in ``--clear-of``, and the prompts of ``--keep-file`` in ``--keep``.

    Raises:
        UserError: a file cannot be read, is large or is no text; names for an editor that uses
            none.
    """
    from goldenlayers.editors.named import checked_names

    found: dict[str, Any] = {}
    for name in LINES:
        file = getattr(config, f"{name}_file")
        named = f"{flag(name)}-file"
        more = [] if file is None else lines_of(file, named, LINES[name])
        found |= {
            name: [*getattr(config, name), *(line.strip() for line in more)],
            f"{name}_file": None,
        }
    found["clear_of"] = list(checked_names(editor_of(config), found["clear_of"]))
    return dataclasses.replace(config, **found)


def lines_of(file: Path | str, named: str, what: str) -> list[str]:
    """The lines of a file that are not blank; "-" stands for standard input.

    Raises:
        UserError: it cannot be read, is large, is no text, or holds nothing. ``named`` says in the
            message how it was given, ``what`` what was to be in it.
    """
    name = named if file == "-" else f"{named} {file}"
    try:
        if file == "-":
            raw = sys.stdin.buffer.read(_LINES_BYTES + 1)
        else:
            with Path(file).open("rb") as opened:
                raw = opened.read(_LINES_BYTES + 1)
    except OSError as error:
        raise UserError(f"{name}: {error.strerror}") from None
    expected = f"{what}, one a line"
    if len(raw) > _LINES_BYTES:
        raise UserError(f"{name} is larger than {_LINES_BYTES} bytes", expected=expected)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{name} is no UTF-8 text") from None
    if lines := [line.removesuffix("\r") for line in text.split("\n") if line.strip()]:
        return lines
    raise UserError(f"{name} is empty", expected=expected)


def refuse_batch(editor: Editor, mode: str, n_facts: int) -> None:
    """Refuse many facts in one solve by an editor of single facts: before the work, not after.

    Raises:
        UserError: that is what is asked for.
    """
    from goldenlayers.editors import one_at_a_time

    if mode == "batch" and n_facts > 1 and not editor.edits_together:
        raise one_at_a_time(editor, n_facts)


def editor_and_layer(
    config: Any, model: Model, facts: Sequence[Fact], sha256: str = ""
) -> tuple[Editor, int]:
    """The editor, and the layer to edit: a preset's own where none is named.

    The other arguments are those of :func:`goldenlayers.commands.auto_layer.pick_layer`.
    """
    from goldenlayers.commands.auto_layer import pick_layer
    from goldenlayers.editors import PRESETS

    editor = editor_of(config, model)
    if config.preset is not None and config.layer == "auto":
        return editor, PRESETS[config.preset].layer
    return editor, pick_layer(config, model, editor, facts, sha256)


def unfinished(config: Any) -> RunFolder | None:
    """The unfinished run at ``config.out``, if there is one."""
    from goldenlayers.store import RunFolder

    try:
        return RunFolder.open(f"{config.out.expanduser().resolve()}.part", part=True)
    except (UserError, OSError, RuntimeError, ValueError):  # told by who needs it
        return None


T = TypeVar("T", bound=Any)


def settle(config: T, model: Model, *sets: Sequence[Fact] | None) -> tuple[T, list[list[Fact]]]:
    """The facts with their joints settled, and the config that holds what the model decided.

    Each of ``sets`` is settled (None gives no facts). What the config or an unfinished run at its
    ``out`` has decided already is not decided again; anything new is said.
    """
    from goldenlayers.decoding import joints_record, settle_joints

    new: dict[Settled, None] = {}
    part = None if config.out is None else unfinished(config)
    before = None if part is None else part.config.get("settings")
    recorded = config.joints or (before.get("joints") if isinstance(before, Mapping) else None)
    found = [
        settle_joints(
            model,
            facts or (),
            recorded=recorded if isinstance(recorded, Mapping) else None,
            on_settled=lambda some: new.update(dict.fromkeys(some)),
        )
        for facts in sets
    ]
    if new:
        say(joints_told(list(new)))
    record = {name: joints for facts in found for name, joints in joints_record(facts).items()}
    return dataclasses.replace(config, joints=record), found


def joints_told(settled: Sequence[Settled]) -> str:
    """What the model decided about the joints, with the clearest example of each form."""
    parts = []
    for joint, what in (("none", "no space"), ("space", "a space")):
        mine = [one for one in settled if one.joint == joint]
        if mine:
            one = max(mine, key=lambda one: abs(one.none - one.space))
            factor = math.exp(min(abs(one.none - one.space), 700.0))
            times = f"{factor:.0f}" if factor >= 10 else f"{factor:.1f}"
            few = f"{len(mine)} times, as in " if len(settled) > 1 else ""
            parts.append(
                f"{what} {few}between {_end(one.prompt)!r} and {shortened(one.answer, 30)!r} "
                f"({times if factor < 1e6 else 'a million or more'} times as likely)"
            )
    return (
        "Where the characters leave open whether a space stands between prompt and answer, the "
        f"model decides: {'; '.join(parts)}. --joint space or none fixes it."
    )


def _end(text: str) -> str:
    return text if len(text) <= 30 else f"…{text[-29:]}"


# Where the runs of a command name the facts that they worked on.
_ROWS = {"locate": "per_fact.jsonl", "sweep": "scores.jsonl", "evaluate": "scores.jsonl"}


def apart_from(facts: FactSet, runs: Sequence[Path]) -> FactSet:
    """``facts`` without those about the subjects of finished runs' facts, and so without these.

    Raises:
        UserError: no run of locate, sweep or evaluate; its facts cannot be loaded as they were;
            nothing is left.
    """
    subjects: set[str] = set()
    for path in runs:
        own = facts_of_run(folder := _opened(path))
        if not own:
            say(f"{folder.path} looked at no facts: there is nothing to leave out for it")
        subjects |= {fact.subject for fact in own}
    left = facts.without((), subjects)  # ids of other data may be alike by chance
    names = ", ".join(str(path) for path in runs)
    if not left:
        raise UserError(
            f"all {len(facts)} facts of {facts.name} are facts of {names}, or about their subjects",
            expected="facts about other subjects",
            fix="Use other facts, or give that run fewer (--limit)",
        )
    say(f"{len(left)} of the {len(facts)} facts of {facts.name} are apart from {names}")
    return left


def apart_digest(runs: Sequence[Path]) -> str:
    """Hash of which facts the runs worked on: other facts would leave others here."""
    from goldenlayers.studying.folders import ids_digest

    return ids_digest(one for path in runs for one in _ids(_opened(path)))


def _opened(path: Path) -> RunFolder:
    from goldenlayers.store import RunFolder

    folder = RunFolder.open(path)
    folder.require(*_ROWS, expected="a run of golden locate, sweep or evaluate")
    return folder


def _ids(folder: RunFolder) -> set[str]:
    return {str(row.get("fact")) for row in folder.read_rows(_ROWS[folder.kind])}


def facts_of_run(folder: RunFolder) -> list[Fact]:
    """The facts that a run of golden locate, sweep or evaluate worked on; [] if on none.

    Raises:
        UserError: it is not there any more, or not what it was.
    """
    from goldenlayers.datasets import load_facts

    if not (own := _ids(folder)):
        return []
    name = str((folder.config.get("settings") or {}).get("data", ""))
    sha256 = (folder.config.get("data") or {}).get("sha256")
    fix = "Put the file back as it was, or make that run again"
    try:
        found = load_facts(name, skip_invalid=True)
    except UserError as error:
        raise UserError(
            f"the facts of {folder.path} cannot be loaded, so their subjects are not known "
            f"({error.found})",
            fix=fix,
        ) from error
    if found.sha256 != sha256:
        raise UserError(
            f"{name} has changed since {folder.path} took its facts from it "
            f"(sha256 {str(sha256)[:12]}, now {found.sha256[:12]})",
            fix=fix,
        )
    return [fact for fact in found if fact.id in own]
