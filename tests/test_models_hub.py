"""Hub models: the order of the look-ups and what each failure tells the user. No network."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from families import build
from huggingface_hub import errors
from tokenizers_built import byte_level_bpe

from goldenlayers import models
from goldenlayers.errors import UserError

Fail = Callable[[], Exception]


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub that serves one folder; ``served/config.json`` can be changed before the call."""
    build("llama").save_pretrained(tmp_path)
    byte_level_bpe().save_pretrained(tmp_path)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda name, file: str(tmp_path / file))

    def snapshot(name: str, **options: Any) -> str:
        (tmp_path / "asked.txt").write_text(json.dumps({"name": name, **options}))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    return tmp_path


def test_a_hub_model_loads_and_only_safetensors_are_asked_for(served: Path) -> None:
    said: list[str] = []
    model = models.load("owner/name", progress=said.append)
    assert model.name == "owner/name"
    assert model.n_layers == 4
    asked = json.loads((served / "asked.txt").read_text())
    assert asked["name"] == "owner/name"
    assert "model*.safetensors" in asked["allow_patterns"]
    assert not any(end in text for text in asked["allow_patterns"] for end in (".bin", ".py"))
    assert "owner/name" in said[0]


def test_code_is_downloaded_only_with_permission(served: Path) -> None:
    models.locate("owner/name", trust_remote_code=True, progress=lambda _: None)
    assert "*.py" in json.loads((served / "asked.txt").read_text())["allow_patterns"]


def test_a_model_that_cannot_be_handled_is_not_downloaded(served: Path) -> None:
    path = served / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "is_encoder_decoder": True}))
    with pytest.raises(UserError, match="owner/name is an encoder-decoder"):
        models.load("owner/name")
    path.write_text("<html>")
    with pytest.raises(UserError, match=r"config\.json of the hub model owner/name is not JSON"):
        models.load("owner/name")
    path.write_text('{"a":' * 100_000)
    with pytest.raises(UserError, match="nested too deeply"):
        models.load("owner/name")
    assert not (served / "asked.txt").exists()


def _answer(kind: type[errors.HfHubHTTPError], status: int) -> Exception:
    """The hub's refusal, made with whichever HTTP library the hub client uses."""
    import importlib

    for base in errors.HfHubHTTPError.__mro__:
        package = base.__module__.split(".")[0]
        if package.startswith("httpx"):
            library = importlib.import_module(package)
            request = library.Request("GET", "https://hub.invalid")
            return kind("refused", response=library.Response(status, request=request))
    raise AssertionError("the hub client no longer uses httpx")


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        (lambda: _answer(errors.GatedRepoError, 403), ("gated", "hf auth login")),
        (lambda: _answer(errors.RepositoryNotFoundError, 404), ("no public model", "spelling")),
        (lambda: _answer(errors.RemoteEntryNotFoundError, 404), ("no config.json",)),
        (lambda: _answer(errors.HfHubHTTPError, 503), ("could not be reached", "directory")),
        (lambda: errors.LocalEntryNotFoundError("no net"), ("could not be reached", "no net")),
        (lambda: errors.OfflineModeIsEnabled("off"), ("HF_HUB_OFFLINE", "local model directory")),
        (lambda: ConnectionError("down"), ("could not be reached", "down")),
        (lambda: errors.HFValidationError("bad"), ("not a valid hub id",)),
    ],
)
def test_each_failure_says_what_to_do(
    failure: Fail, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> str:
        raise failure()

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(UserError) as caught:
        models.load("owner/name")
    for word in words:
        assert word in str(caught.value)


def test_a_transport_error_in_mid_download(served: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from goldenlayers.models.fetching import _transport_errors

    def torn(*_: object, **__: object) -> str:
        raise _transport_errors()[0]("connection reset")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", torn)
    with pytest.raises(UserError, match=r"could not be reached.*connection reset"):
        models.load("owner/name", progress=lambda _: None)
