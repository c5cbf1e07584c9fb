"""The command ``golden``: parse, check, hand over to one function per command.

Exit status: 0 done, 2 the user's input (one message, no traceback), 1 a defect, 130 interrupted.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Iterator, Sequence
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
    status = 0
    with showing():
        try:
            status = dispatch(parse(arguments))
        except UserError as error:
            status = 2
            say(f"golden: {error}")
        except KeyboardInterrupt:
            status = 130
            say("golden: interrupted")
    return status


def say(text: str) -> None:
    """A line for the person at the terminal; results go to standard output, this does not."""
    try:
        print(text, file=sys.stderr, flush=True)
    except BrokenPipeError:  # as in `2>&1 | head`: no reason to stop the work
        _to_nowhere(sys.stderr)


@contextlib.contextmanager
def showing() -> Iterator[None]:
    """Within it, output whose reader went away (head, less) ends the block, and no more than that.

    What is printed afterwards goes nowhere, so the work behind the block is done in any case.
    """
    try:
        yield
        if sys.stdout is not None:  # it is None where it was closed from the start
            sys.stdout.flush()
    except BrokenPipeError:
        _to_nowhere(sys.stdout)
    except SystemExit as stop:
        # Rich makes this of it. A block also ends so after --help, or with wrong flags.
        if not isinstance(stop.__context__, BrokenPipeError):
            raise
        _to_nowhere(sys.stdout)


def _to_nowhere(stream: Any) -> None:
    """Let what is still buffered, and what comes later, vanish: else the exit would complain."""
    with contextlib.suppress(OSError, ValueError):  # no real file, as in a notebook
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


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
    config.refuse_bad_names(settings)
    module = next(name for kind, name in COMMANDS.values() if type(settings) is kind)
    return importlib.import_module(f"goldenlayers.commands.{module}").run(settings)


if __name__ == "__main__":
    sys.exit(main())
