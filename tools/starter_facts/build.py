"""Writes the built-in starter facts: ``python tools/starter_facts/build.py [--check]``.

``--check`` writes nothing and exits 1 when the file differs from what the tables give.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from itertools import chain, zip_longest
from pathlib import Path

import tables_arts
import tables_commerce
import tables_countries
import tables_people
import tables_places
import tables_science
import tables_usa
from relation import Relation

from goldenlayers.facts import Fact

TARGET = Path(__file__).resolve().parents[2] / "src/goldenlayers/datasets/starter.jsonl"

RELATIONS: tuple[Relation, ...] = (
    *tables_countries.RELATIONS,
    *tables_places.RELATIONS,
    *tables_usa.RELATIONS,
    *tables_arts.RELATIONS,
    *tables_science.RELATIONS,
    *tables_commerce.RELATIONS,
    *tables_people.RELATIONS,
)


def facts() -> Iterator[Fact]:
    """All facts, one relation after the other in turn, so that the first rows show them all."""
    turns = zip_longest(*(relation.facts() for relation in RELATIONS))
    return (fact for fact in chain.from_iterable(turns) if fact is not None)


def row(fact: Fact) -> dict[str, object]:
    """A fact as one object of the file; empty lists of optional fields are left out."""
    data: dict[str, object] = {
        "id": fact.id,
        "relation": fact.relation,
        "subject": fact.subject,
        "prompt": fact.prompt,
        "target_new": fact.target,
        "target_old": fact.target_old,
        "rephrasings": list(fact.rephrasings),
    }
    for name, probes in (("locality", fact.locality), ("portability", fact.portability)):
        data[name] = [{"prompt": p.prompt, "answer": p.answer, "kind": p.kind} for p in probes]
    if fact.generation_prompts:
        data["generation_prompts"] = list(fact.generation_prompts)
    return data


def text() -> str:
    """The whole file, UTF-8 text with one object a line."""
    return "".join(json.dumps(row(fact), ensure_ascii=False) + "\n" for fact in facts())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write the built-in starter facts.")
    parser.add_argument("--check", action="store_true", help="only say whether the file is current")
    check = parser.parse_args(arguments).check
    built = text()
    if not check:
        TARGET.write_bytes(built.encode())
        print(f"{built.count(chr(10))} facts, {len(RELATIONS)} relations: {TARGET}")
        return 0
    if not TARGET.is_file() or TARGET.read_bytes() != built.encode():
        print(
            f"{TARGET.name} is not what the tables give: run python tools/starter_facts/build.py",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
