"""What is done with finished runs: ``golden ask``, ``export`` and ``run``."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from goldenlayers.commands import call, options_of, shared
from goldenlayers.commands.options import (
    RARE,
    Consent,
    Dtype,
    LoadOptions,
    ModelOptions,
    Out,
    OutputOptions,
    Role,
    Sources,
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
from goldenlayers.shown import put, say

if TYPE_CHECKING:
    from goldenlayers.delta import WeightDelta
    from goldenlayers.models import Model


@dataclass(frozen=True, kw_only=True)
class AskConfig(ModelOptions):
    """Ask a model, with and without edits.

    golden ask smollm2-135m "The capital of Italy is"
    golden ask smollm2-135m "The capital of Italy is" --delta my-edit
    """

    prompt: Annotated[Positional[str], arg(metavar="PROMPT")]
    """What the model is to continue."""

    delta: Annotated[Sources, arg(metavar="RUN ...")] = dataclasses.field(default_factory=list)
    """Run folders of `golden edit`; several are added up."""

    tokens: int = 20
    """Most tokens of the answer."""

    top: int = 5
    """How many candidates for the next token to show."""

    force: Annotated[Consent, RARE] = False
    """Apply a delta although it was made on other weights."""


def run_ask(config: AskConfig) -> int:
    """Print the greedy continuation and the likeliest next tokens."""
    from goldenlayers.delta import WeightDelta

    deltas = [WeightDelta.load(path) for path in config.delta]
    model = shared.load_model(config)
    if config.prompt.endswith(" "):
        say(
            "The prompt ends in a space, and is asked so; most models expect the space as a part "
            "of the next word, and answer better without it."
        )
    for delta in deltas:
        delta.check(model, force=config.force)
        shared.tell_rounding(delta, model)
    _tell_contradictions(deltas)
    _answer(model, config, "as it is" if deltas else "")
    if deltas:
        with ExitStack() as stack:
            for delta in deltas:
                stack.enter_context(delta.applied(model, force=config.force))
            _answer(model, config, "edited")
    return 0


def _tell_contradictions(deltas: Sequence[WeightDelta]) -> None:
    """Say it where two of the edits give one prompt different answers."""
    answers: dict[object, object] = {}
    for delta in deltas:
        for fact in delta.facts:
            prompt, target = fact.get("prompt"), fact.get("target")
            before = answers.setdefault(prompt, target)
            if prompt and before != target:
                say(f"Two of the edits contradict: '{prompt}' → '{before}' and '{target}'")


def _answer(model: Model, config: AskConfig, title: str) -> None:
    import torch

    from goldenlayers.decoding import greedy
    from goldenlayers.hooks import last_logits

    prompt = model.encoder.verbatim(config.prompt)
    room = model.encoder.max_length
    count = config.tokens if room is None else min(config.tokens, room - len(prompt))
    (tokens,) = greedy(model, [prompt.ids], count) if count > 0 else ([],)
    if count < config.tokens:
        say(f"Only {max(0, count)} tokens: the model's context ends there")
    if title:
        put(f"{title}:")
    more = model.encoder.continuation(prompt.ids, tokens)
    first, *others = (prompt.text + more).split("\n")
    # No line of a text can pass for one of ours.
    put(f"  {first}", *(f"  | {line}" for line in others), limit=None)
    if config.top:
        with torch.no_grad():
            logits, _ = last_logits(model, torch.tensor([prompt.ids], device=model.device))
        best = logits[0].float().softmax(-1).topk(min(config.top, model.layers.vocab_size))
        candidates = (
            f"{model.encoder.continuation(prompt.ids, [i], with_special=True)!r} {p:.3f}"
            for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        )
        put("  next: " + "  ".join(candidates))


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

    export.refuse_place(config.out, overwrite=config.overwrite)
    shared.refuse_unwritable(config.out)
    names = [str(run) for run in config.run]
    delta, warnings = export.added_up([WeightDelta.load(run) for run in config.run], names)
    say(*(f"Warning: {warning}" for warning in warnings))
    how = replace(config, model=config.model or model_of(config.run[0]), dtype="auto")
    if config.to == "gguf-merged":
        export.mergeable(how.model, delta)  # or said before the model is converted and loaded
    model = shared.load_model(how)
    stored = None if config.dtype == "auto" else config.dtype
    if config.to == "gguf-merged":
        path = export.export_gguf_merged(model, delta, config.out, force=config.force)
        say(f"Merged GGUF file written to {path}")
        return 0
    kept: Any = {"force": config.force, "overwrite": config.overwrite}
    if config.to == "gguf":
        held = export.export_gguf(delta, config.out, model, rank=config.rank, dtype=stored, **kept)
        say(f"llama.cpp adapter of rank {held.rank} written to {held.path}")
        say(f"  llama-server -m MODEL.gguf --lora {held.path}")
        _tell_left_out(held.errors)
        return 0
    found = [export.read_check(run) for run in config.run if run.is_dir()]
    kept["evidence"] = [sentence for sentence in found if sentence]
    if config.to == "peft":
        done = export.export_peft(delta, config.out, model, rank=config.rank, dtype=stored, **kept)
        say(f"LoRA adapter of rank {done.rank} written to {done.path}")
        if done.vllm_rank is None:
            say("  Its rank is higher than vLLM takes: --rank 512, or --to merged")
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
    settings = from_record(kind, record["settings"], given, f"{folder / CONFIG}, settings")
    _tell_not_taken(kind, record["settings"], given)
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
            say(f"Warning: {what} not those of the first run ({part} {key} {old}, now {new}).")
    old_inputs, new_inputs = (run.get("inputs") or {} for run in (before, after))
    for name, sha256 in old_inputs.items():
        if new_inputs.get(name) != sha256:
            say(f"Warning: what {flag(name)} names has changed since the first run.")
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
