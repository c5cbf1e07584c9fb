"""Known facts (the "known_1000" file of ROME): facts GPT-2 XL knows, for tracing and locating."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence

from goldenlayers.datasets.fields import Record, Row, text, verbatim
from goldenlayers.errors import DataError
from goldenlayers.facts import Fact

NOTE = "the data has no new answers: each is another record's answer to the same relation"


def reader_for(records: Sequence[object]) -> Callable[[Record, Row], Iterable[Fact]]:
    """A reader that takes each fact's false answer from the other ``records``.

    The file has only true facts: ``prompt`` (it may run past its template) and ``attribute``.
    The new answer is an attribute of the same ``relation_id`` from another record, chosen by a
    hash of the fact itself: the same in every run, whatever the seed, the limit or the order.
    Never chosen: an answer that some record gives for this subject and relation, and one that
    contains or is contained in the true one ("New York", "New York City"). A record whose
    relation has no other answer is a row error.
    """
    by_relation: dict[str, set[str]] = {}
    true_answers: dict[tuple[str, str], set[str]] = {}
    for record in records:
        if not isinstance(record, dict):
            continue
        relation, subject, answer = (
            str(value).strip() if isinstance(value := record.get(name), str) else ""
            for name in ("relation_id", "subject", "attribute")
        )
        if answer:
            by_relation.setdefault(relation, set()).add(answer)
            true_answers.setdefault((relation, subject), set()).add(answer)

    def read(record: Record, row: Row) -> Iterable[Fact]:
        relation = text(record, "relation_id")
        subject = text(record, "subject")
        answer = text(record, "attribute")
        known = {other.casefold() for other in true_answers.get((relation, subject), ())}
        others = sorted(
            other
            for other in by_relation.get(relation, ())
            if not any(_overlap(other.casefold(), true) for true in known)
        )
        if not others:
            raise DataError(
                f"no other record of relation {relation} has another answer, "
                "so there is no false answer to take",
                field="relation_id",
                reason="no other answer in the same relation",
            )
        itself = "\n".join((relation, subject, answer))
        digest = hashlib.sha256(itself.encode("utf-8", "surrogatepass")).digest()
        identity = record.get("known_id")
        yield Fact(
            id=f"known-{identity if isinstance(identity, int | str) else row.number}",
            subject=subject,
            prompt=verbatim(record, "prompt"),
            target=others[int.from_bytes(digest[:8]) % len(others)],
            target_old=answer,
            relation=relation,
        )

    return read


def _overlap(one: str, other: str) -> bool:
    return one in other or other in one
