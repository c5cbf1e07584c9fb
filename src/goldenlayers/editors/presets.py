"""Published settings per model, by name, and the check that a model is the one they are for.

Sources: the hyper-parameter files released with ROME (arXiv 2202.05262; FT-L's stand beside it),
MEMIT (arXiv 2210.07229), PMET (arXiv 2308.08742) and AlphaEdit (arXiv 2410.02355), and for EMMET
and for Llama 2 those of EasyEdit. ``layer`` is the single published layer, or the last of the
published range.
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
    """Settings published for one method on one model.

    ``shape`` tells which model: layers, width, MLP width and vocabulary.
    """

    method: str
    layer: int
    shape: tuple[int, int, int, int]
    settings: dict[str, float | int | bool] = field(default_factory=dict)


_GPT2_XL = (48, 1600, 6400, 50257)
_GPT_J = (28, 4096, 16384, 50400)
_LLAMA_2_7B = (32, 4096, 11008, 32000)
_LLAMA_3_8B = (32, 4096, 14336, 128256)

_ROME = {"lr": 0.5, "lr_absolute": True, "kl_factor": 0.0625, "clamp": 4.0, "prefixes": 20}
_MEMIT = {
    "memit_lambda": 15000.0,
    "memit_lambda_absolute": True,
    "lr": 0.5,
    "lr_absolute": True,
    "kl_factor": 0.0625,
    "weight_decay": 0.5,
    "block_norm": True,
    "prefixes": 5,
    "prefix_tokens": 10,
}
_FT_L = {"steps": 25, "ft_lr": 5e-4, "lr_absolute": True, "prompt_last": True, "stop_loss": 0.01}

PRESETS: dict[str, Preset] = {
    "rome/gpt2-xl": Preset("rome", 17, _GPT2_XL, {**_ROME, "steps": 20, "weight_decay": 0.5}),
    "rome/gpt-j-6b": Preset("rome", 5, _GPT_J, {**_ROME, "steps": 20, "weight_decay": 0.5}),
    "rome/llama-2-7b": Preset("rome", 5, _LLAMA_2_7B, {**_ROME, "steps": 25, "weight_decay": 1e-3}),
    "memit/gpt2-xl": Preset(
        "memit",
        17,
        _GPT2_XL,
        {**_MEMIT, "steps": 20, "clamp": 0.75, "layers_before": 4, "memit_lambda": 20000.0},
    ),
    "memit/gpt-j-6b": Preset(
        "memit",
        8,
        _GPT_J,
        {**_MEMIT, "steps": 25, "clamp": 0.75, "layers_before": 5, "memit_lambda": 15000.0},
    ),
    "memit/llama-2-7b": Preset(
        "memit",
        8,
        _LLAMA_2_7B,
        {**_MEMIT, "steps": 25, "weight_decay": 1e-3, "clamp": 4.0, "layers_before": 4},
    ),
    "emmet/gpt2-xl": Preset(
        "emmet",
        17,
        _GPT2_XL,
        {**_MEMIT, "steps": 20, "clamp": 0.75, "layers_before": 4, "emmet_lambda": 0.1},
    ),
    "pmet/gpt-j-6b": Preset(
        "pmet",
        8,
        _GPT_J,
        {
            **_MEMIT,
            "steps": 30,
            "lr": 0.2,
            "clamp": 0.75,
            "kl_factor": 1.0,
            "block_norm": False,
            "layers_before": 5,
            "memit_lambda": 6000.0,
        },
    ),
    "alphaedit/llama-3-8b": Preset(
        "alphaedit",
        8,
        _LLAMA_3_8B,
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
    "ft-l/gpt2-xl": Preset("ft-l", 0, _GPT2_XL, {**_FT_L, "epsilon": 5e-4}),
    "ft-l/gpt-j-6b": Preset("ft-l", 0, _GPT_J, {**_FT_L, "epsilon": 5e-5}),
}


def preset(name: str, model: Model) -> tuple[Preset, EditSettings]:
    """A published preset, checked against the model it is to be used on.

    Raises:
        UserError: unknown preset, or one for a model of another shape.
    """
    if name not in PRESETS:
        raise UserError(f"unknown preset '{name}'", fix=near_matches(name, PRESETS))
    found = PRESETS[name]
    layers = model.layers
    have = (len(layers), layers.d_model, layers.d_mlp, layers.vocab_size)
    if have != found.shape:
        raise UserError(
            f"preset '{name}' is for a model of {_said(found.shape)}; '{model.name}' has "
            f"{_said(have)}",
            fix="Leave the preset out: the defaults scale with the model's own norms",
        )
    return found, EditSettings().replace(**found.settings)


def _said(shape: tuple[int, int, int, int]) -> str:
    n_layers, d_model, d_mlp, vocabulary = shape
    return f"{n_layers} layers, width {d_model}, MLP width {d_mlp}, vocabulary {vocabulary}"
