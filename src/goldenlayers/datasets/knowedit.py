"""KnowEdit (Zhang et al. 2024): ZsRE, wiki_recent and wiki_counterfact share a form; WikiBio."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from goldenlayers.datasets.counterfact import one_answer
from goldenlayers.datasets.fields import Record, Row, old_answer, probes, text, texts, verbatim
from goldenlayers.facts import Fact


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
