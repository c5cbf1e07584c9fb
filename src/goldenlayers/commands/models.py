"""``golden models``: what can be loaded by name, and how a model is laid out."""

from __future__ import annotations

from goldenlayers.commands import shared
from goldenlayers.config import ModelsConfig
from goldenlayers.shown import put


def run(config: ModelsConfig) -> int:
    """List, fetch, verify, clear or inspect."""
    from goldenlayers import models

    if config.clear is not None:
        freed = models.clear_cache(config.clear, config.cache_dir)
        shared.say(f"Removed {config.clear} from the cache ({freed / 1e6:.0f} MB)")
        return 0
    if config.verify is not None:
        models.verify_cache(config.verify, config.cache_dir)
        shared.say(f"The cached copy of {config.verify} is as it was made")
        return 0
    if config.fetch is not None or config.inspect is not None:
        name = config.inspect or config.fetch or ""
        model = models.load(
            name,
            dtype="auto",
            cache_dir=config.cache_dir,
            trust_remote_code=config.trust_remote_code,
            layer_paths=config.layer_paths or None,
            progress=shared.say,
        )
        if config.inspect is not None:
            put(*model.layers.describe().split("\n"))
        else:
            shared.say(f"{name} is ready")
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
