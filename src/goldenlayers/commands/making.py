"""The edit of ``golden edit``: by one editor at one layer, or for each fact the best of several."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from goldenlayers.commands.auto_layer import with_layer
from goldenlayers.commands.deciding import (
    editor_and_layer,
    editor_of,
    refuse_batch,
    statistics_of,
)
from goldenlayers.errors import UserError
from goldenlayers.progress import Progress, progress
from goldenlayers.shown import say

if TYPE_CHECKING:
    from goldenlayers.choosing import Chosen
    from goldenlayers.delta import WeightDelta
    from goldenlayers.editors import Editor
    from goldenlayers.facts import Fact
    from goldenlayers.models import Model

_USUAL = "clear-rome"
_SHOWN = 5  # facts whose choice is told in a line


def is_chosen(config: Any) -> bool:
    """Whether several ways to edit are tried on each fact."""
    return config.layer == "each" or config.method == "auto" or config.strength == "auto"


def with_usual(config: Any) -> Any:
    """The config with the usual editor for ``--method auto``."""
    auto = config.method == "auto"
    return dataclasses.replace(config, method=_USUAL) if auto else config


def check_strength(config: Any) -> float:
    """The number that ``--strength`` gives; 1 where it is chosen.

    Raises:
        UserError: it is neither "auto" nor a number above 0 and at most 10; options that do not go
            with a choice.
    """
    try:
        number = 1.0 if config.strength == "auto" else float(config.strength)
    except ValueError:
        number = math.nan
    if not 0 < number <= 10:
        raise UserError(
            f"--strength is '{config.strength}'", expected="auto, or a number above 0, at most 10"
        )
    if is_chosen(config):
        if config.mode != "auto" or config.step != 1:
            raise UserError(
                "--mode and --step do not go with a choice for each fact: each is edited by itself",
                fix="Leave them out",
            )
        if config.preset and config.method == "auto":
            raise UserError("--preset names the editor, and --method is auto", fix="Leave one out")
    return number


class Made(NamedTuple):
    """The edit with the config that names its layer, the usual editor, and what was tried."""

    config: Any
    editor: Editor
    layer: int
    delta: WeightDelta
    tried: Chosen | None = None


def make(config: Any, model: Model, facts: Sequence[Fact], dropped: list[Any]) -> Made:
    """The edit that the options ask for; ``dropped`` gets the error of each fact that fails."""
    from goldenlayers.editors import edit

    if is_chosen(config):
        return _chosen(config, model, facts, dropped)
    editor = editor_of(config)
    refuse_batch(editor, config.mode, len(facts))
    editor, layer = editor_and_layer(config, model, facts)
    statistics = statistics_of(config, model, editor, [layer])
    with progress(f"editing with {config.method}", "facts") as bar:
        delta = edit(
            model,
            facts,
            editor,
            layer=layer,
            mode=None if config.mode == "auto" else config.mode,
            step=config.step,
            statistics=statistics,
            seed=config.seed,
            names=config.clear_of,
            progress=Progress(on_progress=bar, on_dropped=dropped.append),
        )
    strength = check_strength(config)
    delta = delta if strength == 1 else delta * strength
    return Made(with_layer(config, layer), editor, layer, delta)


def _chosen(config: Any, model: Model, facts: Sequence[Fact], dropped: list[Any]) -> Made:
    """The facts' edits, each the best of those tried."""
    from goldenlayers.atlas import found_for
    from goldenlayers.choosing import EDITORS, STRENGTHS, choose_edits, usual_layers

    usual = with_usual(config)
    if config.layer == "each":
        editor = editor_of(usual, model)
        known, some = found_for(model, editor), usual_layers(model)
        layers = list(dict.fromkeys(some if known is None else [known.advised, *some]))
    else:
        editor, layer = editor_and_layer(usual, model, facts)
        layers, config = [layer], with_layer(config, layer)
    others = EDITORS[1:] if config.method == "auto" else ()
    strengths = STRENGTHS if config.strength == "auto" else (float(config.strength),)
    one = len(facts) == 1
    count = len(layers) * (1 + len(others)) * len(strengths)
    say(
        f"Trying {count} ways to edit {'the fact' if one else f'each of {len(facts)} facts'}: "
        f"{'layer' if len(layers) == 1 else 'layers'} {', '.join(map(str, layers))}; "
        f"{', '.join([editor.name, *others])}; strength {', '.join(f'{s:g}' for s in strengths)}. "
        f"It takes as long as {len(layers)} {'search' if len(layers) == 1 else 'searches'} and "
        f"{count} checks of an edit"
    )
    with progress("trying", "ways") as bar:
        found = choose_edits(
            model,
            facts,
            [editor, *(_like(other, editor) for other in others)],
            layers=layers,
            strengths=strengths,
            statistics=statistics_of(config, model, editor, layers),
            seed=config.seed,
            names=config.clear_of,
            progress=Progress(on_progress=bar, on_dropped=dropped.append),
        )
    if any(len(fact.rephrasings) > 1 or len(fact.must_stay) > 1 for fact in found.facts):
        say("Half of the facts' own probes chose, from the first on; the check asks the others")
    told = list(zip(found.facts, found.sentences(), strict=True))
    for fact, sentence in told[:_SHOWN]:
        say(f"'{fact.prompt}': {sentence}" if len(told) > 1 else f"{sentence}; {found.cost()}")
    if len(told) > 1:
        changed = sum(pick != 0 for pick in found.picks)
        say(f"{changed} of {len(told)} facts keep another try than the usual; {found.cost()}")
    return Made(config, editor, layers[0], found.delta, found)


def _like(method: str, editor: Editor) -> Editor:
    """An editor whose value search is that of another."""
    from goldenlayers.editors import ValueSearch, make_editor

    names = (f.name for f in dataclasses.fields(ValueSearch))
    return make_editor(method, **{name: getattr(editor, name) for name in names})
