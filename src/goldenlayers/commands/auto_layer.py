"""The golden layer that ``--layer auto`` stands for: LGA on the starter facts, found once."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from goldenlayers.durable import disk_errors, read_text_file, write_text
from goldenlayers.errors import UserError
from goldenlayers.records import entry, json_text, parse_json
from goldenlayers.shown import say

if TYPE_CHECKING:
    from goldenlayers.locating.ranking import LayerRanking
    from goldenlayers.models import Model

_PROXY_FACTS = 200
_VERSION = 3  # of what is kept: to be raised when LGA's scores change, or what may be kept


def whole(ranking: LayerRanking) -> LayerRanking:
    """The ranking, unless Ctrl-C cut it short: then the command that needs it ends, too."""
    if ranking.interrupted:
        raise KeyboardInterrupt
    return ranking


def golden_layer(model: Model, cache_dir: Path | None = None) -> int:
    """The layer LGA chooses on a fixed sample of the starter facts.

    Kept for the same weights, number format, configuration and tokenizer.
    """
    from goldenlayers.datasets import load_facts
    from goldenlayers.locating import locate
    from goldenlayers.models.cache import models_root
    from goldenlayers.statistics.cache import model_settings

    facts = load_facts("starter", limit=_PROXY_FACTS)
    found_by = json_text([_VERSION, _PROXY_FACTS, facts.sha256, model_settings(model)])
    path = models_root(cache_dir).parent / "golden" / f"{_sha256(found_by)[:32]}.json"
    ranking = _kept(path)
    if ranking is None:
        ranking = whole(locate(model, facts))
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        record = json_text(ranking.to_json())
        write_text(path, json_text({"sha256": _sha256(record), "ranking": record}))
    say(f"Layer {ranking.golden_layer}: LGA on {ranking.n_facts} starter facts")
    for warning in ranking.warnings:
        say(f"  {warning}")
    return ranking.golden_layer


def _kept(path: Path) -> LayerRanking | None:
    """The ranking that is kept there; None where there is none, or it is not what was kept."""
    from goldenlayers.locating.ranking import LayerRanking

    if not path.exists():
        return None
    try:
        record = parse_json(read_text_file(path), path)
        text = entry(record if isinstance(record, dict) else {}, "ranking", str, path)
        if record.get("sha256") != _sha256(text):
            raise UserError(f"{path} has changed since it was written")
        return LayerRanking.from_json(text)
    except UserError as error:
        say(f"The kept golden layer cannot be used, so it is located again: {error}")
        return None


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
