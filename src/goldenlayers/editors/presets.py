"""Published settings per model, by name, and the check that a model is the one they are for.

Sources: the hyper-parameter files released with ROME (arXiv 2202.05262; FT-L's stand beside it),
MEMIT (arXiv 2210.07229), PMET (arXiv 2308.08742) and AlphaEdit (arXiv 2410.02355), and for EMMET
and for Llama 2 those of EasyEdit. ``layer`` is the single published layer, or the last of the
published range.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from goldenlayers.editors.base import Editor
from goldenlayers.editors.finetune import FtL
from goldenlayers.editors.memit import AlphaEdit, Emmet, Memit, Pmet
from goldenlayers.editors.rome import Rome
from goldenlayers.errors import UserError, near_matches

if TYPE_CHECKING:
    from goldenlayers.models.model import Model


@dataclass(frozen=True)
class Preset:
    """An editor with the settings published for one model, and the published layer.

    ``shape`` tells which model: layers, width, MLP width and vocabulary.
    """

    editor: Editor
    layer: int
    shape: tuple[int, int, int, int]


_GPT2_XL = (48, 1600, 6400, 50257)
_GPT_J = (28, 4096, 16384, 50400)
_LLAMA_2_7B = (32, 4096, 11008, 32000)
_LLAMA_3_8B = (32, 4096, 14336, 128256)

_ROME: dict[str, Any] = {"lr": 0.5, "lr_absolute": True, "prefixes": 20}
_SPREAD: dict[str, Any] = {
    "lr": 0.5,
    "lr_absolute": True,
    "weight_decay": 0.5,
    "block_norm": True,
    "prefix_tokens": 10,
    "clamp": 0.75,
    "layers_before": 4,
}
_MEMIT = {**_SPREAD, "memit_lambda": 15000.0, "memit_lambda_absolute": True}
_FT_L: dict[str, Any] = {
    "ft_lr": 5e-4,
    "lr_absolute": True,
    "prompt_last": True,
    "stop_loss": 0.01,
}

PRESETS: dict[str, Preset] = {
    "rome/gpt2-xl": Preset(Rome(**_ROME, steps=20, weight_decay=0.5), 17, _GPT2_XL),
    "rome/gpt-j-6b": Preset(Rome(**_ROME, steps=20, weight_decay=0.5), 5, _GPT_J),
    "rome/llama-2-7b": Preset(Rome(**_ROME), 5, _LLAMA_2_7B),
    "memit/gpt2-xl": Preset(
        Memit(**{**_MEMIT, "steps": 20, "memit_lambda": 20000.0}), 17, _GPT2_XL
    ),
    "memit/gpt-j-6b": Preset(Memit(**{**_MEMIT, "layers_before": 5}), 8, _GPT_J),
    "memit/llama-2-7b": Preset(
        Memit(**{**_MEMIT, "weight_decay": 1e-3, "clamp": 4.0}), 8, _LLAMA_2_7B
    ),
    "emmet/gpt2-xl": Preset(Emmet(**_SPREAD, steps=20, emmet_lambda=0.1), 17, _GPT2_XL),
    "pmet/gpt-j-6b": Preset(
        Pmet(
            **{
                **_MEMIT,
                "steps": 30,
                "lr": 0.2,
                "kl_factor": 1.0,
                "block_norm": False,
                "layers_before": 5,
                "memit_lambda": 6000.0,
            }
        ),
        8,
        _GPT_J,
    ),
    "alphaedit/llama-3-8b": Preset(
        AlphaEdit(
            **{**_SPREAD, "lr": 0.1},
            null_space=0.02,
            null_space_absolute=True,
            l2=10.0,
            l2_absolute=True,
        ),
        8,
        _LLAMA_3_8B,
    ),
    "ft-l/gpt2-xl": Preset(FtL(**_FT_L, epsilon=5e-4), 0, _GPT2_XL),
    "ft-l/gpt-j-6b": Preset(FtL(**_FT_L, epsilon=5e-5), 0, _GPT_J),
}


def preset(name: str, model: Model) -> Preset:
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
    return found


def _said(shape: tuple[int, int, int, int]) -> str:
    n_layers, d_model, d_mlp, vocabulary = shape
    return f"{n_layers} layers, width {d_model}, MLP width {d_mlp}, vocabulary {vocabulary}"
