"""Text for key statistics: what cannot be read or is not enough, bad settings, hub data sets."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build
from tokenizers_built import sentencepiece_bpe

from goldenlayers.errors import DataError, UserError
from goldenlayers.models import Model
from goldenlayers.statistics import key_statistics

WORDS = "the city of Paris is the capital of France and its river flows to the sea"
OPTIONS: dict[str, Any] = {"tokens": 600, "length": 32, "batch_tokens": 128, "settle": 0}


@pytest.fixture
def model() -> Model:
    return Model.wrap(build("llama"), sentencepiece_bpe())


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"{n} {WORDS} {WORDS}"}) for n in range(60)))
    return path


def bad_lines(path: Path, line: str) -> Path:
    path.write_text('{"text": "fine"}\n' + line + "\n")
    return path


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"title": "no text here"}', r"bad.jsonl, row 2, field 'text'.*found: title"),
        ('{"text": 7}', "row 2, field 'text'"),
        ("[1, 2]", "row 2, field 'text'.*found: list"),
        ('{"text": "open', "row 2: broken JSON"),
    ],
)
def test_bad_rows_are_named(model: Model, tmp_path: Path, line: str, message: str) -> None:
    path = bad_lines(tmp_path / "bad.jsonl", line)
    with pytest.raises(DataError, match=message):
        key_statistics(model, text=path, cache=False)


def test_text_that_is_not_utf8_is_named(model: Model, tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes("eins\nzwei\nfünf\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin.txt, row 3: not UTF-8"):
        key_statistics(model, text=path, cache=False)


def test_bad_input_is_one_clear_error(model: Model, corpus: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n  \n")
    short = tmp_path / "short.txt"
    short.write_text("Only these few words.")
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"text": empty}, "is empty"),
        ({"text": short}, "gives only 0 tokens.*at least 72"),
        ({"text": tmp_path / "corpus.json"}, r"no text file.*Did you mean 'corpus.jsonl'"),
        ({"text": tmp_path / "no" / "where.txt"}, "no text file"),
        ({"tokens": 0}, "tokens is 0"),
        ({"batch_tokens": 0}, "batch_tokens is 0"),
        ({"settle": -1.0}, "settle is -1"),
        ({"settle": float("nan")}, "settle is nan"),
        ({"ridge": -0.1}, "ridge is -0.1"),
        ({"layers": [4]}, "no layer 4"),
        ({"layers": []}, "no layers"),
        ({"lenght": 40}, "no setting 'lenght'.*Did you mean 'length'"),
    ]
    for options, message in wrong:
        with pytest.raises(UserError, match=message):
            key_statistics(model, **{"text": corpus, **options}, cache_dir=tmp_path)
    assert not list(tmp_path.rglob("manifest.json"))


def test_a_text_that_ends_before_the_budget_says_so(model: Model, corpus: Path) -> None:
    with pytest.warns(UserWarning, match=r"ended after \d+ of 1000000 tokens"):
        found = key_statistics(model, [0], text=corpus, tokens=10**6, settle=0, cache=False)
    assert 72 <= found.n_tokens < 10**6


def test_keys_that_are_not_finite_are_refused(model: Model, corpus: Path, tmp_path: Path) -> None:
    with torch.no_grad():
        model.hf.get_parameter("model.layers.2.mlp.up_proj.weight")[0, 0] = float("nan")
    with pytest.raises(UserError, match="keys of layer 2 hold NaN"):
        key_statistics(model, [1, 2], text=corpus, cache_dir=tmp_path, **OPTIONS)
    assert not list(tmp_path.rglob("manifest.json"))


def test_hub_data_sets(model: Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Rows(list[dict[str, str]]):
        _fingerprint = "abc"

    asked: list[tuple[Any, ...]] = []

    def load_dataset(name: str, configuration: str | None, split: str) -> Rows:
        asked.append((name, configuration, split))
        if name == "owner/none":
            raise FileNotFoundError("no such data set")
        return Rows({"text": WORDS} for _ in range(80))

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    found = key_statistics(
        model, [0], text="hub:owner/name@raw:test", cache_dir=tmp_path, **OPTIONS
    )
    assert asked == [("owner/name", "raw", "test")] and "hub:owner/name" in found.source
    with pytest.raises(UserError, match=r"could not be loaded.*no such data set"):
        key_statistics(model, text="hub:owner/none", cache=False)
    assert asked[-1] == ("owner/none", None, "train")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"goldenlayers\[hub\]"):
        key_statistics(model, text="hub:owner/name", cache=False)
