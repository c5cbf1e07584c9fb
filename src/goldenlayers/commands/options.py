"""The options that commands share, their checks, and how they are saved and read back.

The options of a command are a frozen dataclass: its fields are the flags, the string under a field
is its help, and a saved run records them all. Nothing heavy is imported here.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_origin, get_type_hints

from tyro.conf import Positional, Suppress, arg

from goldenlayers.errors import LARGEST_SEED, UserError, check_number, near_matches


class Role(enum.Enum):
    """What a setting is beside a value: said of every path, and of all that could do harm."""

    CONSENT = "consent"
    """Lets the command do what could harm: run a checkpoint's code, replace a run."""
    PLACE = "place"
    """Where the work is done or written: a folder, a cluster, how many processes."""
    SOURCE = "source"
    """The name of something that is read."""


class Under(str):
    """The heading of the help that an option stands under, where its class does not say it.

    A class says it for all its options by ``heading``.
    """


FACTS = Under("Facts")
RARE = Under("More options")  # shown by --help-all alone
Consent = Annotated[bool, Role.CONSENT]
ModelName = Annotated[Positional[str], arg(metavar="MODEL"), Role.SOURCE]
DataName = Annotated[Positional[str], arg(metavar="DATA"), Role.SOURCE]
Statistics = Annotated[str, arg(metavar="TEXT"), Role.SOURCE, RARE]
Sources = Annotated[list[Path], Role.SOURCE]
Out = Annotated[Path | None, arg(metavar="RUN"), Role.PLACE, Under("Output")]
Chat = Annotated[bool, Under("Model")]
LayerPaths = Annotated[dict[str, str], RARE]
Dtype = Literal["float32", "bfloat16", "float16", "float64", "auto"]


# The smallest and the largest value of every number among the flags, whatever the command. What is
# larger would only fill the memory, or never end.
LIMITS: dict[str, tuple[float, float]] = {
    "batch_size": (1, 100_000),
    "bootstrap": (0, 100_000),
    "chunk": (1, 1_000_000),
    "grid": (1, 10_000),
    "kappa": (0, 1_000_000),
    "limit": (1, 1_000_000_000),
    "minutes": (0, 10_000_000),
    "port": (1, 65_535),
    "rank": (1, 1_000_000),
    "repeats": (1, 10_000),
    "seed": (0, LARGEST_SEED),
    "sizes": (1, 1_000_000_000),
    "step": (1, 1_000_000),
    "text_tokens": (2, 100_000_000),
    "tokens": (1, 100_000),
    "top": (0, 1_000),
    "top_k": (1, 10_000),
    "window": (1, 10_000),
    "workers": (1, 256),
}
_FRACTIONS = ("kappa", "minutes")


@dataclass(frozen=True, kw_only=True)
class Checked:
    """A config whose numbers lie within ``LIMITS``."""

    def __post_init__(self) -> None:
        hints = types_of(type(self))
        for name in (n for n in LIMITS if n in hints and get_origin(hints[n]) is not Literal):
            value = getattr(self, name)
            if hints[name] is str and value != "auto" and whole_number(str(value)) is None:
                raise UserError(f"{flag(name)} is '{value}'", expected="a number above 0, or auto")
            if hints[name] is str:
                value = whole_number(str(value))
            for one in value if isinstance(value, list) else [value]:
                if one is not None:
                    check_number(flag(name), one, *LIMITS[name], whole=name not in _FRACTIONS)


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """What is allowed where a model is loaded."""

    cache_dir: Annotated[Path | None, Role.PLACE, RARE] = None
    """Where converted models are kept (default: the user cache directory)."""

    trust_remote_code: Annotated[bool, Role.CONSENT, RARE] = False
    """Run model code that comes with a checkpoint. Only for sources you trust."""


@dataclass(frozen=True, kw_only=True)
class ModelOptions(LoadOptions, Checked):
    """Which model, and how to load it."""

    heading = "Model"

    model: ModelName
    """Packaged short name (see `golden models`), directory, .gguf file, or hub id."""

    dtype: Dtype = "float32"
    """Number format of the weights while working; auto keeps the checkpoint's own."""

    device: str = "auto"
    """cpu, cuda, cuda:N, mps, or auto (several, if one is too small)."""

    layer_paths: LayerPaths = dataclasses.field(default_factory=dict)
    """Module paths for models whose parts are not found: blocks, mlp, attention, down, embedding,
    final_norm, head (mlp, attention and down relative to a block)."""


@dataclass(frozen=True, kw_only=True)
class JointOptions(Checked):
    """In which form prompts are asked, and what stands between them and answers."""

    heading = "Facts"

    chat: Chat = False
    """Ask prompts by the model's own chat template."""

    joint: Annotated[Literal["auto", "space", "none"], RARE] = "auto"
    """What stands between prompts and answers where the data do not say it: space, none (nothing),
    or auto (by their characters, and where these leave it open by what the model finds likelier).
    """

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

    all_probes: Annotated[bool, RARE] = False
    """Count locality probes that contradict their edit as ordinary ones, as published figures."""


@dataclass(frozen=True, kw_only=True)
class ApartOptions(DataOptions):
    """Which facts, apart from those of other runs."""

    apart_from: Annotated[Sources, arg(metavar="RUN ...")] = dataclasses.field(default_factory=list)
    """Leave out the facts of these finished runs (of golden locate, sweep or evaluate) and all
    facts about their subjects, before --limit draws: proxy and test facts from one file."""


@dataclass(frozen=True, kw_only=True)
class OutputOptions(Checked):
    """Where the results go."""

    heading = "Output"

    out: Out = None
    """Run folder to write."""

    overwrite: Consent = False
    """Replace the run folder if it is there already."""


@dataclass(frozen=True, kw_only=True)
class WorkerOptions(Checked):
    """Who does the work."""

    heading = "Workers"

    workers: Annotated[int, Role.PLACE] = 1
    """Processes, or Ray actors, that each load the model and work side by side."""

    engine: Annotated[Literal["local", "ray"], Role.PLACE, RARE] = "local"
    """local: processes of this machine. ray: actors of a cluster (extra ray)."""

    address: Annotated[str | None, Role.PLACE, RARE] = None
    """With --engine ray: address of a running cluster (default: one is started here)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.address is not None and self.engine != "ray":
            raise UserError("--address is for Ray", fix="Add --engine ray, or leave it out")


def flag(name: str) -> str:
    """How a setting is called on the command line."""
    return f"--{name.rstrip('_').replace('_', '-')}"


def whole_number(text: str) -> int | None:
    """The number that ``text`` writes in plain digits; None where it is something else."""
    return int(text) if re.fullmatch("[0-9]{1,18}", text) else None


def refuse_bad_names(config: Any) -> None:
    """Refuse names of files, folders, models and data sets that no file can have.

    Raises:
        UserError: a name with a NUL, that is no UTF-8 text, or longer than systems allow.
    """
    for name in roles(type(config)):
        value = getattr(config, name)
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, str | Path) and (why := _bad_name(str(one))):
                found = f"{flag(name)} is {ascii(str(one))[:60]}: {why}"
                raise UserError(found, expected="a name that a file can have")


def _bad_name(text: str) -> str:
    if "\0" in text:
        return "it holds a NUL character"
    try:
        parts = text.encode().split(b"/")
    except UnicodeEncodeError:
        return "it is no UTF-8 text"
    return "it is too long" if max(map(len, parts)) > 255 or len(text) > 4000 else ""


def to_record(config: Any) -> dict[str, Any]:
    """A config as plain YAML-ready values."""
    from goldenlayers.records import plain

    return plain(config)


def default_of(f: dataclasses.Field[Any]) -> Any:
    """What a setting is where it is not named; ``dataclasses.MISSING`` where it must be."""
    return f.default if f.default_factory is dataclasses.MISSING else f.default_factory()


def default_settings(kind: type[Any]) -> dict[str, Any]:
    """The settings of a config that need not be named, with their defaults."""
    found = {f.name: default_of(f) for f in dataclasses.fields(kind)}
    return {name: value for name, value in found.items() if value is not dataclasses.MISSING}


@functools.cache
def types_of(kind: type[Any]) -> dict[str, Any]:
    """The types of a config's settings."""
    return get_type_hints(kind)


@functools.cache
def marks_of(kind: type[Any]) -> dict[str, tuple[Any, ...]]:
    """What is said of a config's settings beside their types."""
    hints = get_type_hints(kind, include_extras=True)
    return {name: getattr(hint, "__metadata__", ()) for name, hint in hints.items()}


@functools.cache
def roles(kind: type[Any]) -> dict[str, Role]:
    """The roles of those of a config's settings that have one."""
    return {
        name: mark
        for name, marks in marks_of(kind).items()
        for mark in marks
        if isinstance(mark, Role)
    }


def never_recorded(kind: type[Any]) -> list[str]:
    """The settings that no record decides: consent, and where the work is done or written."""
    return [name for name, role in roles(kind).items() if role is not Role.SOURCE]


def from_record(
    kind: type[Any],
    record: Mapping[str, Any],
    given: Mapping[str, Any],
    where: str = "the recorded settings",
) -> Any:
    """The config saved by :func:`to_record`, as it may be repeated.

    A record may come from anywhere: what lets the command do harm, and where it works and writes,
    is never taken from it.

    Args:
        kind: of the config.
        record: the saved settings.
        given: the settings that no record decides (:func:`never_recorded`).
        where: the record stands, for messages.

    Raises:
        UserError: a setting this version does not know, a value of another type, none for a
            setting that must be named, or what the config itself refuses.
    """
    from goldenlayers.records import entry

    fields = {f.name: f for f in dataclasses.fields(kind)}
    here = never_recorded(kind)
    values = {name: value for name, value in given.items() if name in here}
    for name in record:
        if name not in fields:
            raise UserError(
                f"{where}: unknown setting {ascii(name)[:60]}", fix=near_matches(name[:60], fields)
            )
        if name not in here:
            values[name] = entry(record, name, types_of(kind)[name], where)
    for name, f in fields.items():
        if name not in values and default_of(f) is dataclasses.MISSING:
            raise UserError(f"{where}: there is no '{name}'", expected="a whole record")
    return kind(**values)
