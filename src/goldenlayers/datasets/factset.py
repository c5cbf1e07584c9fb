"""FactSet: facts with where they come from, what was refused, and seeded samples and splits."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import overload

from goldenlayers.errors import DataError, UserError, shortened
from goldenlayers.facts import Fact
from goldenlayers.prompts import mentions, plain_subject
from goldenlayers.shown import shown

_SHOWN = 20  # kinds and reasons named in a summary


@dataclass(frozen=True)
class FactSet(Sequence[Fact]):
    """An immutable list of facts.

    Attributes:
        facts: the facts, in the order of their source.
        name: short name for tables and run folders.
        format: the format they were read in.
        source: file, "starter", or hub address, as given.
        sha256: hash of the source's bytes (of its records for the hub); samples and splits keep
            it, as it names the data, not the choice.
        skipped: the row errors that were passed over, in the order of their rows.
        notes: what a reader left out or made up, and what to know about these facts.
        warnings: what was hardly meant so; every command says it.
    """

    facts: tuple[Fact, ...]
    name: str = "facts"
    format: str = ""
    source: str = ""
    sha256: str = ""
    skipped: tuple[DataError, ...] = ()
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @overload
    def __getitem__(self, index: int) -> Fact: ...
    @overload
    def __getitem__(self, index: slice) -> FactSet: ...
    def __getitem__(self, index: int | slice) -> Fact | FactSet:
        if isinstance(index, slice):
            return dataclasses.replace(self, facts=self.facts[index])
        return self.facts[index]

    def __len__(self) -> int:
        return len(self.facts)

    def __iter__(self) -> Iterator[Fact]:
        return iter(self.facts)

    def sample(self, n: int, seed: int = 0) -> FactSet:
        """``n`` facts drawn at random, in the order they stand here; all where there are fewer.

        Smaller samples of one seed are parts of its larger ones, so results of 50 and of 100
        facts are about the same facts.

        Raises:
            UserError: ``n`` is below 1.
        """
        _at_least_one(n, "the number of facts")
        chosen = sorted(_shuffled(len(self), seed)[:n])
        return dataclasses.replace(self, facts=tuple(self.facts[i] for i in chosen))

    def without(self, ids: Collection[str], subjects: Collection[str] = ()) -> FactSet:
        """The facts that have none of these ids and are about none of these subjects.

        Subjects are compared without regard to case and spaces.
        """
        barred_ids, barred = set(ids), {plain_subject(subject) for subject in subjects}
        kept = (
            f for f in self if f.id not in barred_ids and plain_subject(f.subject) not in barred
        )
        return dataclasses.replace(self, facts=tuple(kept))

    def with_all_probes(self) -> FactSet:
        """The facts with every locality probe as an ordinary one, as published figures have it."""
        kept = (
            dataclasses.replace(
                fact,
                locality=tuple(dataclasses.replace(p, contradicts=False) for p in fact.locality),
            )
            for fact in self
        )
        return dataclasses.replace(self, facts=tuple(kept))

    def split(self, n_proxy: int, seed: int = 0) -> tuple[FactSet, FactSet]:
        """(proxy set of exactly ``n_proxy`` facts, test set): no fact and no subject in both.

        Subjects are compared without regard to case and spaces. Facts are taken subject by
        subject in a seeded random order. Where only a part of a subject's facts fits, the rest of
        them go to neither set, and a note of the test set says how many.

        Raises:
            UserError: ``n_proxy`` is below 1, or leaves no subject for the test set.
        """
        _at_least_one(n_proxy, "the number of proxy facts")
        groups: dict[str, list[int]] = {}
        for place in _shuffled(len(self), seed):
            groups.setdefault(plain_subject(self.facts[place].subject), []).append(place)
        proxy: list[int] = []
        test: list[int] = []
        in_parts: list[list[int]] = []
        for group in groups.values():
            if len(proxy) + len(group) <= n_proxy:
                proxy += group
            elif len(proxy) < n_proxy:
                in_parts.append(group)
            else:
                test += group
        # Groups too large for what was still missing: the smallest is cut if it must be.
        in_parts.sort(key=len)
        left = 0
        while len(proxy) < n_proxy and in_parts:
            group = in_parts.pop(0)
            taken = n_proxy - len(proxy)
            proxy += group[:taken]
            left += len(group[taken:])
        for group in in_parts:
            test += group
        if len(proxy) < n_proxy or not test:
            raise UserError(
                f"{n_proxy} proxy facts of {len(self)} facts on {len(groups)} subjects "
                "leave none for the test",
                fix="Ask for fewer proxy facts",
            )
        note = (f"{left} facts are in neither set: their subject is in the proxy set",)

        def part(places: list[int], what: str, notes: tuple[str, ...] = ()) -> FactSet:
            facts = tuple(self.facts[i] for i in sorted(places))
            return dataclasses.replace(
                self, facts=facts, name=f"{self.name}-{what}", notes=self.notes + notes
            )

        return part(proxy, "proxy"), part(test, "test", note if left else ())

    def skipped_reasons(self) -> dict[str, int]:
        """How many rows were skipped for each reason, the most frequent first."""
        return dict(Counter(error.reason for error in self.skipped).most_common())

    def summary(self) -> str:
        """What is in the set, what was skipped and why, and the notes; a few lines of text."""
        lines = [f"{self.name}: {len(self):,} facts"]
        if self.source:
            lines.append(f"  from {self.source} ({self.format}, sha256 {self.sha256[:12]}…)")
        subjects = len({fact.subject for fact in self})
        relations = len({fact.relation for fact in self if fact.relation})
        lines.append(
            f"  {subjects:,} subjects"
            + (f", {relations} relations" if relations else "")
            + f"; old answer in {sum(fact.target_old is not None for fact in self):,}, "
            f"rephrasings in {sum(bool(fact.rephrasings) for fact in self):,}"
        )
        for what in ("locality", "portability"):
            kinds = Counter(probe.kind for fact in self for probe in getattr(fact, what))
            counts = [
                f"{shortened(kind, 40) or 'no kind'} {n:,}" for kind, n in sorted(kinds.items())
            ]
            lines.append(f"  {what} probes: {_first(counts, ', ') or 'none'}")
            if what == "locality" and counts:
                lines += _locality_lines(self.facts)
        if self.skipped:
            lines.append(f"  skipped {len(self.skipped):,} rows:")
            for reason, count in list(self.skipped_reasons().items())[:_SHOWN]:
                rows = [str(e.row) for e in self.skipped if e.reason == reason and e.row]
                more = ", …" if len(rows) > 5 else ""
                where = f" (row {', '.join(rows[:5])}{more})" if rows else ""
                lines.append(f"    {count:,} × {reason}{where}")
            if len(self.skipped_reasons()) > _SHOWN:
                lines.append(f"    and {len(self.skipped_reasons()) - _SHOWN:,} more reasons")
        lines += [f"  note: {note}" for note in self.notes]
        lines += [f"  warning: {warning}" for warning in self.warnings]
        return "\n".join(map(shown, lines))


def _locality_lines(facts: Sequence[Fact]) -> Iterator[str]:
    """What the locality probes are about, and how many contradict their edit."""
    same = [mentions(fact.subject, p.prompt) for fact in facts for p in fact.must_stay]
    yield f"    about the edited subject {sum(same):,}, about others {len(same) - sum(same):,}"
    if n := sum(len(fact.locality) - len(fact.must_stay) for fact in facts):
        verb = "contradicts" if n == 1 else "contradict"
        yield f"    {n:,} locality probe{'s' * (n != 1)} {verb} the edit: left out of locality"


def _first(parts: Sequence[str], between: str) -> str:
    more = [f"{len(parts) - _SHOWN:,} more"] if len(parts) > _SHOWN else []
    return between.join([*parts[:_SHOWN], *more])


def _shuffled(n: int, seed: int) -> list[int]:
    order = list(range(n))
    random.Random(seed).shuffle(order)
    return order


def _at_least_one(n: int, what: str) -> None:
    if n < 1:
        raise UserError(f"{what} is {n}", expected="1 or more")
