"""The editors by name, and how settings given by name become an editor."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from goldenlayers.editors.base import Editor, Settings
from goldenlayers.editors.finetune import FtL, FtM
from goldenlayers.editors.incontext import InContext
from goldenlayers.editors.memit import AlphaEdit, Emmet, Memit, Pmet
from goldenlayers.editors.rome import Rome, RRome
from goldenlayers.errors import UserError, check_number, near_matches
from goldenlayers.registry import Registry

S = TypeVar("S", bound=Settings)

EDITORS: Registry[type[Editor]] = Registry("editor", "goldenlayers.editors")
for _kind in (Rome, RRome, Memit, Emmet, AlphaEdit, Pmet, FtM, FtL):
    EDITORS.register(_kind.name, _kind)


def make_editor(method: str | Editor, **settings: Any) -> Editor:
    """The editor of a name, or the one given, with some settings changed.

    Raises:
        UserError: an unknown editor, with near matches; a setting that it does not have, with the
            editors that have it; a value out of range.
    """
    if isinstance(method, str):
        if method == InContext.name and method not in EDITORS:
            raise UserError(
                f"unknown editor '{method}' (in-context changes no weights)",
                fix=near_matches(method, EDITORS),
            )
        method = EDITORS[method]()
    return with_settings(method, settings)


def with_settings(one: S, settings: Mapping[str, Any]) -> S:
    """``one`` with some settings changed.

    Raises:
        UserError: see :func:`make_editor`.
    """
    own = {f.name for f in dataclasses.fields(one)}
    for name in settings:
        if name not in own:
            having = [
                n for n, kind in _kinds() if name in {f.name for f in dataclasses.fields(kind)}
            ]
            raise UserError(
                f"{one.name} has no setting '{name}'",
                fix=f"It is one of {', '.join(having)}" if having else near_matches(name, own),
            )
    return dataclasses.replace(one, **settings) if settings else one


def read_settings(one: S, texts: Mapping[str, str], flag: str = "--set") -> S:
    """``one`` with settings that a flag gives as text, by NAME VALUE pairs.

    Raises:
        UserError: no such setting, or no value for it.
    """
    values: dict[str, Any] = dict(texts)
    for f in dataclasses.fields(one):
        if f.name in texts and type(f.default) in (bool, int, float):
            values[f.name] = _value(texts[f.name], type(f.default), f"{flag} {f.name}")
    return with_settings(one, values)


def _value(text: str, kind: type, what: str) -> float | int | bool:
    try:
        return {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
    except (ValueError, KeyError):
        kinds = {bool: "true or false", int: "a whole number"}
        raise UserError(f"{what} is '{text}'", expected=kinds.get(kind, "a number")) from None


def _kinds() -> Iterable[tuple[str, type[Settings]]]:
    for name in EDITORS:
        try:
            yield name, EDITORS[name]
        except UserError:  # a broken package: for who asks for this editor
            continue
    yield InContext.name, InContext


def one_at_a_time(editor: Editor, n_facts: int) -> UserError:
    """The error of many facts in one solve, where the editor takes one."""
    able = [name for name, kind in _kinds() if issubclass(kind, Editor) and kind.edits_together]
    return UserError(
        f"{editor.name} edits one fact at a time, not {n_facts} together",
        fix=f"Use --mode sequential, or for a batch another --method: {', '.join(able)}",
    )


def check_step(editor: Editor, step: int) -> None:
    """Refuse a number of facts per step that the editor cannot write.

    Raises:
        UserError: below 1, or above 1 where it takes one fact at a time.
    """
    check_number("the step", step, 1, 1_000_000)
    if step > 1 and not editor.edits_together:
        raise one_at_a_time(editor, step)
