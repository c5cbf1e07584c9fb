"""Where an export is written: whole or not at all, and over nothing but an earlier export.

A folder is known as an export by the record that lies in it. What may be replaced is decided here
and not by that record: only files of the names that exports write, each a plain file.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

import goldenlayers
from goldenlayers.durable import absolute, in_place_of, is_abandoned, lock, read_text_file, sync
from goldenlayers.errors import UserError
from goldenlayers.models.gguf import read_header
from goldenlayers.records import parse_json

_MARK = ".goldenlayers-export"  # in a folder that is being written
RECORD = "goldenlayers.json"
_FORMAT = "goldenlayers.export"
GGUF_MARK = "goldenlayers.version"
"""The entry by which a GGUF adapter is known as ours."""

_KNOWN = (
    *(RECORD, "README.md", "adapter_config.json", "adapter_model.safetensors"),
    *("config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json"),
    *("model-[0-9]*-of-[0-9]*.safetensors", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "vocab.json"),
    *("vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
)


def refuse_place(out: Path, *, file: bool = False, overwrite: bool = False) -> None:
    """Refuse a place that is taken, unless an earlier export of the same sort (a ``file``, or else
    a folder) stands there and may be replaced.

    Raises:
        UserError: it is taken; says what would have been replaced, or what keeps it from being.
    """
    try:
        if not os.path.lexists(out):
            return
        why = _not_ours(out, file=file)
    except (OSError, ValueError) as error:  # ValueError: NUL in the name
        raise _unwritable(out, error) from error
    if overwrite and not why:
        return
    raise UserError(
        f"{out} is there already" + (f", and {why}" if overwrite else ""),
        fix="Choose another --out"
        + (", or add --overwrite to replace that export" if not why and not overwrite else ""),
    )


def _not_ours(out: Path, *, file: bool) -> str:
    """Why what stands at ``out`` is no export, or holds more than one; "" if it may be replaced."""
    if out.is_symlink():
        return "it is a link"
    if file and out.is_dir():
        return "it is a folder"
    if out.is_file():
        if not file:
            return "it is a file"
        try:
            values = read_header(out).values
        except UserError:
            return "it is no GGUF adapter that an export wrote"
        ours = values.get("general.type") == "adapter" and GGUF_MARK in values
        return "" if ours else "it is no adapter that an export wrote"
    if not out.is_dir():
        return "it is no folder"
    try:
        record = parse_json(read_text_file(out / RECORD, 1 << 20), out / RECORD)
    except (UserError, OSError):
        record = None
    if not isinstance(record, dict) or record.get("format") != _FORMAT:
        return "it is no export of ours"
    for item in sorted(os.scandir(out), key=lambda item: item.name):
        if not item.is_file(follow_symlinks=False) or not _is_known(item.name):
            return f"it holds what no export wrote: {ascii(item.name)[1:-1][:60]}"
    return ""


def _is_known(name: str) -> bool:
    return any(fnmatchcase(name, known) for known in _KNOWN)


def _unwritable(out: Path, error: BaseException) -> UserError:
    return UserError(
        f"'{str(out)[:200]}' could not be written: {getattr(error, 'strerror', None) or error}",
        fix="Check the path, its permissions and the free space",
    )


@contextmanager
def new_folder(out: Path, about: dict[str, Any], *, overwrite: bool = False) -> Iterator[Path]:
    """A folder to write into that becomes ``out`` when all went well, and vanishes otherwise.

    While it is written it is locked and bears a mark. So the next export into the same place knows
    what a killed one has left there, and removes it. All files get the permissions that the user
    gives new files (safetensors lets nobody else read its own). ``about`` goes into its record.

    Raises:
        UserError: the place is taken, or cannot be written.
    """
    out = Path(absolute(out))  # "." has no name
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        refuse_place(out, overwrite=overwrite)
        out.parent.mkdir(parents=True, exist_ok=True)
        for old in out.parent.glob(".*.part"):  # of exports that were killed
            if (old / _MARK).is_file() and not old.is_symlink() and is_abandoned(old):
                shutil.rmtree(old, ignore_errors=True)
        part.mkdir()
        with ExitStack() as stack:
            stack.callback(shutil.rmtree, part, ignore_errors=True)
            descriptor = os.open(part, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            lock(descriptor)
            (part / _MARK).touch()
            yield part
            record = {"format": _FORMAT, "version": goldenlayers.__version__, **about}
            (part / RECORD).write_text(json.dumps(record, indent=2) + "\n", "utf-8")
            mode = (part / _MARK).stat().st_mode & 0o777
            for file in part.rglob("*"):
                if file.is_file():
                    file.chmod(mode)
                sync(file)
            _put(part, out, overwrite=overwrite)
            (out / _MARK).unlink()
            sync(out.parent)
    except (OSError, ValueError, SafetensorError) as error:
        raise _unwritable(out, error) from error


def _put(part: Path, out: Path, *, overwrite: bool) -> None:
    """Move ``part`` to ``out``, where an earlier export may stand that is looked at once more."""
    refuse_place(out, overwrite=overwrite)
    if not out.exists():
        part.rename(out)
        return
    aside = out.with_name(f".{out.name}.{os.getpid()}.old")
    out.rename(aside)
    try:
        part.rename(out)
    except OSError:
        aside.rename(out)
        raise
    for item in list(os.scandir(aside)):  # and nothing that was put there meanwhile
        if item.is_file(follow_symlinks=False) and _is_known(item.name):
            Path(item.path).unlink()
    with contextlib.suppress(OSError):
        aside.rmdir()


@contextmanager
def new_file(out: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A file to write that becomes ``out`` when all went well, and vanishes otherwise.

    Raises:
        UserError: the place is taken, cannot be written, or its name does not end in ``.gguf``.
    """
    if out.suffix.lower() != ".gguf":
        raise UserError(
            f"--out is {str(out)[:200]}", expected="a file NAME.gguf, for llama.cpp to load"
        )
    try:
        refuse_place(out, file=True, overwrite=overwrite)
        out.parent.mkdir(parents=True, exist_ok=True)
        with in_place_of(out) as part:
            yield part
            sync(part)
            refuse_place(out, file=True, overwrite=overwrite)
        sync(out.parent)
    except (OSError, ValueError) as error:
        raise _unwritable(out, error) from error
