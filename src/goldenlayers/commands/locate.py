"""``golden locate``: facts and a model in, the golden layer out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import arg

from goldenlayers.commands import shared
from goldenlayers.commands.deciding import settle
from goldenlayers.commands.options import (
    FACTS,
    RARE,
    ApartOptions,
    ModelOptions,
    Out,
    OutputOptions,
    Statistics,
    Under,
    default_settings,
)
from goldenlayers.errors import DataError, UserError
from goldenlayers.locating.base import LayerMethod
from goldenlayers.locating.methods import FLAGS, make_method, options_of, read_options
from goldenlayers.progress import Progress, progress
from goldenlayers.shown import result, say, warn

if TYPE_CHECKING:
    from goldenlayers.datasets import FactSet
    from goldenlayers.locating.grid import TracingGrid
    from goldenlayers.models import Model
    from goldenlayers.store import RunFolder

# These change how fast the work is done, not what comes out.
_FREE = ("batch_size", "device")


RACE = Under("Race (--method race)")


@dataclass(frozen=True, kw_only=True)
class LocateConfig(ApartOptions, ModelOptions, OutputOptions):
    """Find the golden layer: the one layer at which a model's facts are best edited.

    golden locate smollm2-135m --limit 100
    golden locate smollm2-135m facts.jsonl --method race --editor memit --budget 5m --out located
    """

    heading = "Method"

    method: Annotated[str, arg(metavar="METHOD")] = "lga"
    """lga: Layer Gradient Analysis (arXiv 2602.20207). race: real edits of some facts at a
    few layers. transfer: key transfer analysis, forward passes only. cma: causal mediation
    analysis (arXiv 2202.05262). saliency: mean absolute gradient. middle, published: choices that
    look at no facts (half depth; that of published settings)."""

    set: dict[str, str] = dataclasses.field(default_factory=dict)
    """Further settings of the method (race: edits, subject, neighbour; transfer:
    reach, align)."""

    statistics: Statistics = "package"
    """transfer, race: text for the key statistics, as for `golden edit`."""

    scope: Literal["mlp", "down", "attention", "block"] = "mlp"
    """Which weight matrices of a block the gradients are taken of."""

    loss: Annotated[Literal["sequence", "answer"], RARE] = "sequence"
    """Cross-entropy over the whole text (the paper's), or over the answer tokens only."""

    tokens: Literal["all", "no-sink", "lookup"] = "all"
    """lga, saliency: the gradients' share of all tokens (the paper's), of all but the first, or of
    the subject's last."""

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

    editor: Annotated[str, RACE] = "clear-rome"
    """The editor that is to edit later."""

    editor_set: Annotated[dict[str, str], RACE] = dataclasses.field(default_factory=dict)
    """Its settings, as NAME VALUE pairs; see `golden editors`."""

    budget: Annotated[str | None, RACE, arg(metavar="TIME")] = None
    """The time that the edits may take, such as 90s, 3m or 1h (default: that of 96 edits)."""

    out: Out = None
    """Run folder to write: ranking.json, per_fact.jsonl, pictures, config.yaml, log.txt, and with
    --grid grid.json and heatmap.svg, .pdf and .png."""

    def __post_init__(self) -> None:
        super().__post_init__()
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
        default = default_settings(LocateConfig)
        options = {n: getattr(self, n) for n in FLAGS if getattr(self, n) != default[n]}
        if self.fence == "none" and "fence" not in options_of(self.method):
            del options["fence"]  # which is what methods without fences do
        if self.editor_set:
            from goldenlayers.editors import make_editor, read_settings

            options["editor"] = read_settings(
                make_editor(self.editor), self.editor_set, "--editor-set"
            )
        options |= read_options(self.method, self.set, "--set")
        return make_method(self.method, batch_size=self.batch_size, **options)


def run(config: LocateConfig) -> int:
    """Locate, write the run folder if one is asked for, and print the table."""
    from goldenlayers.locating import locate
    from goldenlayers.report import show_ranking
    from goldenlayers.report.figures import FORMATS

    how = config.layer_method()
    shared.refuse_out(config, "locate", ignore=_FREE)
    facts = shared.load_facts(config)
    model = shared.load_model(config)
    config, (settled,) = settle(config, model, facts)
    facts = dataclasses.replace(facts, facts=tuple(settled))
    statistics = None
    if reads := how.statistics_layers(model):
        from goldenlayers.editors.routing import layer_statistics

        text, seed, cache = config.statistics, config.seed, config.cache_dir
        statistics = layer_statistics(model, reads, text=text, seed=seed, cache_dir=cache)
    used: list[str] = []
    dropped: list[DataError] = []

    def take(rows: list[dict[str, Any]]) -> None:
        used.extend(row["fact"] for row in rows)
        if folder is not None:
            folder.append_rows("per_fact.jsonl", rows)

    with shared.run_folder(config, "locate", model=model, facts=facts, ignore=_FREE) as folder:
        with progress(f"locating with {how.name}", "facts") as bar:
            ranking = locate(
                model,
                facts,
                how,
                seed=config.seed,
                bootstrap=config.bootstrap,
                top_k=config.top_k,
                statistics=statistics,
                progress=Progress(
                    on_rows=take, on_progress=bar, on_dropped=dropped.append, on_note=say
                ),
            )
        result(**ranking.to_json())
        if dropped:
            shared.tell_dropped(dropped)
        stopped: UserError | KeyboardInterrupt | None = None
        if config.grid is not None and folder is not None:
            folder.write_json("ranking.json", ranking.to_json())
            show_ranking(ranking)  # the rest may take minutes
            seen = set(used)
            proxy = dataclasses.replace(facts, facts=tuple(f for f in facts if f.id in seen))
            try:
                if ranking.interrupted:  # whoever stops the work wants no more of it
                    raise KeyboardInterrupt
                write_grids(folder, _grids(config, model, proxy))
            except (UserError, KeyboardInterrupt) as error:
                stopped = error  # the ranking stands without the rest
                when = "while ranking" if ranking.interrupted else "after the ranking"
                folder.log(f"stopped {when}: {type(error).__name__}: {error}")
        if folder is not None:
            from goldenlayers.studying.folders import finish_choice

            finish_choice(folder, ranking)
    if config.grid is None:
        show_ranking(ranking)
    if how.verdict:
        say(how.verdict)
    pictures = (f"{name}.{ending}" for name in ("ranking", "heatmap") for ending in FORMATS)
    shared.tell_written(folder, "ranking.json", "grid.json", "per_fact.jsonl", *pictures)
    if stopped is not None:
        kept = f"; the ranking is kept in {folder.path}" if folder is not None else ""
        warn(f"the choice has no heat map, the work was stopped before that{kept}.")
        raise stopped
    return 130 if ranking.interrupted else 0  # 130: as for any command that Ctrl-C ends


def _grids(config: LocateConfig, model: Model, facts: FactSet) -> dict[str, TracingGrid]:
    """Every token traced, for some of the facts that the ranking is of; by fact id."""
    from goldenlayers.locating import Work

    assert config.grid is not None  # held by run
    chosen = facts.sample(config.grid, config.seed)
    found = config.layer_method().grids(Work(model, facts, config.seed), chosen)
    grids: dict[str, TracingGrid] = {}
    with progress("tracing every token", "facts") as bar:
        for fact, grid in zip(chosen, found, strict=True):
            grids[fact.id] = grid
            bar(len(grids), len(chosen))
    return grids


def write_grids(folder: RunFolder, grids: Mapping[str, TracingGrid]) -> None:
    """Put the grids, their mean by role, and the heat map into the run folder.

    One fact's heat map has its own tokens; that of several has their roles.
    """
    from goldenlayers.locating.grid import mean_by_role
    from goldenlayers.report.pictures import tracing_figure

    several = list(grids.values())
    mean = mean_by_role(several)
    facts = {name: grid.to_json() for name, grid in grids.items()}
    folder.write_json("grid.json", {"schema": 1, "mean": mean.to_json(), "facts": facts})
    tracing_figure(several[0] if len(several) == 1 else mean, folder.file("heatmap"))
