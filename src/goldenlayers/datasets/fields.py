"""Reading single fields of a record (text, answers in all their shapes, probe lists); and our own
JSON lines, one fact per line, written and read back.

Public data sets write an answer as a string, a list of strings, or a list of alias lists, leave
out what they do not have, and now and then hold an empty answer. These helpers accept all of that
and report what they leave out; nothing vanishes without a note.
"""

from __future__ import annotations

import difflib
import functools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from goldenlayers.datasets.tables import FACT_FIELDS, OTHER_NAMES, PROBE_FIELDS, Field
from goldenlayers.durable import write_text
from goldenlayers.errors import DataError, UserError, shortened
from goldenlayers.facts import Fact, Probe, check_text, contradicts

Record = Mapping[str, object]


@dataclass
class Row:
    """Where a record stands (``number`` counts from 1) and what its reader left out of it.

    ``unread`` names fields that the reader does not know.
    """

    number: int
    left_out: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)

    def note(self, what: str) -> None:
        """Keeps a remark; equal remarks of all rows are counted together."""
        self.left_out.append(what)


def text(record: Record, name: str, *, at: str = "") -> str:
    """The required text ``name`` without space around it.

    ``at`` is the record's own place, for the message ("requested_rewrite[2]").

    Raises:
        DataError: the field is missing, empty, or not text.
    """
    return verbatim(record, name, at=at).strip()


def verbatim(record: Record, name: str, *, at: str = "") -> str:
    """The required text ``name`` letter for letter, as prompts are.

    Raises:
        DataError: the field is missing, empty, or not text.
    """
    place = f"{at}.{name}" if at else name
    value = record.get(name)
    if value is None:
        raise DataError("the field is missing", field=place, reason=f"{place} is missing")
    if not isinstance(value, str):
        raise DataError(
            f"it is {_kind(value)}, not text",
            field=place,
            expected="text in quotes",
            reason=f"{place} is not text",
        )
    if not value.strip():
        raise DataError("it is empty", field=place, reason=f"{place} is empty")
    return value


def texts(record: Record, name: str, row: Row) -> tuple[str, ...]:
    """A list of prompts, given as one string or a list; () when missing, empty ones noted."""
    value = record.get(name)
    if value is None:
        return ()
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list):
        raise DataError(f"it is {_kind(value)}, not a list of texts", field=name)
    kept = []
    for item in items:
        if isinstance(item, str) and item.strip():
            kept.append(item)
        else:
            row.note(f"{name} that are empty or not text, left out")
    return tuple(kept)


def answers(value: object, name: str) -> tuple[str, ...]:
    """All ways of writing an answer, the first one first.

    Takes a string, a list of strings, a list of alias lists, or {"str": …} (CounterFact); None
    and empty lists give (). Empty strings and repetitions are dropped.

    Raises:
        DataError: something else, such as a number.
    """
    return tuple(dict.fromkeys(item.strip() for item in _flat(value, name) if item.strip()))


def old_answer(record: Record, name: str) -> tuple[str | None, tuple[str, ...]]:
    """The answer before the edit and its aliases; (None, ()) when the record has none.

    Raises:
        DataError: the answer is there but empty.
    """
    found = answers(record.get(name), name)
    if found:
        return found[0], found[1:]
    if any(True for _ in _flat(record.get(name), name)):
        raise DataError("the old answer is empty", field=name)
    return None, ()


def probes(
    record: Record, name: str, row: Row, *, needs_answer: bool, kind: str = ""
) -> tuple[Probe, ...]:
    """The probes of ``record[name]``.

    Takes {kind: probes} or probes, where probes is a list of {"prompt", "ground_truth"}, one such
    object, or one object of lists; a missing or empty part gives no probes. A probe that cannot
    be used is left out and noted. A probe without an answer is kept, without it, where only the
    prediction counts (locality), and left out and noted where ``needs_answer`` (portability).
    """
    value = record.get(name)
    if value is None:
        return ()
    if isinstance(value, Mapping) and "prompt" not in value:
        groups = [
            (str(group), items, f"{name}.{shortened(str(group), 40)}")
            for group, items in value.items()
        ]
    else:
        groups = [(kind, value, name)]
    made = []
    for group, items, place in groups:
        for item in _items(items, place):
            probe = _probe(item, group, name, row, needs_answer)
            if probe is not None:
                made.append(probe)
    return tuple(made)


def _items(value: object, place: str) -> Iterable[object]:
    """The single probes of one kind, whatever way they are put together."""
    if value is None:
        return []
    if isinstance(value, list):
        return value
    if isinstance(value, Mapping):
        prompts, truths = value.get("prompt"), value.get("ground_truth")
        if not isinstance(prompts, list):
            return [value]
        if not isinstance(truths, list) or len(truths) != len(prompts):
            raise DataError(
                f"{len(prompts)} prompts do not go with their answers",
                field=place,
                expected="one ground_truth for each prompt",
                reason="probes: prompts and answers differ in number",
            )
        return [
            {"prompt": prompt, "ground_truth": truth}
            for prompt, truth in zip(prompts, truths, strict=True)
        ]
    raise DataError(
        f"it is {_kind(value)}, not a list of probes", field=place, reason="probes are not a list"
    )


def _probe(item: object, kind: str, name: str, row: Row, needs_answer: bool) -> Probe | None:
    prompt = item.get("prompt") if isinstance(item, Mapping) else None
    if not isinstance(item, Mapping) or not isinstance(prompt, str) or not prompt.strip():
        row.note(f"{name} probes without a prompt, left out")
        return None
    try:
        found = answers(item.get("ground_truth"), name)
    except DataError:
        row.note(f"{name} probes whose answer is not text, left out")
        return None
    if not found and needs_answer:
        row.note(f"{name} probes without an answer, left out")
        return None
    if not found:
        row.note(f"{name} probes without an answer, kept: only the prediction counts")
    try:
        return Probe(prompt, found[0] if found else None, kind, found[1:])
    except DataError as error:
        row.note(f"{name} probes left out: {error.problem}")
        return None


def _flat(value: object, name: str) -> Iterable[str]:
    if value is None:
        return
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _flat(item, name)
    elif isinstance(value, Mapping) and "str" in value:
        yield from _flat(value["str"], name)
    else:
        raise DataError(
            f"it holds {_kind(value)}",
            field=name,
            expected="text, a list of texts, or a list of alias lists",
            reason=f"{name} is not text",
        )


def _kind(value: object) -> str:
    """What a JSON value is, in words."""
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int | float):
        return f"the number {shortened(str(value), 40)}"
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, list):
        return "a list"
    if value is None:
        return "null"
    return "text" if isinstance(value, str) else f"a value of type {type(value).__name__}"


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


def read_own(record: Record, row: Row) -> Iterable[Fact]:
    """One of our own lines. The user can mend this file, so whatever is wrong in it is an error."""
    values = _known_fields(record, FACT_FIELDS, "", row)
    values.setdefault("id", f"fact-{row.number}")
    if isinstance(values["id"], int) and not isinstance(values["id"], bool):
        values["id"] = str(values["id"])
    for name in ("locality", "portability"):
        values[name] = _probes(values.get(name, ()), name, row)
    generated = values.get("target_old_is_generated", False)
    if not isinstance(generated, bool):
        raise DataError("it is neither true nor false", field="target_old_is_generated")
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
    known = frozenset(one.name for one in fields)
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
    for one in fields:
        if one.required and one.name not in found:
            place = f"{at}.{one.name}" if at else one.name
            raise DataError("the field is missing", field=place, reason=f"{one.name} is missing")
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
