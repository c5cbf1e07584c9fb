"""What the commands share: loading with a word on what happens, progress bars, run folders."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from goldenlayers.commands.deciding import apart_digest, apart_from, unfinished
from goldenlayers.commands.options import (
    ApartOptions,
    DataOptions,
    ModelOptions,
    Role,
    default_settings,
    never_recorded,
    roles,
    to_record,
    types_of,
)
from goldenlayers.errors import DataError, UserError
from goldenlayers.records import plain
from goldenlayers.shown import result, say, warn

if TYPE_CHECKING:
    from goldenlayers.datasets import FactSet
    from goldenlayers.delta import WeightDelta
    from goldenlayers.models import Model
    from goldenlayers.store import RunFolder


def load_model(options: ModelOptions) -> Model:
    """The model a command was asked for; a sweep's workers load it by this, too."""
    from goldenlayers.models import load

    return load(
        options.model,
        dtype=options.dtype,
        device=options.device,
        cache_dir=options.cache_dir,
        trust_remote_code=options.trust_remote_code,
        layer_paths=options.layer_paths or None,
        chat=getattr(options, "chat", False),
        progress=say,
    )


def loader(options: ModelOptions, model: Model, *, numbered: bool) -> Callable[[], Model]:
    """How a worker loads a command's model again: on the device that it is on.

    ``numbered``: on the very GPU; False where a worker counts those that it was given from 0.
    """
    from goldenlayers.models.offload import is_spread

    there = str(model.device) if numbered else model.device.type
    device = options.device if is_spread(model.hf) else there
    return partial(load_model, dataclasses.replace(options, device=device))


def load_facts(options: DataOptions) -> FactSet:
    """The facts a command was asked for; says what was left out."""
    from goldenlayers.datasets import load_facts as load

    runs = options.apart_from if isinstance(options, ApartOptions) else []
    limit = None if runs else options.limit
    facts = load(
        options.data,
        limit=limit,
        seed=options.seed,
        skip_invalid=options.skip_invalid,
        joint=options.joint,
    )
    if options.all_probes:
        facts = facts.with_all_probes()
    tell_data(facts)
    if runs:
        facts = apart_from(facts, runs)
        if options.limit is not None:
            facts = facts.sample(options.limit, options.seed)
    tell_fewer(len(facts), options.limit)
    return facts


def tell_fewer(n_facts: int, limit: int | None) -> None:
    """Say it where there are fewer facts than ``--limit`` asks for."""
    if limit is not None and n_facts < limit:
        say(f"There are only {n_facts} facts, fewer than the {limit} of --limit: all are used")


def tell_data(facts: FactSet) -> None:
    """Say what of a data file was left out or not read, if anything."""
    if facts.skipped:
        say(*facts.summary().split("\n"))
        return
    for warning in facts.warnings:
        warn(f"{facts.source}: {warning}")


def agreeing(facts: FactSet, *, skip_invalid: bool, drop_doubled: bool) -> FactSet:
    """The facts that can be edited together; says what is left out or stands twice.

    ``skip_invalid`` leaves out facts that contradict an earlier one, ``drop_doubled`` those that
    repeat one.

    Raises:
        DataError: facts contradict each other, and are not to be left out.
    """
    from goldenlayers.facts import contradiction, refuse_contradictions, repeats

    if not skip_invalid:
        refuse_contradictions(facts, "Mend the data, or leave out the later ones: --skip-invalid")
    doubled, contradicting = repeats(facts)
    if contradicting:
        tell_dropped([contradiction(*pair) for pair in contradicting])
    if doubled:
        first, later = doubled[0]
        one = len(doubled) == 1
        say(
            f"{len(doubled)} {'fact repeats' if one else 'facts repeat'} an earlier one "
            f"('{later.id}' is '{first.id}' again)" + ": edited once" * drop_doubled
        )
    gone = {later.id for _, later in contradicting + doubled * drop_doubled}
    return facts.without(gone)


def tell_dropped(dropped: Sequence[DataError]) -> None:
    """Say which facts were left out, and why."""
    some = [f"  {error}" for error in dropped[:3]]
    more = [f"  and {len(dropped) - 3} more"] if len(dropped) > 3 else []
    say(f"Left out {len(dropped)} {'fact' if len(dropped) == 1 else 'facts'}:", *some, *more)


def tell_written(folder: RunFolder | None, *names: str) -> None:
    """Say which of these files a finished run folder has, if there is one."""
    if folder is not None:
        there = ", ".join(name for name in names if folder.file(name).exists())
        say(f"Written to {folder.path}: {there}")


def tell_use(delta: WeightDelta, model: Model) -> None:
    """Say it where an edit is used otherwise than it was made: in a number format too narrow for
    it, or with prompts in another form.
    """
    import torch

    from goldenlayers.models import DTYPES

    made = getattr(torch, delta.base_dtype, None) if delta.base_dtype in DTYPES else None
    if made is not None and torch.promote_types(made, model.dtype) != model.dtype:
        used = str(model.dtype).removeprefix("torch.")
        warn(
            f"the edit was made in {delta.base_dtype} and is used in {used}, which rounds it; "
            f"--dtype {delta.base_dtype} does not"
        )
    if delta.in_chat != model.chat:
        made_so, used_so = ("with", "without") if delta.in_chat else ("without", "with")
        warn(f"the edit was made {made_so} --chat and is asked {used_so} it: it may not show")


def settings_of(config: Any) -> dict[str, Any]:
    """The settings a run folder records; ``overwrite`` is no part of what the run is."""
    record = {name: value for name, value in to_record(config).items() if name != "overwrite"}
    return with_absolute_paths(type(config), record)


def with_absolute_paths(kind: type[Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Recorded settings whose files are found from any working directory.

    Names of models and data sets stay as they are, and so does what is not there.
    """
    files = [name for name in types_of(kind) if "Path" in str(types_of(kind)[name])]
    files += [name for name, role in roles(kind).items() if role is Role.SOURCE]

    def found(name: str, value: Any) -> Any:
        if isinstance(value, list):
            return [found(name, one) for one in value]
        return _absolute(name, value) if name in files and isinstance(value, str) else value

    return {name: found(name, value) for name, value in plain(settings).items()}


def _absolute(name: str, value: str) -> str:
    """A setting's text as it is good from any working directory, by the rules of its own room."""
    if name == "model":
        from goldenlayers.models import absolute_name
    elif name in ("data", "facts"):
        from goldenlayers.datasets import absolute_name
    elif name == "statistics":
        from goldenlayers.statistics.documents import absolute_name
    else:
        from goldenlayers.durable import absolute as absolute_name
    return absolute_name(value)


@contextlib.contextmanager
def run_folder(
    config: Any,
    command: str,
    *,
    model: Model | None = None,
    facts: FactSet | None = None,
    resume: bool = False,
    ignore: Collection[str] = (),
) -> Iterator[RunFolder | None]:
    """The run folder of ``config.out`` with its resolved config, or None when none is asked for.

    ``resume`` goes on with an unfinished run of the same settings, if there is one. ``ignore`` are
    settings that may differ then: those of how fast and where the work is done, not what comes out.
    """
    from goldenlayers.store import RunFolder

    result(out=config.out)
    if config.out is None:
        yield None
        return
    record, free = _recorded(config, command, ignore, alike=resume)
    from goldenlayers.studying.folders import origin

    record |= origin(model, facts)
    if inputs := inputs_of(config):
        record["inputs"] = inputs
    with RunFolder.create(
        config.out, record, resume=resume, overwrite=config.overwrite, ignore=free
    ) as folder:
        yield folder


def refuse_out(
    config: Any, command: str, *, resume: bool = False, ignore: Collection[str] = ()
) -> None:
    """Refuse an --out where :func:`run_folder` cannot write, before minutes of work and not after.

    Raises:
        UserError: it is taken, holds other work or what no run wrote, or cannot be written to; or
            the run reads what it would replace.
    """
    from goldenlayers.store import RunFolder

    if config.out is None:
        return
    record, free = _recorded(config, command, ignore, alike=True)
    RunFolder.refuse(config.out, record, resume=resume, overwrite=config.overwrite, ignore=free)
    for name, role in roles(type(config)).items():
        value = record["settings"].get(name)
        for one in value if isinstance(value, list) else [value]:
            if role is Role.SOURCE and isinstance(one, str) and _reads(config.out, one):
                raise UserError(
                    f"--out is {config.out}, which the run reads itself (as its {name})",
                    fix="Choose another --out",
                )
    refuse_unwritable(config.out)


def _reads(out: Path, source: str) -> bool:
    """Whether a source (a path, or FORMAT:PATH) is the folder ``out``, or lies in it."""
    with contextlib.suppress(OSError, ValueError):
        for text in (source, source.partition(":")[2]):
            path = Path(text)
            if text and path.exists() and out.exists():
                around = (path, *path.resolve().parents)
                return any(one.samefile(out) for one in around)
    return False


def _recorded(
    config: Any, command: str, ignore: Collection[str], *, alike: bool
) -> tuple[dict[str, Any], list[str]]:
    """A run's record, and what of it may differ from the unfinished run that it goes on with.

    With ``alike`` also what is the same in both, though written otherwise.
    """
    settings = settings_of(config)
    # Files may be named in several ways; the weights and the facts themselves are compared.
    names, free = [*never_recorded(type(config)), *ignore], ["model.name"]
    if alike and (part := unfinished(config)) is not None:
        old = recorded_settings(type(config), part.config)
        names += [name for name in old if old[name] == settings.get(name)]
        # A version that hashed no files cannot say that they have changed.
        free += [] if "inputs" in part.config else ["inputs"]
    free += [f"settings.{name}" for name in names]
    return {"command": command, "settings": settings}, free


def inputs_of(config: Any) -> dict[str, str]:
    """What else a run reads, by the setting that names it: hashes of the content.

    Raises:
        UserError: a file that cannot be read.
    """
    from goldenlayers.durable import reading
    from goldenlayers.models.cache import sha256_file
    from goldenlayers.statistics.documents import WORDS

    found: dict[str, str] = {}
    for name in ("delta", "text", "statistics"):
        value = getattr(config, name, None)
        if not isinstance(value, str | Path):
            continue
        path = Path(value).expanduser()
        if name == "delta" and path.is_dir():
            from goldenlayers.delta.files import TENSORS

            path /= TENSORS  # complete in itself
        # What is named is no file where it is a word (package, hub:...), or where it is missing,
        # which is told by who needs it.
        if path.is_file() and value not in WORDS:
            with reading(path):
                found[name] = sha256_file(path)
    if isinstance(config, ApartOptions) and config.apart_from:
        found["apart_from"] = apart_digest(config.apart_from)
    return found


def recorded_settings(kind: type[Any], record: Mapping[str, Any]) -> dict[str, Any]:
    """A run's recorded settings as they read from here: files as :func:`with_absolute_paths` has
    them, and the default of what the version that made the run did not know.
    """
    return with_absolute_paths(kind, default_settings(kind) | (record.get("settings") or {}))


def refuse_taken(path: Path) -> None:
    """Refuse an existing output.

    Raises:
        UserError: something stands at ``path``, or nothing can.
    """
    try:
        taken = os.path.lexists(path)
    except ValueError as error:  # NUL in the name
        raise UserError(f"'{str(path)[:60]}...' cannot be written to ({error})") from error
    if taken:
        raise UserError(f"{path} is there already", fix="Choose another --out")


def refuse_twice(runs: Sequence[Path], option: str) -> None:
    """Refuse a run that is named twice: its edit would be there twice.

    Raises:
        UserError: one is.
    """
    places = [os.path.realpath(run.expanduser()) for run in runs]
    for run, place in zip(runs, places, strict=True):
        if places.count(place) > 1:
            raise UserError(f"{run} is given twice {option}", fix="Name it once")


def refuse_unwritable(path: Path) -> None:
    """Refuse a place where nothing can be written, before the work and not after it.

    Raises:
        UserError: the folder that ``path`` is to stand in cannot be made or written to.
    """
    from goldenlayers.durable import disk_errors

    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
