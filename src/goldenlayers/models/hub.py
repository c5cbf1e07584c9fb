"""Models of the hub, fetched into the hub's own cache: configuration first, then safetensors."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

from goldenlayers.errors import UserError
from goldenlayers.models import cache
from goldenlayers.models.checks import check_config
from goldenlayers.models.files import read_object

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_WANTED = ["*.json", "model*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken"]
_UNWANTED = ["*/*", "*.fp16.*", "*.bf16.*", "*.8bit.*"]
_OFFLINE = "Without a network, give a local model directory or a .gguf file"


def fetch_hub(name: str, *, trust_remote_code: bool, progress: cache.Progress = cache.say) -> Path:
    """The folder of hub model ``name``, downloaded if it is not in the hub's cache yet.

    Its configuration is looked at first, so a model that cannot be handled costs no download.
    Weights come as safetensors only.

    Raises:
        UserError: no such model, not allowed, hub out of reach, or a kind that cannot be handled.

    """
    from huggingface_hub import errors, hf_hub_download, snapshot_download

    wanted = [*_WANTED, "*.py"] if trust_remote_code else _WANTED
    try:
        config = _config(Path(hf_hub_download(name, "config.json")), name)
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


def _config(path: Path, name: str) -> dict[str, Any]:
    try:
        return read_object(path)
    except UserError as error:
        raise UserError(f"config.json of the hub model {name} is not JSON: {error}") from error


def _transport_errors() -> tuple[type[Exception], ...]:
    """Errors of the HTTP library under the hub client, whose name differs between versions."""
    found = []
    for name in ("httpx", "httpx2"):
        try:
            found.append(importlib.import_module(name).HTTPError)
        except ImportError:
            continue
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
