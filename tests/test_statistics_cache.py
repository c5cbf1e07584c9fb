"""Key statistics on disk: what matches, what does not, killed passes, damaged files, bad input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import build
from safetensors.torch import load_file, save_file
from tokenizers_built import byte_level_bpe, sentencepiece_bpe

from goldenlayers.errors import UserError
from goldenlayers.models import Model
from goldenlayers.models.cache import sha256_file
from goldenlayers.statistics import KeyStatistics, key_statistics
from goldenlayers.statistics.cache import StatisticsCache, _seal, model_settings
from goldenlayers.statistics.sources import SampledSource, TextSource
from goldenlayers.statistics.sums import MomentSums

WORDS = "the city of Paris is the capital of France and its river flows to the sea"


def write_corpus(path: Path, seed: int = 0, n: int = 60) -> Path:
    random = np.random.default_rng(seed)
    rows = [json.dumps({"text": " ".join(random.choice(WORDS.split(), 40))}) for _ in range(n)]
    path.write_text("\n".join(rows), encoding="utf-8")
    return path


@pytest.fixture
def model() -> Model:
    return Model.wrap(build("llama"), sentencepiece_bpe())


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "corpus.jsonl")


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of rows of every batch that was run."""
    seen: list[int] = []
    for kind in (TextSource, SampledSource):
        run = kind.run

        def counting(self: Any, *args: Any, run: Any = run) -> Iterator[int]:
            for n_rows in run(self, *args):
                seen.append(n_rows)
                yield n_rows

        monkeypatch.setattr(kind, "run", counting)
    return seen


OPTIONS: dict[str, Any] = {"tokens": 600, "length": 32, "batch_tokens": 128, "settle": 0}


def moments(found: KeyStatistics) -> dict[int, torch.Tensor]:
    return {layer: found[layer].moment for layer in found}


def equal(a: dict[int, torch.Tensor], b: dict[int, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def folders(cache: Path) -> list[Path]:
    return sorted((cache / "statistics").iterdir())


def test_second_call_reads_what_the_first_wrote(
    model: Model, corpus: Path, tmp_path: Path, passes: list[int]
) -> None:
    first = key_statistics(model, text=corpus, cache_dir=tmp_path, **OPTIONS)
    ran = len(passes)
    second = key_statistics(model, text=str(corpus), cache_dir=tmp_path, ridge=0.5, **OPTIONS)
    fewer = key_statistics(model, [2], text=corpus, cache_dir=tmp_path, **OPTIONS)
    assert ran > 1 and len(passes) == ran
    assert equal(moments(first), moments(second))
    assert torch.equal(fewer[2].moment, first[2].moment) and list(fewer) == [2]
    assert second[1].ridge == 0.5 and first[1].ridge == 0.01
    assert (first.n_tokens, first.settled, first.errors) == (
        second.n_tokens, second.settled, second.errors,
    )  # fmt: skip
    plain = key_statistics(model, text=corpus, cache=False, **OPTIONS)
    assert equal(moments(plain), moments(first)) and plain.errors == first.errors
    assert not list(tmp_path.rglob("*.part"))


def test_a_layer_is_read_only_when_it_is_used(model: Model, corpus: Path, tmp_path: Path) -> None:
    found = key_statistics(model, text=corpus, cache_dir=tmp_path, **OPTIONS)
    assert found.folder is not None
    (found.folder / "layer-001.safetensors").unlink()
    assert found[2].size == model.layers.d_mlp
    with pytest.raises(FileNotFoundError):
        found[1]


@pytest.mark.parametrize("settle", [0, 0.5])
def test_only_missing_layers_are_collected_from_the_same_tokens(
    model: Model, corpus: Path, tmp_path: Path, passes: list[int], settle: float
) -> None:
    options = {**OPTIONS, "settle": settle}
    whole = key_statistics(model, text=corpus, cache=False, **options)
    passes.clear()
    some = key_statistics(model, [0, 3], text=corpus, cache_dir=tmp_path, **options)
    n_first = sum(passes)
    both = key_statistics(model, text=corpus, cache_dir=tmp_path, **options)
    assert sum(passes) == 2 * n_first
    assert torch.equal(both[0].moment, some[0].moment)
    assert both.n_tokens == some.n_tokens and both.settled == some.settled == bool(settle)
    if not settle:
        assert equal(moments(both), moments(whole))
    passes.clear()
    key_statistics(model, text=corpus, cache_dir=tmp_path, **options)
    assert not passes
    assert len(folders(tmp_path)) == 1


def test_every_setting_has_its_own_folder(model: Model, corpus: Path, tmp_path: Path) -> None:
    other = write_corpus(tmp_path / "other.jsonl", seed=1)
    changes: list[dict[str, Any]] = [
        {}, {"tokens": 700}, {"seed": 1}, {"settle": 0.9}, {"length": 33}, {"batch_tokens": 64},
        {"text": other}, {"text": "model"}, {"text": "model", "seed": 1},
        {"text": "model", "length": 16},
    ]  # fmt: skip
    for n, change in enumerate(changes, 1):
        options = {"text": corpus, **OPTIONS, **change}
        key_statistics(model, [0], cache_dir=tmp_path, **options)
        assert len(folders(tmp_path)) == n, change
    # The ridge is not part of what is stored, nor is the file's name.
    key_statistics(model, [0], text=corpus, cache_dir=tmp_path, ridge=0.1, **OPTIONS)
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(corpus.read_bytes())
    key_statistics(model, [0], text=copy, cache_dir=tmp_path, **OPTIONS)
    assert len(folders(tmp_path)) == len(changes)


def test_other_weights_config_tokenizer_or_type_never_match(model: Model) -> None:
    base = model_settings(model)
    assert model_settings(Model.wrap(build("llama"), sentencepiece_bpe())) == base

    changed = build("llama")
    with torch.no_grad():
        changed.get_parameter("model.layers.3.mlp.down_proj.weight")[0, 0] += 1
    others = [
        Model.wrap(changed, sentencepiece_bpe()),
        Model.wrap(build("llama"), byte_level_bpe()),
        Model.wrap(build("llama"), sentencepiece_bpe(dummy_prefix=False)),
        Model.wrap(build("llama", torch.bfloat16), sentencepiece_bpe()),
        Model.wrap(build("llama"), sentencepiece_bpe()),
        Model.wrap(build("llama"), sentencepiece_bpe()),
    ]
    others[-2].config.rms_norm_eps = 0.5  # pyright: ignore[reportAttributeAccessIssue]
    # A small edit in force, of which the fingerprint, computed before, knows nothing.
    assert others[-1].fingerprint() == model.fingerprint()
    others[-1].layers[1].down.weight.data.view(-1)[7] *= 1 + 1e-6
    settings = [json.dumps(model_settings(other)) for other in others]
    assert len({json.dumps(base), *settings}) == len(others) + 1


def test_a_manifest_of_other_settings_is_not_believed(
    model: Model, corpus: Path, tmp_path: Path, passes: list[int]
) -> None:
    key_statistics(model, [0], text=corpus, cache_dir=tmp_path, **OPTIONS)
    manifest = folders(tmp_path)[0] / "manifest.json"
    record = json.loads(manifest.read_text())
    record["settings"]["weights"] = "0" * 64
    manifest.write_text(json.dumps(record))
    passes.clear()
    key_statistics(model, [0], text=corpus, cache_dir=tmp_path, **OPTIONS)
    assert passes
    assert json.loads(manifest.read_text())["settings"]["weights"] == model.fingerprint()


def test_a_layer_map_with_another_down_projection_is_not_served(
    model: Model, corpus: Path, tmp_path: Path, passes: list[int]
) -> None:
    key_statistics(model, [0], text=corpus, cache_dir=tmp_path, **OPTIONS)
    passes.clear()
    other = Model.wrap(model.hf, model.tokenizer, layer_paths={"down": "mlp.up_proj"})
    found = key_statistics(other, [0], text=corpus, cache_dir=tmp_path, tokens=600, length=32,
                           batch_tokens=128, settle=0)  # fmt: skip
    assert passes and found[0].size == model.layers.d_model


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone", "manifest"])
def test_damaged_files_are_collected_again_with_a_message(
    model: Model, corpus: Path, tmp_path: Path, passes: list[int], damage: str
) -> None:
    first = moments(key_statistics(model, text=corpus, cache_dir=tmp_path, **OPTIONS))
    first = {layer: moment.clone() for layer, moment in first.items()}
    folder, passes[:] = folders(tmp_path)[0], []
    path = folder / "layer-001.safetensors"
    if damage == "cut":
        os.truncate(path, path.stat().st_size // 2)
    elif damage == "flipped":
        raw = bytearray(path.read_bytes())
        raw[-100] ^= 1
        path.write_bytes(raw)
    elif damage == "gone":
        path.unlink()
    else:
        (folder / "manifest.json").write_text('{"settings": ')
    with pytest.warns(UserWarning, match="collected again"):
        again = key_statistics(model, text=corpus, cache_dir=tmp_path, **OPTIONS)
    assert passes and equal(moments(again), first)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        key_statistics(model, text=corpus, cache_dir=tmp_path, **OPTIONS)


def _reseal(folder: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Put another tensor into the file of layer 1, with hashes that are right."""
    path, manifest = folder / "layer-001.safetensors", folder / "manifest.json"
    save_file({"second_moment": change(load_file(path)["second_moment"]).contiguous()}, path)
    record = json.loads(manifest.read_text())
    record["layers"]["1"]["sha256"] = sha256_file(path)
    del record["sha256"]
    manifest.write_text(_seal(record))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c.int(), "values of torch.int32, not a second moment"),
        (lambda c: c.double(), "values of torch.float64"),
        (lambda c: c[:5, :5], r"holds \(5, 5\) values"),
        (lambda c: c * torch.nan, "not symmetric, or not finite"),
        (lambda c: c / 0, "not symmetric, or not finite"),
        (lambda c: torch.triu(c), "not symmetric"),
        (lambda c: -c, "negative diagonal"),
    ],
)
def test_what_is_no_second_moment_is_collected_again(
    model: Model, corpus: Path, tmp_path: Path, passes: list[int], change: Any, said: str
) -> None:
    first = key_statistics(model, [1], text=corpus, cache_dir=tmp_path, **OPTIONS)[1].moment.clone()
    passes.clear()
    _reseal(folders(tmp_path)[0], lambda c: c)
    key_statistics(model, [1], text=corpus, cache_dir=tmp_path, **OPTIONS)
    assert not passes
    _reseal(folders(tmp_path)[0], change)
    with pytest.warns(UserWarning, match=said):
        again = key_statistics(model, [1], text=corpus, cache_dir=tmp_path, **OPTIONS)
    assert passes and torch.equal(again[1].moment, first)


def test_odd_manifests_are_collected_again(
    model: Model, corpus: Path, tmp_path: Path, passes: list[int]
) -> None:
    key_statistics(model, [0], text=corpus, cache_dir=tmp_path, **OPTIONS)
    manifest = folders(tmp_path)[0] / "manifest.json"
    whole = json.loads(manifest.read_text())
    rest = {name: value for name, value in whole.items() if name != "sha256"}
    odd: list[str] = [
        json.dumps({**whole, "n_tokens": whole["n_tokens"] + 1}),  # not what was written
        _seal({**rest, "n_tokens": 0}),
        _seal({**rest, "n_rows": "many"}),
        _seal({**rest, "settled": 1}),
        _seal({**rest, "layers": {"0": 3}}),
        _seal({**rest, "layers": {"0": {"path": 1, "sha256": "", "error": 0.1}}}),
        json.dumps({**rest, "sha256": None}),
        "[" * 100_000,
        '{"settings": "\\ud800"}',
        "[]",
        "nul\0",
    ]
    for text in odd:
        passes.clear()
        manifest.write_text(text)
        with pytest.warns(UserWarning, match="manifest is damaged") as said:
            key_statistics(model, [0], text=corpus, cache_dir=tmp_path, **OPTIONS)
        assert passes and len(said) == 1
        assert json.loads(manifest.read_text())["n_tokens"] == whole["n_tokens"]
    manifest.unlink()
    os.mkfifo(manifest)
    with pytest.warns(UserWarning, match="no plain file"):
        key_statistics(model, [0], text=corpus, cache_dir=tmp_path, **OPTIONS)


def test_files_are_hashed_once_per_change(
    model: Model, corpus: Path, tmp_path: Path, passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("goldenlayers.models.cache._SETTLED", -(1 << 62))  # do not wait for it
    options = {"text": corpus, "cache_dir": tmp_path, **OPTIONS}
    for _ in range(2):
        key_statistics(model, **options)
    with monkeypatch.context() as patch:
        patch.setattr("goldenlayers.models.cache.sha256_file", None)
        key_statistics(model, **options)
    passes.clear()
    path = folders(tmp_path)[0] / "layer-001.safetensors"
    data = bytearray(path.read_bytes())
    data[-4] ^= 1
    path.write_bytes(data)
    with pytest.warns(UserWarning, match="layer-001.safetensors is damaged"):
        key_statistics(model, **options)
    assert passes


class KilledError(Exception):
    pass


@pytest.mark.parametrize("source", ["text", "model"])
def test_a_pass_that_was_cut_off_goes_on_with_identical_bits(
    model: Model, corpus: Path, tmp_path: Path, passes: list[int], source: str
) -> None:
    options = {**OPTIONS, "text": corpus if source == "text" else "model"}
    if source == "model":
        options["tokens"] = 64 * 31 * 3
    whole = key_statistics(model, cache_dir=tmp_path / "whole", **options)
    n_batches = len(passes)
    assert n_batches >= 3
    passes.clear()

    def kill(done: int, _total: int) -> None:
        if len(passes) == n_batches - 1:
            raise KilledError

    again = {"cache_dir": tmp_path / "killed", "checkpoint_seconds": 0, **options}
    with pytest.raises(KilledError):
        key_statistics(model, progress=kill, **again)
    folder = folders(tmp_path / "killed")[0]
    assert (folder / "checkpoint").is_dir() and not (folder / "manifest.json").exists()
    passes.clear()
    resumed = key_statistics(model, **again)
    assert len(passes) == 2  # the batch in flight when it was cut off, and the last
    assert equal(moments(resumed), moments(whole)) and resumed.errors == whole.errors
    assert not (folder / "checkpoint").exists()
    assert not list(folder.glob("*.part"))


SCRIPT = """
import sys, time
from contextlib import nullcontext
sys.path.insert(0, sys.argv[1])
from families import build
from off_a_bit import OffABit
from safetensors.torch import load_file, save_file
from tokenizers_built import sentencepiece_bpe
from goldenlayers.models import Model
from goldenlayers.models.cache import sha256_file
from goldenlayers.statistics import key_statistics
model = Model.wrap(build("llama"), sentencepiece_bpe())
seen = []
def wait_after_the_third(done, total):
    seen.append(done)
    if len(seen) == 3:
        print(done, flush=True)
        time.sleep(1000)  # until it is killed
with OffABit() if sys.argv[4:] else nullcontext():
    key_statistics(
        model, text=sys.argv[2], cache_dir=sys.argv[3], tokens=600, length=32, batch_tokens=128,
        settle=0, checkpoint_seconds=0, progress=wait_after_the_third,
    )
"""


def test_a_killed_process_goes_on_with_identical_bits(
    model: Model, corpus: Path, tmp_path: Path, passes: list[int]
) -> None:
    whole = key_statistics(model, text=corpus, cache=False, **OPTIONS)
    passes.clear()
    # Its sums are off where those of this process are.
    arguments = [Path(__file__).parent, corpus, tmp_path, *({"off_a_bit"} & sys.modules.keys())]
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *map(str, arguments)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.wait()
    resumed = key_statistics(
        model, text=corpus, cache_dir=tmp_path, checkpoint_seconds=0, **OPTIONS
    )
    assert equal(moments(resumed), moments(whole))
    assert 0 < sum(passes) < 20


def _store(state: Path) -> StatisticsCache:
    """The cache that a checkpoint's state lies in."""
    store = StatisticsCache({}, state.parents[3])
    store.folder = state.parents[1]
    return store


def test_checkpoints_of_another_pass_or_in_pieces_are_not_used(
    model: Model, corpus: Path, tmp_path: Path, passes: list[int]
) -> None:
    def stop(done: int, _total: int) -> None:
        if len(passes) == 3:
            raise KilledError

    options = {"text": corpus, "cache_dir": tmp_path, "checkpoint_seconds": 0, **OPTIONS}
    with pytest.raises(KilledError):
        key_statistics(model, [0, 1], progress=stop, **options)
    passes.clear()
    whole = key_statistics(model, [0], text=corpus, cache=False, **OPTIONS)
    n_batches = len(passes)
    passes.clear()
    other = key_statistics(model, [0], **options)
    assert len(passes) == n_batches and torch.equal(other[0].moment, whole[0].moment)

    passes.clear()
    with pytest.raises(KilledError):
        key_statistics(model, [2], progress=stop, **options)
    os.truncate(folders(tmp_path)[0] / "checkpoint" / "2.safetensors", 100)
    passes.clear()
    with pytest.warns(UserWarning, match="checkpoint is damaged"):
        key_statistics(model, [2], **options)
    assert len(passes) == n_batches

    passes.clear()
    with pytest.raises(KilledError):
        key_statistics(model, [3], progress=stop, **options)
    state = folders(tmp_path)[0] / "checkpoint" / "state.json"
    whole_state = state.read_text()
    for text in ("[]", "[" * 100_000, whole_state.replace('"n_rows": ', '"n_rows": 1'), "{}"):
        assert text != whole_state
        (state.parent).mkdir(exist_ok=True)
        state.write_text(text)
        sums = MomentSums.empty({3: model.layers.d_mlp})
        with pytest.warns(UserWarning, match="checkpoint is damaged"):
            assert not _store(state).load_checkpoint(sums, 19)


def test_a_full_disk_is_said_and_leaves_nothing_by_halves(
    model: Model, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_tensors: Any, path: Path) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("goldenlayers.statistics.cache.save_file", full)
    with (
        pytest.warns(UserWarning, match=r"no checkpoint could be saved.*No space left"),
        pytest.raises(UserError, match=r"could not be written.*No space left"),
    ):
        key_statistics(model, text=corpus, cache_dir=tmp_path, checkpoint_seconds=0, **OPTIONS)
    assert list(folders(tmp_path)[0].iterdir()) == []
    monkeypatch.undo()
    key_statistics(model, text=corpus, cache_dir=tmp_path, **OPTIONS)
    left = folders(tmp_path)[0] / "checkpoint.0.part"
    left.mkdir()
    os.utime(left, (0, 0))
    key_statistics(model, [0], text=corpus, cache_dir=tmp_path, **OPTIONS)
    assert left.exists()  # nothing was written, nothing swept
    (folders(tmp_path)[0] / "layer-000.safetensors").unlink()
    with pytest.warns(UserWarning, match="missing"):
        key_statistics(model, [0], text=corpus, cache_dir=tmp_path, **OPTIONS)
    assert not left.exists()
