"""``golden export``: a saved edit for other tools."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from goldenlayers.commands import shared
from goldenlayers.commands.edit import saved_delta
from goldenlayers.config import ExportConfig
from goldenlayers.errors import UserError


def run(config: ExportConfig) -> int:
    """Write a LoRA adapter or a merged checkpoint."""
    from goldenlayers.export import export_merged, export_peft, whole_dtype

    shared.refuse_taken(config.out)
    shared.refuse_unwritable(config.out)
    delta = saved_delta(config.run)
    how = replace(config, model=config.model or model_of(config.run), dtype="auto")
    model = shared.load_model(how)
    if config.to == "peft":
        stored = None if config.dtype == "auto" else config.dtype
        done = export_peft(
            delta, config.out, model, rank=config.rank, dtype=stored, force=config.force
        )
        shared.say(f"LoRA adapter of rank {done.rank} written to {done.path}")
        for name, error in done.errors.items():
            if error:
                shared.say(f"  {name}: {error:.2%} of the change is left out by the rank")
        return 0
    # Worked with in a format that holds all of it, and rounded once, when it is written.
    needed = whole_dtype(model, config.dtype)
    if model.dtype != needed:
        del model
        dtype: Any = str(needed).removeprefix("torch.")
        model = shared.load_model(replace(how, dtype=dtype))
    path = export_merged(model, delta, config.out, dtype=config.dtype, force=config.force)
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
