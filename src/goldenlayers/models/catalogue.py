"""What is there to load, what is cached, and how a model is laid out: for ``golden models``."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from goldenlayers.errors import UserError, near_matches
from goldenlayers.models import cache, packaged


@dataclass(frozen=True, slots=True)
class ModelRow:
    """One line of ``golden models``: a packaged model, or a GGUF file converted earlier.

    ``size`` is what is downloaded, ``cached_size`` what the converted copy takes on disk, in bytes.
    ``package`` and ``licence`` are empty for the user's own GGUF files.
    """

    name: str
    title: str
    package: str
    family: str
    layers: int
    parameters: int
    size: int
    licence: str
    cached: bool
    cached_size: int
    path: Path


def list_models(cache_dir: str | Path | None = None) -> list[ModelRow]:
    """The packaged models, then the GGUF files converted earlier."""
    root = cache.models_root(cache_dir)
    rows = []
    for model in packaged.registry().values():
        folder = root / model.name
        cached = cache.fault(folder, model.source, check="sizes") is None
        rows.append(
            ModelRow(
                name=model.name,
                title=model.title,
                package=model.package,
                family=model.family,
                layers=model.layers,
                parameters=model.parameters,
                size=model.download_size,
                licence=model.licence,
                cached=cached,
                cached_size=_size(folder),
                path=folder,
            )
        )
    for folder in sorted(root.glob("gguf-*")):
        if folder.name.endswith(".part"):
            continue
        about = (cache.read_manifest(folder) or {}).get("about")
        about = about if isinstance(about, dict) else {}
        rows.append(
            ModelRow(
                name=folder.name,
                title=str(about.get("file", "")),
                package="",
                family=str(about.get("family", "")),
                layers=_whole(about.get("layers")),
                parameters=_whole(about.get("parameters")),
                size=0,
                licence="",
                cached=cache.fault(folder, check="sizes") is None,
                cached_size=_size(folder),
                path=folder,
            )
        )
    return rows


def verify_cache(name: str, cache_dir: str | Path | None = None) -> None:
    """Hash every file of a cached model and compare with its manifest (seconds per gigabyte).

    Raises:
        UserError: not cached, or changed since it was converted.

    """
    row = _row(name, cache_dir)
    source = packaged.registry()[name].source if name in packaged.registry() else None
    found = cache.fault(row.path, source, check="all")
    if found is not None:
        raise UserError(
            f"The cached copy of {name} in {row.path} is not as it was made: {found}",
            fix="Clear it (golden models --clear) and load the model again",
        )


def clear_cache(name: str, cache_dir: str | Path | None = None) -> int:
    """Remove the converted copy of a model from the cache; returns the bytes freed (0: none there).

    Raises:
        UserError: no model of that name, or it cannot be removed.

    """
    row = _row(name, cache_dir)
    try:
        if row.path.exists():
            shutil.rmtree(row.path)
    except OSError as error:
        raise UserError(
            f"{row.path} cannot be removed: {error.strerror or error}",
            fix="Check the permissions of the cache folder",
        ) from error
    return row.cached_size


def _row(name: str, cache_dir: str | Path | None) -> ModelRow:
    rows = {row.name: row for row in list_models(cache_dir)}
    if name not in rows:
        raise UserError(
            f"No packaged or cached model is called '{name}'", fix=near_matches(name, rows)
        )
    return rows[name]


def _whole(value: object) -> int:
    """A number of a manifest that may be damaged."""
    return value if isinstance(value, int) else 0


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
