"""What is done with finished runs: ``golden export`` and ``run``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from goldenlayers.commands import call, options_of, shared
from goldenlayers.commands.deciding import LINES
from goldenlayers.commands.options import (
    RARE,
    Consent,
    Dtype,
    LoadOptions,
    ModelOptions,
    Out,
    OutputOptions,
    Role,
    Under,
    WorkerOptions,
    default_settings,
    flag,
    from_record,
    never_recorded,
    roles,
    to_record,
)
from goldenlayers.durable import absolute
from goldenlayers.errors import UserError
from goldenlayers.shown import result, say, warn


@dataclass(frozen=True, kw_only=True)
class ExportConfig(ModelOptions):
    """Write saved edits for other tools: a LoRA adapter for PEFT and vLLM, one for llama.cpp and
    Ollama, or a whole checkpoint. Each folder gets a model card. Several edits become one.

    golden export my-edit --out adapter
    golden export my-edit another-edit --to gguf --out edits.gguf
    """

    run: Annotated[Positional[list[Path]], arg(metavar="RUN ..."), Role.SOURCE]
    """Run folders of `golden edit`; several are added up."""

    model: Annotated[str, Role.SOURCE, Under("Model")] = ""
    """The model, as for `golden edit` (default: the one that the first run names)."""

    dtype: Annotated[Dtype, Under("Output")] = "auto"
    """Number format to write. auto keeps that of the checkpoint; for adapters it is float32."""

    out: Annotated[Path, arg(metavar="PATH"), Role.PLACE, Under("Output")]
    """Folder to write; with --to gguf a file NAME.gguf."""

    to: Literal["peft", "merged", "gguf", "gguf-merged"] = "peft"
    """peft: a LoRA adapter. merged: the model with the edit in it. gguf: a LoRA adapter for
    llama.cpp. gguf-merged: the model's own GGUF file with the edit in it, where that is not
    quantised."""

    rank: int | None = None
    """For adapters: most ranks per matrix; needed for fine-tuned edits, which have no low rank.
    What is cut off is told."""

    overwrite: Annotated[Consent, Under("Output")] = False
    """Replace an earlier export (nothing else is ever replaced)."""

    force: Annotated[Consent, RARE] = False
    """Export for a model with other weights than the edit was made on."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.run:
            raise UserError("there is no edit to export", expected="RUN, a folder of golden edit")
        if self.to == "gguf-merged" and (self.overwrite or self.dtype != "auto"):
            raise UserError(
                "--to gguf-merged replaces nothing, and keeps the number formats of its file",
                fix="Leave --overwrite and --dtype out",
            )
        if self.to.startswith("gguf") and self.out.suffix.lower() != ".gguf":
            raise UserError(f"--out is {self.out}", expected="a file NAME.gguf with --to gguf")
        if self.to == "gguf" and self.dtype not in ("auto", "float32", "float16"):
            raise UserError(f"--dtype is {self.dtype}", expected="float32 or float16 for gguf")
        if self.to.endswith("merged") and self.rank is not None:
            raise UserError("--rank is for adapters", fix="Leave it out, or add --to peft")


def run_export(config: ExportConfig) -> int:
    """Write a LoRA adapter or a merged checkpoint."""
    from goldenlayers import export
    from goldenlayers.delta import WeightDelta

    export.refuse_place(config.out, file=config.to.startswith("gguf"), overwrite=config.overwrite)
    shared.refuse_unwritable(config.out)
    shared.refuse_twice(config.run, "to golden export")
    names = [str(run) for run in config.run]
    delta, warnings = export.added_up([WeightDelta.load(run) for run in config.run], names)
    for warning in warnings:
        warn(warning)
    how = replace(config, model=config.model or model_of(config.run[0]), dtype="auto")
    if config.to == "gguf-merged":
        export.mergeable(how.model, delta)  # or said before the model is converted and loaded
    model = shared.load_model(how)
    stored = None if config.dtype == "auto" else config.dtype
    if config.to == "gguf-merged":
        path = export.export_gguf_merged(model, delta, config.out, force=config.force)
        say(f"Merged GGUF file written to {path}")
        result(to=config.to, out=path)
        return 0
    kept: Any = {"force": config.force, "overwrite": config.overwrite}
    if config.to == "gguf":
        held = export.export_gguf(delta, config.out, model, rank=config.rank, dtype=stored, **kept)
        say(f"llama.cpp adapter of rank {held.rank} written to {held.path}")
        say(f"  llama-server -m MODEL.gguf --lora {held.path}")
        result(to=config.to, out=held.path, rank=held.rank, left_out=held.errors)
        _tell_left_out(held.errors)
        return 0
    found = [export.read_check(run) for run in config.run if run.is_dir()]
    kept["evidence"] = [sentence for sentence in found if sentence]
    if config.to == "peft":
        done = export.export_peft(delta, config.out, model, rank=config.rank, dtype=stored, **kept)
        say(f"LoRA adapter of rank {done.rank} written to {done.path}")
        result(to=config.to, out=done.path, rank=done.rank, left_out=done.errors)
        if done.vllm_rank is None:
            warn("its rank is higher than vLLM takes: --rank 512, or --to merged")
        _tell_left_out(done.errors)
        return 0
    # Worked with in a format that holds all of it, and rounded once, when it is written.
    needed = export.whole_dtype(model, config.dtype)
    if model.dtype != needed:
        del model
        dtype: Any = str(needed).removeprefix("torch.")
        model = shared.load_model(replace(how, dtype=dtype))
    path = export.export_merged(model, delta, config.out, dtype=config.dtype, **kept)
    say(f"Merged checkpoint written to {path}")
    result(to=config.to, out=path)
    return 0


def _tell_left_out(errors: Mapping[str, float]) -> None:
    for name, error in errors.items():
        if error:
            say(f"  {name}: {error:.2%} of the change is left out by the rank")


def model_of(run: Path) -> str:
    """The model that a run of ``golden edit`` names.

    Raises:
        UserError: it names none.
    """
    from goldenlayers.store import CONFIG, RunFolder

    settings = RunFolder.open(run).config.get("settings") if (run / CONFIG).is_file() else None
    name = (settings or {}).get("model")
    if not name:
        raise UserError(f"{run} does not say which model it edits", fix="Add --model MODEL")
    return str(name)


@dataclass(frozen=True, kw_only=True)
class RunConfig(WorkerOptions, LoadOptions, OutputOptions):
    """Repeat a finished run from its config.yaml. What could do harm, and where the work is done,
    is said here and never taken from the record: it may come from anyone.

    golden run located
    golden run swept/config.yaml --out swept-again --workers 2
    """

    config: Annotated[Positional[Path], arg(metavar="RUN"), Role.SOURCE]
    """A run folder, or its config.yaml."""

    out: Out = None
    """Run folder for the repetition (default: the first run's folder name with -again)."""

    allow_overlap: Consent = False
    """Of `golden compare`: go on where a run chose with facts of the sweep."""

    atlas: Annotated[Path | None, arg(metavar="FILE"), Role.PLACE, RARE] = None
    """Of `golden compare`: put the sweep's golden layer into this atlas."""


def run_run(config: RunConfig) -> int:
    """Read config.yaml, and run its command again into another folder.

    The record decides on settings alone: consent and places are those of ``config``.
    """
    from goldenlayers.runfiles import CONFIG, FILES
    from goldenlayers.store import RunFolder

    folder = config.config
    if folder.is_file():
        if folder.name != CONFIG:
            raise UserError(f"{folder} is no run's record", expected=f"a {CONFIG}, or its folder")
        folder = folder.parent
    record: dict[str, Any] = RunFolder.open(folder).config
    command = record.get("command")
    if command == "study":
        raise UserError(f"{folder} is a study's table", fix="golden study FILE repeats the study")
    if command not in FILES or "settings" not in record:
        raise UserError(
            f"{folder} records the command '{command}'",
            expected="the config.yaml that a golden command wrote",
            fix=f"Those that leave a run folder are {', '.join(FILES)}",
        )
    kind = options_of(command)
    given = to_record(config) | {"out": config.out or _again(folder), "cache_dir": config.cache_dir}
    usual = default_settings(RunConfig)
    for name in never_recorded(RunConfig):
        if name not in roles(kind) and given[name] != usual[name]:
            raise UserError(f"{flag(name)} means nothing to golden {command}", fix="Leave it out")
    for name in (f"{name}_file" for name in LINES):  # what they held stands in the lists
        if isinstance(record["settings"], dict) and record["settings"].get(name) is not None:
            raise UserError(
                f"{folder / CONFIG} names a file to be read, {name} {record['settings'][name]!r}",
                expected="what our runs record: the lines, not the file",
            )
    settings = from_record(kind, record["settings"], given, f"{folder / CONFIG}, settings")
    _tell_not_taken(kind, record["settings"], given)
    result(repeats={"run": folder, "command": command})
    status = call(command, settings)
    if status == 0:
        tell_differences(record, RunFolder.open(given["out"]).config)
    return status


def _tell_not_taken(kind: type[Any], record: dict[str, Any], given: dict[str, Any]) -> None:
    """Say which consents and places of the first run do not hold for this one."""
    usual = default_settings(kind)
    flags = [
        flag(name)
        for name in never_recorded(kind)
        if name in record
        and name != "out"
        and record[name] not in (None, usual.get(name), given.get(name))
    ]
    if "--trust-remote-code" in flags:
        say(
            "Note: the first run ran code that comes with its model. This one does not: add "
            "--trust-remote-code if you trust where the model comes from."
        )
        flags.remove("--trust-remote-code")
    if flags:
        say(f"Note: {', '.join(flags)} of the first run must be given again to hold here, too.")


def tell_differences(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Say it where the repetition had other weights, facts or code than the first run."""
    from goldenlayers.models import comparable

    for part, key, what in (
        ("model", "fingerprint", "the model's weights are"),
        ("data", "sha256", "the facts are"),
    ):
        old, new = (run.get(part, {}).get(key) for run in (before, after))
        if key == "fingerprint" and not comparable(str(old), str(new)):
            say("Note: the first run names its weights as older versions did: not compared.")
        elif old != new:
            warn(f"{what} not those of the first run ({part} {key} {old}, now {new}).")
    old_inputs, new_inputs = (run.get("inputs") or {} for run in (before, after))
    for name, sha256 in old_inputs.items():
        if new_inputs.get(name) != sha256:
            warn(f"what {flag(name)} names has changed since the first run.")
    if before.get("version") != after.get("version"):
        say(f"Note: the first run was made by version {before.get('version')}.")


def _again(folder: Path) -> Path:
    """The first free name behind the folder's: run-again, run-again-2, ..."""
    first = Path(absolute(folder))
    for number in range(1, 1000):
        suffix = "-again" if number == 1 else f"-again-{number}"
        path = first.with_name(first.name + suffix)
        if not os.path.lexists(path):  # a link there might lead anywhere
            return path
    raise UserError(f"{folder} has been repeated 999 times", fix="Give --out")
