"""ZsRE in the form of MEND (Mitchell et al. 2022; from Levy et al. 2017, De Cao et al. 2021), and
KnowEdit (Zhang et al. 2024): its ZsRE, wiki_recent and wiki_counterfact share a form; WikiBio.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from goldenlayers.datasets.counterfact import one_answer
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
from goldenlayers.facts import Fact, Probe

MARKER = "nq question: "


def reader(prefix: str) -> Callable[[Record, Row], Iterable[Fact]]:
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
