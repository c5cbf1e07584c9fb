"""``golden locate``: facts and a model in, the golden layer out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
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
    flag,
    whole_number,
)
from goldenlayers.errors import DataError, UserError
from goldenlayers.locating.base import LayerMethod
from goldenlayers.locating.methods import make_method, options_of
from goldenlayers.progress import Progress
from goldenlayers.shown import progress, say

if TYPE_CHECKING:
    from goldenlayers.datasets import FactSet
    from goldenlayers.editors import Editor
    from goldenlayers.facts import Fact
    from goldenlayers.locating.grid import TracingGrid
    from goldenlayers.locating.ranking import LayerRanking
    from goldenlayers.models import Model
    from goldenlayers.racing import VerifiedChoice
    from goldenlayers.statistics.moments import Covariance
    from goldenlayers.store import RunFolder

# These change how fast the work is done, not what comes out.
_FREE = ("batch_size", "device")


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


def run(config: LocateConfig) -> int:
    """Locate, write the run folder if one is asked for, and print the table."""
    from goldenlayers.locating import locate
    from goldenlayers.report import show_ranking

    how = config.layer_method()
    shared.refuse_out(config, "locate", ignore=_FREE)
    if config.verify is not None:
        _race_editor(config)  # refused before minutes of work, not after
    facts = shared.load_facts(config)
    model = shared.load_model(config)
    config, (settled,) = settle(config, model, facts)
    facts = dataclasses.replace(facts, facts=tuple(settled))
    _also(config, model)
    statistics = None
    if how.needs_statistics:
        from goldenlayers.statistics import key_statistics

        text, seed, cache = config.statistics, config.seed, config.cache_dir
        statistics = key_statistics(model, text=text, seed=seed, cache_dir=cache)
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
                progress=Progress(on_rows=take, on_progress=bar, on_dropped=dropped.append),
            )
        if dropped:
            shared.tell_dropped(dropped)
        verified: VerifiedChoice | None = None
        stopped: UserError | KeyboardInterrupt | None = None
        more = config.verify is not None or config.grid is not None
        if more:
            if folder is not None:
                folder.write_json("ranking.json", ranking.to_json())
            show_ranking(ranking)  # the rest may take minutes
            seen = set(used)
            proxy = dataclasses.replace(facts, facts=tuple(f for f in facts if f.id in seen))
            try:
                if ranking.interrupted:  # whoever stops the work wants no more of it
                    raise KeyboardInterrupt
                if folder is not None and config.grid is not None:
                    write_grids(folder, _grids(config, model, proxy))
                if config.verify is not None:
                    verified = _verify(config, model, proxy or facts, ranking, statistics)
            except (UserError, KeyboardInterrupt) as error:
                stopped = error  # the ranking stands without the rest
                if folder is not None:
                    when = "while ranking" if ranking.interrupted else "after the ranking"
                    folder.log(f"stopped {when}: {type(error).__name__}: {error}")
        if folder is not None:
            from goldenlayers.studying.folders import finish_choice

            if verified is not None:
                folder.write_json("verified.json", verified.to_json())
            finish_choice(folder, ranking)
    if not more:
        show_ranking(ranking)
    if verified is not None:
        from goldenlayers.report.tables import show_verified

        show_verified(verified)
    if folder is not None:
        _tell_files(folder)
    if stopped is not None:
        what = "is not verified" if config.verify is not None else "has no heat map"
        kept = f"; the ranking is kept in {folder.path}" if folder is not None else ""
        say(f"Warning: the choice {what}, the work was stopped before that{kept}.")
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


def _race_editor(config: LocateConfig) -> Editor:
    from goldenlayers.editors import make_editor, read_settings

    return read_settings(make_editor(config.verify_method), config.verify_set, "--verify-set")


def _also(config: LocateConfig, model: Model) -> list[int]:
    """The layers of ``--also``.

    Raises:
        UserError: no layer of the model, and not "published".
    """
    from goldenlayers.locating import published_layer

    found = []
    for text in config.also:
        if text == "published":
            found.append(published_layer(len(model.layers)))
        elif (layer := whole_number(text)) is not None:
            found.append(model.layers[layer].index)
        else:
            raise UserError(f"--also is '{text}'", expected="layer numbers, or published")
    return found


def _verify(
    config: LocateConfig,
    model: Model,
    facts: Sequence[Fact],
    ranking: LayerRanking,
    statistics: Mapping[int, Covariance] | None,
) -> VerifiedChoice:
    """Race the best layers of the ranking on some of its facts."""
    from goldenlayers.commands.deciding import statistics_of
    from goldenlayers.progress import Progress
    from goldenlayers.racing import best_layers, verify, with_neighbours

    layers = best_layers(ranking, config.verify or 1, spacing=config.spacing)
    layers = list(dict.fromkeys([*layers, *_also(config, model)]))
    if len(layers) < 2:
        raise UserError(
            f"--also names layer {layers[0]}, the choice itself: there is nothing to race",
            fix="Name another layer, or raise --verify",
        )
    if config.neighbours:
        layers = with_neighbours(layers, len(model.layers))
    editor = _race_editor(config)
    if statistics is None:
        statistics = statistics_of(config, model, editor, layers)
    with progress(f"verifying with {config.verify_method}", "edits") as bar:
        return verify(
            model,
            facts,
            layers,
            editor,
            n_facts=config.verify_facts,
            statistics=statistics,
            seed=config.seed,
            progress=Progress(on_progress=bar),
        )


def _tell_files(folder: RunFolder) -> None:
    pictures = (f"{name}.{ending}" for name in ("ranking", "heatmap") for ending in ("svg", "png"))
    names = ("ranking.json", "verified.json", "grid.json", "per_fact.jsonl", *pictures)
    there = ", ".join(name for name in names if folder.file(name).exists())
    say(f"Written to {folder.path}: {there}")
