"""Key statistics on disk: one folder per (weights, text, settings), one file per layer.

Layout of a folder: ``manifest.json``, ``layer-007.safetensors`` (C in float32, so that a solve in
float64 with a ridge of 1 % of the mean diagonal loses nothing; a ridge of 0 would want more), and
while collecting ``checkpoint/``, the float64 sums so far. Files are written as ``.part`` and
renamed; the manifest comes last, so what it lists is whole.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
import uuid
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from goldenlayers.models.cache import models_root, sha256_file
from goldenlayers.shown import shown

if TYPE_CHECKING:
    from goldenlayers.models.model import Model
    from goldenlayers.statistics.moments import MomentSums

FORMAT = 1  # raise it when the same settings would now give other statistics
MANIFEST = "manifest.json"
CHECKPOINT = "checkpoint"
_TENSOR = "second_moment"
_STALE_SECONDS = 24 * 3600


@dataclass
class Manifest:
    """What a folder holds. ``settings`` repeats everything that its name is a hash of.

    ``layers``: layer → {"path", "sha256", "error"}.
    """

    settings: dict[str, Any]
    n_tokens: int
    n_rows: int
    settled: bool
    source: str
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)


class StatisticsCache:
    """The cached statistics of one model, text and settings.

    Args:
        settings: JSON values; statistics with any other settings are never read.
        cache_dir: as for loading models.
    """

    def __init__(self, settings: Mapping[str, Any], cache_dir: str | Path | None = None) -> None:
        text = json.dumps(settings, sort_keys=True)
        self.settings: dict[str, Any] = json.loads(text)
        self.key = hashlib.sha256(text.encode()).hexdigest()
        self.folder = models_root(cache_dir).parent / "statistics" / self.key[:32]

    def manifest(self) -> Manifest | None:
        """The folder's manifest; None if it has none for exactly these settings."""
        try:
            raw = json.loads((self.folder / MANIFEST).read_text(encoding="utf-8"))
            manifest = Manifest(**raw)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError):
            self._say("the manifest is not readable")
            return None
        return manifest if manifest.settings == self.settings else None

    def whole_layers(self, model: Model, layers: Sequence[int]) -> list[int]:
        """Those of ``layers`` whose files are there, of this down projection, and undamaged."""
        manifest = self.manifest()
        found: list[int] = []
        for layer in layers if manifest is not None else ():
            record = manifest.layers.get(str(layer)) if manifest is not None else None
            if record is None or record.get("path") != model.layers[layer].down.path:
                continue
            path = self.path(layer)
            if not path.is_file() or sha256_file(path) != record.get("sha256"):
                self._say(f"{path.name} is missing or damaged")
                continue
            found.append(layer)
        return found

    def path(self, layer: int) -> Path:
        """The file of a layer."""
        return self.folder / f"layer-{layer:03d}.safetensors"

    def read(self, layer: int) -> Tensor:
        """C of a layer, (F, F) float32, memory-mapped."""
        with safe_open(self.path(layer), framework="pt") as file:
            return file.get_tensor(_TENSOR)

    def write(self, model: Model, sums: MomentSums, *, settled: bool, source: str) -> Manifest:
        """Store the means of ``sums``, beside the layers that are there already."""
        self.folder.mkdir(parents=True, exist_ok=True)
        before = self.manifest()
        same = before is not None and before.n_rows == sums.n_rows
        manifest = Manifest(
            self.settings, sums.n_tokens, sums.n_rows, settled, source,
            dict(before.layers) if before is not None and same else {},
        )  # fmt: skip
        for layer in sums.layers:
            path = self.path(layer)
            _replace(path, {_TENSOR: sums.mean(layer).float()})
            manifest.layers[str(layer)] = {
                "path": model.layers[layer].down.path,
                "sha256": sha256_file(path),
                "error": sums.error(layer),
            }
        part = self.folder / f"{MANIFEST}.{uuid.uuid4().hex}.part"
        part.write_text(json.dumps(asdict(manifest), indent=1), encoding="utf-8")
        part.replace(self.folder / MANIFEST)
        shutil.rmtree(self.folder / CHECKPOINT, ignore_errors=True)
        self._sweep()
        return manifest

    def _sweep(self) -> None:
        """Remove what killed passes left, but nothing that another process may be writing."""
        for path in self.folder.glob("*.part"):
            if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)

    def save_checkpoint(self, sums: MomentSums, stop_rows: int) -> None:
        """Keep the sums between two batches, so that a killed pass can go on from here.

        Raises:
            OSError, SafetensorError: the disk is full or not writable.
        """
        part = self.folder / f"{CHECKPOINT}.{uuid.uuid4().hex}.part"
        try:
            self._write_checkpoint(part, sums, stop_rows)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
        final = self.folder / CHECKPOINT
        old = self.folder / f"{CHECKPOINT}.{uuid.uuid4().hex}.part"
        try:
            # A kill between the two renames costs the checkpoint, never gives a wrong one.
            if final.exists():
                final.replace(old)
            part.replace(final)
        except OSError:  # another process collects the same statistics and was quicker
            shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)

    def _write_checkpoint(self, part: Path, sums: MomentSums, stop_rows: int) -> None:
        part.mkdir(parents=True)
        for layer, mine in sums.layers.items():
            tensors = {"total": mine.total, "sketch": mine.sketch}
            save_file(tensors, part / f"{layer}.safetensors")
        state = {
            "settings": self.settings,
            "stop_rows": stop_rows,
            "n_tokens": sums.n_tokens,
            "n_rows": sums.n_rows,
            "squares": {str(layer): mine.squares for layer, mine in sums.layers.items()},
            "sizes": {p.name: p.stat().st_size for p in part.iterdir()},
        }
        (part / "state.json").write_text(json.dumps(state), encoding="utf-8")

    def load_checkpoint(self, sums: MomentSums, stop_rows: int) -> bool:
        """Put a checkpoint of the same pass into empty ``sums``; False if there is none."""
        folder = self.folder / CHECKPOINT
        try:
            state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return False
        except (OSError, ValueError):
            self._say("the checkpoint is not readable")
            return False
        same = (
            state.get("settings") == self.settings
            and state.get("stop_rows") == stop_rows
            and set(state.get("squares", ())) == {str(layer) for layer in sums.layers}
        )
        if not same:
            return False
        try:
            loaded: dict[int, dict[str, Tensor]] = {}
            for name, size in state["sizes"].items():
                if (folder / name).stat().st_size != size:
                    raise OSError(f"{name} is cut short")
            for layer, mine in sums.layers.items():
                with safe_open(folder / f"{layer}.safetensors", framework="pt") as file:
                    loaded[layer] = {name: file.get_tensor(name) for name in ("total", "sketch")}
                if loaded[layer]["total"].shape != mine.total.shape:
                    raise OSError("another width")
        except (OSError, SafetensorError):
            self._say("the checkpoint is damaged")
            return False
        for layer, mine in sums.layers.items():
            mine.total.copy_(loaded[layer]["total"])
            mine.sketch.copy_(loaded[layer]["sketch"])
            mine.squares = float(state["squares"][str(layer)])
        sums.n_tokens, sums.n_rows = int(state["n_tokens"]), int(state["n_rows"])
        return True

    def _say(self, problem: str) -> None:
        warnings.warn(
            shown(
                f"cached key statistics in {self.folder.name}: {problem}; they are collected again"
            ),
            stacklevel=3,
        )


def _replace(path: Path, tensors: dict[str, Tensor]) -> None:
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    try:
        save_file(tensors, part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def model_settings(model: Model) -> dict[str, Any]:
    """What tells a model's keys apart: weights as they are now, configuration, tokenizer, type."""
    return {
        "weights": model.fingerprint(),
        "bits": _bit_sums(model),
        "config": _hash(_stable(model.config.to_dict())),
        "tokenizer": _tokenizer_hash(model.tokenizer),
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def _bit_sums(model: Model) -> str:
    """A hash over each parameter's bits added up as integers, taken anew at every call.

    The fingerprint stands for the model as loaded and rounds to bfloat16; this tells an edit that
    is applied at the moment, however small. Integer sums are the same in any order.
    """
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = [
        (name, int(p.detach().view(integers[p.element_size()]).sum(dtype=torch.int64)))
        for name, p in sorted(model.hf.named_parameters())
    ]
    return _hash(sums)


# Where a model was loaded from and by which version says nothing about what it computes.
_VOLATILE = frozenset({"_name_or_path", "name_or_path", "dtype", "torch_dtype"})
_VOLATILE_ENDS = ("_version", "_attn_implementation", "architectures")


def _stable(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            str(k): _stable(v)
            for k, v in value.items()
            if k not in _VOLATILE and not str(k).endswith(_VOLATILE_ENDS)
        }
    return [_stable(v) for v in value] if isinstance(value, list | tuple) else value


def _hash(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _tokenizer_hash(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else type(tokenizer).__name__
    return _hash([rules, sorted(tokenizer.get_vocab().items()), tokenizer.special_tokens_map])


def in_memory(sums: MomentSums) -> dict[int, Tensor]:
    """The same values as the cache would hold, without a cache."""
    return {layer: sums.mean(layer).to(torch.float32) for layer in sums.layers}
