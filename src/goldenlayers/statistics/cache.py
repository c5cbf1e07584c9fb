"""Key statistics on disk: one folder per (weights, text, settings), one file per layer.

Layout of a folder: ``manifest.json``, ``layer-007.safetensors`` (C in float32, so that a solve in
float64 with a ridge of 1 % of the mean diagonal loses nothing; a ridge of 0 would want more), and
while collecting ``checkpoint/``, the float64 sums so far. Files are written as ``.part`` and
renamed; the manifest comes last, so what it lists is whole.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
import uuid
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from goldenlayers.durable import discard, in_place_of, read_text_file
from goldenlayers.errors import UserError
from goldenlayers.models.cache import has_sha256, models_root, sha256_file
from goldenlayers.models.offload import named_values
from goldenlayers.records import entry, json_text, made, parse_json, plain, short
from goldenlayers.shown import shown

if TYPE_CHECKING:
    from goldenlayers.models import Model
    from goldenlayers.statistics.sums import MomentSums

FORMAT = 1  # raise it when the same settings would now give other statistics
MANIFEST = "manifest.json"
CHECKPOINT, STATE = "checkpoint", "state.json"
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
    layers: dict[str, dict[str, Any]]

    @classmethod
    def of(cls, model: Model, sums: MomentSums, *, settled: bool, source: str) -> Manifest:
        """What ``sums`` give, before they are stored under any settings."""
        layers = {
            str(layer): {"path": model.layers[layer].down.path, "error": sums.error(layer)}
            for layer in sums.layers
        }
        return cls({}, sums.n_tokens, sums.n_rows, settled, source, layers)


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
        self._said: set[str] = set()

    def manifest(self) -> Manifest | None:
        """The folder's manifest; None if it has none for exactly these settings."""
        path = self.folder / MANIFEST
        if not path.exists():
            return None
        try:
            manifest = _manifest(_sealed(path))
        except UserError as error:
            self._say(f"the manifest is damaged ({error.found})")
            return None
        return manifest if manifest.settings == self.settings else None

    def whole_layers(self, model: Model, layers: Sequence[int]) -> list[int]:
        """Those of ``layers`` whose files are there, of this down projection, and undamaged."""
        manifest = self.manifest()
        records = manifest.layers if manifest is not None else {}
        found: list[int] = []
        for layer in layers:
            record, down = records.get(str(layer)), model.layers[layer].down
            if record is None or record["path"] != down.path:
                continue
            if fault := _fault(self.path(layer), record["sha256"], down.in_features):
                self._say(f"{self.path(layer).name} {fault}")
            else:
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
        """Store the means of ``sums``, beside the layers that are there already.

        Raises:
            UserError: the disk is full or not writable.
        """
        manifest = Manifest.of(model, sums, settled=settled, source=source)
        manifest.settings = self.settings
        before = self.manifest()
        if before is not None and before.n_rows == sums.n_rows:
            manifest.layers = before.layers | manifest.layers
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for layer in sums.layers:
                path = self.path(layer)
                with in_place_of(path) as part:
                    save_file({_TENSOR: sums.mean(layer).float()}, part)
                manifest.layers[str(layer)]["sha256"] = sha256_file(path)
            with in_place_of(self.folder / MANIFEST) as part:
                part.write_text(_seal(asdict(manifest)), encoding="utf-8")
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"the key statistics could not be written to '{self.folder}' ({error})",
                fix="Make room there, name another cache folder, or go without a cache",
            ) from error
        shutil.rmtree(self.folder / CHECKPOINT, ignore_errors=True)
        self._sweep()
        return manifest

    def _sweep(self) -> None:
        """Remove what killed passes left, but nothing that another process may be writing."""
        for path in self.folder.glob("*.part"):
            if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                discard(path)

    def save_checkpoint(self, sums: MomentSums, stop_rows: int) -> None:
        """Keep the sums between two batches, so that a killed pass can go on from here.

        Raises:
            OSError, SafetensorError: the disk is full or not writable.
        """
        final = self.folder / CHECKPOINT
        part, old = (self.folder / f"{CHECKPOINT}~{uuid.uuid4().hex}.part" for _ in range(2))
        try:
            self._write_checkpoint(part, sums, stop_rows)
            with suppress(OSError):  # another process collects the same statistics and was quicker
                # A kill between the two renames costs the checkpoint, never gives a wrong one.
                if final.exists():
                    final.replace(old)
                part.replace(final)
        finally:
            discard(part)
            discard(old)

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
            "files": {str(n): sha256_file(part / f"{n}.safetensors") for n in sums.layers},
        }
        (part / STATE).write_text(_seal(state), encoding="utf-8")

    def load_checkpoint(self, sums: MomentSums, stop_rows: int) -> bool:
        """Put a checkpoint of the same pass into empty ``sums``; False if there is none."""
        folder = self.folder / CHECKPOINT
        if not (folder / STATE).exists():
            return False
        names = {str(layer) for layer in sums.layers}
        loaded: dict[int, dict[str, Tensor]] = {}
        try:
            state = _sealed(folder / STATE)
            squares = entry(state, "squares", dict[str, float], STATE)
            files = entry(state, "files", dict[str, str], STATE)
            n_tokens, n_rows = (entry(state, name, int, STATE) for name in ("n_tokens", "n_rows"))
            same = state.get("settings") == self.settings and state.get("stop_rows") == stop_rows
            if not same or set(squares) != names:
                return False
            for layer, mine in sums.layers.items():
                path = folder / f"{layer}.safetensors"
                if sha256_file(path) != files.get(str(layer)):
                    raise UserError(f"{path.name} has changed")
                with safe_open(path, framework="pt") as file:
                    loaded[layer] = {name: file.get_tensor(name) for name in ("total", "sketch")}
                for name, value in loaded[layer].items():
                    wanted = getattr(mine, name)
                    if (value.shape, value.dtype) != (wanted.shape, wanted.dtype):
                        raise UserError(f"{path.name} is of another shape or type")
        except (UserError, OSError, SafetensorError) as error:
            self._say(f"the checkpoint is damaged ({getattr(error, 'found', error)})")
            return False
        for layer, mine in sums.layers.items():
            mine.total.copy_(loaded[layer]["total"])
            mine.sketch.copy_(loaded[layer]["sketch"])
            mine.squares = squares[str(layer)]
        sums.n_tokens, sums.n_rows = n_tokens, n_rows
        return True

    def _say(self, problem: str) -> None:
        if problem not in self._said:
            self._said.add(problem)
            said = f"cached key statistics in {self.folder.name}: {problem}"
            warnings.warn(shown(f"{said}; they are collected again"), stacklevel=3)


def _seal(record: Mapping[str, Any]) -> str:
    """A record as JSON, with a hash of all that it says."""
    said = plain(record)
    return json_text({**said, "sha256": _hash(said)}, indent=1)


def _sealed(path: Path) -> dict[str, Any]:
    """The record that :func:`_seal` made.

    Raises:
        UserError: it cannot be read, or has changed.
    """
    record = parse_json(read_text_file(path), path.name)
    sha256 = record.pop("sha256", None) if isinstance(record, dict) else None
    if sha256 is None or sha256 != _hash(record):
        raise UserError(f"{path.name} is not what was written")
    return record


def _manifest(record: Mapping[str, Any]) -> Manifest:
    """The manifest in a record, its fields held to their types.

    Raises:
        UserError: a field is missing, or something else than it should be.
    """
    manifest = made(Manifest, record, MANIFEST)
    if manifest.n_tokens < 1 or manifest.n_rows < 1:
        raise UserError(f"{MANIFEST} counts no tokens")
    for layer, about in manifest.layers.items():
        where = f"layer {short(layer)} of {MANIFEST}"
        for name in ("path", "sha256"):
            entry(about, name, str, where)
        # JSON has no infinity, which stands for an error that is not known.
        about["error"] = entry(about, "error", float, where, math.inf)
    return manifest


def _fault(path: Path, sha256: str, width: int) -> str | None:
    """What is wrong with a layer's file, or None."""
    try:
        if not path.is_file():
            return "is missing"
        if not has_sha256(path, sha256):
            return "is damaged"
        with safe_open(path, framework="pt") as file:
            moment = file.get_tensor(_TENSOR)
    except (OSError, SafetensorError) as error:
        return f"cannot be read ({error})"
    if moment.dtype != torch.float32 or moment.shape != (width, width):
        return f"holds {tuple(moment.shape)} values of {moment.dtype}, not a second moment"
    # NaN equals nothing, and a second moment its transpose.
    if not torch.equal(moment, moment.T) or not torch.isfinite(moment).all():
        return "is not symmetric, or not finite"
    return None if (moment.diagonal() >= 0).all() else "has a negative diagonal"


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
        (
            name,
            int(values.contiguous().view(integers[values.element_size()]).sum(dtype=torch.int64)),
        )
        for name, values in named_values(model.hf)
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
