"""``golden export``: a saved edit for other tools."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from goldenlayers.commands import shared
from goldenlayers.commands.options import RARE, Consent, Dtype, ModelOptions, Role, Under
from goldenlayers.errors import UserError
from goldenlayers.shown import say


@dataclass(frozen=True, kw_only=True)
class ExportConfig(ModelOptions):
    """Write a saved edit for other tools: a LoRA adapter for PEFT, or a whole checkpoint.

    golden export my-edit --out adapter
    golden export my-edit --to merged --dtype float16 --out checkpoint
    """

    run: Annotated[Positional[Path], arg(metavar="RUN"), Role.SOURCE]
    """Run folder of `golden edit`."""

    model: Annotated[str, Role.SOURCE, Under("Model")] = ""
    """The model, as for `golden edit` (default: the one that the run names)."""

    dtype: Annotated[Dtype, Under("Output")] = "auto"
    """Number format to write. auto keeps that of the checkpoint; for peft it is float32."""

    out: Annotated[Path, arg(metavar="PATH"), Role.PLACE, Under("Output")]
    """Folder to write."""

    to: Literal["peft", "merged"] = "peft"
    """A LoRA adapter, or the model with the edit merged in."""

    rank: int | None = None
    """For peft: most ranks per matrix; needed for fine-tuned edits, which have no low rank. What is
    cut off is told."""

    force: Annotated[Consent, RARE] = False
    """Export for a model with other weights than the edit was made on."""


def run(config: ExportConfig) -> int:
    """Write a LoRA adapter or a merged checkpoint."""
    from goldenlayers.delta import WeightDelta
    from goldenlayers.export import export_merged, export_peft, whole_dtype

    shared.refuse_taken(config.out)
    shared.refuse_unwritable(config.out)
    delta = WeightDelta.load(config.run)
    how = replace(config, model=config.model or model_of(config.run), dtype="auto")
    model = shared.load_model(how)
    if config.to == "peft":
        stored = None if config.dtype == "auto" else config.dtype
        done = export_peft(
            delta, config.out, model, rank=config.rank, dtype=stored, force=config.force
        )
        say(f"LoRA adapter of rank {done.rank} written to {done.path}")
        for name, error in done.errors.items():
            if error:
                say(f"  {name}: {error:.2%} of the change is left out by the rank")
        return 0
    # Worked with in a format that holds all of it, and rounded once, when it is written.
    needed = whole_dtype(model, config.dtype)
    if model.dtype != needed:
        del model
        dtype: Any = str(needed).removeprefix("torch.")
        model = shared.load_model(replace(how, dtype=dtype))
    path = export_merged(model, delta, config.out, dtype=config.dtype, force=config.force)
    say(f"Merged checkpoint written to {path}")
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
