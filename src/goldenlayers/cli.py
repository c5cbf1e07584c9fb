"""The command ``golden``: parse, check, hand over to one function per command.

Exit status: 0 done, 2 the user's input (one message, no traceback), 1 a defect, 130 interrupted.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Annotated, Any

from goldenlayers import config
from goldenlayers.errors import UserError

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
    if arguments in (["--version"], ["-V"]):
        from goldenlayers import __version__

        print(f"goldenlayers {__version__}")
        return 0
    try:
        return dispatch(parse(arguments))
    except UserError as error:
        print(f"golden: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("golden: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output (head, less) went away: nothing left to say.
        sys.stderr.close()
        return 0


def parse(arguments: Sequence[str]) -> Any:
    """The config that the arguments describe; prints help or exits 2 as usual."""
    import tyro

    choices = tuple(
        Annotated[kind, tyro.conf.subcommand(name, prefix_name=False)]
        for name, (kind, _) in COMMANDS.items()
    )
    return tyro.cli(
        _union(choices),
        prog="golden",
        args=list(arguments) or ["--help"],
        description=(
            "Find the golden layer of a language model, edit its knowledge there, and measure "
            "honestly what changed."
        ),
        config=(tyro.conf.FlagCreatePairsOff,),
    )


def _union(choices: tuple[Any, ...]) -> Any:
    from typing import Union

    return Union[choices]  # noqa: UP007 - built at run time


def dispatch(settings: Any) -> int:
    """Call the command a config belongs to."""
    module = next(name for kind, name in COMMANDS.values() if type(settings) is kind)
    return importlib.import_module(f"goldenlayers.commands.{module}").run(settings)


if __name__ == "__main__":
    sys.exit(main())
