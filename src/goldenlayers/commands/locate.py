"""``golden locate``: facts and a model in, the golden layer out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from goldenlayers.commands import shared
from goldenlayers.config import LocateConfig

if TYPE_CHECKING:
    from goldenlayers.covariance import Covariance
    from goldenlayers.locate import LayerRanking
    from goldenlayers.models.model import Model
    from goldenlayers.store import RunFolder


def run(config: LocateConfig) -> int:
    """Locate, print the table, and write the run folder if one is asked for."""
    from goldenlayers.locate import locate
    from goldenlayers.report.terminal import show_ranking

    folder_free(config)
    facts = shared.load_facts(config)
    model = shared.load_model(config)
    statistics, prefixes = (
        _for_transfer(config, model) if config.method == "transfer" else (None, ())
    )
    with shared.run_folder(config, "locate", model=model, facts=facts) as folder:
        with shared.progress(f"locating with {config.method}", "facts") as bar:
            ranking = locate(
                model,
                facts,
                config.method,
                scope=config.scope,
                loss=config.loss,
                known=config.known,
                fence=config.fence,
                kappa=config.kappa,
                top_k=config.top_k,
                bootstrap=config.bootstrap,
                seed=config.seed,
                batch_size=config.batch_size,
                statistics=statistics,
                prefixes=prefixes,
                reach=config.reach,
                data=facts.name,
                on_rows=None if folder is None else lambda rows: append(folder, rows),
                on_progress=bar,
                on_dropped=shared.tell_dropped,
            )
        show_ranking(ranking)
        if folder is not None:
            write(folder, ranking)
    return 0


def _for_transfer(
    config: LocateConfig, model: Model
) -> tuple[Mapping[int, Covariance], Sequence[str]]:
    """Key statistics of every layer, and prefixes for facts without rephrasings."""
    from goldenlayers.editors import EditSettings
    from goldenlayers.editors.prefixes import sample_prefixes
    from goldenlayers.statistics import key_statistics

    with shared.progress("key statistics", "tokens") as bar:
        statistics = key_statistics(model, text=config.statistics, seed=config.seed, progress=bar)
    s = EditSettings()
    return statistics, sample_prefixes(model, s.prefixes, s.prefix_tokens, config.seed)


def folder_free(config: LocateConfig) -> None:
    """Refuse a taken --out before minutes of work, not after."""
    if config.out is not None and not config.overwrite:
        shared.refuse_taken(config.out)


def append(folder: RunFolder, rows: list[dict[str, Any]]) -> None:
    """Add a batch's rows to the run folder."""
    folder.append_rows("per_fact.jsonl", rows)


def write(folder: RunFolder, ranking: LayerRanking) -> None:
    """Put the ranking and its pictures into the run folder and finish it."""
    from goldenlayers.report.figures import ranking_figure

    folder.write_json("ranking.json", ranking.to_json())
    ranking_figure(ranking, folder.file("ranking"))
    folder.finish()
    names = ("ranking.json", "per_fact.jsonl", "ranking.svg", "ranking.png")
    there = ", ".join(name for name in names if folder.file(name).exists())
    shared.say(f"Written to {folder.path}: {there}")
