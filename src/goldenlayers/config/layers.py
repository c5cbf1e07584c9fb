"""Configs of the commands that choose a layer: locate, sweep, compare."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from goldenlayers.config.options import (
    Address,
    ApartOptions,
    Checked,
    Consent,
    Engine,
    ModelOptions,
    Out,
    Role,
    Sources,
    Statistics,
    Workers,
    flag,
)
from goldenlayers.errors import UserError


@dataclass(frozen=True, kw_only=True)
class LocateConfig(ApartOptions, ModelOptions):
    """Find the golden layer: the one layer at which a model's facts are best edited."""

    method: Annotated[str, arg(metavar="METHOD")] = "lga"
    """lga: Layer Gradient Analysis (arXiv 2602.20207). transfer: key transfer analysis, forward
    passes only. cma: causal mediation analysis (arXiv 2202.05262). saliency: mean absolute
    gradient. middle, published: choices that look at no facts (half depth; the depth published
    settings use)."""

    statistics: Statistics = "model"
    """transfer, --verify: text for the key statistics: model (sampled from the model itself), a
    text or JSONL file, or hub:NAME."""

    reach: bool = False
    """transfer: weigh by whether an edit can still bring the answer about (one backward pass)."""

    align: bool = False
    """transfer: weigh by that, and by whether rephrasings want the change that the prompt wants
    (one more backward pass)."""

    scope: Literal["mlp", "down", "attention", "block"] = "mlp"
    """Which weight matrices of a block the gradients are taken of."""

    loss: Literal["sequence", "answer"] = "sequence"
    """Cross-entropy over the whole text (the paper's), or over the answer tokens only."""

    known: bool = False
    """Keep only facts whose old answer the model gives by itself."""

    fence: Literal["tukey", "last", "none"] = "tukey"
    """Leave layers with outlying scores out of the choice (Tukey fences, the paper's), or the last
    block alone, or keep all."""

    kappa: float = 1.0
    """Width of the Tukey fences in interquartile ranges."""

    top_k: int = 5
    """How many candidate layers to list."""

    bootstrap: int = 1000
    """Resamples of the facts that tell how stable the choice is."""

    batch_size: int = 16
    """Facts per batch; halved by itself when memory runs out."""

    grid: int | None = None
    """cma: also trace every token of this many of the facts, drawn with --seed, and draw the heat
    map; needs --out."""

    verify: int | None = None
    """Race this many of the best layers on a few of the facts with real edits, and choose the
    winner (successive halving)."""

    verify_facts: int = 8
    """--verify: facts that are edited at most, each by itself; those with the most probes."""

    verify_method: str = "rome"
    """--verify: the editor."""

    verify_set: dict[str, str] = dataclasses.field(default_factory=dict)
    """--verify: settings of the editor, as NAME VALUE pairs; see `golden editors`."""

    spacing: int = 1
    """--verify: race layers at least so far apart, as far as there are any. Neighbours score alike:
    with 2 the race has more to choose from."""

    also: list[str] = dataclasses.field(default_factory=list)
    """--verify: race these layers, too: numbers, or 'published' for the depth that published
    configurations use."""

    neighbours: bool = False
    """--verify: race the layers just below and above those, too."""

    out: Out = None
    """Run folder to write: ranking.json, per_fact.jsonl, pictures, config.yaml, log.txt, and
    verified.json with --verify, grid.json and heatmap.svg and .png with --grid."""

    overwrite: Consent = False
    """Replace the run folder if it is there already."""

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
        if self.grid is not None:
            if self.method != "cma":
                raise UserError(
                    f"--grid is for causal tracing, and the method is {self.method}",
                    fix="Add --method cma, or leave it out",
                )
            if self.out is None:
                raise UserError("--grid needs a run folder to write to", fix="Add --out RUN")


@dataclass(frozen=True, kw_only=True)
class SweepConfig(ApartOptions, ModelOptions):
    """Edit every fact at every layer and score: the truth. Run again after a kill to go on."""

    method: str = "rome"
    """rome, r-rome, memit, emmet, alphaedit, pmet, ft-m or ft-l."""

    layers: str = "all"
    """all, or numbers and ranges: 0-11 or 0,3,5 or 0-4,8."""

    known: bool = False
    """Keep only facts whose old answer the model gives by itself."""

    metrics: list[str] = dataclasses.field(default_factory=list)
    """As for `golden evaluate`; rewrite, rephrase, locality, portability if none is named."""

    preset: str | None = None
    """Published settings by name, such as rome/gpt2-xl; their layer is left aside."""

    set: dict[str, str] = dataclasses.field(default_factory=dict)
    """Settings of the editor, as NAME VALUE pairs (steps 30 clamp 2 ...); see `golden editors`."""

    statistics: Statistics = "model"
    """Text for the key statistics, as for `golden edit`; one pass serves all layers."""

    chunk: str = "auto"
    """Facts per batch, or auto; halved by itself when memory runs out."""

    evidence: bool = False
    """Also write what the model said before and after each edit (several times the size)."""

    workers: Workers = 1
    """Processes, or Ray actors, that each load the model and work side by side."""

    engine: Engine = "local"
    """local: processes of this machine. ray: actors of a cluster (extra ray)."""

    address: Address = None
    """With --engine ray: address of a running cluster (default: one is started here)."""

    out: Annotated[Path, Role.PLACE]
    """Run folder to write: scores.jsonl, summary.json, pictures, config.yaml, log.txt."""

    overwrite: Consent = False
    """Replace the run folder if it is there already."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.address is not None and self.engine != "ray":
            raise UserError("--address is for Ray", fix="Add --engine ray, or leave it out")


@dataclass(frozen=True, kw_only=True)
class CompareConfig(Checked):
    """Judge layer choices by a finished sweep: score, regret, hits, rank correlation, cost."""

    sweep: Annotated[Positional[Path], arg(metavar="SWEEP"), Role.SOURCE]
    """Run folder of `golden sweep`: the truth, on test facts."""

    with_: Annotated[Sources, arg(name="with", metavar="RUN")] = dataclasses.field(
        default_factory=list
    )
    """Run folders of `golden locate`, on other facts: the choices. Those of other sweeps, too: does
    their golden layer, of other data or another editor, serve here?"""

    metric: str = "overall"
    """What to judge by: overall, or a metric of the sweep."""

    sizes: list[int] = dataclasses.field(default_factory=lambda: [10, 20, 50, 100, 200, 300])
    """Numbers of proxy facts to try, by choosing again with random parts of each run's facts."""

    repeats: int = 200
    """Random parts per size."""

    seed: int = 0
    """Seed of the random parts."""

    allow_overlap: Consent = False
    """Go on, with a warning, where a run chose with facts of the sweep."""

    out: Out = None
    """Run folder to write: compare.json, config.yaml, log.txt."""

    overwrite: Consent = False
    """Replace the run folder if it is there already."""
