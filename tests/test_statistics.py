"""The one pass over all layers against a slow loop, on several families; sampling; settling."""

from __future__ import annotations

import itertools
import json
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build, shared
from tokenizers_built import TOKENIZERS, byte_level_bpe, byte_tokenizer, sentencepiece_bpe
from torch import Tensor

from goldenlayers.errors import UserError
from goldenlayers.hooks import observe
from goldenlayers.models import Model
from goldenlayers.statistics import MissingLayerError, StatisticsSettings, key_statistics
from goldenlayers.statistics.sources import (
    Observer,
    SampledSource,
    TextSource,
    drawable,
    special_ids,
)
from goldenlayers.statistics.sums import MomentSums

# Conv1D, no MLP module, MLP that adds the residual, normed MLP output, parallel, image model.
FAMILIES = ["gpt2", "gpt2_square", "opt", "bloom", "gemma3", "falcon_new", "gemma3_multimodal"]
TEXTS = [
    f"{name} was born in {place} in {year}, and wrote {n} books about the {thing} of {place}."
    for n, (name, place, year, thing) in enumerate(
        itertools.product(
            ["Ada", "Grace", "Emmy", "Kurt"],
            ["London", "Königsberg", "New York"],
            [1815, 1906],
            ["history", "mathematics", "weather"],
        )
    )
]


def wrap(name: str, tokenizer: Any = None, dtype: torch.dtype = torch.float32) -> Model:
    """A tiny model of a family with a tokenizer that puts <s> in front."""
    return Model.wrap(build(name, dtype), tokenizer or sentencepiece_bpe())


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    rows = [json.dumps({"id": i, "text": text}) for i, text in enumerate(TEXTS)]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def slow_moment(model: Model, layer: int, rows: list[list[int]], skip: int) -> Tensor:
    """C of one layer by the definition: one text, one token, one outer product at a time."""
    down = model.layers[layer].down
    total, n = torch.zeros(down.in_features, down.in_features, dtype=torch.float64), 0
    seen: list[Tensor] = []
    handle = down.module.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    try:
        for row in rows:
            seen.clear()
            with torch.no_grad():
                model.hf(input_ids=torch.tensor([row]))
            for key in seen[0].reshape(len(row), -1)[skip:].double():
                total += torch.outer(key, key)
                n += 1
    finally:
        handle.remove()
    return total / n


def text_rows(model: Model, path: Path, length: int, n_rows: int, seed: int = 0) -> list[list[int]]:
    source = StatisticsSettings(path, length=length, batch_tokens=10**6, seed=seed).source(model)
    assert isinstance(source, TextSource)
    return list(itertools.islice(source.rows(), n_rows))


def largest_difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("name", FAMILIES)
def test_one_pass_equals_a_slow_loop_per_layer_and_text(name: str, corpus: Path) -> None:
    model = wrap(name, dtype=torch.float64)
    found = key_statistics(
        model, text=corpus, tokens=200, length=40, batch_tokens=100, settle=0, cache=False
    )
    rows = text_rows(model, corpus, 40, math.ceil(200 / 39))
    assert found.n_tokens == 39 * len(rows)
    for layer in range(len(model.layers)):
        slow = slow_moment(model, layer, rows, skip=1)
        # Stored in float32, computed in float64 but for some families' norms and attention.
        assert largest_difference(found[layer].moment, slow) < 1e-6


def test_first_position_is_left_out(corpus: Path) -> None:
    model = wrap("gpt2")
    found = key_statistics(model, [1], text=corpus, tokens=200, length=40, settle=0, cache=False)
    rows = text_rows(model, corpus, 40, 6)
    assert largest_difference(found[1].moment, slow_moment(model, 1, rows, skip=0)) > 1e-3


@pytest.mark.parametrize("name", ["gpt2", "gemma3"])
def test_batch_size_and_number_of_layers_do_not_matter(name: str, corpus: Path) -> None:
    model = wrap(name)

    def run(layers: list[int] | None, batch_tokens: int) -> dict[int, Tensor]:
        found = key_statistics(
            model, layers, text=corpus, tokens=400, length=40, settle=0,
            batch_tokens=batch_tokens, cache=False,
        )  # fmt: skip
        return {layer: found[layer].moment for layer in found}

    whole = run(None, 10_000)
    for other in (run(None, 1), run([2], 120), run([0, 1], 10_000)):
        for layer, moment in other.items():
            assert largest_difference(moment, whole[layer]) < 1e-5


@pytest.mark.parametrize("tokenizer", ["byte_level_bpe", "sentencepiece_no_prefix", "bytes_eos"])
def test_rows_are_whole_running_text(tokenizer: str, corpus: Path) -> None:
    model = wrap("llama", TOKENIZERS[tokenizer]())
    rows = text_rows(model, corpus, 64, 10_000)
    assert {len(row) for row in rows} == {64}
    special = special_ids(model)
    front = 1 if tokenizer.startswith("sentencepiece") else 0
    assert all(not special.intersection(row[front:]) for row in rows)
    assert all((row[0] in special) == bool(front) for row in rows)
    text = model.tokenizer.decode([i for row in rows for i in row[front:]])
    assert isinstance(text, str)
    # Every document is there once but the few that a rest shorter than a row held.
    there = sum(text.count(document) for document in TEXTS)
    assert len(TEXTS) - 3 <= there <= len(TEXTS)


def test_seed_orders_documents_and_long_ones_take_turns(tmp_path: Path) -> None:
    path = tmp_path / "two.jsonl"
    long, short = "long " * 2000, "short " * 30
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in (long, short)))
    model = wrap("llama", byte_tokenizer())
    first = text_rows(model, path, 256, 6)
    text = bytes(i - 3 for row in first for i in row if i >= 3).decode()
    assert "short" in text and "long" in text
    assert text_rows(model, path, 256, 6) == first
    orders = {
        tuple(map(tuple, text_rows(model, path, 256, 6, seed))) for seed in range(1, 8)
    }  # one of two documents comes first
    assert len(orders) == 2


def test_a_plain_text_file_is_read_too(tmp_path: Path) -> None:
    path = tmp_path / "plain.txt"
    path.write_text("\n\n".join(TEXTS * 3), encoding="utf-8")
    model = wrap("llama", byte_tokenizer())
    found = key_statistics(model, [0], text=path, tokens=2000, settle=0, cache=False)
    assert found.n_tokens >= 2000
    assert "plain.txt" in found.source


@pytest.mark.parametrize("name", ["gpt2", "opt", "bloom", "gemma3", "gemma3_multimodal"])
def test_keys_of_sampled_text_equal_a_slow_loop_over_that_text(name: str) -> None:
    model = wrap(name)
    found = key_statistics(model, text="model", tokens=700, length=12, settle=0, cache=False)
    source = SampledSource(model, length=12, seed=0)
    with torch.no_grad():
        full = source.sample(model, Observer(), 0, source.batch_rows).tolist()
    assert found.n_tokens == 64 * 11
    for layer in (0, len(model.layers) - 1):
        assert largest_difference(found[layer].moment, slow_moment(model, layer, full, 1)) < 1e-5


def test_sampling_is_seeded_and_follows_the_models_distribution() -> None:
    model = wrap("llama")
    source = SampledSource(model, length=3, seed=0)
    torch.manual_seed(5)
    draws = [source.sample(model, None, index, 64) for index in range(60)]
    torch.manual_seed(6)
    assert torch.equal(draws[3], source.sample(model, None, 3, 64))
    assert torch.equal(draws[3][:9], source.sample(model, None, 3, 9))
    assert not torch.equal(draws[3], draws[4])
    assert not torch.equal(
        draws[3], SampledSource(model, length=3, seed=1).sample(model, None, 3, 64)
    )
    # The first token drawn, 3840 times, against its probabilities (special tokens excluded).
    with torch.no_grad():
        logits = model.hf(input_ids=torch.tensor([source.front])).logits[0, -1]
    wanted = torch.softmax(logits.masked_fill(~drawable(model), -torch.inf), -1)
    first = torch.cat(draws)[:, len(source.front)]
    seen = torch.bincount(first, minlength=len(wanted)) / len(first)
    assert float((seen - wanted).abs().sum() / 2) < 0.12  # total variation
    assert not set(first.tolist()) & special_ids(model)


def test_sampling_without_bos_begins_with_random_tokens_that_exist() -> None:
    model = wrap("llama", byte_tokenizer())
    text = SampledSource(model, length=4, seed=0).sample(model, None, 0, 64)
    assert len(set(text[:, 0].tolist())) > 20
    assert int(text.max()) < 259  # the model's vocabulary is padded to 320
    assert int(text.min()) >= 3


def test_bos_that_the_tokenizer_does_not_add_still_begins_sampled_text() -> None:
    model = wrap("gpt2", byte_level_bpe())
    text = SampledSource(model, length=4, seed=0).sample(model, None, 0, 64)
    assert all(token == model.tokenizer.bos_token_id for token in text[:, 0].tolist())


def test_rows_shorter_than_the_context_and_context_respected(corpus: Path) -> None:
    model = wrap("gpt2")
    assert StatisticsSettings(corpus, batch_tokens=512).source(model).length == 256
    with pytest.raises(UserError, match="2 to 512 tokens"):
        key_statistics(model, text=corpus, length=513, cache=False)
    with pytest.raises(UserError, match="2 to 512 tokens"):
        key_statistics(model, length=1, cache=False)


def sums_of(keys: Tensor, batch: int = 8) -> MomentSums:
    """Sums for one layer from rows (R, T, F)."""
    sums = MomentSums.empty({0: keys.shape[-1]})
    for part in keys.split(batch):
        sums.add(0, part)
        sums.end_batch(part.shape[0] * part.shape[1])
    return sums


def test_error_estimate_is_the_error() -> None:
    generator = torch.Generator().manual_seed(0)
    scale = torch.linspace(0.1, 2, 48)
    exact = torch.diag(scale.square()).double()
    true, estimated = [], []
    for _ in range(20):
        sums = sums_of(torch.randn(40, 16, 48, generator=generator) * scale)
        true.append(float((sums.mean(0) - exact).norm() / exact.norm()))
        estimated.append(sums.error(0))
    ratio = sum(estimated) / sum(true)
    assert 0.8 < ratio < 1.25
    # Rows that repeat one another tell less than their number of tokens suggests.
    rows = torch.randn(40, 1, 48, generator=generator) * scale
    assert sums_of(rows.expand(40, 16, 48)).error(0) > 2.5 * estimated[0]


def test_sums_in_files_give_the_same_bits(tmp_path: Path) -> None:
    keys = torch.randn(4, 5, 300, generator=torch.Generator().manual_seed(0))
    memory = sums_of(keys)
    files = MomentSums.empty({0: 300}, memory_limit=0, folder=tmp_path)
    assert list(tmp_path.glob("sums-*/0.bin"))
    files.add(0, keys)
    files.end_batch(20)
    assert torch.equal(memory.mean(0), files.mean(0))
    flat = keys.reshape(-1, 300).double()
    assert largest_difference(memory.mean(0), flat.T @ flat / 20) < 1e-5
    files.close()
    assert not list(tmp_path.iterdir())


def test_settling_stops_early_and_0_never_does(corpus: Path) -> None:
    model = wrap("gpt2", byte_tokenizer())  # MLP width 128
    options: dict[str, Any] = {
        "text": corpus, "tokens": 5000, "length": 32, "batch_tokens": 64, "cache": False,
    }  # fmt: skip
    early = key_statistics(model, settle=0.2, **options)
    assert early.settled
    assert 4 * model.layers.d_mlp <= early.n_tokens < 5000
    assert sum(early.errors.values()) / len(early) <= 0.2
    full = key_statistics(model, settle=0, **options)
    assert not full.settled
    assert full.n_tokens >= 5000
    for layer in early:
        norm = full[layer].moment.norm()
        assert float((early[layer].moment - full[layer].moment).norm() / norm) < 0.3
    assert not key_statistics(model, settle=1e-6, **options).settled


def test_nothing_is_left_on_the_model(corpus: Path) -> None:
    model = wrap("gpt2")
    before = {name: value.clone() for name, value in model.hf.state_dict().items()}
    key_statistics(model, [0], text=corpus, tokens=200, length=40, cache=False)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.hf.modules())
    assert all(torch.equal(before[name], value) for name, value in model.hf.state_dict().items())
    out = model.hf(input_ids=torch.tensor([[5, 6, 7]])).logits
    assert torch.equal(out, shared("gpt2")(input_ids=torch.tensor([[5, 6, 7]])).logits)


def test_blocks_behind_the_last_wanted_layer_do_not_run(corpus: Path) -> None:
    model = wrap("gpt2")
    ran: list[int] = []
    blocks = {block.index: block.module for block in model.layers}
    with observe(blocks, lambda index, _x, _y: ran.append(index)):
        key_statistics(model, [1], text=corpus, tokens=200, length=40, cache=False)
    assert set(ran) == {0}


def test_half_precision_models_sum_in_float32(corpus: Path) -> None:
    model = wrap("llama", dtype=torch.bfloat16)
    found = key_statistics(model, [1], text=corpus, tokens=200, length=40, settle=0, cache=False)
    slow = slow_moment(model, 1, text_rows(model, corpus, 40, 6), 1)
    # Batched and single bfloat16 forwards differ in their last bits; the sums must not add to it.
    assert largest_difference(found[1].moment, slow) < 2e-2
    assert found[1].moment.dtype == torch.float64


def test_statistics_are_a_mapping_that_factorises_once_and_forgets_the_oldest(
    corpus: Path,
) -> None:
    model = wrap("gpt2")
    found = key_statistics(model, [0, 2], text=corpus, tokens=400, length=40, cache=False)
    assert list(found) == [0, 2] and len(found) == 2 and 1 not in found and 2 in found
    assert found[0] is found[0]
    assert found[0].cholesky is found[0].cholesky
    assert found.get(1) is None
    assert torch.equal(pickle.loads(pickle.dumps(found))[2].moment, found[2].moment)
    with pytest.raises(MissingLayerError, match=r"do not hold layer 1.*one of 0, 2"):
        found[1]
    first, found.keep_bytes = found[0], 1
    assert found[2] is found[2]
    assert found[0] is not first
    assert torch.equal(found[0].moment, first.moment)
    assert "2 layers from" in found.describe()


def test_identity_is_loud_and_marked() -> None:
    model = wrap("gpt2")
    with pytest.warns(UserWarning, match="NO KEY STATISTICS"):
        found = key_statistics(model, [1], text="none")
    assert found.is_identity and "NO key statistics" in found.describe()
    for copy in (found, pickle.loads(pickle.dumps(found))):
        assert torch.equal(copy[1].matrix(), torch.eye(model.layers.d_mlp).double())
    assert not key_statistics(model, [1], tokens=700, length=12, cache=False).is_identity
