"""Configs of the commands that edit and judge edits: edit, evaluate."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from goldenlayers.commands.options import (
    FACTS,
    RARE,
    DataOptions,
    JointOptions,
    ModelOptions,
    Out,
    OutputOptions,
    Role,
    Statistics,
)
from goldenlayers.errors import UserError


@dataclass(frozen=True, kw_only=True)
class EditConfig(JointOptions, ModelOptions, OutputOptions):
    """Edit facts at one layer and save the small change; the model itself is left as it is.

    golden edit smollm2-135m --subject Italy --prompt "The capital of {} is" --target Paris
    golden edit smollm2-135m --facts facts.jsonl --method memit --layer 6 --out my-edit
    """

    heading = "Method"

    subject: Annotated[str | None, FACTS] = None
    """One fact by flags: its subject, letter for letter as in --prompt."""

    prompt: Annotated[str | None, FACTS] = None
    """One fact by flags: the prompt that the new answer follows; {} stands for the subject."""

    target: Annotated[str | None, FACTS] = None
    """One fact by flags: the new answer."""

    facts: Annotated[str | None, Role.SOURCE, FACTS] = None
    """Many facts: a registered name, a file, or FORMAT:FILE."""

    limit: Annotated[int | None, FACTS] = None
    """Use a random sample of this many of --facts."""

    skip_invalid: Annotated[bool, FACTS] = False
    """Leave out invalid rows of --facts, and say how many and why."""

    method: str = "rome"
    """rome, r-rome, memit, emmet, alphaedit, pmet, ft-m or ft-l."""

    layer: str = "auto"
    """Layer to edit, or auto: the golden layer by LGA on the starter facts (found once, kept)."""

    mode: Literal["auto", "batch", "sequential"] = "auto"
    """All facts in one solve, or one after another; auto takes batch where the editor can."""

    step: Annotated[int, RARE] = 1
    """In sequence: how many facts to edit at a time (memit, emmet, alphaedit, pmet, ft-m, ft-l)."""

    preset: Annotated[str | None, RARE] = None
    """Published settings by name, such as rome/gpt2-xl; checked against the model."""

    set: dict[str, str] = dataclasses.field(default_factory=dict)
    """Settings of the editor as NAME VALUE pairs (steps 30 clamp 2.5 ...); see `golden editors`."""

    statistics: Statistics = "model"
    """Text for the key statistics: model (sampled from the model itself), a text or JSONL file,
    hub:NAME, or none (identity: another algorithm, only for comparison)."""

    seed: Annotated[int, RARE] = 0
    """Seed of the sampled prefixes and statistics."""

    out: Out = None
    """Run folder to write: delta.safetensors, delta.json, config.yaml, log.txt."""

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
class EvaluateConfig(DataOptions, ModelOptions, OutputOptions):
    """Score facts under an edit (or none), probe by probe; run again after a kill to go on.

    golden evaluate smollm2-135m facts.jsonl --method rome --layer 6 --limit 30
    golden evaluate smollm2-135m facts.jsonl --delta my-edit --out scores
    """

    heading = "Method"

    delta: Annotated[Path | None, arg(metavar="RUN"), Role.SOURCE] = None
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

    text: Annotated[Path | None, Role.SOURCE, RARE] = None
    """Held-out text file for perplexity."""

    text_tokens: Annotated[int, RARE] = 1024
    """Tokens of --text that are read."""

    preset: Annotated[str | None, RARE] = None
    """Published settings by name, such as rome/gpt2-xl; checked against the model."""

    set: dict[str, str] = dataclasses.field(default_factory=dict)
    """Settings of the editor, as NAME VALUE pairs (steps 30 ...); see `golden editors`."""

    statistics: Statistics = "model"
    """Text for the key statistics, as for `golden edit`."""

    batch_size: Annotated[str, RARE] = "auto"
    """Texts per forward pass, or auto."""

    out: Out = None
    """Run folder to write: scores.jsonl, summary.json, config.yaml, log.txt (delta.* in the modes
    batch and sequential)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.step != 1 and self.mode != "sequential":
            raise UserError("--step is for edits in sequence", fix="Add --mode sequential")
        if self.delta is not None and self.method != "none":
            raise UserError("both --delta and --method are given", fix="Give one of them")
