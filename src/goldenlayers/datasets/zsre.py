"""ZsRE in the form of MEND (Mitchell et al. 2022), from Levy et al. 2017 and De Cao et al. 2021."""

from __future__ import annotations

from collections.abc import Iterable

from goldenlayers.datasets.fields import Record, Row, answers, old_answer, text, texts, verbatim
from goldenlayers.facts import Fact, Probe

MARKER = "nq question: "


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
