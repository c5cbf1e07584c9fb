"""The help of ``golden``: every text is the one that stands with a command and with its options."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from tyro.conf import Positional, Suppress

from goldenlayers.commands.options import RARE, Under, default_of, flag, marks_of, types_of
from goldenlayers.shown import width

# Where a heading stands; those that are not named stand between.
_PLACES = {"": 0, "Method": 1, "Options": 1, "Facts": 2, "Output": 3, "Model": 8, RARE: 9}
_COLUMN = 24  # where the texts of the options begin


def command_help(command: str, kind: type[Any], *, rare: bool = False) -> list[str]:
    """The lines of ``golden COMMAND --help``; with ``rare`` those of ``--help-all``.

    Args:
        command: its name.
        kind: the dataclass of its options. Its docstring says what the command does; lines in it
            that begin with "golden" are examples.
        rare: list the rarely used options, too.
    """
    about, _, more = (inspect.getdoc(kind) or "").partition("\n\n")
    texts, usage, groups = field_texts(kind), [f"usage: golden {command}"], dict[str, list[str]]()
    for f in dataclasses.fields(kind):
        marks = marks_of(kind)[f.name]
        if Suppress in marks:
            continue
        heading, left, value = _heading(kind, f.name, marks), flag(f.name), _metavar(kind, f, marks)
        usual = default_of(f)
        if Positional in marks:
            heading, left, value = "", value, ""
            usage.append(left if usual is dataclasses.MISSING else f"[{left}]")
        elif usual is dataclasses.MISSING:
            usage.append(f"{left} {value}")
        text = texts.get(f.name, "")
        if usual not in (None, "", dataclasses.MISSING, [], {}) and not isinstance(usual, bool):
            text += f" (default: {' '.join(map(str, usual)) if isinstance(usual, list) else usual})"
        groups.setdefault(heading, []).extend(_entry(f"{left} {value}".rstrip(), text))
    hidden = not rare and groups.pop(RARE, None)
    usage += ["[OPTIONS]"] * any(groups)
    lines = [" ".join(usage), "", *textwrap.wrap(about, width())]
    for heading in sorted(groups, key=lambda name: _PLACES.get(name, 5)):
        lines += ["", *[f"{heading}:"] * bool(heading), *groups[heading]]
    lines += ["", f"More options: golden {command} --help-all"] * bool(hidden)
    examples = [f"  {line}" for line in more.split("\n") if line.startswith("golden ")]
    return [*lines, "", "Examples:", *examples]


def field_texts(kind: type[Any]) -> dict[str, str]:
    """The string under each field of a dataclass and of its bases, from their source."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__[:-1]):
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(body, ast.ClassDef)
        for field, text in zip(body.body, body.body[1:], strict=False):
            match field, text:
                case ast.AnnAssign(ast.Name(name)), ast.Expr(ast.Constant(str(value))):
                    found[name] = " ".join(value.split())
    return found


def _heading(kind: type[Any], name: str, marks: tuple[Any, ...]) -> str:
    """The heading that an option stands under: its own, or that of the class it comes from."""
    said = [mark for mark in marks if isinstance(mark, Under)]
    owner = next(base for base in kind.__mro__ if name in inspect.get_annotations(base))
    own = vars(kind).get("heading", "Options")
    return said[0] if said else own if owner is kind else getattr(owner, "heading", "Options")


def _metavar(kind: type[Any], f: dataclasses.Field[Any], marks: tuple[Any, ...]) -> str:
    """How the value of an option is written in the help."""
    if said := [mark.metavar for mark in marks if getattr(mark, "metavar", None)]:
        return said[0]
    hint = types_of(kind)[f.name]
    parts = [part for part in get_args(hint) if part is not type(None)]
    if get_origin(hint) is Literal:
        return "|".join(parts)
    if get_origin(hint) is dict:
        return "NAME VALUE ..."
    many, word = get_origin(hint) is list, f.name.rpartition("_")[2].upper()
    words = {bool: "", int: "N", float: "X", Path: "PATH"}
    word = words.get(parts[0] if parts else hint, word.removesuffix("S") if many else word)
    return f"{word} ..." if many else word


def _entry(left: str, text: str) -> list[str]:
    """The lines of an option: its name on the left, its text beside or below it."""
    room = " " * _COLUMN
    lines = [room + line for line in textwrap.wrap(text, width() - _COLUMN)]
    if len(left) > _COLUMN - 4 or not lines:
        return [f"  {left}", *lines]
    return [f"  {left}".ljust(_COLUMN) + lines[0].lstrip(), *lines[1:]]
