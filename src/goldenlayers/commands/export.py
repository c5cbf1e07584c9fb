"""``golden export``: a saved edit for other tools."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from goldenlayers.commands import shared
from goldenlayers.commands.edit import saved_delta
from goldenlayers.config import ExportConfig
from goldenlayers.errors import UserError


def run(config: ExportConfig) -> int:
    """Write a LoRA adapter or a merged checkpoint."""
    from goldenlayers.export import export_merged, export_peft

    if os.path.lexists(config.out):
        raise UserError(f"{config.out} is there already", fix="Choose another --out")
    delta = saved_delta(config.run)
    name = config.model or model_of(config.run)
    model = shared.load_model(replace(config, model=name))
    if config.to == "peft":
        done = export_peft(delta, config.out, model, rank=config.rank, force=config.force)
        shared.say(f"LoRA adapter of rank {done.rank} written to {done.path}")
        for name, error in done.errors.items():
            if error:
                shared.say(f"  {name}: {error:.2%} of the change is left out by the rank")
    else:
        path = export_merged(model, delta, config.out, force=config.force)
        shared.say(f"Merged checkpoint written to {path}")
    return 0


def model_of(run: Path) -> str:
    """The model that a run of ``golden edit`` names.

    Raises:
        UserError: it names none.
    """
    from goldenlayers.store import CONFIG, RunFolder

    settings = RunFolder.open(run).config.get("settings") if (run / CONFIG).is_file() else None
    name = (settings or {}).get("model")
    if not name:
        raise UserError(f"{run} does not say which model it edits", fix="Add --model MODEL")
    return str(name)
