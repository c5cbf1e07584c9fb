"""An edit for llama.cpp (and Ollama): a LoRA adapter beside a GGUF model, or a GGUF file with the
edit in it.

llama.cpp adds (alpha / R) · B A to a matrix of the model, where A is the adapter's tensor
``NAME.lora_a`` (R, in) and B ``NAME.lora_b`` (out, R); with alpha = R the factor is 1. GGUF counts
dimensions from the fastest, so that A's are (in, R) there. Source: llama.cpp, ``llama-adapter.cpp``
and ``convert_lora_to_gguf.py``.

Shapes: R rank.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import goldenlayers
from goldenlayers.delta import WeightDelta
from goldenlayers.delta.factors import hf_of
from goldenlayers.delta.targets import Target, find_targets
from goldenlayers.errors import UserError
from goldenlayers.export.card import base_of
from goldenlayers.export.factors import cast, factors_of
from goldenlayers.export.places import GGUF_MARK, new_file
from goldenlayers.models.gguf import GgufHeader, read_header
from goldenlayers.models.loading import told
from goldenlayers.shown import shown

if TYPE_CHECKING:
    from goldenlayers.models import Model

# transformers' model types → llama.cpp's architectures: those whose converter
# (convert_hf_to_gguf.py) leaves the matrices of _AS_THEY_ARE as they are.
_ARCHITECTURES = {
    "bloom": "bloom",
    "cohere": "command-r",
    "cohere2": "cohere2",
    "falcon": "falcon",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3": "gemma3",
    "gemma3_text": "gemma3",
    "glm4": "glm4",
    "gpt2": "gpt2",
    "gpt_neox": "gptneox",
    "granite": "granite",
    "llama": "llama",
    "mistral": "llama",
    "mpt": "mpt",
    "nemotron": "nemotron",
    "olmo": "olmo",
    "olmo2": "olmo2",
    "phi": "phi2",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "smollm3": "smollm3",
    "stablelm": "stablelm",
    "starcoder2": "starcoder2",
}
_AS_THEY_ARE = ("ffn_down", "ffn_up", "ffn_gate", "attn_output", "attn_v")
_MERGED_INSTEAD = (
    "Otherwise export the merged checkpoint (--to merged), and convert that with llama.cpp's "
    "convert_hf_to_gguf.py"
)
_DTYPES = ("float32", "float16")
_MOST_LAYERS = 1024  # that a file can make us name tensors for


@dataclass(frozen=True)
class GgufExport:
    """A written adapter: its file, its rank, llama.cpp's names of the matrices, and what
    truncation cost (relative Frobenius errors by parameter name).
    """

    path: Path
    rank: int
    tensors: tuple[str, ...]
    errors: dict[str, float]


def export_gguf(
    delta: WeightDelta,
    out_file: str | Path,
    model: Model,
    *,
    rank: int | None = None,
    dtype: str | None = None,
    force: bool = False,
    overwrite: bool = False,
) -> GgufExport:
    """Write ``delta`` as a LoRA adapter that llama.cpp loads beside the model (``--lora FILE``).

    Where the model was loaded from a GGUF file, each changed matrix is compared with the file's
    tensor, so that one that llama.cpp keeps in another order is refused and not written wrongly.

    Args:
        delta: the change to write.
        out_file: a file ``NAME.gguf`` that does not exist yet.
        model: the base.
        rank: cut changes to this rank whatever it costs.
        dtype: "float32" or "float16" to store the factors in; None: float32.
        force: as for ``WeightDelta.applied``.
        overwrite: replace an earlier adapter that an export wrote.

    Raises:
        UserError: the file exists, the delta is empty or does not belong to the model, a dense
            change has no exact form of lower rank, or llama.cpp has no such model or matrix.
    """
    from gguf import GGUFType, GGUFWriter, Keys

    wanted: torch.dtype = getattr(torch, _dtype_name(dtype))
    delta.check(model, force=force)
    targets = find_targets(hf_of(model), delta.changes)
    architecture, names = _names(model, targets)
    pairs, common, errors = factors_of(delta.changes, rank)
    tensors: dict[str, Tensor] = {}
    for name, (right, left) in pairs.items():
        tensors[f"{names[name]}.lora_a"] = right  # (R, in)
        tensors[f"{names[name]}.lora_b"] = left  # (out, R)
    tensors = cast(tensors, dict.fromkeys(tensors, wanted))
    out = Path(out_file)
    with new_file(out, overwrite=overwrite) as part:
        writer = GGUFWriter(str(part), architecture)
        writer.add_type(GGUFType.ADAPTER)
        writer.add_string(Keys.Adapter.TYPE, "lora")
        writer.add_float32(Keys.Adapter.LORA_ALPHA, float(common))
        for key, value in _about(delta, model).items():
            writer.add_string(key, value)
        for name, tensor in tensors.items():
            writer.add_tensor(name, tensor.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return GgufExport(out, common, tuple(names[name] for name in pairs), errors)


def export_gguf_merged(
    model: Model, delta: WeightDelta, out_file: str | Path, *, force: bool = False
) -> Path:
    """Write the GGUF file that ``model`` was loaded from with the edit in it.

    Of the file's bytes only those of the edited tensors change: W + ΔW, summed in float32 and
    rounded once to the tensor's own format, which is float32, float16 or bfloat16.

    Raises:
        UserError: the model is of no GGUF file, an edited tensor is quantised, the file exists, or
            the delta does not fit the model.
    """
    formats = mergeable(model.name, delta)
    base = _gguf_file(model.name)
    assert base is not None  # or refused by now
    delta.check(model, force=force)
    _, names = _names(model, find_targets(hf_of(model), delta.changes))
    header = read_header(base)
    sums = {
        names[name]: _tensor(base, header, names[name]) + change.dense.cpu().float()
        for name, change in delta.changes.items()
    }
    with new_file(Path(out_file)) as part:
        shutil.copyfile(base, part)
        with part.open("r+b") as file:
            for name, tensor in cast(sums, formats).items():
                file.seek(header.start + header.tensors[name].offset)
                file.write(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return Path(out_file)


def mergeable(name: str, delta: WeightDelta) -> dict[str, torch.dtype]:
    """Number formats of the tensors of a GGUF file that ``delta`` can be merged into, by name.

    Raises:
        UserError: ``name`` is no GGUF file, or an edited tensor in it is missing or quantised.
    """
    from gguf import GGMLQuantizationType

    base = _gguf_file(name)
    if base is None:
        raise UserError(
            f"'{name}' is no GGUF file, so there is none to write the edit into",
            expected="the .gguf file that the edit was made on (--model FILE.gguf)",
            fix="Export an adapter (--to gguf): it goes beside any GGUF file of the model",
        )
    header = read_header(base)
    plain = {
        GGMLQuantizationType.F32: torch.float32,
        GGMLQuantizationType.F16: torch.float16,
        GGMLQuantizationType.BF16: torch.bfloat16,
    }
    formats: dict[str, torch.dtype] = {}
    layers = min(len(header.tensors), _MOST_LAYERS)
    for theirs in _mapped(delta.changes, header.architecture, layers).values():
        if theirs not in header.tensors:
            raise UserError(f"{base} has no tensor '{theirs}', which the edit changes")
        kind = GGMLQuantizationType(header.tensors[theirs].kind)
        if kind not in plain:
            raise UserError(
                f"{base} stores '{theirs}' as {kind.name}: to write the edit into it, every number "
                "of the matrix would have to be rounded anew, the edit with it",
                expected="a file with F32, F16 or BF16 there",
                fix="Export an adapter (--to gguf): it goes beside the file as it is",
            )
        formats[theirs] = plain[kind]
    return formats


def _mapped(names: Iterable[str], architecture: str, layers: int) -> dict[str, str]:
    """llama.cpp's name of each matrix, by ours.

    Raises:
        UserError: llama.cpp has no such architecture, or no such matrix.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    known = {name: arch for arch, name in MODEL_ARCH_NAMES.items()}
    if architecture not in known:
        raise UserError(
            f"the package gguf knows no architecture '{architecture}'", fix=_MERGED_INSTEAD
        )
    table = get_tensor_name_map(known[architecture], layers)
    found = {}
    for name in names:
        plain = name.removeprefix("language_model.").replace("model.language_model.", "model.", 1)
        theirs = table.get_name(plain, try_suffixes=(".weight",))
        if theirs is None:
            raise UserError(
                f"llama.cpp has no tensor for '{name}' in its architecture '{architecture}'",
                fix=_MERGED_INSTEAD,
            )
        found[name] = theirs
    return found


def _names(model: Model, targets: Mapping[str, Target]) -> tuple[str, dict[str, str]]:
    """llama.cpp's name of the architecture, and of each matrix.

    Raises:
        UserError: it has none, or keeps the matrix in another form.
    """
    config: Any = model.hf.config
    base, family = _gguf_file(model.name), str(config.model_type)
    header = read_header(base) if base is not None else None
    architecture = header.architecture if header is not None else _ARCHITECTURES.get(family)
    if architecture is None:
        raise UserError(
            f"no llama.cpp architecture is known here for models of the kind '{family}'",
            expected="one of " + ", ".join(_ARCHITECTURES),
            fix=_MERGED_INSTEAD,
        )
    names = _mapped(targets, architecture, len(model.layers))
    for name, theirs in names.items():
        if base is not None and header is not None:
            _compare(base, header, theirs, targets[name])
        elif theirs.split(".")[2] not in _AS_THEY_ARE:
            why = "fuses several matrices in it" if "qkv" in theirs else "may reorder its rows"
            raise UserError(
                f"'{name}' is '{theirs}' in llama.cpp, which {why}",
                expected="a change of " + ", ".join(_AS_THEY_ARE),
                fix="Name the model by its GGUF file (--model FILE.gguf), so that the two can be "
                f"compared. {_MERGED_INSTEAD}",
            )
    return architecture, names


def _compare(base: Path, header: GgufHeader, name: str, target: Target) -> None:
    """Refuse a matrix that the file keeps otherwise than transformers does.

    Raises:
        UserError: it is not there, or other numbers stand there.
    """
    weight = target.weight(target.now()).cpu()
    weight = weight.T if target.transposed else weight  # (out, in)
    there = header.tensors.get(name)
    if there is not None and there.dims == tuple(reversed(weight.shape)):
        stored = _tensor(base, header, name)
        if torch.equal(stored.to(weight.dtype), weight):
            return
    why = "has no such tensor" if there is None else "keeps it in another order or shape"
    raise UserError(
        f"'{target.name}' would be '{name}' in llama.cpp, and {base} {why}",
        fix=_MERGED_INSTEAD,
    )


def _tensor(path: Path, header: GgufHeader, name: str) -> Tensor:
    """A matrix (out, in) of a GGUF file, unpacked to float32."""
    import numpy as np
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    tensor = header.tensors[name]
    with path.open("rb") as file:
        file.seek(header.start + tensor.offset)
        data = np.frombuffer(file.read(tensor.size), np.uint8).reshape(tensor.dims[-1], -1)
    with told(f"the tensor '{name}' of {path} cannot be unpacked"):
        values = dequantize(data, GGMLQuantizationType(tensor.kind))
    return torch.from_numpy(np.array(values, np.float32)).reshape(tuple(reversed(tensor.dims)))


def _gguf_file(name: str) -> Path | None:
    """The GGUF file of that name; None where the model goes by another name."""
    path = Path(name)
    with contextlib.suppress(RuntimeError):  # "~name" of nobody
        path = path.expanduser()
    return path if path.suffix.lower() == ".gguf" and path.is_file() else None


def _about(delta: WeightDelta, model: Model) -> dict[str, str]:
    """Entries that say what the adapter is, for who looks into the file."""
    prompts = [f"{fact.get('prompt', '')} → {fact.get('target', '')}" for fact in delta.facts]
    layers = ", ".join(map(str, delta.layers))
    what = f"{len(prompts)} facts edited with {delta.method} at layers {layers}: "
    return {
        "general.name": shown(f"edit of {Path(model.name).name}", 200),
        "general.description": shown(what + "; ".join(prompts), 2000),
        "goldenlayers.base": shown(base_of(model), 400),
        "goldenlayers.base_fingerprint": shown(delta.base_fingerprint, 100),
        GGUF_MARK: goldenlayers.__version__,
    }


def _dtype_name(dtype: str | None) -> str:
    if dtype is not None and dtype not in _DTYPES:
        raise UserError(f"the dtype is '{dtype}'", expected=" or ".join(_DTYPES) + " for gguf")
    return dtype or "float32"
