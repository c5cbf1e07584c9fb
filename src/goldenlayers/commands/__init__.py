"""The commands of ``golden``: the options of each are a dataclass, and ``run(options)`` beside it
does the work. Small ones share a file, where they are ``run_NAME(options)``.
"""

from __future__ import annotations

import importlib
from typing import Any, get_type_hints

# Heading → command → what it does, in a line of ``golden --help``.
GROUPS: dict[str, dict[str, str]] = {
    "Find a layer": {
        "locate": "find the layer at which facts are best edited",
        "sweep": "edit at every layer and score: the truth about the layers",
        "compare": "judge located layers by a sweep",
        "study": "all of that for several models, data sets and editors, from one file",
    },
    "Edit": {
        "edit": "change facts at one layer, and save the change",
        "ask": "ask a model, with and without edits",
        "studio": "open a page on this machine to edit, ask and check",
        "export": "write edits for PEFT, vLLM and llama.cpp, or as a whole checkpoint",
    },
    "Judge": {
        "evaluate": "score facts under an edit",
        "run": "repeat a finished run",
    },
    "Look": {
        "report": "runs as one page: to read, print and share",
        "models": "list, fetch and inspect models",
        "datasets": "list the formats of facts, check a file",
        "editors": "list the editors, their settings and presets",
    },
}
# What every command takes: it says how a call is told, not what it does.
CALL_FLAGS = {
    "json": "Print the result as one JSON object: see docs/json.md.",
    "quiet": "Show results and errors alone.",
}
COMMANDS = tuple(name for group in GROUPS.values() for name in group)
# Files that hold several commands; the others bear their command's name.
_SHARED = {
    "listings": ("models", "datasets", "editors"),
    "saved": ("export", "run"),
    "sweeps": ("sweep", "compare", "study"),
}


def options_of(command: str) -> type[Any]:
    """The class of a command's options: what its ``run`` takes."""
    (options,) = (
        kind for name, kind in get_type_hints(_run_of(command)).items() if name != "return"
    )
    return options


def call(command: str, options: Any) -> int:
    """Run a command; returns its exit status.

    Raises:
        UserError: what the user gave is wrong.
    """
    from goldenlayers.commands.options import refuse_bad_names

    refuse_bad_names(options)
    return _run_of(command)(options)


def _run_of(command: str) -> Any:
    for file, commands in _SHARED.items():
        if command in commands:
            return getattr(importlib.import_module(f"{__name__}.{file}"), f"run_{command}")
    return importlib.import_module(f"{__name__}.{command}").run
