"""Which editor, at which layer, with which statistics: shared by the commands that edit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from goldenlayers.commands.options import whole_number
from goldenlayers.errors import UserError

if TYPE_CHECKING:
    from goldenlayers.covariance import Covariance
    from goldenlayers.editors import Editor
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


def refuse_batch(editor: Editor, mode: str, n_facts: int) -> None:
    """Refuse many facts in one solve by an editor of single facts: before the work, not after.

    Raises:
        UserError: that is what is asked for.
    """
    from goldenlayers.editors import one_at_a_time

    if mode == "batch" and n_facts > 1 and not editor.edits_together:
        raise one_at_a_time(editor, n_facts)


def editor_and_layer(config: Any, model: Model) -> tuple[Editor, int]:
    """The editor, and the layer to edit: a preset's own where none is named."""
    from goldenlayers.editors import PRESETS

    editor = editor_of(config, model)
    if config.preset is not None and config.layer == "auto":
        return editor, PRESETS[config.preset].layer
    return editor, pick_layer(config, model)


def pick_layer(config: Any, model: Model) -> int:
    """The layer ``--layer`` names; for auto the golden layer by LGA, found once and kept.

    Raises:
        UserError: not a number, or no layer of the model.
    """
    if config.layer != "auto":
        layer = whole_number(config.layer)
        if layer is None:
            raise UserError(f"--layer is '{config.layer}'", expected="a layer number, or auto")
        return model.layers[layer].index
    from goldenlayers.commands.auto_layer import golden_layer

    return golden_layer(model, cache_dir=config.cache_dir)
