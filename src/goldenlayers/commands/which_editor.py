"""Which editor, at which layer, with which statistics: shared by the commands that edit."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from goldenlayers.errors import UserError

if TYPE_CHECKING:
    from goldenlayers.covariance import Covariance
    from goldenlayers.editors import Editor
    from goldenlayers.facts import Fact
    from goldenlayers.models.model import Model


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


_NAMES_BYTES = 1_000_000  # of a file of names


def with_names(config: Any) -> Any:
    """The config with the names of ``--clear-of-file`` in ``--clear-of``, where a run records them.

    Raises:
        UserError: the file cannot be read, is large or is no text; names for an editor that uses
            none.
    """
    from goldenlayers.editors.named import checked_names

    names, file = list(config.clear_of), config.clear_of_file
    if file is not None:
        names += _read_names(file)
    names = list(checked_names(editor_of(config), names))
    return dataclasses.replace(config, clear_of=names, clear_of_file=None)


def _read_names(file: Path) -> list[str]:
    try:
        with file.open("rb") as opened:
            raw = opened.read(_NAMES_BYTES + 1)
        text = raw.decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"--clear-of-file {file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"--clear-of-file {file} is no UTF-8 text") from None
    if len(raw) > _NAMES_BYTES:
        raise UserError(
            f"--clear-of-file {file} is larger than {_NAMES_BYTES} bytes",
            expected="names, one a line",
        )
    if names := [line.strip() for line in text.splitlines() if line.strip()]:
        return names
    raise UserError(f"--clear-of-file {file} is empty", expected="names, one a line")


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
