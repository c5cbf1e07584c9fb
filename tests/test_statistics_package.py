"""The text that comes with the package: what it is, that it is the default, and what it settles."""

from __future__ import annotations

import hashlib
import json
import logging
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build
from tokenizers_built import byte_tokenizer

from goldenlayers import progress as pace
from goldenlayers import statistics
from goldenlayers.models import Model
from goldenlayers.statistics import StatisticsSettings, key_statistics
from goldenlayers.statistics.documents import PACKAGE_TEXT, absolute_name, open_documents

QUICK: dict[str, Any] = {"length": 64, "batch_tokens": 512}


@pytest.fixture
def model() -> Model:
    return Model.wrap(build("gpt2"), byte_tokenizer())  # MLP width 128


def test_its_origin_and_hash_are_stated_beside_it() -> None:
    here = files("goldenlayers.statistics")
    note, text = here / "text.md", here / "text.jsonl"
    told = " ".join(note.read_text("utf-8").split())
    assert hashlib.sha256(text.read_bytes()).hexdigest() in told
    for word in ("Apache License 2.0", "SmolLM2-135M-Instruct", "tools/package_text.py", "seeds"):
        assert word in told
    rows = [json.loads(line) for line in text.read_text("utf-8").splitlines()]
    assert f"{len(rows)} texts" in told
    assert len({row["text"] for row in rows}) == len(rows)
    assert all(set(row) == {"text"} and len(row["text"].split()) >= 40 for row in rows)
    assert len(text.read_bytes()) < 1_000_000


def test_it_is_the_default_and_a_text_as_any_other(model: Model, tmp_path: Path) -> None:
    mine = key_statistics(model, [1], cache_dir=tmp_path / "a", **QUICK)
    assert "the text of the package" in mine.describe()
    assert mine.n_tokens >= 10 * model.layers.d_mlp or mine.settled
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(PACKAGE_TEXT.read_bytes())
    same = key_statistics(model, [1], text=copy, cache_dir=tmp_path / "b", **QUICK)
    assert torch.equal(mine[1].moment, same[1].moment)


def test_what_is_kept_tells_the_texts_apart(model: Model, tmp_path: Path) -> None:
    folders = {
        key_statistics(model, [1], text=text, tokens=200, cache_dir=tmp_path, length=32).folder
        for text in ("package", "model")
    }
    assert len(folders) == 2
    again = key_statistics(model, [1], tokens=200, cache_dir=tmp_path, length=32)
    assert again.folder in folders


def test_its_name_is_good_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "package").write_text("a file of that name")
    assert absolute_name("package") == "package"
    assert len(open_documents("package")) > 1


def test_where_it_is_shorter_than_wished_nothing_is_said(
    model: Model, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    documents = open_documents("package")
    tokens = sum(len(documents[i].encode()) for i in range(len(documents)))
    how: dict[str, Any] = {**QUICK, "settle": 0, "cache": False}
    monkeypatch.setattr(statistics, "BUDGET_WIDTHS", 2 * tokens // model.layers.d_mlp)
    found = key_statistics(model, [0], **how)
    assert found.n_tokens < StatisticsSettings().budget(model.layers.d_mlp)
    assert not recwarn.list
    with pytest.warns(UserWarning, match=r"the text of the package .* ended after"):
        key_statistics(model, [0], tokens=2 * tokens, **how)


def test_settled_statistics_solve_as_those_of_more_text(model: Model) -> None:
    def run(**more: Any) -> Any:
        return key_statistics(model, [1], cache=False, **QUICK, **more)

    settled, full = run(settle=0.1, tokens=20_000), run(settle=0, tokens=20_000)
    assert settled.settled
    assert settled.n_tokens < full.n_tokens / 2
    generator = torch.Generator().manual_seed(0)
    _, vectors = full[1].eigh()
    scale = full[1].eigh()[0].clamp_min(0).sqrt()
    keys = vectors @ (scale[:, None] * torch.randn(len(scale), 32, generator=generator).double())

    def cosine(statistics: Any) -> float:
        both = (one[1].solve(keys) for one in (statistics, full))
        return float(torch.nn.functional.cosine_similarity(*both, dim=0).min())

    assert cosine(settled) > 0.8
    assert cosine(run(settle=0, tokens=128)) < cosine(settled)


def test_what_takes_long_is_said_once_and_with_the_model_and_the_layer(
    model: Model, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "goldenlayers")
    key_statistics(model, [1], tokens=2000, cache=False, **QUICK)
    assert not caplog.records
    for limit in ("WORTH_SAYING", "_SHORT"):
        monkeypatch.setattr(pace, limit, -1.0)
    key_statistics(model, [1], tokens=2000, cache=False, **QUICK)
    (told,) = [one.getMessage() for one in caplog.records]
    assert told.startswith("key statistics of") and "layer 1: about" in told and "tokens" in told
    caplog.clear()
    key_statistics(model, [1], tokens=2000, cache=False, progress=lambda _n, _all: None, **QUICK)
    assert not caplog.records
