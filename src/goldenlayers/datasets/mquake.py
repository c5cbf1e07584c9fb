"""MQuAKE (Zhong et al. 2023): edits with multi-hop questions that must follow from them."""

from __future__ import annotations

from collections.abc import Iterable

from goldenlayers.datasets.counterfact import case_id, rewrite
from goldenlayers.datasets.fields import Record, Row, answers, texts
from goldenlayers.errors import DataError
from goldenlayers.facts import Fact, Probe

TOGETHER = (
    "multi-hop questions that follow only from all rewrites of their record together "
    "(facts ID.1, ID.2, …): score their portability in batch or sequential mode"
)


def read(record: Record, row: Row) -> Iterable[Fact]:
    """One record: one Fact per requested rewrite, with ids CASE.1, CASE.2, …

    The record's multi-hop questions become portability probes of kind "Reasoning" of its *first*
    rewrite, with the new answer's aliases: the first rewrite is the head of the chain, whose
    subject the questions name, and asking once keeps a record's weight in the mean at one. Where
    a record has several rewrites the answer follows from all of them together; a note says so.
    A rewrite's own ``question`` is its rephrasing; aliases of the old answer come from the single
    hop that asks it. A record with one bad rewrite is refused whole, since its questions would
    lose their ground.
    """
    rewrites = record.get("requested_rewrite")
    if not isinstance(rewrites, list) or not rewrites:
        raise DataError(
            "it is not a list of rewrites", field="requested_rewrite", expected="one or more"
        )
    questions = _questions(record, row)
    if len(rewrites) > 1:
        for _ in questions:
            row.note(TOGETHER)
    made = []
    for place, item in enumerate(rewrites, 1):
        at = f"requested_rewrite[{place}]"
        edit = rewrite(item, at)
        question = item.get("question")
        try:
            fact = Fact(
                id=f"{case_id(record, row)}.{place}",
                subject=edit["subject"],
                prompt=edit["prompt"],
                target=edit["target_new"],
                target_old=edit["target_old"],
                relation=edit.get("relation"),
                rephrasings=texts(item, "question", row),
                portability=questions if place == 1 else (),
                old_aliases=_aliases(record, question, edit["target_old"]),
            )
        except DataError as error:
            raise error.at(field=f"{at}.{error.field}") from None
        made.append(fact)
    return made


def _questions(record: Record, row: Row) -> tuple[Probe, ...]:
    prompts = texts(record, "questions", row)
    found = answers([record.get("new_answer"), record.get("new_answer_alias")], "new_answer")
    if prompts and not found:
        for _ in prompts:
            row.note("questions without a new answer, left out")
        return ()
    return tuple(Probe(prompt, found[0], "Reasoning", found[1:]) for prompt in prompts)


def _aliases(record: Record, question: object, old: str) -> tuple[str, ...]:
    """Other ways of writing the old answer, from the single hop that asks this very question."""
    hops = record.get("single_hops")
    for hop in hops if isinstance(hops, list) else []:
        if isinstance(hop, dict) and hop.get("question") == question and hop.get("answer") == old:
            found = answers(hop.get("answer_alias"), "single_hops")
            return tuple(alias for alias in found if alias != old)
    return ()
