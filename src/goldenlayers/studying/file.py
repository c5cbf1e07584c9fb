"""What a study is made of, and the file that says so."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from goldenlayers.durable import read_text_file
from goldenlayers.editors import Editor, InContext, make_editor, read_settings
from goldenlayers.errors import UserError, check_number, check_seed, near_matches
from goldenlayers.evaluation.metrics import check_metrics
from goldenlayers.locating import LayerMethod, make_method
from goldenlayers.models.fetching import registry
from goldenlayers.records import entry, parse_yaml, short
from goldenlayers.statistics.documents import WORDS

EXAMPLE = """\
# golden study FILE --out DIR runs all of this, and goes on after a kill.
models:                      # short names, folders, .gguf files, hub ids
  - gemma3-270m
  - model: qwen2.5-coder-1.5b
    facts: {test: 12}        # fewer facts for this one
    data: [starter]          # and only these data sets, by their name
    chat: true               # asked by its chat template
data:                        # starter, files (from the folder of this file), FORMAT:FILE
  - starter
  - {data: counterfact/counterfact_500.json, name: counterfact}
editors:                     # the first one is what the others are compared with
  - rome
  - {editor: memit, name: memit-3, settings: {layers_before: 3}}
  - in-context
settings: {steps: 10, prefixes: 2}   # of all editors that have them
layers: [1/6, 1/3, 1/2]      # all, every 2, numbers, shares of the depth, published, middle
facts: {test: 40, proxy: 100}        # proxy facts, about other subjects, choose; test facts judge
methods:                     # layer choices to be judged; none if left out
  - lga
  - {method: transfer, settings: {align: true}}
statistics: package          # text of the key statistics: package, model, or a file
seed: 0
dtype: float32
chat: false                  # of all models that do not say it
"""
NO_EDIT = "none"
_RESERVED = ("study", "locate", "compare")
_DTYPES = ("float32", "bfloat16", "float16", "float64", "auto")
_MOST = 1_000_000
_FILE_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Facts:
    """How many facts: ``test`` judge, ``proxy`` choose; None where another place says it."""

    test: int | None = None
    proxy: int | None = None


@dataclass(frozen=True, kw_only=True)
class StudyModel:
    """A model: ``name`` is its folder, ``source`` what is loaded.

    ``data`` names its data sets, all if None; ``layers`` are its own, if not None, and so is
    ``chat``.
    """

    name: str
    source: str
    facts: Facts = Facts()
    layers: tuple[str, ...] | None = None
    data: tuple[str, ...] | None = None
    chat: bool | None = None


@dataclass(frozen=True, kw_only=True)
class StudyData:
    """A data set: ``name`` is its folder, ``source`` what is read."""

    name: str
    source: str
    facts: Facts = Facts()


@dataclass(frozen=True, kw_only=True)
class StudyEditor:
    """An editor, in-context, or None for the model as it is."""

    name: str
    editor: Editor | InContext | None
    settings: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def sweeps(self) -> bool:
        """Whether it edits at layers."""
        return isinstance(self.editor, Editor)

    @property
    def method(self) -> str:
        """The editor's own name."""
        return NO_EDIT if self.editor is None else self.editor.name


@dataclass(frozen=True, kw_only=True)
class StudyMethod:
    """A layer method whose choice is judged, with its options as they were given."""

    name: str
    method: LayerMethod
    called: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Study:
    """Models × data sets × editors, the layers, and the layer choices that are judged.

    ``layers`` are words: "all", "every N", or numbers, shares ("1/6"), "published", "middle".
    """

    models: tuple[StudyModel, ...]
    data: tuple[StudyData, ...]
    editors: tuple[StudyEditor, ...]
    methods: tuple[StudyMethod, ...] = ()
    layers: tuple[str, ...] = ("all",)
    facts: Facts = Facts(test=40, proxy=100)
    seed: int = 0
    statistics: str = "package"
    dtype: str = "float32"
    metrics: tuple[str, ...] = ()
    chat: bool = False

    @classmethod
    def read(cls, path: str | Path, base: str | Path | None = None) -> Study:
        """The study of a YAML file; see ``EXAMPLE``.

        Args:
            path: the file.
            base: the folder that its relative paths begin at; default the file's own.

        Raises:
            UserError: it cannot be read; an unknown key, model-free things that are wrong (an
                unknown editor, method or setting, a layer that no model has, two equal names).
        """
        file = Path(path).expanduser()
        record = parse_yaml(read_text_file(file, _FILE_BYTES), file)
        return cls.of(record, base or file.parent, str(file))

    @classmethod
    def of(cls, record: Any, base: str | Path = ".", where: str = "the study") -> Study:
        """The study of a mapping such as the file holds; see :meth:`read`."""
        hints = {
            **dict.fromkeys(("models", "data", "editors", "methods"), list[Any]),
            "layers": Any,
            "facts": Any,
            "settings": dict[str, Any],
            "seed": int,
            "statistics": str,
            "dtype": str,
            "metrics": list[str],
            "chat": bool,
        }
        given = _checked(record, hints, where)
        for name in ("models", "data", "editors"):
            if not given.get(name):
                raise UserError(f"{where} names no {name}", expected=f"a list under '{name}:'")
        folder = Path(base).expanduser()
        shared = given.get("settings", {})
        editors = [_editor(one, shared, f"{where}, editors") for one in given["editors"]]
        _refuse_unused(shared, editors, where)
        facts = _facts(given.get("facts"), f"{where}, facts")
        found = cls(
            models=tuple(_model(one, folder, f"{where}, models") for one in given["models"]),
            data=tuple(_data(one, folder, f"{where}, data") for one in given["data"]),
            editors=tuple(editors),
            methods=tuple(_method(o, f"{where}, methods") for o in given.get("methods", [])),
            layers=layer_words(given.get("layers", "all"), f"{where}, layers"),
            facts=Facts(
                test=cls.facts.test if facts.test is None else facts.test,
                proxy=cls.facts.proxy if facts.proxy is None else facts.proxy,
            ),
            seed=given.get("seed", 0),
            statistics=_based(given.get("statistics", "package"), folder, WORDS),
            dtype=given.get("dtype", "float32"),
            metrics=check_metrics(given["metrics"]) if given.get("metrics") else (),
            chat=given.get("chat", False),
        )
        found._check(where)
        return found

    def counts(self, model: StudyModel, data: StudyData) -> tuple[int, int]:
        """(test, proxy) facts of a cell: the smaller of the model's and the data set's own numbers,
        where one has its own.
        """

        def count(name: str) -> int:
            own = [getattr(one.facts, name) for one in (model, data)]
            return min((n for n in own if n is not None), default=getattr(self.facts, name))

        return count("test"), count("proxy")

    def data_of(self, model: StudyModel) -> list[StudyData]:
        """The data sets that a model is studied on."""
        return [one for one in self.data if model.data is None or one.name in model.data]

    def _check(self, where: str) -> None:
        for what, names in (
            ("models", [one.name for one in self.models]),
            ("data sets", [one.name for one in self.data]),
            ("editors", [one.name for one in self.editors]),
            ("methods", [one.name for one in self.methods]),
        ):
            seen: set[str] = set()
            for name in names:
                if name.casefold() in seen:
                    raise UserError(
                        f"{where}: two {what} are called '{name}'", fix="Give one of them a 'name:'"
                    )
                seen.add(name.casefold())
        known = [one.name for one in self.data]
        for model in self.models:
            for name in model.data or ():
                if name not in known:
                    fix = near_matches(name, known)
                    raise UserError(f"{where}: {model.name} has no data '{name}'", fix=fix)
        if self.metrics and "perplexity" in self.metrics:
            raise UserError(f"{where}: a study measures no perplexity", fix="Leave it out")
        if self.dtype not in _DTYPES:
            fix = near_matches(self.dtype, _DTYPES)
            raise UserError(f"{where}: unknown dtype '{self.dtype}'", fix=fix)
        text = self.statistics
        if text not in WORDS and not (text.startswith("hub:") or Path(text).is_file()):
            fix = "Give a file from the folder of the study's file, package or model"
            raise UserError(f"{where}: there is no text {text} for the statistics", fix=fix)
        check_seed(self.seed)


def _checked(record: Any, hints: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A mapping's values, held to their types.

    Raises:
        UserError: no mapping, an unknown key, or a value of another type.
    """
    if not isinstance(record, dict):
        raise UserError(
            f"{where}: {short(record)} is no mapping", expected=f"keys such as {', '.join(hints)}"
        )
    for name in record:
        if name not in hints:
            raise UserError(
                f"{where}: unknown key '{ascii(name)[1:-1][:60]}'", fix=near_matches(name, hints)
            )
    return {name: entry(record, name, hints[name], where) for name in record}


def _facts(record: Any, where: str) -> Facts:
    given = {} if record is None else _checked(record, {"test": int, "proxy": int}, where)
    for name, count in given.items():
        check_number(f"{where}: {name}", count, 1, _MOST)
    return Facts(**given)


def _named(
    record: Any, key: str, where: str, hints: Mapping[str, Any]
) -> tuple[str, dict[str, Any]]:
    """What an entry names: it is text, or a mapping with ``key`` and what else may be said."""
    given = {key: record} if isinstance(record, str) else record
    given = _checked(given, {key: str, "name": str, **hints}, where)
    if not given.get(key, "").strip():
        raise UserError(f"{where}: {short(record)} names no {key}")
    return given[key], given


def _model(record: Any, folder: Path, where: str) -> StudyModel:
    hints = {"facts": Any, "layers": Any, "data": list[str], "chat": bool}
    source, given = _named(record, "model", where, hints)
    own, layers = f"{where}, {source}", given.get("layers")
    return StudyModel(
        name=_safe(given.get("name", Path(source).name), where),
        source=_based(source, folder, registry()),
        facts=_facts(given.get("facts"), f"{own}, facts"),
        layers=None if layers is None else layer_words(layers, f"{own}, layers"),
        data=tuple(given["data"]) if "data" in given else None,
        chat=given.get("chat"),
    )


def _data(record: Any, folder: Path, where: str) -> StudyData:
    source, given = _named(record, "data", where, {"facts": Any})
    return StudyData(
        name=_safe(given.get("name", Path(source).name.partition(".")[0]), where),
        source=_based(source, folder, ("starter",)),
        facts=_facts(given.get("facts"), f"{where}, {source}, facts"),
    )


def _editor(record: Any, shared: Mapping[str, Any], where: str) -> StudyEditor:
    name, given = _named(record, "editor", where, {"settings": dict[str, Any]})
    own = given.get("settings", {})
    label = _safe(given.get("name", name), where)
    if name == NO_EDIT:
        if own:
            raise UserError(f"{where}: {NO_EDIT} has no settings", fix="Leave them out")
        return StudyEditor(name=label, editor=None)
    start = InContext() if name == InContext.name else make_editor(name)
    has = {f.name for f in dataclasses.fields(start)}
    # As text, by which a run's record has them.
    texts = {n: str(value) for n, value in {**shared, **own}.items() if n in has or n in own}
    editor = read_settings(start, texts, f"{where}, {name}, settings:")
    return StudyEditor(name=label, editor=editor, settings=texts)


def _method(record: Any, where: str) -> StudyMethod:
    called, given = _named(record, "method", where, {"settings": dict[str, Any]})
    options = given.get("settings", {})
    method = make_method(called, **options)
    return StudyMethod(
        name=_safe(given.get("name", method.label if options else called), where),
        method=method,
        called=called,
        options=options,
    )


def layer_words(value: Any, where: str) -> tuple[str, ...]:
    """The words of ``layers`` in a study's file: "all", "every N", or numbers, shares ("1/6"),
    "published", "middle".

    Raises:
        UserError: a word that can be no layer; it begins with ``where``.
    """
    words = [str(one) for one in value] if isinstance(value, list) else [str(value)]
    several = words[0] == "all" or re.fullmatch(r"every [1-9][0-9]{0,3}", words[0]) if words else 0
    for word in words:
        share = re.fullmatch(r"([0-9]{1,4})/([1-9][0-9]{0,3})", word)
        right = int(share[1]) <= int(share[2]) if share else re.fullmatch(r"-?[0-9]{1,4}", word)
        if not (right or word in ("published", "middle") or (several and len(words) == 1)):
            raise UserError(
                f"{where}: {short(word)} is no layer",
                expected="all, every 2, or a list of numbers and shares of the depth such as 1/6",
            )
    if not words:
        raise UserError(f"{where}: there are none", expected="at least one layer, or all")
    return tuple(words)


def _refuse_unused(shared: Mapping[str, Any], editors: Collection[StudyEditor], where: str) -> None:
    for name in shared:
        if not any(name in one.settings for one in editors):
            known = {
                f.name for one in editors if one.editor for f in dataclasses.fields(one.editor)
            }
            raise UserError(
                f"{where}, settings: no editor of the study has '{name}'",
                fix=near_matches(name, known),
            )


def _based(source: str, folder: Path, words: Collection[str]) -> str:
    """A path of the file as it is good from here; ``words``, and what is not there, stay."""
    if source in words:
        return source
    head, colon, rest = source.partition(":")
    for before, text in (("", source), (f"{head}:", rest if colon else "")):
        try:
            if text and not Path(text).is_absolute() and (folder / text).exists():
                return f"{before}{folder.resolve() / text}"
        except (OSError, ValueError):
            continue
    return source


def _safe(name: str, where: str) -> str:
    """A name as a folder can have it, whatever it holds.

    Raises:
        UserError: nothing is left of it, or the study itself writes to a folder of that name.
    """
    safe = re.sub(r"[^A-Za-z0-9._+-]+", "-", name).strip(".-")[:80]
    safe = re.sub(r"\.part$", "-part", safe)
    if not safe or safe.casefold() in _RESERVED:
        raise UserError(f"{where}: {short(name)} cannot name a folder", fix="Give a 'name:'")
    return safe
