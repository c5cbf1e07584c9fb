"""The command ``golden``: parse, check, hand over to one function per command.

Exit status: 0 done, 2 the user's input (one message, no traceback), 1 a defect, 130 interrupted.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

from goldenlayers.commands import COMMANDS, GROUPS, call, options_of
from goldenlayers.errors import UserError
from goldenlayers.shown import OutputLost, put, say, showing, width, without_styles

ABOUT = (
    "Find the golden layer of a language model, edit its knowledge there, and measure honestly "
    "what changed."
)
_HELP = ("-h", "--help", "--help-all")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        with showing():
            return _run(arguments)
    except OutputLost as error:
        say(f"golden: {error}. What was written to files is whole.")
        return 2


def _run(arguments: Sequence[str]) -> int:
    command = arguments[0] if arguments else "--help"
    asked = [one for one in arguments if one in _HELP]
    try:
        if command in ("--version", "-V"):
            from goldenlayers import __version__

            put(f"goldenlayers {__version__}")
        elif command in _HELP:
            put(*overview())
        elif command in COMMANDS and asked:
            from goldenlayers.commands.listings import command_help

            put(*command_help(command, options_of(command), rare="--help-all" in asked))
        else:
            return call(command, parse(arguments))
        return 0
    except UserError as error:
        say(f"golden: {error}")
        return 2
    except KeyboardInterrupt:
        say("golden: interrupted")
        return 130


def overview() -> list[str]:
    """The lines of ``golden --help``."""
    lines = ["usage: golden COMMAND ...", "", *textwrap.wrap(ABOUT, width())]
    for heading, commands in GROUPS.items():
        lines += ["", f"{heading}:", *(f"  {name:10}{text}" for name, text in commands.items())]
    return [*lines, "", "golden COMMAND --help says more, golden --version which version this is."]


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

    said, nowhere = io.StringIO(), io.TextIOWrapper(io.BytesIO(), "utf-8")  # so it draws a box
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(nowhere):
            return tyro.cli(
                options_of(command),
                prog=f"golden {command}",
                args=given,
                add_help=False,
                config=(tyro.conf.FlagCreatePairsOff,),
            )
    except SystemExit:
        found = _complaint(without_styles(said.getvalue()))
        raise UserError(found, fix=f"See golden {command} --help") from None


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
