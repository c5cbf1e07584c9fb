"""The check of an edit (``check.json``) as facts: what it asked, asked again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from goldenlayers.datasets.fields import Record, Row, text, verbatim
from goldenlayers.errors import DataError, shortened
from goldenlayers.facts import Fact, Probe

PARTS = ("prompt", "rephrase", "neighbours", "unrelated")


def read_check(record: Record, row: Row) -> Iterable[Fact]:
    """The facts of a check, with its rephrasings, and its other prompts as locality probes.

    These have no answer: what the untouched model says is to stay, as in the check itself.
    """
    asked: dict[str, dict[str, list[str]]] = {}
    for one, at in _objects(record, "edited"):
        name = text(one, "id", at=at)
        if name in asked:
            raise DataError(f"two facts are called '{shortened(name)}'", field=f"{at}.id")
        asked[name] = {part: [] for part in PARTS}
    for one, at in _objects(record, "probes"):
        fact, part = text(one, "fact", at=at), text(one, "part", at=at)
        if fact not in asked:
            raise DataError(
                f"no edited fact is called '{shortened(fact)}'",
                field=f"{at}.fact",
                expected="the id of one under 'edited'",
                reason="a probe of no edited fact",
            )
        if part not in PARTS:
            raise DataError(
                f"it is '{shortened(part)}'", field=f"{at}.part", expected=" or ".join(PARTS)
            )
        asked[fact][part].append(verbatim(one, "prompt", at=at))
    for one, at in _objects(record, "edited"):
        name = text(one, "id", at=at)
        try:
            yield Fact(
                id=name,
                subject=text(one, "subject", at=at),
                prompt=verbatim(one, "prompt", at=at),
                target=text(one, "target", at=at),
                joint=one.get("joint") or "auto",  # pyright: ignore[reportArgumentType] - Fact checks
                rephrasings=tuple(asked[name]["rephrase"]),
                locality=tuple(
                    Probe(prompt, kind=part, contradicts=False)
                    for part in PARTS[2:]
                    for prompt in asked[name][part]
                ),
            )
        except DataError as error:
            inside = error.field.startswith(f"{at}.")
            raise error if inside else error.at(field=f"{at}.{error.field}") from None


def _objects(record: Record, name: str) -> Iterator[tuple[Mapping[str, object], str]]:
    """The objects of a list with the place of each, from 1."""
    rows = record.get(name)
    if not isinstance(rows, list):
        raise DataError("it is not a list of objects", field=name)
    for place, one in enumerate(rows, 1):
        at = f"{name}[{place}]"
        if not isinstance(one, Mapping):
            raise DataError("it is not an object", field=at, reason=f"{name}: not an object")
        yield one, at
