"""The command ``golden``: parse, check, hand over to one function per command.

Exit status: 0 done, 2 the user's input (one message, no traceback), 1 a defect, 130 interrupted.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
from collections.abc import Sequence
from typing import Annotated, Any

from goldenlayers import config
from goldenlayers.errors import UserError
from goldenlayers.shown import OutputLost, put, say, showing, unescaped, without_styles

# name → (config class, module of goldenlayers.commands whose run(config) does it)
COMMANDS: dict[str, tuple[type[Any], str]] = {
    "locate": (config.LocateConfig, "locate"),
    "edit": (config.EditConfig, "edit"),
    "ask": (config.AskConfig, "ask"),
    "evaluate": (config.EvaluateConfig, "evaluate"),
    "sweep": (config.SweepConfig, "sweep"),
    "compare": (config.CompareConfig, "compare"),
    "export": (config.ExportConfig, "export"),
    "editors": (config.EditorsConfig, "editors"),
    "models": (config.ModelsConfig, "models"),
    "datasets": (config.DatasetsConfig, "datasets"),
    "run": (config.RunConfig, "rerun"),
}


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
    if arguments in (["--version"], ["-V"]):
        from goldenlayers import __version__

        put(f"goldenlayers {__version__}")
        return 0
    try:
        return dispatch(parse(arguments))
    except UserError as error:
        say(f"golden: {error}")
        return 2
    except KeyboardInterrupt:
        say("golden: interrupted")
        return 130
    except SystemExit as stop:  # the parser's, after the help or with wrong flags
        return stop.code if isinstance(stop.code, int) else 0


def parse(arguments: Sequence[str]) -> Any:
    """The config that the arguments describe; prints help or exits 2 as usual."""
    import tyro

    choices = tuple(
        Annotated[kind, tyro.conf.subcommand(name, prefix_name=False)]
        for name, (kind, _) in COMMANDS.items()
    )
    said = io.StringIO()
    try:
        # The help is ours and may have colours; a complaint repeats what was given.
        with contextlib.redirect_stdout(unescaped(sys.stdout)), contextlib.redirect_stderr(said):
            return tyro.cli(
                _union(choices),
                prog="golden",
                args=list(arguments) or ["--help"],
                description=(
                    "Find the golden layer of a language model, edit its knowledge there, and "
                    "measure honestly what changed."
                ),
                config=(tyro.conf.FlagCreatePairsOff,),
            )
    finally:
        say(*without_styles(said.getvalue()).splitlines())


def _union(choices: tuple[Any, ...]) -> Any:
    from typing import Union

    return Union[choices]  # noqa: UP007 - built at run time


def dispatch(settings: Any) -> int:
    """Call the command a config belongs to."""
    config.refuse_bad_names(settings)
    module = next(name for kind, name in COMMANDS.values() if type(settings) is kind)
    return importlib.import_module(f"goldenlayers.commands.{module}").run(settings)


if __name__ == "__main__":
    sys.exit(main())
