"""Reading single fields of a record: text, answers in all their shapes, probe lists.

Public data sets write an answer as a string, a list of strings, or a list of alias lists, leave
out what they do not have, and now and then hold an empty answer. These helpers accept all of that
and report what they leave out; nothing vanishes without a note.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from goldenlayers.errors import DataError, shortened
from goldenlayers.facts import Probe

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
