"""The formats of facts: name, the keys they are recognised by, their reader; ours and others'."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import KW_ONLY, dataclass, field

from goldenlayers.datasets import published
from goldenlayers.datasets.checks import read_check
from goldenlayers.datasets.fields import Record, Row, read_own
from goldenlayers.datasets.tables import OTHER_NAMES
from goldenlayers.errors import UserError, near_matches, shortened
from goldenlayers.facts import Fact
from goldenlayers.registry import Registry

Reader = Callable[[Record, Row], Iterable[Fact]]


@dataclass(frozen=True)
class Format:
    """A data set's form.

    Attributes:
        name: what it is asked for by, as in ``NAME:PATH``.
        title: what it is, for the list of formats.
        keys: what every record has. They tell the formats apart, with ``objects``.
        read: makes the facts of a record; what is wrong in it is a ``DataError``.
        objects: fields of which one at least is an object.
        families: names that stand for several formats; recognition then picks among these.
        reader_for: makes ``read`` from all records, where a fact depends on others.
        spelled: the file's names for Fact's fields where they differ, for messages.
        also: keys that may stand in place of others.
        note: is said of every set read so.
    """

    name: str
    title: str
    keys: AbstractSet[str]
    read: Reader | None = None
    _: KW_ONLY
    objects: AbstractSet[str] = frozenset()
    families: tuple[str, ...] = ()
    reader_for: Callable[[Sequence[object]], Reader] | None = None
    spelled: Mapping[str, str] = field(default_factory=dict)
    also: Mapping[str, str] = field(default_factory=dict)
    note: str = ""

    def reader(self, records: Sequence[object]) -> Reader:
        """What makes the facts of each of ``records``."""
        found = self.reader_for(records) if self.reader_for is not None else self.read
        assert found is not None, f"the format '{self.name}' has no reader"
        return found

    def fits(self, record: object) -> bool:
        """Whether a record has the form's keys."""
        return isinstance(record, dict) and not self.missing(record)

    def missing(self, record: Mapping[str, object]) -> list[str]:
        """What of the form a record lacks, in words for a message."""
        named = set(record) | {self.also[name] for name in self.also.keys() & record.keys()}
        lacks = [f"'{key}'" for key in sorted(self.keys - named)]
        if self.objects and not any(isinstance(record.get(name), dict) for name in self.objects):
            lacks.append(
                " or ".join(f"'{name}'" for name in sorted(self.objects)) + " as an object"
            )
        return lacks

    def nearness(self, record: Mapping[str, object]) -> float:
        """Which share of what the form has a record has, too."""
        return 1 - len(self.missing(record)) / (len(self.keys) + bool(self.objects))


_FACT = frozenset({"subject", "prompt", "target_new"})
_NEW = {"target": "target_new"}
_NEW_AND_OLD = {**_NEW, "target_old": "ground_truth"}
_PROBES = frozenset({"locality", "portability"})
_NESTED = {
    name: f"requested_rewrite.{key}"
    for name, key in {
        **_NEW,
        "subject": "subject",
        "prompt": "prompt",
        "target_old": "target_true",
    }.items()
}
_MEND = {"prompt": "src", "target": "alt", "target_old": "answers"}
_BIO = {"subject": "concept", "prompt": "text", "target": "labels"}
_KNOWN = {"target": "attribute", "target_old": "attribute"}

# The order decides where a record fits several: the more particular one comes first.
# fmt: off
_OURS = (
    Format("mquake", "MQuAKE: edits with multi-hop questions",
           {"requested_rewrite", "questions"}, published.read_mquake),
    Format("counterfact-nested", "CounterFact, the original form",
           {"requested_rewrite"}, published.read_nested,
           families=("counterfact",), spelled=_NESTED),
    Format("zsre-mend", "ZsRE, the form of MEND",
           {"subject", "src", "alt"}, published.read_mend, families=("zsre",), spelled=_MEND),
    Format("zsre-knowedit", "ZsRE of KnowEdit",
           _FACT | {"ground_truth", "rephrase_prompt"}, published.knowedit_reader("zsre"),
           objects=_PROBES, families=("zsre", "knowedit"), spelled=_NEW_AND_OLD),
    Format("wiki-counterfact", "wiki_counterfact of KnowEdit",
           _FACT | {"ground_truth"}, published.knowedit_reader("wiki-counterfact"),
           objects=_PROBES, families=("knowedit",), spelled=_NEW_AND_OLD),
    Format("wiki-recent", "wiki_recent of KnowEdit (no old answers)",
           _FACT, published.knowedit_reader("wiki-recent"),
           objects=_PROBES, families=("knowedit",), spelled=_NEW),
    Format("wikibio", "WikiBio of KnowEdit: a sentence after a passage",
           {"text", "labels", "concept"}, published.read_wikibio,
           families=("knowedit",), spelled=_BIO),
    Format("counterfact-flat", "CounterFact, the flat form of EasyEdit",
           _FACT | {"ground_truth"}, published.read_flat,
           families=("counterfact",), spelled=_NEW_AND_OLD),
    Format("known", "known facts of ROME (known_1000), each given a false answer of its relation",
           {"subject", "attribute", "prompt", "relation_id"}, reader_for=published.known_reader,
           families=("known-1000",), spelled=_KNOWN, note=published.KNOWN_NOTE),
    Format("check", "check.json of golden edit: what an edit was asked",
           {"edited", "probes", "verdict"}, read_check),
    Format("jsonl", "our own fields, as JSON lines or a table (see --schema)",
           _FACT, read_own, also=OTHER_NAMES),
)
# fmt: on
FORMATS: Registry[Format] = Registry(
    "format", "goldenlayers.datasets", [(one.name, one) for one in _OURS]
)
"""The formats that a file may have. One from outside is recognised where none of ours fits, or
where its keys are those of ours that fits and more; by its name it is always read.
"""
_LOOKED_AT = 50
_NAMES = 8  # shown of a record's fields


def names() -> tuple[str, ...]:
    """All names a format may be called by; imports nothing."""
    families = (family for form in FORMATS.known() for family in form.families)
    return tuple(sorted(map(plain_name, {*FORMATS, *families})))


def plain_name(name: str) -> str:
    """The one spelling of a format's name: wiki_recent, Wiki-Recent → wiki-recent."""
    return name.strip().lower().replace("_", "-")


def is_name(name: str) -> bool:
    """Whether a format goes by this name."""
    return plain_name(name) in names()


def choose(
    records: Sequence[object], wanted: str | None, source: str, *, header: bool = False
) -> Format:
    """The format of ``records`` by their keys; among those called ``wanted`` if it is given.

    ``header``: the keys come from the first line of a table.

    Raises:
        UserError: unknown name, or no format fits.
    """
    forms = among = FORMATS.values()
    if wanted is not None:
        plain = plain_name(wanted)
        among = tuple(f for f in forms if plain in map(plain_name, (f.name, *f.families)))
        if not among and wanted in FORMATS:
            among = (FORMATS[wanted],)  # says why it is not there
        if not among:
            raise UserError(
                f"'{shortened(wanted)}' is not a known format", fix=near_matches(plain, names())
            )
    votes: Counter[str] = Counter()
    looked_at = [record for record in records if isinstance(record, dict)][:_LOOKED_AT]
    for record in looked_at:
        form = None
        for other in forms:
            if other.fits(record) and (form is None or other.keys > form.keys):
                form = other
        if form is not None:
            votes[form.name] += 1
    by_name = {form.name: form for form in among}
    for name, _ in votes.most_common():  # equal votes: the one seen first
        if name in by_name:
            return by_name[name]
    # A format asked for by name may fit without being the first that does.
    for form in among if wanted is not None else ():
        if any(form.fits(record) for record in looked_at):
            return form
    if wanted is not None and votes:
        seen = votes.most_common(1)[0][0]
        raise UserError(
            f"{source} is not in the format '{wanted}': it looks like '{seen}'",
            fix=f"Leave the format out, or give {seen}:PATH",
        )
    raise _refusal(records, looked_at, among, wanted, source, header)


def nearness(record: object) -> float:
    """Which share of the nearest format's keys a record has; 0 for what is no object."""
    if not isinstance(record, dict):
        return 0.0
    return max(form.nearness(record) for form in FORMATS.values())


def _refusal(
    records: Sequence[object],
    looked_at: Sequence[dict[str, object]],
    among: Sequence[Format],
    wanted: str | None,
    source: str,
    header: bool,
) -> UserError:
    """Why no format fits: what the rows lack of the nearest one."""
    problem = f"{source} is " + (
        "in no format known here" if wanted is None else f"not in the format '{wanted}'"
    )
    fix = "See 'golden datasets --schema' for our own form, 'golden datasets' for the others"
    if not looked_at:
        what = type(records[0]).__name__ if records else "nothing"
        return UserError(f"{problem}: its rows are no objects (the first is {what})", fix=fix)
    names = [str(name) for name in looked_at[0]]
    shown = ", ".join(shortened(name, 40) for name in names[:_NAMES])
    shown += f", and {len(names) - _NAMES} more" if len(names) > _NAMES else ""
    of = "columns of its first line" if header else "fields of its first record"
    fields = f"({of}: {shown or 'none'})"
    near, share = among[0], -1.0
    # Our own is the simplest one to get to; others' come last.
    ours = [form for form in reversed(among) if form in _OURS]
    for form in (*ours, *(form for form in among if form not in ours)):
        mean = sum(form.nearness(record) for record in looked_at) / len(looked_at)
        if mean > share:
            near, share = form, mean
    if share <= 0 and wanted is None:
        what = "its first line names no field of one" if header else "no row has a field of one"
        return UserError(f"{problem}: {what} {fields}", fix=fix)
    lacking = Counter(lack for record in looked_at for lack in near.missing(record))
    never = [lack for lack, count in lacking.items() if count == len(looked_at)]
    some = [
        f"{lack} is in {len(looked_at) - count} of the first {len(looked_at)} rows"
        for lack, count in lacking.items()
        if count < len(looked_at)
    ]
    lacks = [f"no row has {_joined(never)}"] if never else []
    tried = [name for name in names[:_LOOKED_AT] if len(name) <= 40]
    meant = [
        f"Is '{shortened(close[0])}' meant for {lack}?"
        for lack in never
        if (close := difflib.get_close_matches(lack.strip("'"), tried, n=1, cutoff=0.6))
    ]
    return UserError(
        f"{problem}. The nearest is '{near.name}' ({near.title}), but "
        f"{', and '.join(lacks + some)} {fields}",
        fix=" ".join([*meant, fix]),
    )


def _joined(words: Sequence[str]) -> str:
    return " or ".join(words) if len(words) < 3 else f"{', '.join(words[:-1])} or {words[-1]}"
