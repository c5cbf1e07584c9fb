"""Edits for llama.cpp: the files read back by gguf, and run by llama.cpp itself where it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from deltas import of_matrices, random_delta
from families import CONFIGS, build, shared, tiny
from gguf_built import write_llama_gguf
from llama_runs import llama
from tokenizers_built import byte_level_bpe
from torch import Tensor

from goldenlayers import models
from goldenlayers.delta import Dense, WeightDelta
from goldenlayers.errors import UserError
from goldenlayers.export import export_gguf, export_gguf_merged
from goldenlayers.models import Model


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny Llama as GGUF: its matrices in float32, float16 and Q8_0."""
    folder = tmp_path_factory.mktemp("gguf")
    found = {
        name: write_llama_gguf(
            folder / f"{name}.gguf", build("llama"), byte_level_bpe(), halve=name == "half"
        )
        for name in ("whole", "half")
    }
    return found | {"cache": folder / "cache"}


def loaded(files: dict[str, Path], name: str) -> Model:
    return models.load(files[name], cache_dir=files["cache"], progress=lambda _: None)


def read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    reader = gguf.GGUFReader(path)
    values = {name: field.contents() for name, field in reader.fields.items()}
    return values, {tensor.name: np.array(tensor.data) for tensor in reader.tensors}


def change_of(tensors: dict[str, np.ndarray], name: str, alpha: float) -> Tensor:
    """(out, in): what llama.cpp adds to a matrix, alpha / R of B A."""
    a, b = (torch.from_numpy(tensors[f"{name}.lora_{part}"]).double() for part in "ab")
    return alpha / a.shape[0] * (b @ a)


def test_the_adapter_holds_the_delta_exactly(files: dict[str, Path], tmp_path: Path) -> None:
    model = loaded(files, "half")
    about: dict[str, Any] = {"base_fingerprint": model.fingerprint()}
    delta = random_delta(model.hf, [1], rank=3, method="rome", **about)
    delta = delta + random_delta(model.hf, [2], rank=1, seed=1, **about)  # padded to rank 3
    done = export_gguf(delta, tmp_path / "edit.gguf", model)
    assert done.rank == 3 and not done.errors
    assert done.tensors == ("blk.1.ffn_down.weight", "blk.2.ffn_down.weight")
    values, tensors = read(done.path)
    assert values["general.type"] == "adapter" and values["adapter.type"] == "lora"
    assert values["general.architecture"] == "llama"
    assert values["goldenlayers.base_fingerprint"] == delta.base_fingerprint
    # It is neither an edit of ours nor a model, and whoever takes it for one is told.
    with pytest.raises(UserError, match="a GGUF file, such as an adapter"):
        WeightDelta.load(done.path)
    with pytest.raises(UserError, match="is an adapter, a change of a model"):
        models.load(done.path, cache_dir=tmp_path)
    assert len(tensors) == 4
    for name, ours in zip(done.tensors, delta.changes, strict=True):
        change = delta.changes[ours]
        out_features, in_features = change.shape
        assert tensors[f"{name}.lora_a"].shape == (3, in_features)
        assert tensors[f"{name}.lora_b"].shape == (out_features, 3)
        found = change_of(tensors, name, values["adapter.lora.alpha"])
        left, right = change.left.double(), change.right.double()  # type: ignore[union-attr]
        torch.testing.assert_close(found, left @ right.T, rtol=1e-12, atol=1e-12)
        assert found.norm() > 1
    halves = export_gguf(delta, tmp_path / "half.gguf", model, dtype="float16")
    assert {t.dtype for t in read(halves.path)[1].values()} == {np.dtype(np.float16)}


@pytest.mark.parametrize("family", ["gpt2", "gemma3", "gemma3_multimodal", "qwen2", "gpt_neox"])
def test_checkpoints_of_other_families(family: str, tmp_path: Path) -> None:
    model = Model.wrap(shared(family), byte_level_bpe(), "tiny")
    delta = random_delta(model.hf, [3], rank=2)
    done = export_gguf(delta, tmp_path / "edit.gguf", model)
    values, tensors = read(done.path)
    assert done.tensors == ("blk.3.ffn_down.weight",)
    (name,) = delta.changes
    found = change_of(tensors, done.tensors[0], values["adapter.lora.alpha"])
    torch.testing.assert_close(found.float(), delta.dense(name), rtol=1e-5, atol=1e-6)


def test_every_family_is_written_or_refused(tmp_path: Path) -> None:
    refused = set()
    for family in CONFIGS:
        delta = random_delta(shared(family), [1])
        model = Model.wrap(shared(family), byte_level_bpe(), "tiny")
        try:
            done = export_gguf(delta, tmp_path / f"{family}.gguf", model)
        except UserError as error:
            assert "no llama.cpp architecture" in str(error) and "--to merged" in str(error)
            refused.add(family)
        else:
            assert done.tensors == ("blk.1.ffn_down.weight",)
    assert refused == {"gptj", "gpt_neo", "opt"}


def test_dense_changes_need_a_rank(tmp_path: Path) -> None:
    model = tiny("llama")
    name = model.layers[1].down.parameter_name
    generator = torch.Generator().manual_seed(0)
    full = WeightDelta({name: Dense(torch.randn(32, 72, generator=generator))})
    with pytest.raises(UserError, match="--rank R"):
        export_gguf(full, tmp_path / "edit.gguf", model)
    done = export_gguf(full, tmp_path / "edit.gguf", model, rank=5)
    assert done.rank == 5 and 0.1 < done.errors[name] < 1


def test_matrices_that_llama_cpp_keeps_otherwise_are_refused(
    files: dict[str, Path], tmp_path: Path
) -> None:
    model = loaded(files, "whole")
    by_name = {matrix.path.split(".")[-1]: matrix for matrix in model.layers[1].matrices("block")}
    for name in ("gate_proj", "up_proj", "down_proj", "v_proj", "o_proj"):
        export_gguf(of_matrices([by_name[name]], 1, 0), tmp_path / f"{name}.gguf", model)
    # Llama's queries and keys are stored in another order there.
    for name in ("q_proj", "k_proj"):
        with pytest.raises(UserError, match="another order"):
            export_gguf(of_matrices([by_name[name]], 1, 0), tmp_path / "new.gguf", model)
    plain = tiny("llama")
    with pytest.raises(UserError, match=r"may reorder.*--model FILE.gguf"):
        export_gguf(
            of_matrices([plain.layers[1].attention_matrices[0]], 1, 0),
            tmp_path / "new.gguf",
            plain,
        )
    fused = tiny("gpt2")
    with pytest.raises(UserError, match="fuses several"):
        export_gguf(
            of_matrices([fused.layers[1].attention_matrices[0]], 1, 0),
            tmp_path / "new.gguf",
            fused,
        )
    # A file of other weights under the name of the model.
    other = loaded(files, "whole")
    other.name = str(
        write_llama_gguf(tmp_path / "o.gguf", build("llama", seed=1), byte_level_bpe())
    )
    with pytest.raises(UserError, match="another order"):
        export_gguf(random_delta(other.hf, [1]), tmp_path / "new.gguf", other)
    assert not (tmp_path / "new.gguf").exists()


@pytest.mark.parametrize("name", ["whole", "half"])
def test_a_merged_gguf_file_differs_in_the_edited_tensor_alone(
    files: dict[str, Path], tmp_path: Path, name: str
) -> None:
    model = loaded(files, name)
    delta = random_delta(model.hf, [2], rank=2)
    out = export_gguf_merged(model, delta, tmp_path / "merged.gguf")
    before, after = read(files[name]), read(out)
    assert before[0] == after[0]
    changed = {key for key, value in before[1].items() if not np.array_equal(value, after[1][key])}
    assert changed == {"blk.2.ffn_down.weight"}
    weight = model.layers[2].down.weight + delta.dense(*delta.changes)
    found = after[1]["blk.2.ffn_down.weight"]
    assert np.array_equal(found, weight.numpy().astype(found.dtype))
    again = models.load(out, cache_dir=tmp_path, progress=lambda _: None)
    assert torch.equal(again.layers[2].down.weight, torch.from_numpy(found).float())


def test_merging_is_refused_where_it_cannot_be(files: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no GGUF file.*--to gguf"):
        plain = tiny("llama")
        export_gguf_merged(plain, random_delta(plain.hf, [1]), tmp_path / "merged.gguf")
    model = loaded(files, "whole")
    delta = random_delta(model.hf, [1])
    quantised = tmp_path / "q.gguf"
    writer = gguf.GGUFWriter(str(quantised), "llama")
    for name, values in read(files["whole"])[1].items():
        kind = gguf.GGMLQuantizationType.Q8_0 if "ffn_gate" in name else None
        data = gguf.quants.quantize(values, kind) if kind else values
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    packed = torch.from_numpy(
        gguf.quants.dequantize(
            read(quantised)[1]["blk.1.ffn_gate.weight"], gguf.GGMLQuantizationType.Q8_0
        )
    )
    model.name = str(quantised)
    gate = next(m for m in model.layers[1].mlp_matrices if m.path.endswith("gate_proj"))
    gate.weight.copy_(packed)
    model.forget_fingerprint()
    with pytest.raises(UserError, match=r"as Q8_0.*--to gguf"):
        export_gguf_merged(model, of_matrices([gate], 1, 0), tmp_path / "merged.gguf")
    export_gguf(of_matrices([gate], 1, 0), tmp_path / "adapter.gguf", model)
    with pytest.raises(UserError, match=r"NAME.gguf"):
        export_gguf_merged(model, delta, tmp_path / "merged")
    with pytest.raises(UserError, match="dtype is 'bfloat16'"):
        export_gguf(delta, tmp_path / "new.gguf", model, dtype="bfloat16")
    assert not (tmp_path / "merged.gguf").exists() and not (tmp_path / "new.gguf").exists()


def apart(model: Model, file: Path, adapter: Path | None = None) -> float:
    """Largest distance of llama.cpp's log probabilities from ours, over the likeliest tokens.

    Its server holds a first token back that is no whole character: such prompts are left out.
    """
    prompts = [[5, 40, 77, one, 9, 200] for one in range(60, 72)]
    with torch.no_grad():
        wanted = model.hf(torch.tensor(prompts)).logits[:, -1].double().log_softmax(-1)
    texts = [model.tokenizer.decode(row.argmax()) for row in wanted]
    kept = [n for n, text in enumerate(texts) if str(text).isascii() and str(text).isprintable()]
    assert len(kept) >= 2
    answers = llama(file, [prompts[n] for n in kept], adapter, n_probs=60)
    assert all(len(found) > 50 for _, found in answers)
    return max(
        abs(wanted[n, token].item() - value)
        for n, (_, found) in zip(kept, answers, strict=True)
        for token, value in found.items()
    )


def test_llama_cpp_computes_what_we_do(files: dict[str, Path], tmp_path: Path) -> None:
    """Every kind of matrix that may be written, as an adapter and in a merged file."""
    model, base = loaded(files, "whole"), files["whole"]
    by_name = {matrix.path.split(".")[-1]: matrix for matrix in model.layers[1].matrices("block")}
    names = ("gate_proj", "up_proj", "down_proj", "v_proj", "o_proj")
    delta = of_matrices([by_name[name] for name in names], 2, 0)
    adapter = export_gguf(delta, tmp_path / "edit.gguf", model).path
    merged = export_gguf_merged(model, delta, tmp_path / "merged.gguf")
    assert apart(model, base) < 0.02
    assert apart(model, merged) > 0.2
    with delta.applied(model):
        assert apart(model, base, adapter) < 0.02
        assert apart(model, merged) < 0.02
