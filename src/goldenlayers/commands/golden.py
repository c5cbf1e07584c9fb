"""The golden layer that ``--layer auto`` stands for: LGA on the starter facts, found once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from goldenlayers.commands import shared
from goldenlayers.durable import disk_errors
from goldenlayers.errors import UserError

if TYPE_CHECKING:
    from goldenlayers.locate import LayerRanking
    from goldenlayers.models.model import Model

_PROXY_FACTS = 200
_VERSION = 2  # of what is kept: to be raised when LGA's scores change, or what may be kept


def whole(ranking: LayerRanking) -> LayerRanking:
    """The ranking, unless Ctrl-C cut it short: then the command that needs it ends, too."""
    if ranking.interrupted:
        raise KeyboardInterrupt
    return ranking


def golden_layer(model: Model, cache_dir: Path | None = None) -> int:
    """The layer LGA chooses on a fixed sample of the starter facts, kept by the weights' hash."""
    import os

    from goldenlayers.datasets import load_facts
    from goldenlayers.locate import LayerRanking, locate
    from goldenlayers.models.cache import models_root

    facts = load_facts("starter", limit=_PROXY_FACTS)
    folder = models_root(cache_dir).parent / "golden"
    path = (
        folder / f"{model.fingerprint()[:32]}-{facts.sha256[:16]}-{_PROXY_FACTS}-v{_VERSION}.json"
    )
    try:
        ranking = LayerRanking.from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, UserError):  # not there, or of another version
        with shared.progress("locating with lga", "facts") as bar:
            ranking = whole(locate(model, facts, "lga", data=facts.name, on_progress=bar))
        with disk_errors(path):
            folder.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(f".{os.getpid()}.part")
            part.write_text(json.dumps(ranking.to_json()), encoding="utf-8")
            part.replace(path)
    shared.say(f"Layer {ranking.golden_layer}: LGA on {ranking.n_facts} starter facts")
    for warning in ranking.warnings:
        shared.say(f"  {warning}")
    return ranking.golden_layer
