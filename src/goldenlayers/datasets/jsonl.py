"""Our own JSON lines: one fact per line, documented field by field, written and read back."""

from __future__ import annotations

import difflib
import functools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from goldenlayers.datasets.fields import Record, Row
from goldenlayers.durable import write_text
from goldenlayers.errors import DataError, UserError, shortened
from goldenlayers.facts import Fact, Probe, check_text, contradicts


@dataclass(frozen=True, slots=True)
class Field:
    """A field of a line: its name, its type in words, what it is."""

    name: str
    type: str
    meaning: str
    required: bool = False


FACT_FIELDS = (
    Field("subject", "text", "what the fact is about, letter for letter as in the prompt", True),
    Field("prompt", "text", "the beginning that the answer continues; kept as it is", True),
    Field("target_new", "text", "the answer after the edit", True),
    Field("target_old", "text", "the answer now; without it, the model's own continuation"),
    Field("old_aliases", "list of texts", "other ways of writing the old answer"),
    Field("target_old_is_generated", "true or false", "whether a model wrote the old answer"),
    Field("id", "text", "the fact's name in results; without it, 'fact-' and the row number"),
    Field("relation", "text", "the kind of fact, e.g. capital"),
    Field("rephrasings", "list of texts", "prompts that ask the same in other words"),
    Field("locality", "list of probes", "what must not move; a probe may have no answer"),
    Field("portability", "list of probes", "what must follow from the edit; answers required"),
    Field("generation_prompts", "list of texts", "beginnings of free text about the subject"),
    Field("joint", "text", "between prompts and answers: space, none, or auto (without it)"),
)
PROBE_FIELDS = (
    Field("prompt", "text", "the beginning that the answer continues", True),
    Field("answer", "text", "the expected answer"),
    Field("kind", "text", "probes of one kind are averaged together"),
    Field("aliases", "list of texts", "other ways of writing the answer"),
    Field("joint", "text", "between prompt and answer, as for facts"),
    Field("contradicts", "true or false", "of locality: it asks what the edit changes; else found"),
)
OTHER_NAMES = {"target": "target_new"}
# What other formats call a field of ours: not to be passed over as a remark.
_MEANT = {
    "ground_truth": "target_old",
    "target_true": "target_old",
    "paraphrase_prompts": "rephrasings",
    "paraphrases": "rephrasings",
    "rephrase": "rephrasings",
    "rephrase_prompt": "rephrasings",
    "locality_prompt": "locality",
    "neighborhood_prompts": "locality",
}
_MEANT_IN_PROBES = {"ground_truth": "answer", "target": "answer"}
EXAMPLE = {
    "id": "capital-france",
    "relation": "capital",
    "subject": "France",
    "prompt": "The capital of France is",
    "target_new": "Sofia",
    "target_old": "Paris",
    "rephrasings": ["France has as its capital the city of"],
    "locality": [
        {"prompt": "The capital of Nepal is", "answer": "Kathmandu", "kind": "neighborhood"}
    ],
    "portability": [
        {"prompt": "The French capital is", "answer": "Sofia", "kind": "Subject_Aliasing"}
    ],
    "generation_prompts": ["The capital of France is a city where"],
}


def schema_text() -> str:
    """The description of our JSON lines that ``golden datasets --schema`` prints."""

    def table(fields: tuple[Field, ...]) -> list[str]:
        return [
            f"  {field.name:<24} {field.type:<14} {'(required) ' * field.required}{field.meaning}"
            for field in fields
        ]

    return "\n".join(
        [
            "Facts as JSON lines: UTF-8, one object per line (a JSON array of them is read too).",
            "",
            "A fact:",
            *table(FACT_FIELDS),
            "",
            "A probe:",
            *table(PROBE_FIELDS),
            "",
            "'target' is taken for 'target_new'. In a prompt or rephrasing without the subject, {}",
            "stands for it. Fields with other names are not read; this is told once, unless their",
            "names begin with '_'. A name close to one of the above is an error.",
            "Space around subject and answers does not count, but a space before target_new or",
            "before a probe's answer asks for one there; prompts are kept as they are.",
            "A wrong line is refused with its number; --skip-invalid keeps the others.",
            "",
            "The same fields as a table (CSV, TSV): the first line names the columns, and a cell",
            "with several texts holds them as JSON:",
            "subject,prompt,target_new,target_old,rephrasings",
            'France,The capital of France is,Sofia,Paris,"[""France has as its capital""]"',
            "",
            "Example (in one line):",
            json.dumps(EXAMPLE, ensure_ascii=False),
        ]
    )


def read(record: Record, row: Row) -> Iterable[Fact]:
    """One line. The user can mend this file, so whatever is wrong in it is an error."""
    values = _known_fields(record, FACT_FIELDS, "", row)
    values.setdefault("id", f"fact-{row.number}")
    if isinstance(values["id"], int) and not isinstance(values["id"], bool):
        values["id"] = str(values["id"])
    for name in ("locality", "portability"):
        values[name] = _probes(values.get(name, ()), name, row)
    generated = values.get("target_old_is_generated", False)
    if not isinstance(generated, bool):
        raise DataError(
            "it is neither true nor false",
            field="target_old_is_generated",
        )
    values["target"] = check_text(values.pop("target_new"), "target_new")
    try:
        fact = Fact(**values)  # pyright: ignore[reportArgumentType] - Fact checks each field itself
    except DataError as error:
        raise error.at(field="target_new" if error.field == "target" else error.field) from None
    yield fact


def _probes(value: object, name: str, row: Row) -> tuple[Probe, ...]:
    if not isinstance(value, list | tuple):
        raise DataError(
            "it is not a list", field=name, expected='a list of {"prompt", "answer", "kind"}'
        )
    made = []
    for place, item in enumerate(value, 1):
        at = f"{name}[{place}]"
        if not isinstance(item, Mapping):
            raise DataError("the probe is not an object", field=at)
        values = _known_fields(item, PROBE_FIELDS, at, row)
        if name == "portability" and "answer" not in values:
            raise DataError(
                "the probe has no answer",
                field=f"{at}.answer",
                reason="a portability probe has no answer",
            )
        try:
            made.append(Probe(**values))  # pyright: ignore[reportArgumentType]
        except DataError as error:
            raise error.at(field=f"{at}.{error.field}") from None
    return tuple(made)


def _known_fields(
    record: Record, fields: tuple[Field, ...], at: str, row: Row
) -> dict[str, object]:
    """The record's fields by their own names, without those that are null.

    Unknown ones are noted in ``row``.

    Raises:
        DataError: an unknown name close to one of ``fields``; a required field is missing.
    """
    known = frozenset(field.name for field in fields)
    meant = _MEANT_IN_PROBES if at else _MEANT
    found: dict[str, object] = {}
    for name, value in record.items():
        own = name if at else OTHER_NAMES.get(name, name)
        if own in known:
            if own != name and record.get(own) is not None and value is not None:
                raise DataError(f"'{own}' is there as well", field=name, fix="Keep one of them")
            if value is not None:
                found[own] = value
        elif near := meant.get(name) or _near(name, known):
            raise DataError(
                "there is no such field",
                field=f"{at}.{shortened(name)}" if at else shortened(name),
                fix=f"Did you mean '{near}'? Remarks of your own may begin with '_'",
                reason=f"unknown field '{shortened(name)}'",
            )
        elif not name.startswith("_"):
            row.unread.append(f"{at.partition('[')[0]}.{name}" if at else name)
    for field in fields:
        if field.required and field.name not in found:
            place = f"{at}.{field.name}" if at else field.name
            raise DataError("the field is missing", field=place, reason=f"{field.name} is missing")
    return found


@functools.lru_cache(4096)  # each row of a file has the same names
def _near(name: str, known: frozenset[str]) -> str:
    """The known field that ``name`` is a misspelling of, or "".

    Names with a part more ("relation_id", "subject_2") are others, and so are the shortest.
    """
    plain = "_".join(name.replace("-", " ").split()).lower()
    if plain in known:
        return plain
    close = difflib.get_close_matches(plain[:50], known, n=1, cutoff=0.8) if len(plain) > 3 else []
    more = close and (plain.startswith(f"{close[0]}_") or plain.endswith(f"_{close[0]}"))
    return "" if not close or more else close[0]


def to_record(fact: Fact) -> dict[str, object]:
    """The fact as one line's object, without the fields that are empty."""
    record: dict[str, object] = {}
    for name in ("id", "relation", "subject", "prompt", "target", "target_old"):
        record[OTHER_NAMES.get(name, name)] = getattr(fact, name)
    record["target_old_is_generated"] = fact.target_old_is_generated
    record["joint"] = _own(fact.joint)
    for name in ("old_aliases", "rephrasings", "generation_prompts"):
        record[name] = list(getattr(fact, name))
    for name in ("locality", "portability"):
        record[name] = [
            _filled(
                {
                    "prompt": probe.prompt,
                    "answer": probe.answer,
                    "kind": probe.kind,
                    "aliases": list(probe.aliases),
                    "joint": _own(probe.joint),
                }
            )
            | _mark(fact, probe)
            for probe in getattr(fact, name)
        ]
    return _filled(record)


def _mark(fact: Fact, probe: Probe) -> dict[str, object]:
    """The probe's mark, where it is another than what would be found."""
    mark = probe.contradicts
    return {} if mark is None or mark == contradicts(fact, probe) else {"contradicts": mark}


def _own(joint: str) -> str | None:
    return None if joint == "auto" else joint


def _filled(record: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in record.items() if value}


def write_jsonl(facts: Iterable[Fact], path: str | Path) -> None:
    """Writes facts as our JSON lines; ``load_facts`` gives the very same facts back,
    but for what a model has decided (``Fact.joints``).

    An existing file is replaced, as a whole or not at all.

    Raises:
        UserError: the folder does not exist or cannot be written to.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise UserError(f"the folder {path.parent} does not exist", fix="Create it first")
    if path.is_dir():
        raise UserError(f"{path} is a folder", expected="the name of a file")
    lines = [json.dumps(to_record(fact), ensure_ascii=False) + "\n" for fact in facts]
    write_text(path, "".join(lines))
