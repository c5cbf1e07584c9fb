"""The options that commands share, their checks, and how a config is saved and read back."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, Suppress, arg

from goldenlayers.errors import UserError

ModelName = Annotated[Positional[str], arg(metavar="MODEL")]
DataName = Annotated[Positional[str], arg(metavar="[DATA]")]
Dtype = Literal["float32", "bfloat16", "float16", "float64", "auto"]


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model, and how to load it."""

    model: ModelName
    """Packaged short name (see `golden models`), directory, .gguf file, or hub id."""

    dtype: Dtype = "float32"
    """Number format of the weights while working; auto keeps the checkpoint's own."""

    device: str = "auto"
    """cpu, cuda, cuda:N, mps, or auto (the best there is)."""

    cache_dir: Path | None = None
    """Where converted models are kept (default: the user cache directory)."""

    trust_remote_code: bool = False
    """Run model code that comes with a checkpoint. Only for sources you trust."""

    layer_paths: dict[str, str] = dataclasses.field(default_factory=dict)
    """Module paths for models whose parts are not found: blocks, mlp, attention, down, embedding,
    final_norm, head (mlp, attention and down relative to a block)."""


@dataclass(frozen=True, kw_only=True)
class JointOptions:
    """What stands between prompts and answers."""

    joint: Literal["auto", "space", "none"] = "auto"
    """Between prompts and answers, where the data do not say it: space, none (nothing), or auto: by
    their characters, and where these leave it open by what the model finds likelier."""

    joints: Suppress[dict[str, str]] = dataclasses.field(default_factory=dict)
    """What the model decided, by fact: recorded, so that a run repeated has the same."""


@dataclass(frozen=True, kw_only=True)
class DataOptions(JointOptions):
    """Which facts."""

    data: DataName = "starter"
    """Registered name (see `golden datasets`), a file, or FORMAT:FILE."""

    limit: int | None = None
    """Use a random sample of this many facts (drawn with --seed)."""

    seed: int = 0
    """Seed of every random draw of the run."""

    skip_invalid: bool = False
    """Leave out invalid rows, and say how many and why, in place of stopping at the first."""

    def __post_init__(self) -> None:
        at_least("limit", self.limit, 1)


@dataclass(frozen=True, kw_only=True)
class ApartOptions(DataOptions):
    """Which facts, apart from those of other runs."""

    apart_from: Annotated[list[Path], arg(metavar="RUN [RUN ...]")] = dataclasses.field(
        default_factory=list
    )
    """Leave out the facts of these finished runs (of golden locate, sweep or evaluate) and all
    facts about their subjects, before --limit draws: proxy and test facts from one file."""


def at_least(name: str, value: float | None, low: float) -> None:
    if value is not None and value < low:
        raise UserError(f"--{name.replace('_', '-')} is {value}", expected=f"{low} or more")


def to_record(config: Any) -> dict[str, Any]:
    """A config as plain YAML-ready values."""

    def plain(value: Any) -> Any:
        return str(value) if isinstance(value, Path) else value

    return {f.name: plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


def default_settings(kind: type[Any]) -> dict[str, Any]:
    """The settings of a config that need not be named, as :func:`to_record` has them."""
    found = {}
    for f in dataclasses.fields(kind):
        if f.default is not dataclasses.MISSING:
            found[f.name] = f.default
        elif f.default_factory is not dataclasses.MISSING:
            found[f.name] = f.default_factory()
    return found


def path_settings(kind: type[Any]) -> set[str]:
    """Names of a config's settings that are paths, or lists of them."""
    return {f.name for f in dataclasses.fields(kind) if "Path" in str(f.type)}


def from_record(kind: type[Any], record: dict[str, Any]) -> Any:
    """The config saved by :func:`to_record`.

    Raises:
        UserError: a setting this version does not know.
    """
    from goldenlayers.errors import near_matches

    fields = {f.name: f for f in dataclasses.fields(kind)}
    for name in record:
        if name not in fields:
            raise UserError(f"unknown setting '{name}'", fix=near_matches(name, fields))

    paths = path_settings(kind)

    def rich(name: str, value: Any) -> Any:
        if name not in paths or value is None:
            return value
        return [Path(one) for one in value] if isinstance(value, list) else Path(value)

    return kind(**{name: rich(name, value) for name, value in record.items()})
