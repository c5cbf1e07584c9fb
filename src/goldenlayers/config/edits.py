"""Configs of the commands that edit and judge edits: edit, ask, evaluate, export, editors."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from goldenlayers.config.options import (
    Consent,
    DataOptions,
    Dtype,
    JointOptions,
    ModelOptions,
    Out,
    Role,
    Sources,
    Statistics,
)
from goldenlayers.errors import UserError


@dataclass(frozen=True, kw_only=True)
class EditConfig(JointOptions, ModelOptions):
    """Edit facts at one layer and save the small change; the model itself is left as it is."""

    subject: str | None = None
    """One fact by flags: its subject, letter for letter as in --prompt."""

    prompt: str | None = None
    """One fact by flags: the prompt that the new answer follows; {} stands for the subject."""

    target: str | None = None
    """One fact by flags: the new answer."""

    facts: Annotated[str | None, Role.SOURCE] = None
    """Many facts: a registered name, a file, or FORMAT:FILE."""

    limit: int | None = None
    """Use a random sample of this many of --facts."""

    skip_invalid: bool = False
    """Leave out invalid rows of --facts, and say how many and why."""

    method: str = "rome"
    """rome, r-rome, memit, emmet, alphaedit, pmet, ft-m or ft-l."""

    layer: str = "auto"
    """Layer to edit, or auto: the golden layer by LGA on the starter facts (found once, kept)."""

    mode: Literal["auto", "batch", "sequential"] = "auto"
    """All facts in one solve, or one after another; auto takes batch where the editor can."""

    step: int = 1
    """In sequence: how many facts to edit at a time (memit, emmet, alphaedit, pmet, ft-m, ft-l)."""

    preset: str | None = None
    """Published settings by name, such as rome/gpt2-xl; checked against the model."""

    set: dict[str, str] = dataclasses.field(default_factory=dict)
    """Settings of the editor as NAME VALUE pairs (steps 30 clamp 2.5 ...); see `golden editors`."""

    statistics: Statistics = "model"
    """Text for the key statistics: model (sampled from the model itself), a text or JSONL file,
    hub:NAME, or none (identity: another algorithm, only for comparison)."""

    seed: int = 0
    """Seed of the sampled prefixes and statistics."""

    out: Out = None
    """Run folder to write: delta.safetensors, delta.json, config.yaml, log.txt."""

    overwrite: Consent = False
    """Replace the run folder if it is there already."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.step != 1 and self.mode == "batch":
            raise UserError("--step is for edits in sequence", fix="Add --mode sequential")
        by_flags = [self.subject, self.prompt, self.target]
        if self.facts is not None and any(part is not None for part in by_flags):
            raise UserError("both --facts and a fact by flags are given", fix="Give one of them")
        if self.facts is None and any(part is None for part in by_flags):
            raise UserError(
                "there is no fact to edit",
                expected="--subject, --prompt and --target, or --facts FILE",
            )


@dataclass(frozen=True, kw_only=True)
class AskConfig(ModelOptions):
    """Ask a model, with and without edits."""

    prompt: Annotated[Positional[str], arg(metavar="PROMPT")]
    """What the model is to continue."""

    delta: Sources = dataclasses.field(default_factory=list)
    """Run folders of `golden edit`; several are added up."""

    tokens: int = 20
    """Most tokens of the answer."""

    top: int = 5
    """How many candidates for the next token to show."""

    force: Consent = False
    """Apply a delta although it was made on other weights."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(DataOptions, ModelOptions):
    """Score facts under an edit (or none), probe by probe; run again after a kill to go on."""

    delta: Annotated[Path | None, Role.SOURCE] = None
    """Judge a saved change on the facts it was made for: the run folder of `golden edit`."""

    method: str = "none"
    """none (the base rate), in-context (told in the prompt), or an editor: rome, r-rome, memit,
    emmet, alphaedit, pmet, ft-m or ft-l."""

    layer: str = "auto"
    """Layer to edit, or auto: the golden layer by LGA on starter facts about other subjects."""

    mode: Literal["single", "batch", "sequential"] = "single"
    """single: each fact by itself on the untouched model. batch: all edited together. sequential:
    one after another, each also scored right after its own edit."""

    step: int = 1
    """--mode sequential: how many facts to edit at a time, where the editor can edit several."""

    metrics: list[str] = dataclasses.field(default_factory=list)
    """rewrite, rephrase, locality, portability (these four if none is named), generation,
    counterfact, fluency, kl, perplexity."""

    text: Annotated[Path | None, Role.SOURCE] = None
    """Held-out text file for perplexity."""

    text_tokens: int = 1024
    """Tokens of --text that are read."""

    preset: str | None = None
    """Published settings by name, such as rome/gpt2-xl; checked against the model."""

    set: dict[str, str] = dataclasses.field(default_factory=dict)
    """Settings of the editor, as NAME VALUE pairs (steps 30 ...); see `golden editors`."""

    statistics: Statistics = "model"
    """Text for the key statistics, as for `golden edit`."""

    batch_size: str = "auto"
    """Texts per forward pass, or auto."""

    out: Out = None
    """Run folder to write: scores.jsonl, summary.json, config.yaml, log.txt (delta.* in the modes
    batch and sequential)."""

    overwrite: Consent = False
    """Replace the run folder if it is there already."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.step != 1 and self.mode != "sequential":
            raise UserError("--step is for edits in sequence", fix="Add --mode sequential")
        if self.delta is not None and self.method != "none":
            raise UserError("both --delta and --method are given", fix="Give one of them")


@dataclass(frozen=True, kw_only=True)
class ExportConfig(ModelOptions):
    """Write a saved edit for other tools: a LoRA adapter for PEFT, or a whole checkpoint."""

    run: Annotated[Positional[Path], arg(metavar="RUN"), Role.SOURCE]
    """Run folder of `golden edit`."""

    model: Annotated[str, Role.SOURCE] = ""
    """The model, as for `golden edit` (default: the one that the run names)."""

    dtype: Dtype = "auto"
    """Number format to write. auto keeps that of the checkpoint; for peft it is float32."""

    out: Annotated[Path, Role.PLACE]
    """Folder to write."""

    to: Literal["peft", "merged"] = "peft"
    """A LoRA adapter, or the model with the edit merged in."""

    rank: int | None = None
    """For peft: most ranks per matrix; needed for fine-tuned edits, which have no low rank. What is
    cut off is told."""

    force: Consent = False
    """Export for a model with other weights than the edit was made on."""


@dataclass(frozen=True, kw_only=True)
class EditorsConfig:
    """List the editors, their settings and the published presets."""
