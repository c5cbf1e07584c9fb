"""The command ``golden``: parse, check, hand over to one function per command.

Exit status: 0 done, 2 the user's input (one message, no traceback), 1 a defect, 130 interrupted.
Every command takes ``--json`` (its result as one JSON object) and ``--quiet``: they say how a call
is told, not what it does, so no command sees them and no run records them.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
import textwrap
from collections.abc import Sequence
from typing import Any, get_origin

from goldenlayers.commands import CALL_FLAGS, COMMANDS, GROUPS, call, options_of
from goldenlayers.errors import DataError, UserError
from goldenlayers.shown import (
    Call,
    OutputLost,
    complain,
    put,
    result,
    showing,
    width,
    without_styles,
)

ABOUT = (
    "Find the golden layer of a language model, edit its knowledge there, and measure honestly "
    "what changed."
)
_HELP = ("-h", "--help", "--help-all")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    how = {flag: _taken(arguments, f"--{flag}") for flag in CALL_FLAGS}
    try:
        with showing(**how) as call:
            return _told(call, arguments)
    except OutputLost as error:
        with showing():
            complain(f"{error}. What was written to files is whole.")
        return 2


def _taken(arguments: list[str], flag: str) -> bool:
    """Whether a flag is among the arguments, which then have it no more; behind "--" none is."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    there = flag in arguments[:end]
    arguments[:end] = [one for one in arguments[:end] if one != flag]
    return there


def _told(call: Call, arguments: Sequence[str]) -> int:
    """Run, and with ``--json`` put the one object: what was found, or why nothing was."""
    error: BaseException | None = None
    try:
        return _run(arguments)
    except UserError as why:
        error = why
        complain(why)
        return 2
    except KeyboardInterrupt as why:
        error = why
        complain("interrupted")
        return 130
    except Exception as why:
        error = why
        raise
    finally:
        if call.json:
            from goldenlayers.records import json_line

            found = call.found if error is None else {"error": _record(error)}
            told = [one.rstrip(".") for one in (*found.get("warnings", []), *call.warnings)]
            command = {"command": arguments[0] if arguments else ""}
            call.write(json_line({**command, **found, "warnings": list(dict.fromkeys(told))}))


def _record(error: BaseException) -> dict[str, Any]:
    """An error as ``--json`` tells it."""
    if isinstance(error, KeyboardInterrupt):
        return {"message": "interrupted", "expected": "", "fix": "", "where": None}
    if not isinstance(error, UserError):
        message = f"a defect: {type(error).__name__}: {error}"
        return {"message": message, "expected": "", "fix": "", "where": None}
    where = None
    if isinstance(error, DataError):
        where = {"source": error.source, "row": error.row, "field": error.field}
    return {
        "message": error.found, "expected": error.expected, "fix": error.fix, "where": where
    }  # fmt: skip


def _run(arguments: Sequence[str]) -> int:
    command = arguments[0] if arguments else "--help"
    asked = [one for one in arguments if one in _HELP]
    if command in ("--version", "-V"):
        from goldenlayers import __version__

        put(f"goldenlayers {__version__}")
        result(version=__version__)
    elif command == "--completion":
        from goldenlayers.commands.listings import completion

        script = completion(arguments[1] if len(arguments) == 2 else "")
        put(*script.split("\n"), limit=None)
        result(completion=script)
    elif command in _HELP or (command in COMMANDS and asked):
        if command in _HELP:
            lines = overview()
        else:
            from goldenlayers.commands.listings import command_help

            lines = command_help(command, options_of(command), rare="--help-all" in asked)
        put(*lines)
        result(help="\n".join(lines))
    else:
        return call(command, parse(arguments))
    return 0


def overview() -> list[str]:
    """The lines of ``golden --help``."""
    lines = ["usage: golden COMMAND ...", "", *textwrap.wrap(ABOUT, width())]
    for heading, commands in GROUPS.items():
        lines += ["", f"{heading}:", *(f"  {name:10}{text}" for name, text in commands.items())]
    return [
        *lines,
        "",
        "golden COMMAND --help says more, golden --version which version this is;",
        "golden --completion bash (or zsh, fish): a script that completes in the shell.",
        "All take --json (the result as one JSON object) and --quiet.",
    ]


def parse(arguments: Sequence[str]) -> Any:
    """The options that a command's name, and what stands behind it, describe.

    Raises:
        UserError: there is no such command; a flag or a value that it does not take, or one that is
            missing; what the options themselves refuse.
    """
    command, *given = arguments
    if command not in COMMANDS:
        raise UserError(
            f"there is no command '{command}'",
            expected=", ".join(COMMANDS),
            fix="See golden --help",
        )
    import tyro

    kind = options_of(command)
    said, nowhere = io.StringIO(), io.TextIOWrapper(io.BytesIO(), "utf-8")  # so it draws a box
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(nowhere):
            return tyro.cli(
                kind,
                prog=f"golden {command}",
                args=_gathered(kind, given),
                add_help=False,
                config=(tyro.conf.FlagCreatePairsOff,),
            )
    except SystemExit:
        found = _complaint(without_styles(said.getvalue()))
        raise UserError(found, fix=f"See golden {command} --help") from None


def _gathered(kind: type[Any], arguments: Sequence[str]) -> list[str]:
    """The arguments with each option of several values named once, and all its values behind it;
    of two the last alone would count. Pairs may stand as NAME=VALUE.
    """
    from tyro.conf import UseAppendAction

    from goldenlayers.commands.options import flag, marks_of, types_of

    several = {
        flag(name): get_origin(hint)
        for name, hint in types_of(kind).items()
        if get_origin(hint) in (list, dict) and UseAppendAction not in marks_of(kind)[name]
    }
    end = arguments.index("--") if "--" in arguments else len(arguments)
    parts: list[list[str]] = [[]]  # each begins with its option, the first has none
    places: dict[str, list[str]] = {}
    for one in arguments[:end]:
        name, equals, value = one.partition("=")
        name = name.replace("_", "-")
        if name in places:
            parts.append(places[name])
        elif one.startswith("--"):
            parts.append([name if name in several else one])
            if name in several:
                places[name] = parts[-1]
        else:
            parts[-1].append(one)
        if equals and name in several:
            parts[-1].append(value)
    for name, part in places.items():
        if several[name] is dict:
            part[1:] = _pairs(part[1:])
    once = {id(part): part for part in parts}
    return [one for part in once.values() for one in part] + list(arguments[end:])


def _pairs(words: Sequence[str]) -> list[str]:
    """NAME VALUE pairs, of which each may stand as NAME=VALUE."""
    found: list[str] = []
    for word in words:
        name, equals, value = word.partition("=")
        named = len(found) % 2 == 0 and equals and name.isidentifier()
        found += [name, value] if named else [word]
    return found


def _complaint(box: str) -> str:
    """What tyro's box says: the first part of it, and the options that it suggests."""
    inner = [line.strip("│").rstrip() for line in box.splitlines()[1:-1]]
    first, *more = re.split(r"(?m)^ ─+$", "\n".join(inner))
    words = [line for line in first.splitlines() if not line.startswith(" " * 6)]
    found = " ".join(" ".join(words).split()) or " ".join(box.split())
    near = re.findall(r"(?m)^ {5}(--\S+)", "\n".join(more))
    return f"{found}. Did you mean {' or '.join(near)}?" if "Perhaps" in box and near else found


if __name__ == "__main__":
    sys.exit(main())
