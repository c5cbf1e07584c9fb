"""``golden export``: a saved edit for other tools."""

from __future__ import annotations

from goldenlayers.commands import shared
from goldenlayers.commands.edit import saved_delta
from goldenlayers.config import ExportConfig


def run(config: ExportConfig) -> int:
    """Write a LoRA adapter or a merged checkpoint."""
    from goldenlayers.export import export_merged, export_peft

    shared.refuse_taken(config.out)
    delta = saved_delta(config.run)
    model = shared.load_model(config)
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
