"""Models that are fetched: Python packages by the user's own pip, hub models into the hub's cache;
and what our cache holds.

The registry (``packaged.json``) pins every wheel and the GGUF file inside by SHA-256.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from goldenlayers.errors import UserError, near_matches
from goldenlayers.models import cache
from goldenlayers.models.checks import check_config
from goldenlayers.models.files import read_object
from goldenlayers.shown import say

if TYPE_CHECKING:
    pass


@dataclass(frozen=True, slots=True)
class Wheel:
    """One wheel: ``parts`` are its pieces of the GGUF file in order, ``keep`` its licence texts."""

    package: str
    version: str
    size: int
    sha256: str
    parts: tuple[str, ...]
    keep: tuple[str, ...]

    @property
    def requirement(self) -> str:
        """How pip is asked for it."""
        return f"{self.package}=={self.version}"


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A packaged model. Sizes in bytes; ``gguf_sha256`` is that of the parts joined in order."""

    name: str
    title: str
    family: str
    layers: int
    parameters: int
    licence: str
    notice: str
    wheels: tuple[Wheel, ...]
    gguf_size: int
    gguf_sha256: str

    @property
    def package(self) -> str:
        """The package the user would look up."""
        return self.wheels[0].package

    @property
    def download_size(self) -> int:
        """Bytes that pip fetches."""
        return sum(wheel.size for wheel in self.wheels)

    @property
    def source(self) -> dict[str, Any]:
        """What the cache's manifest must say about the origin of the weights."""
        return {
            "kind": "packaged",
            "name": self.name,
            "wheels": {wheel.requirement: wheel.sha256 for wheel in self.wheels},
            "gguf_sha256": self.gguf_sha256,
        }


@functools.cache
def registry() -> dict[str, PackagedModel]:
    """The packaged models by short name."""
    text = resources.files("goldenlayers.models").joinpath("packaged.json").read_text("utf-8")
    found = {}
    for row in json.loads(text)["models"]:
        gguf = row.pop("gguf")
        wheels = tuple(
            Wheel(**{**wheel, "parts": tuple(wheel["parts"]), "keep": tuple(wheel["keep"])})
            for wheel in row.pop("wheels")
        )
        found[row["name"]] = PackagedModel(
            **row, wheels=wheels, gguf_size=gguf["size"], gguf_sha256=gguf["sha256"]
        )
    return found


def fetch(model: PackagedModel, folder: Path, *, progress: cache.Progress = say) -> Path:
    """Download the model's wheels one by one into ``folder`` and join their GGUF file there.

    Each wheel is deleted as soon as it is unpacked; licence texts are put beside the GGUF file.

    Raises:
        UserError: pip failed, or a file is not the one that the registry pins.
    """
    gguf = folder / "model.gguf"
    megabytes = model.download_size / 1e6
    progress(f"Fetching {model.name} with pip ({megabytes:.0f} MB, licence: {model.licence}).")
    if model.notice:
        progress(model.notice)
    with gguf.open("wb") as joined:
        for wheel in model.wheels:
            with tempfile.TemporaryDirectory(dir=folder) as temporary:
                path = pip_download(wheel.requirement, Path(temporary))
                _check(path, wheel.sha256, f"The wheel of {wheel.requirement}")
                _unpack(path, wheel, joined, folder)
    _check(gguf, model.gguf_sha256, f"The GGUF file of {model.name}")
    return gguf


def _unpack(path: Path, wheel: Wheel, joined: Any, folder: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        for member in wheel.parts:
            with archive.open(member) as stream:
                shutil.copyfileobj(stream, joined, 1 << 20)
        for member in wheel.keep:
            (folder / Path(member).name).write_bytes(archive.read(member))


def _check(path: Path, expected: str, what: str) -> None:
    actual = cache.sha256_file(path)
    if actual != expected:
        raise UserError(
            f"{what} has SHA-256 {actual}",
            expected=expected,
            fix="The download is damaged or was tampered with, so nothing of it was used. "
            "Clear pip's cache (python -m pip cache purge) and try again; if it stays so, "
            "the package index serves another file",
        )


def pip_download(requirement: str, folder: Path) -> Path:
    """Download one wheel with the user's pip set-up (index, proxy, links) and return its path.

    Raises:
        UserError: pip is missing or could not get the wheel; says what was tried.
    """
    command = [
        # Not kept in pip's cache either: a model of 22 wheels would stay there for good.
        *(sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"),
        *("--no-cache-dir", "--no-input", "--disable-pip-version-check"),
        *("--progress-bar=off", "--quiet"),
        *(requirement, "-d", str(folder)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    offline = (
        "Without a network, give a local model directory (as save_pretrained writes it) or a "
        ".gguf file instead of the short name"
    )
    if "No module named pip" in done.stderr:
        raise UserError(
            f"{requirement} could not be fetched: this Python ({sys.executable}) has no pip",
            fix=f"Install it with: {sys.executable} -m ensurepip. {offline}",
        )
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")] or lines
        reason = " ".join(errors[-2:]) or f"it ended with status {done.returncode}"
        raise UserError(
            f"pip could not fetch {requirement} (tried: python -m pip download --no-deps "
            f"{requirement}): {reason}",
            fix="Check the network and pip's index settings (python -m pip config list). "
            + offline,
        )
    return wheels[0]


@dataclass(frozen=True, slots=True)
class ModelRow:
    """One line of ``golden models``: a packaged model, or a GGUF file converted earlier.

    ``size`` is what is downloaded, ``cached_size`` what the converted copy takes on disk, in bytes.
    ``package`` and ``licence`` are empty for the user's own GGUF files.
    """

    name: str
    title: str
    family: str
    layers: int
    parameters: int
    cached: bool
    cached_size: int
    path: Path
    package: str = ""
    size: int = 0
    licence: str = ""


def list_models(cache_dir: str | Path | None = None) -> list[ModelRow]:
    """The packaged models, then the GGUF files converted earlier."""
    root = cache.models_root(cache_dir)
    rows = [
        _row_of(
            root / model.name,
            model.source,
            title=model.title,
            family=model.family,
            layers=model.layers,
            parameters=model.parameters,
            package=model.package,
            size=model.download_size,
            licence=model.licence,
        )
        for model in registry().values()
    ]
    for folder in sorted(root.glob("gguf-*")):
        if folder.name.endswith(".part"):
            continue
        about = cache.json_object(folder / cache.MANIFEST).get("about")
        about = about if isinstance(about, dict) else {}  # a manifest may be damaged
        title, family = (str(about.get(name, "")) for name in ("file", "family"))
        found = (about.get(name) for name in ("layers", "parameters"))
        layers, parameters = (n if isinstance(n, int) else 0 for n in found)
        rows.append(
            _row_of(folder, title=title, family=family, layers=layers, parameters=parameters)
        )
    return rows


def _row_of(folder: Path, source: dict[str, Any] | None = None, **about: Any) -> ModelRow:
    return ModelRow(
        name=folder.name,
        cached=cache.fault(folder, source, check="sizes") is None,
        cached_size=sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
        path=folder,
        **about,
    )


def verify_cache(name: str, cache_dir: str | Path | None = None) -> None:
    """Hash every file of a cached model and compare with its manifest (seconds per gigabyte).

    Raises:
        UserError: not cached, or changed since it was converted.
    """
    row = _row(name, cache_dir)
    source = registry()[name].source if name in registry() else None
    found = cache.fault(row.path, source, check="all")
    if found is not None:
        raise UserError(
            f"The cached copy of {name} in {row.path} is not as it was made: {found}",
            fix="Clear it (golden models --clear) and load the model again",
        )


def clear_cache(name: str, cache_dir: str | Path | None = None) -> int:
    """Remove the converted copy of a model from the cache; returns the bytes freed (0: none there).

    Raises:
        UserError: no model of that name, or it cannot be removed.
    """
    row = _row(name, cache_dir)
    try:
        if row.path.exists():
            shutil.rmtree(row.path)
    except OSError as error:
        raise UserError(
            f"{row.path} cannot be removed: {error.strerror or error}",
            fix="Check the permissions of the cache folder",
        ) from error
    return row.cached_size


def _row(name: str, cache_dir: str | Path | None) -> ModelRow:
    rows = {row.name: row for row in list_models(cache_dir)}
    if name not in rows and name.endswith(".gguf") and Path(name).is_file():
        name = f"gguf-{cache.sha256_file(Path(name))[:16]}"
    if name not in rows:
        problem = f"No packaged or cached model is called '{name}'"
        raise UserError(problem, fix=near_matches(name, rows))
    return rows[name]


HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


_WANTED = ["*.json", "model*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken"]


_UNWANTED = ["*/*", "*.fp16.*", "*.bf16.*", "*.8bit.*"]


_OFFLINE = "Without a network, give a local model directory or a .gguf file"


def fetch_hub(name: str, *, trust_remote_code: bool, progress: cache.Progress = say) -> Path:
    """The folder of hub model ``name``, downloaded if it is not in the hub's cache yet.

    Its configuration is looked at first, so a model that cannot be handled costs no download.
    Weights come as safetensors only.

    Raises:
        UserError: no such model, not allowed, hub out of reach, or a kind that cannot be handled.
    """
    from huggingface_hub import errors, hf_hub_download, snapshot_download

    wanted = [*_WANTED, "*.py"] if trust_remote_code else _WANTED
    try:
        path = Path(hf_hub_download(name, "config.json"))
        try:
            config = read_object(path)
        except UserError as error:
            problem = f"config.json of the hub model {name} is not JSON: {error}"
            raise UserError(problem) from error
        check_config(config, name, trust_remote_code=trust_remote_code)
        progress(f"Looking up {name} on the hub; files not in its cache yet are downloaded.")
        return Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=_UNWANTED))
    except errors.GatedRepoError as error:
        raise UserError(
            f"The hub model {name} is gated: its licence must be accepted first",
            fix=f"Accept it at the page of {name}, then log in with: hf auth login",
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"There is no directory {name} here, and the hub has no public model of that name",
            fix="Check the spelling; for a private model log in with: hf auth login",
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise unreachable(name, error) from error
    except errors.EntryNotFoundError as error:
        raise UserError(
            f"The hub model {name} has no config.json",
            expected="a transformers model with safetensors weights",
            fix="If it is a PEFT adapter, merge it into its base model first and save that",
        ) from error
    except errors.HFValidationError as error:
        raise UserError(f"'{name}' is not a valid hub id: {error}") from error
    except (OSError, *_transport_errors()) as error:
        raise unreachable(name, error) from error


def _transport_errors() -> tuple[type[Exception], ...]:
    """Errors of the HTTP library under the hub client, whose name differs between versions."""
    found = []
    for name in ("httpx", "httpx2"):
        with contextlib.suppress(ImportError):
            found.append(importlib.import_module(name).HTTPError)
    return tuple(found)


def unreachable(name: str, error: BaseException) -> UserError:
    """The error for a hub that does not answer: what was tried, and the way without it."""
    lines = str(error).strip().splitlines()
    return UserError(
        f"There is no directory {name} here, the hub's cache does not hold that model, and the "
        f"hub could not be reached "
        f"({type(error).__name__}: {lines[0] if lines else ''})",
        fix=f"Check the network and HF_ENDPOINT, HF_HUB_OFFLINE. {_OFFLINE}",
    )
