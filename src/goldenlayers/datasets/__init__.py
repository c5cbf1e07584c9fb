"""Fact data: the starter facts, one small reader per public format, and our own fields."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from goldenlayers.datasets import formats, source
from goldenlayers.datasets.factset import FactSet
from goldenlayers.datasets.fields import Record, Row, write_jsonl
from goldenlayers.datasets.formats import FORMATS, Format
from goldenlayers.datasets.reading import Doubled, Table, flaw
from goldenlayers.datasets.tables import schema_text
from goldenlayers.durable import absolute
from goldenlayers.errors import DataError, UserError, near_matches, shortened
from goldenlayers.facts import Fact, repeats
from goldenlayers.prompts import Joint

__all__ = [
    "FORMATS",
    "DatasetInfo",
    "FactSet",
    "Format",
    "Record",
    "Row",
    "list_datasets",
    "load_facts",
    "schema_text",
    "write_jsonl",
]


_ROWS_NAMED = 5
_WRAPPERS = 4


def load_facts(
    data: str | os.PathLike[str] = "starter",
    *,
    path: str | os.PathLike[str] | None = None,
    limit: int | None = None,
    seed: int | None = 0,
    skip_invalid: bool = False,
    joint: Joint = "auto",
) -> FactSet:
    """Facts from the package, a file, or the hub.

    Args:
        data: "starter" (ships inside), a file (JSON, JSON lines, CSV, TSV, parquet, gzip may pack
            them) or a folder of ``save_to_disk``, recognised by content, ``FORMAT:PATH``, or
            ``hub:owner/name[:config][:split]`` (extra ``hub``). With ``path`` it is the name of the
            file's format; "auto" (and the default) recognises it.
        path: the file, where ``data`` names a format.
        limit: at most so many facts: a seeded random sample of the valid ones, in file order
            (``FactSet.sample``). All rows are read and checked, whatever the limit.
        seed: of the sample; None takes the first ``limit`` facts instead.
        skip_invalid: pass over invalid rows; ``FactSet.skipped`` holds their errors.
        joint: what stands between prompts and answers where a row does not say it itself: "space",
            "none", or "auto" (see :class:`goldenlayers.facts.Fact`).

    Raises:
        DataError: the first invalid row, with its number, its field and how many more there are.
        UserError: the source cannot be read or recognised, or has no valid fact.
    """
    if limit is not None and limit < 1:
        raise UserError(f"the limit is {limit}", expected="1 or more facts")
    table, wanted = _find(data, path)
    table = _unwrapped(table)
    if not table.rows:
        raise _with_count(table.broken, len(table.broken))
    form = formats.choose(table.records, wanted, table.source, header=table.header)
    found = _read(table, form)
    errors = found.skipped
    if errors and not skip_invalid:
        raise _with_count(errors, len(table.rows) + len(table.broken))
    if not found.facts:
        first = f" valid fact; its first error: {errors[0]}" if errors else " facts"
        raise UserError(f"{table.source} has no{first}")
    if joint != "auto":
        facts = tuple(fact.with_joint(joint) for fact in found)
        found = dataclasses.replace(found, facts=facts)
    if limit is None:
        return found
    return found[:limit] if seed is None else found.sample(limit, seed)


@dataclass(frozen=True)
class DatasetInfo:
    """A line of ``golden datasets``: a name, whether it needs a path, and what it is."""

    name: str
    needs_path: bool
    title: str
    families: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()


def list_datasets() -> tuple[DatasetInfo, ...]:
    """The data that can be named: the built-in facts, then the formats that files may have."""
    return (
        DatasetInfo("starter", False, "well-known facts that ship with the package"),
        *(
            DatasetInfo(form.name, True, form.title, form.families, tuple(sorted(form.keys)))
            for form in formats.FORMATS.values()
        ),
    )


def _find(
    data: str | os.PathLike[str], path: str | os.PathLike[str] | None
) -> tuple[Table, str | None]:
    """The records, and the name of the format that was asked for."""
    name = os.fspath(data)
    if path is not None:
        wanted = None if formats.plain_name(name) in {"auto", "starter"} else name
        return source.from_file(path), wanted
    if not name.strip():
        raise UserError("the data has no name", expected="'starter', a file, or FORMAT:PATH")
    if isinstance(data, str):
        if name == "starter":
            return source.from_package(), None
        if name.startswith("hub:"):
            return source.from_hub(name.removeprefix("hub:")), None
        prefix, colon, rest = name.partition(":")
        if colon and rest and formats.is_name(prefix):
            return source.from_file(rest), prefix
        if not source.exists(name):
            _explain_name(name, prefix, rest)
    return source.from_file(data), None


def absolute_name(data: str) -> str:
    """``data`` of :func:`load_facts` as it is good from any working directory."""
    if data == "starter" or data.startswith("hub:"):
        return data
    prefix, colon, rest = data.partition(":")
    if colon and rest and formats.is_name(prefix):
        return f"{prefix}:{absolute(rest)}"
    return absolute(data)


def _explain_name(name: str, prefix: str, rest: str) -> None:
    """Says what is wrong with a name that is no file; nothing if it may have been meant as one."""
    if formats.is_name(name):
        raise UserError(f"'{shortened(name)}' is a format, not a file", fix=f"Give {name}:PATH")
    if rest and source.exists(rest):
        raise UserError(
            f"'{shortened(prefix)}' is not a known format",
            fix=near_matches(prefix, formats.names()),
        )
    if not any(mark in name for mark in ("/", "\\", ".", ":")):
        raise UserError(
            f"'{shortened(name)}' is neither a built-in data set nor a file",
            expected="'starter', a file, or FORMAT:PATH",
            fix=near_matches(name, ("starter", *formats.names())),
        )


def _read(table: Table, form: formats.Format) -> FactSet:
    """The facts of all good rows, the errors of the others in row order, notes, warnings."""
    read = form.reader(table.records)
    facts: list[Fact] = []
    errors = list(table.broken)
    left_out: dict[str, list[int]] = {}
    renamed: list[int] = []
    unread: Counter[str] = Counter()
    ids: set[str] = set()
    for number, record in table.rows:
        row = Row(number)
        try:
            if not isinstance(record, dict):
                raise DataError("the row is not an object", reason="the row is not an object")
            if wrong := flaw(record):
                raise wrong
            made = list(read(record, row))
        except DataError as error:
            name = form.spelled.get(error.field, error.field)
            errors.append(error.at(source=table.source, row=number, field=name))
            continue
        for fact in made:
            unique = _unique(fact, ids)
            renamed += [number] * (unique is not fact)
            facts.append(unique)
        unread.update(set(row.unread))
        for what in row.left_out:
            left_out.setdefault(what, []).append(number)
    errors.sort(key=lambda error: error.row or 0)
    notes = [form.note] if form.note else []
    notes += [f"{len(rows):,} {what} ({_rows(rows)})" for what, rows in left_out.items()]
    if renamed:
        notes.append(
            f"{len(renamed):,} facts had the id of an earlier one and were renamed to ID#2, ID#3 … "
            f"({_rows(renamed)})"
        )
    doubled, contradicting = repeats(facts)  # they weigh double, or contradict in a batch
    for pairs, what, how in (
        (doubled, "repeat", "same prompt, same new answer"),
        (contradicting, "contradict", "same prompt, another new answer"),
    ):
        notes += [f"{len(pairs):,} facts {what} an earlier one ({how})"] * bool(pairs)
    return FactSet(
        facts=tuple(facts),
        name=table.name,
        format=form.name,
        source=table.source,
        sha256=table.sha256,
        skipped=tuple(errors),
        notes=tuple(notes),
        warnings=_unread(unread),
    )


def _unwrapped(table: Table) -> Table:
    """The records of the one list inside a wrapping object, as in {"data": [...]}.

    Raises:
        UserError: the object holds several lists of records.
    """
    found = table.rows[0][1] if len(table.rows) == 1 and not table.broken else None
    lists = list(_lists(found, table.source)) if isinstance(found, dict) else []
    if len(lists) > 1:
        named = ", ".join(f"'{shortened(name, 40)}'" for name, _ in lists[:_ROWS_NAMED])
        raise UserError(
            f"{table.source} holds several lists of records: {named}",
            fix="Put the one that is meant into a file of its own",
        )
    return dataclasses.replace(table, rows=tuple(enumerate(lists[0][1], 1))) if lists else table


def _lists(
    found: dict[str, object], source: str, depth: int = 0
) -> Iterator[tuple[str, list[Any]]]:
    """The lists of records in an object that is no record itself, and in the objects within it."""
    if formats.nearness(found) > 0.5:
        return
    if isinstance(found, Doubled):
        raise UserError(f"{source} holds '{shortened(found.key)}' twice")
    for name, value in found.items():
        if isinstance(value, list) and any(isinstance(item, dict) for item in value):
            yield name, value
        elif isinstance(value, dict) and depth < _WRAPPERS:
            yield from ((f"{name}.{rest}", one) for rest, one in _lists(value, source, depth + 1))


def _unread(fields: Counter[str]) -> tuple[str, ...]:
    """One warning of all fields that were not read."""
    if not fields:
        return ()
    named = [
        f"'{shortened(name, 40)}' ({count:,} {'row' if count == 1 else 'rows'})"
        for name, count in fields.most_common(_ROWS_NAMED)
    ]
    more = [f"{len(fields) - len(named):,} more"] if len(fields) > len(named) else []
    return (f"fields that are not read: {', '.join(named + more)}",)


def _unique(fact: Fact, ids: set[str]) -> Fact:
    """The fact, under an id that no earlier one has; results are keyed by it."""
    name, count = fact.id, 1
    while name in ids:
        count += 1
        name = f"{fact.id}#{count}"
    ids.add(name)
    return fact if name == fact.id else dataclasses.replace(fact, id=name)


def _with_count(errors: Sequence[DataError], rows: int) -> DataError:
    """The first error, with what to do about it and about the others."""
    first = errors[0]
    mend = f"{first.fix.rstrip('.')}. " if first.fix else ""
    if len(errors) == 1:
        mend += "Mend this row, or pass over it"
    else:
        mend += f"{len(errors):,} of {rows:,} rows are invalid: mend them, or keep the others"
    return first.at(fix=f"{mend} with --skip-invalid (skip_invalid=True)")


def _rows(numbers: list[int]) -> str:
    distinct = list(dict.fromkeys(numbers))
    named = ", ".join(str(number) for number in distinct[:_ROWS_NAMED])
    more = ", …" if len(distinct) > _ROWS_NAMED else ""
    return f"row {named}{more}"
