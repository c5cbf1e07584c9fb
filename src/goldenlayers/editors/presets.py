"""Published settings per model, by name, and the check that a model is the one they are for.

Sources: the hyper-parameter files released with ROME (arXiv 2202.05262), MEMIT (arXiv 2210.07229)
and AlphaEdit (arXiv 2410.02355), and for Llama 2 those of EasyEdit. ``layer`` is the single
published layer, or the last of the published range.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from goldenlayers.editors.settings import EditSettings
from goldenlayers.errors import UserError, near_matches

if TYPE_CHECKING:
    from goldenlayers.models.model import Model


@dataclass(frozen=True)
class Preset:
    """Settings published for one method on one model: its depth and width tell which model."""

    method: str
    layer: int
    n_layers: int
    d_model: int
    settings: dict[str, float | int | bool] = field(default_factory=dict)


_ROME = {"lr": 0.5, "lr_absolute": True, "kl_factor": 0.0625, "clamp": 4.0, "prefixes": 20}
_MEMIT = {
    "memit_lambda": 15000.0,
    "memit_lambda_absolute": True,
    "lr": 0.5,
    "lr_absolute": True,
    "kl_factor": 0.0625,
    "weight_decay": 0.5,
    "prefixes": 5,
}

PRESETS: dict[str, Preset] = {
    "rome/gpt2-xl": Preset("rome", 17, 48, 1600, {**_ROME, "steps": 20, "weight_decay": 0.5}),
    "rome/gpt-j-6b": Preset("rome", 5, 28, 4096, {**_ROME, "steps": 20, "weight_decay": 0.5}),
    "rome/llama-2-7b": Preset("rome", 5, 32, 4096, {**_ROME, "steps": 25, "weight_decay": 1e-3}),
    "memit/gpt2-xl": Preset(
        "memit",
        17,
        48,
        1600,
        {**_MEMIT, "steps": 20, "clamp": 0.75, "layers_before": 4, "memit_lambda": 20000.0},
    ),
    "memit/gpt-j-6b": Preset(
        "memit",
        8,
        28,
        4096,
        {**_MEMIT, "steps": 25, "clamp": 0.75, "layers_before": 5, "memit_lambda": 15000.0},
    ),
    "memit/llama-2-7b": Preset(
        "memit",
        8,
        32,
        4096,
        {**_MEMIT, "steps": 25, "weight_decay": 1e-3, "clamp": 4.0, "layers_before": 4},
    ),
    "alphaedit/llama-3-8b": Preset(
        "alphaedit",
        8,
        32,
        4096,
        {
            **_MEMIT,
            "lr": 0.1,
            "steps": 25,
            "clamp": 0.75,
            "layers_before": 4,
            "null_space": 0.02,
            "null_space_absolute": True,
            "l2": 10.0,
            "l2_absolute": True,
        },
    ),
}


def preset(name: str, model: Model) -> tuple[Preset, EditSettings]:
    """A published preset, checked against the model it is to be used on.

    Raises:
        UserError: unknown preset, or one for a model of another depth or width.
    """
    if name not in PRESETS:
        raise UserError(f"unknown preset '{name}'", fix=near_matches(name, PRESETS))
    found = PRESETS[name]
    have = (len(model.layers), model.layers.d_model)
    if have != (found.n_layers, found.d_model):
        raise UserError(
            f"preset '{name}' is for a model of {found.n_layers} layers and width {found.d_model}; "
            f"'{model.name}' has {have[0]} layers and width {have[1]}",
            fix="Leave the preset out: the defaults scale with the model's own norms",
        )
    return found, EditSettings().replace(**found.settings)
