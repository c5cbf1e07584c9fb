"""Configs of the commands that choose a layer: locate, sweep."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from goldenlayers.commands.options import (
    FACTS,
    RARE,
    ApartOptions,
    Consent,
    ModelOptions,
    Out,
    OutputOptions,
    Role,
    Statistics,
    Under,
    WorkerOptions,
    default_settings,
    flag,
)
from goldenlayers.errors import UserError
from goldenlayers.locating.base import LayerMethod
from goldenlayers.locating.methods import make_method, options_of

VERIFY = Under("Verify (race the best layers with real edits)")


@dataclass(frozen=True, kw_only=True)
class LocateConfig(ApartOptions, ModelOptions, OutputOptions):
    """Find the golden layer: the one layer at which a model's facts are best edited.

    golden locate smollm2-135m --limit 100
    golden locate smollm2-135m facts.jsonl --verify 5 --out located
    """

    heading = "Method"

    method: Annotated[str, arg(metavar="METHOD")] = "lga"
    """lga: Layer Gradient Analysis (arXiv 2602.20207). transfer: key transfer analysis, forward
    passes only. cma: causal mediation analysis (arXiv 2202.05262). saliency: mean absolute
    gradient. middle, published: choices that look at no facts (half depth; the depth published
    settings use)."""

    statistics: Statistics = "model"
    """transfer, --verify: text for the key statistics: model (sampled from the model itself), a
    text or JSONL file, or hub:NAME."""

    reach: Annotated[bool, RARE] = False
    """transfer: weigh by whether an edit can still bring the answer about (one backward pass)."""

    align: Annotated[bool, RARE] = False
    """transfer: weigh by that, and by whether rephrasings want the change that the prompt wants
    (one more backward pass)."""

    scope: Literal["mlp", "down", "attention", "block"] = "mlp"
    """Which weight matrices of a block the gradients are taken of."""

    loss: Annotated[Literal["sequence", "answer"], RARE] = "sequence"
    """Cross-entropy over the whole text (the paper's), or over the answer tokens only."""

    known: Annotated[bool, FACTS] = False
    """Keep only facts whose old answer the model gives by itself."""

    fence: Annotated[Literal["tukey", "last", "none"], RARE] = "tukey"
    """Leave layers with outlying scores out of the choice (Tukey fences, the paper's), or the last
    block alone, or keep all."""

    kappa: Annotated[float, RARE] = 1.0
    """Width of the Tukey fences in interquartile ranges."""

    window: int | None = None
    """cma: layers restored together (default: 10, or half of them in models of 10 or fewer)."""

    top_k: int = 5
    """How many candidate layers to list."""

    bootstrap: Annotated[int, RARE] = 1000
    """Resamples of the facts that tell how stable the choice is."""

    batch_size: Annotated[int, RARE] = 16
    """Facts per batch; halved by itself when memory runs out."""

    grid: Annotated[int | None, RARE] = None
    """cma: also trace every token of this many of the facts, drawn with --seed, and draw the heat
    map; needs --out."""

    verify: Annotated[int | None, VERIFY] = None
    """Race this many of the best layers on a few of the facts with real edits, and choose the
    winner (successive halving)."""

    verify_facts: Annotated[int, VERIFY] = 8
    """--verify: facts that are edited at most, each by itself; those with the most probes."""

    verify_method: Annotated[str, VERIFY] = "rome"
    """--verify: the editor."""

    verify_set: Annotated[dict[str, str], RARE] = dataclasses.field(default_factory=dict)
    """--verify: settings of the editor, as NAME VALUE pairs; see `golden editors`."""

    spacing: Annotated[int, RARE] = 1
    """--verify: race layers at least so far apart, as far as there are any. Neighbours score alike:
    with 2 the race has more to choose from."""

    also: Annotated[list[str], RARE] = dataclasses.field(default_factory=list)
    """--verify: race these layers, too: numbers, or 'published' for the depth that published
    configurations use."""

    neighbours: Annotated[bool, RARE] = False
    """--verify: race the layers just below and above those, too."""

    out: Out = None
    """Run folder to write: ranking.json, per_fact.jsonl, pictures, config.yaml, log.txt, and
    verified.json with --verify, grid.json and heatmap.svg and .png with --grid."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.verify == 1 and not (self.neighbours or self.also):
            raise UserError("--verify is 1: there is nothing to race", expected="2 or more")
        unused = {"neighbours": False, "verify_set": {}, "spacing": 1, "also": []}
        for name, default in unused.items():
            if getattr(self, name) != default and self.verify is None:
                raise UserError(
                    f"{flag(name)} is for --verify", fix="Add --verify 5, or leave it out"
                )
        how = self.layer_method()
        if self.grid is not None:
            if not how.traces_tokens:
                raise UserError(
                    f"--grid is for causal tracing, and the method is {self.method}",
                    fix="Add --method cma, or leave it out",
                )
            if self.out is None:
                raise UserError("--grid needs a run folder to write to", fix="Add --out RUN")

    def layer_method(self) -> LayerMethod:
        """The method with its options: those flags that are not at their default.

        Raises:
            UserError: an unknown method, or an option that it does not have.
        """
        names = ("scope", "loss", "known", "fence", "kappa", "reach", "align", "window")
        default = default_settings(LocateConfig)
        options = {n: getattr(self, n) for n in names if getattr(self, n) != default[n]}
        if self.fence == "none" and "fence" not in options_of(self.method):
            del options["fence"]  # which is what methods without fences do
        return make_method(self.method, batch_size=self.batch_size, **options)


@dataclass(frozen=True, kw_only=True)
class SweepConfig(WorkerOptions, ApartOptions, ModelOptions):
    """Edit every fact at every layer and score: the truth. Run again after a kill to go on.

    golden sweep smollm2-135m facts.jsonl --limit 30 --out swept
    golden sweep smollm2-135m facts.jsonl --method memit --layers 3-8 --out swept
    """

    heading = "Method"

    method: str = "rome"
    """rome, r-rome, memit, emmet, alphaedit, pmet, ft-m or ft-l."""

    layers: str = "all"
    """all, or numbers and ranges: 0-11 or 0,3,5 or 0-4,8."""

    known: Annotated[bool, FACTS] = False
    """Keep only facts whose old answer the model gives by itself."""

    metrics: list[str] = dataclasses.field(default_factory=list)
    """As for `golden evaluate`; rewrite, rephrase, locality, portability if none is named."""

    preset: Annotated[str | None, RARE] = None
    """Published settings by name, such as rome/gpt2-xl; their layer is left aside."""

    set: dict[str, str] = dataclasses.field(default_factory=dict)
    """Settings of the editor, as NAME VALUE pairs (steps 30 clamp 2 ...); see `golden editors`."""

    statistics: Statistics = "model"
    """Text for the key statistics, as for `golden edit`; one pass serves all layers."""

    chunk: Annotated[str, RARE] = "auto"
    """Facts per batch, or auto; halved by itself when memory runs out."""

    evidence: Annotated[bool, RARE] = False
    """Also write what the model said before and after each edit (several times the size)."""

    out: Annotated[Path, arg(metavar="RUN"), Role.PLACE, Under("Output")]
    """Run folder to write: scores.jsonl, summary.json, pictures, config.yaml, log.txt."""

    overwrite: Annotated[Consent, Under("Output")] = False
    """Replace the run folder if it is there already."""
