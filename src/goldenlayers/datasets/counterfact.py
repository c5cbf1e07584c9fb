"""CounterFact (Meng et al. 2022), in its original nested form and in the flat form of EasyEdit."""

from __future__ import annotations

from collections.abc import Iterable

from goldenlayers.datasets.fields import Record, Row, answers, old_answer, text, texts, verbatim
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
