"""Readers of the published formats.

CounterFact (Meng et al. 2022), in its original nested form and in the flat form of EasyEdit; ZsRE
in the form of MEND (Mitchell et al. 2022; from Levy et al. 2017, De Cao et al. 2021); KnowEdit
(Zhang et al. 2024): its ZsRE, wiki_recent and wiki_counterfact share a form, WikiBio has another;
MQuAKE (Zhong et al. 2023): edits with multi-hop questions that must follow from them; known facts
(the "known_1000" file of ROME): facts that GPT-2 XL knows, for tracing and locating.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence

from goldenlayers.datasets.fields import (
    Record,
    Row,
    answers,
    old_answer,
    probes,
    text,
    texts,
    verbatim,
)
from goldenlayers.errors import DataError, shortened
from goldenlayers.facts import Fact, Probe


def fill(template: str, subject: str, *, field: str = "prompt") -> str:
    """The prompt of a template whose one "{}" stands for the subject.

    Not str.format: other braces in prompts and subjects are text.

    Raises:
        DataError: not exactly one "{}".
    """
    if template.count("{}") != 1:
        raise DataError(
            f"the template '{shortened(template)}' has {template.count('{}')} places '{{}}' "
            "for the subject",
            field=field,
            expected="exactly one",
            reason="the template does not have exactly one place '{}'",
        )
    return template.replace("{}", subject)


def rewrite(record: object, at: str) -> dict[str, str]:
    """Subject, prompt, new and old answer, relation of a ``requested_rewrite`` object."""
    if not isinstance(record, dict):
        raise DataError("it is not an object", field=at)
    subject = text(record, "subject", at=at)
    found = {
        "subject": subject,
        "prompt": fill(verbatim(record, "prompt", at=at), subject, field=f"{at}.prompt"),
        "target_new": one_answer(record, "target_new", at),
        "target_old": one_answer(record, "target_true", at),
    }
    if isinstance(record.get("relation_id"), str):
        found["relation"] = str(record["relation_id"])
    return found


def one_answer(record: Record, name: str, at: str = "") -> str:
    """The answer ``name``, plain or as {"str": …}."""
    place = f"{at}.{name}" if at else name
    if record.get(name) is None:
        raise DataError("the field is missing", field=place, reason=f"{place} is missing")
    found = answers(record[name], place)
    if not found:
        raise DataError("it is empty", field=place, reason=f"{place} is empty")
    return found[0]


def read_nested(record: Record, row: Row) -> Iterable[Fact]:
    """One record of the original file.

    Neighbourhood prompts are locality probes whose answer is the old one. ``attribute_prompts``
    (other subjects that have the new answer) are not used: no metric here asks for them.
    """
    edit = rewrite(record.get("requested_rewrite"), "requested_rewrite")
    yield Fact(
        id=case_id(record, row),
        subject=edit["subject"],
        prompt=edit["prompt"],
        target=edit["target_new"],
        target_old=edit["target_old"],
        relation=edit.get("relation"),
        rephrasings=texts(record, "paraphrase_prompts", row),
        locality=tuple(
            Probe(prompt, edit["target_old"], "neighborhood")
            for prompt in texts(record, "neighborhood_prompts", row)
        ),
        generation_prompts=texts(record, "generation_prompts", row),
    )


def read_flat(record: Record, row: Row) -> Iterable[Fact]:
    """One record of the flat file: one rephrasing, one neighbourhood prompt with its answer."""
    old, aliases = old_answer(record, "ground_truth")
    yield Fact(
        id=case_id(record, row),
        subject=text(record, "subject"),
        prompt=verbatim(record, "prompt"),
        target=one_answer(record, "target_new"),
        target_old=old,
        old_aliases=aliases,
        rephrasings=texts(record, "rephrase_prompt", row),
        locality=_neighbours(record, row),
    )


def _neighbours(record: Record, row: Row) -> tuple[Probe, ...]:
    prompts = texts(record, "locality_prompt", row)
    truths = record.get("locality_ground_truth")
    if not prompts:
        return ()
    if len(prompts) == 1:
        truths = [truths]
    if not isinstance(truths, list) or len(truths) != len(prompts):
        raise DataError(
            f"{len(prompts)} locality prompts do not go with their answers",
            field="locality_ground_truth",
            expected="one answer for each locality_prompt",
            reason="locality prompts and answers differ in number",
        )
    made = []
    for prompt, truth in zip(prompts, truths, strict=True):
        found = answers(truth, "locality_ground_truth")
        if not found:
            row.note("locality probes without an answer, kept: only the prediction counts")
        made.append(Probe(prompt, found[0] if found else None, "neighborhood", found[1:]))
    return tuple(made)


def case_id(record: Record, row: Row) -> str:
    """The record's own number, or its row's."""
    value = record.get("case_id")
    return str(value) if isinstance(value, int | str) and str(value).strip() else str(row.number)


TOGETHER = (
    "multi-hop questions that follow only from all rewrites of their record together "
    "(facts ID.1, ID.2, …): score their portability in batch or sequential mode"
)


def read_mquake(record: Record, row: Row) -> Iterable[Fact]:
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
            name = "target_new" if error.field == "target" else error.field
            raise error.at(field=f"{at}.{name}") from None
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


KNOWN_NOTE = "the data has no new answers: each is another record's answer to the same relation"


def known_reader(records: Sequence[object]) -> Callable[[Record, Row], Iterable[Fact]]:
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
            if not any(true in (low := other.casefold()) or low in true for true in known)
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


MARKER = "nq question: "


def knowedit_reader(prefix: str) -> Callable[[Record, Row], Iterable[Fact]]:
    """The reader of one KnowEdit part; ``prefix`` begins its facts' ids (records have none)."""

    def read(record: Record, row: Row) -> Iterable[Fact]:
        # ground_truth: a list of strings in ZsRE, a string in wiki_counterfact, absent in
        # wiki_recent; the probes' own: a string, a list, or a list of alias lists.
        old, aliases = old_answer(record, "ground_truth")
        yield Fact(
            id=f"{prefix}-{row.number}",
            subject=text(record, "subject"),
            prompt=verbatim(record, "prompt"),
            target=one_answer(record, "target_new"),
            target_old=old,
            old_aliases=aliases,
            rephrasings=texts(record, "rephrase_prompt", row) + texts(record, "rephrase", row),
            locality=probes(record, "locality", row, needs_answer=False, kind="locality"),
            portability=probes(record, "portability", row, needs_answer=True, kind="portability"),
        )

    return read


def read_wikibio(record: Record, row: Row) -> Iterable[Fact]:
    """One WikiBio record: after the passage ``text`` on ``concept`` comes the sentence ``labels``.

    The concept is in lower case and stands so in the passage ("This is a Wikipedia passage about
    john russell reynolds."), so the subject is found there letter for letter. There is no old
    answer and no rephrasing.
    """
    yield Fact(
        id=f"wikibio-{row.number}",
        subject=text(record, "concept"),
        prompt=verbatim(record, "text"),
        target=one_answer(record, "labels"),
        locality=probes(record, "locality", row, needs_answer=False, kind="locality"),
        portability=probes(record, "portability", row, needs_answer=True, kind="portability"),
    )


def read_mend(record: Record, row: Row) -> Iterable[Fact]:
    """One record.

    - ``src`` is the prompt, ``rephrase`` a rephrasing, ``alt`` the new answer.
    - The old answer is ``answers`` (the true one; the others are its aliases). ``pred`` is not
      used: it is what MEND's own BART answered, wrong in about four records of ten, and says
      nothing of the model at hand.
    - ``loc`` / ``loc_ans`` is an unrelated Natural Questions question: a locality probe of kind
      "unrelated". Its marker "nq question: " belongs to BART's training and is dropped, and
      the question gets the question mark that the data set leaves out.
    """
    old, aliases = old_answer(record, "answers")
    yield Fact(
        id=f"zsre-{row.number}",
        subject=text(record, "subject"),
        prompt=verbatim(record, "src"),
        target=text(record, "alt"),
        target_old=old,
        old_aliases=aliases,
        rephrasings=texts(record, "rephrase", row),
        locality=_unrelated(record, row),
    )


def _unrelated(record: Record, row: Row) -> tuple[Probe, ...]:
    prompts = texts(record, "loc", row)
    found = answers(record.get("loc_ans"), "loc_ans")
    if prompts and not found:
        row.note("locality probes without an answer, kept: only the prediction counts")
    return tuple(
        Probe(question(prompt), found[0] if found else None, "unrelated", found[1:])
        for prompt in prompts
    )


def question(prompt: str) -> str:
    """The question without MEND's marker and with a question mark."""
    plain = prompt.removeprefix(MARKER).strip()
    return plain if plain.endswith("?") else plain + "?"
