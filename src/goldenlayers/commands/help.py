"""The help of ``golden``: every text is the one that stands with a command and with its options."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import shutil
import textwrap
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from goldenlayers.commands import GROUPS

ABOUT = (
    "Find the golden layer of a language model, edit its knowledge there, and measure honestly "
    "what changed."
)
# Where a heading stands; those that are not named stand between.
_PLACES = {"Method": 0, "Options": 0, "Facts": 1, "Output": 2, "Model": 8, "More options": 9}
_COLUMN = 24  # where the texts of the options begin


def overview() -> list[str]:
    """The lines of ``golden --help``."""
    lines = ["usage: golden COMMAND ...", "", *textwrap.wrap(ABOUT, _width())]
    for heading, commands in GROUPS.items():
        lines += ["", f"{heading}:", *(f"  {name:10}{text}" for name, text in commands.items())]
    return [*lines, "", "golden COMMAND --help says more, golden --version which version this is."]


def command_help(command: str, kind: type[Any], *, rare: bool = False) -> list[str]:
    """The lines of ``golden COMMAND --help``; with ``rare`` those of ``--help-all``.

    Args:
        command: its name.
        kind: the dataclass of its options. Its docstring says what the command does; lines in it
            that begin with "golden" are examples.
        rare: list the rarely used options, too.
    """
    from tyro.conf import Positional, Suppress

    from goldenlayers.commands.options import RARE, flag, marks_of

    about, _, more = (inspect.getdoc(kind) or "").partition("\n\n")
    texts, usage, groups = field_texts(kind), [f"usage: golden {command}"], dict[str, list[str]]()
    for f in dataclasses.fields(kind):
        marks = marks_of(kind)[f.name]
        if Suppress in marks:
            continue
        value = _metavar(kind, f, marks)
        needed = f.default is f.default_factory is dataclasses.MISSING
        heading, left = _heading(kind, f.name, marks), flag(f.name.rstrip("_"))
        if Positional in marks:
            heading, left, value = "", value, ""
            usage.append(left if needed else f"[{left}]")
        elif needed:
            usage.append(f"{left} {value}")
        text = texts.get(f.name, "") + _default(f)
        groups.setdefault(heading, []).extend(_entry(f"{left} {value}".rstrip(), text))
    hidden = groups.pop(RARE, None) if not rare else None
    options = [name for name in groups if name]
    lines = [
        " ".join([*usage, *["[OPTIONS]"] * bool(options)]),
        "",
        *textwrap.wrap(about, _width()),
    ]
    for heading in sorted(groups, key=lambda name: _PLACES.get(name, 5 if name else -1)):
        lines += ["", *[f"{heading}:"] * bool(heading), *groups[heading]]
    if hidden:
        lines += ["", f"More options: golden {command} --help-all"]
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
    from goldenlayers.commands.options import Under

    said = [mark for mark in marks if isinstance(mark, Under)]
    owner = next(base for base in kind.__mro__ if name in inspect.get_annotations(base))
    return said[0] if said else vars(owner).get("heading", "Options")


def _metavar(kind: type[Any], f: dataclasses.Field[Any], marks: tuple[Any, ...]) -> str:
    """How the value of an option is written in the help."""
    from goldenlayers.commands.options import types_of

    if said := [mark.metavar for mark in marks if getattr(mark, "metavar", None)]:
        return said[0]
    hint = types_of(kind)[f.name]
    parts = [part for part in get_args(hint) if part is not type(None)]
    if get_origin(hint) is Literal:
        return "|".join(parts)
    if get_origin(hint) is dict:
        return "NAME VALUE ..."
    many = get_origin(hint) is list
    words = {bool: "", int: "N", float: "X", Path: "PATH"}
    word = f.name.rpartition("_")[2].upper()
    word = words.get(parts[0] if parts else hint, word.removesuffix("S") if many else word)
    return f"{word} ..." if many else word


def _default(f: dataclasses.Field[Any]) -> str:
    """What an option is where it is not given, if that says anything."""
    value = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
    if value in (None, "", dataclasses.MISSING, [], {}) or isinstance(value, bool):
        return ""
    return f" (default: {' '.join(map(str, value)) if isinstance(value, list) else value})"


def _entry(left: str, text: str) -> list[str]:
    lines = textwrap.wrap(text, _width() - _COLUMN, break_on_hyphens=False)
    if len(left) > _COLUMN - 4:
        lines.insert(0, "")
    lines = [" " * _COLUMN + line for line in lines]
    return [f"  {left:{_COLUMN - 2}}{lines[0].strip()}".rstrip(), *lines[1:]]


def _width() -> int:
    return min(shutil.get_terminal_size().columns, 100)
