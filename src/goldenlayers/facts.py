"""A fact edit and its probes: immutable, and checked when made."""

from __future__ import annotations

import dataclasses
import hashlib
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from goldenlayers.errors import DataError
from goldenlayers.errors import shortened as _short
from goldenlayers.prompts import (
    JOINTS,
    Joint,
    filled,
    find_subject,
    mentions,
    near_subject,
    plain_words,
)


@dataclass(frozen=True, slots=True)
class Probe:
    """A prompt whose continuation is looked at after an edit.

    ``answer`` is the expected answer; None where only "the prediction must not move" is asked.
    ``kind`` groups probes that are averaged together (for portability: Subject_Aliasing, Reasoning,
    Logical_Generalization; for locality: neighborhood, Relation_Specificity, Forgetfulness, ...).
    ``aliases`` are other ways of writing the answer. ``joint`` says what stands between prompt and
    answer, see :class:`Fact`. The prompt is kept letter for letter. ``contradicts`` marks a
    locality probe that asks what the edit changes; None leaves it to the fact to find out.

    Raises:
        DataError: empty prompt, empty answer or alias, something that is not text, or no joint.
    """

    prompt: str
    answer: str | None = None
    kind: str = ""
    aliases: tuple[str, ...] = ()
    joint: Joint = "auto"
    contradicts: bool | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        check_text(self.prompt, "prompt")
        _fix_joint(self, self.answer)
        if not (self.contradicts is None or isinstance(self.contradicts, bool)):
            raise DataError("it is neither true nor false", field="contradicts")
        _strip(self, "answer", optional=True)
        _texts(self, "aliases", strip=True)
        if not isinstance(self.kind, str) or self.kind.strip():
            _strip(self, "kind")


@dataclass(frozen=True, slots=True)
class Fact:
    """One fact edit: after it, the model should answer ``prompt`` with ``target``.

    ``subject`` stands in ``prompt``; ``target_old`` is the answer now (None when the data has none:
    it is then filled with the model's own greedy continuation and ``target_old_is_generated`` is
    set). ``rephrasings`` ask the same in other words; ``locality`` probes must not move, but for
    those that contradict the edit (:func:`contradicts`, told when the fact is made);
    ``portability`` probes must follow from the edit. ``id`` is the fact's name in results; left
    out, it is made of subject, prompt and target.

    Prompts are kept letter for letter. ``joint`` says what stands between the prompt (or a
    rephrasing) and its answer: "space", "none", or "auto", which goes by their characters and,
    where these leave it open, by what the model finds likelier. A prompt that ends in white space
    brings its own joint, whatever ``joint`` says. Space around the subject and the answers is
    dropped; that before ``target`` means the joint "space". ``joints`` holds what the model
    has decided, as (prompt, answer, joint): see :func:`goldenlayers.decoding.settle_joints`.

    Where a prompt, a rephrasing or a generation prompt has one "{}" and the subject is not
    otherwise in it, "{}" stands for the subject, as in the requests of ROME and MEMIT.

    Raises:
        DataError: an empty field, something that is not text, no joint, a subject that does not
            stand in the prompt letter for letter, or a new answer equal to the old one or an
            alias of it.
    """

    subject: str
    prompt: str
    target: str
    target_old: str | None = None
    target_old_is_generated: bool = False
    relation: str | None = None
    rephrasings: tuple[str, ...] = ()
    locality: tuple[Probe, ...] = ()
    portability: tuple[Probe, ...] = ()
    generation_prompts: tuple[str, ...] = ()
    old_aliases: tuple[str, ...] = ()
    joint: Joint = "auto"
    joints: tuple[tuple[str, str, Joint], ...] = ()
    id: str = field(default="", kw_only=True)

    def __post_init__(self) -> None:
        check_text(self.prompt, "prompt")
        _fix_joint(self, self.target)
        for name in ("subject", "target"):
            _strip(self, name)
        for name in ("target_old", "relation"):
            _strip(self, name, optional=True)
        _texts(self, "old_aliases", strip=True)
        for name in ("locality", "portability"):
            _probes(self, name)
        object.__setattr__(self, "prompt", filled(self.prompt, self.subject))
        for name in ("rephrasings", "generation_prompts"):
            _texts(self, name)
            texts = tuple(filled(text, self.subject) for text in getattr(self, name))
            object.__setattr__(self, name, texts)
        object.__setattr__(self, "joints", tuple(self.joints))
        if self.id == "":
            told = "\n".join((self.subject, self.prompt, self.target)).encode()
            object.__setattr__(self, "id", f"fact-{hashlib.sha256(told).hexdigest()[:12]}")
        check_text(self.id, "id")
        if find_subject(self.subject, self.prompt) is None:
            raise _subject_missing(self.subject, self.prompt)
        if self.target == self.target_old:
            raise DataError(
                f"the new answer equals the old answer ('{_short(self.target)}')",
                field="target",
                reason="the new answer equals the old answer",
            )
        if self.target in self.old_aliases:
            raise DataError(
                f"the new answer '{_short(self.target)}' is right already: the data has it "
                f"beside the old answer '{_short(self.target_old or '')}'",
                field="target",
                reason="the new answer is among the old answer's aliases",
            )
        marked = (
            dataclasses.replace(p, contradicts=contradicts(self, p)) if p.contradicts is None else p
            for p in self.locality
        )
        object.__setattr__(self, "locality", tuple(marked))

    @property
    def must_stay(self) -> tuple[Probe, ...]:
        """The locality probes that do not contradict the edit."""
        return tuple(probe for probe in self.locality if not probe.contradicts)

    @property
    def subject_span(self) -> tuple[int, int]:
        """Character span of the subject in the prompt."""
        span = find_subject(self.subject, self.prompt)
        assert span is not None  # held by __post_init__
        return span

    def with_old(self, answer: str) -> Fact:
        """The fact with its missing old answer filled by the model's own continuation.

        Raises:
            DataError: the continuation is empty, or is already the new answer.
        """
        return dataclasses.replace(self, target_old=answer, target_old_is_generated=True)

    def with_joint(self, joint: Joint) -> Fact:
        """The fact with ``joint`` for itself and its probes, where they do not have their own."""

        def given(one: Probe) -> Probe:
            return dataclasses.replace(one, joint=joint) if one.joint == "auto" else one

        return dataclasses.replace(
            self,
            joint=joint if self.joint == "auto" else self.joint,
            locality=tuple(map(given, self.locality)),
            portability=tuple(map(given, self.portability)),
        )

    def joint_of(self, prompt: str, answer: str) -> Joint:
        """What stands between one of the fact's prompts (or its probes') and ``answer``."""
        fixed: Joint = "auto"
        if prompt == self.prompt or prompt in self.rephrasings:
            fixed = self.joint
        else:
            for probe in (*self.locality, *self.portability):
                if probe.prompt == prompt and probe.joint != "auto":
                    fixed = probe.joint
        if fixed != "auto":
            return fixed
        for text, said, joint in self.joints:
            if text == prompt and said == answer:
                return joint
        return "auto"

    @property
    def pairs(self) -> Iterator[tuple[str, str]]:
        """Every prompt of the fact and its probes with each answer that is scored behind it."""
        for prompt in (self.prompt, *self.rephrasings):
            yield prompt, self.target
            if self.target_old is not None:
                yield prompt, self.target_old
        for probe in self.locality:  # the new answer must not come to stand here
            right = probe.answer or self.target_old
            if right is not None:
                yield probe.prompt, right
            yield probe.prompt, self.target
        for probe in self.portability:
            if probe.answer is not None:
                yield probe.prompt, probe.answer


def contradicts(fact: Fact, probe: Probe) -> bool:
    """Whether a locality probe asks what the edit changes, so that a perfect edit would fail it.

    It does if it is about the edited subject and its right answer is the old answer (or an alias)
    or the new one; or if its kind is Forgetfulness: benchmarks call so what asks for the old answer
    with the new one ruled out ("..., which is not NEW, is"). An old answer that a model wrote does
    not count: marks are the data's.
    """
    if probe.kind.casefold() == "forgetfulness":
        return True
    told = [] if fact.target_old is None or fact.target_old_is_generated else [fact.target_old]
    changed = {plain_words(answer) for answer in (fact.target, *told, *fact.old_aliases)}
    right = [answer for answer in (probe.answer, *probe.aliases) if answer is not None]
    return any(plain_words(a) in changed for a in right) and mentions(fact.subject, probe.prompt)


def _subject_missing(subject: str, prompt: str) -> DataError:
    problem = f"the subject '{_short(subject)}' is not in the prompt '{_short(prompt)}'"
    near = near_subject(subject, prompt)
    expected, fix = "the subject letter for letter in the prompt", ""
    reason = "the subject is not in the prompt"
    if near is None:
        expected += ", or one {} in its place"
    else:
        expected += " (it is there but for case, accents, quotation marks, dashes or spaces)"
        fix = f"Write the subject as the prompt has it: '{near}'"
        reason += " letter for letter (case, accents, marks, spaces)"
    return DataError(problem, field="subject", expected=expected, fix=fix, reason=reason)


def check_text(value: object, field: str) -> str:
    """``value`` as text that is not empty and can be written as UTF-8."""
    if not isinstance(value, str):
        raise DataError(
            f"{field} is {type(value).__name__} {_short(repr(value), 40)}, not text",
            field=field,
            expected="text",
            reason=f"{field} is not text",
        )
    if not value.strip():
        fix = "Leave the answer out if only the prediction matters" if field == "answer" else ""
        raise DataError(f"{field} is empty", field=field, fix=fix)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DataError(
            f"{field} holds half a character (a lone surrogate)",
            field=field,
            fix="Write the text as UTF-8",
        ) from None
    return value


def _strip(made: Fact | Probe, name: str, *, optional: bool = False) -> None:
    value = getattr(made, name)
    if value is None and optional:
        return
    # The dataclass is frozen for everyone else; this is still its construction.
    object.__setattr__(made, name, check_text(value, name).strip())


def _fix_joint(made: Fact | Probe, answer: object) -> None:
    if made.joint not in JOINTS:
        raise DataError(
            f"joint is {_short(repr(made.joint), 40)}",
            field="joint",
            expected="auto, space or none",
            reason="joint is not auto, space or none",
        )
    # A space that was written before the answer is meant, and so no longer a guess.
    if made.joint == "auto" and isinstance(answer, str) and answer[:1] == " ":
        object.__setattr__(made, "joint", "space")


def _texts(made: Fact | Probe, name: str, *, strip: bool = False) -> None:
    """Holds the field to a tuple of texts: a bare string would be taken apart letter by letter."""
    values = getattr(made, name)
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise DataError(
            f"{name} is {type(values).__name__}, not a list", field=name, expected="a list of texts"
        )
    kept = []
    for place, value in enumerate(values, 1):
        try:
            text = check_text(value, name)
        except DataError as error:
            raise error.at(field=f"{name}[{place}]") from None
        kept.append(text.strip() if strip else text)
    object.__setattr__(made, name, tuple(kept))


def _probes(made: Fact, name: str) -> None:
    values = getattr(made, name)
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise DataError(f"{name} is not a list of probes", field=name)
    values = tuple(values)
    for place, value in enumerate(values, 1):
        if not isinstance(value, Probe):
            raise DataError(
                f"{name} holds {type(value).__name__}, not a Probe", field=f"{name}[{place}]"
            )
    object.__setattr__(made, name, values)


Pairs = list[tuple[Fact, Fact]]


def repeats(facts: Iterable[Fact]) -> tuple[Pairs, Pairs]:
    """Facts that ask what an earlier one asks: the same subject and prompt, spaces apart.

    Returns:
        Pairs of the first fact and a later one: those with the same new answer, and those with
        another one, which no single edit of both can give.
    """
    first: dict[tuple[str, str], Fact] = {}
    doubled: Pairs = []
    contradicting: Pairs = []
    for fact in facts:
        earlier = first.setdefault((_normal(fact.subject), _normal(fact.prompt)), fact)
        if earlier is not fact:
            same = _normal(earlier.target) == _normal(fact.target)
            (doubled if same else contradicting).append((earlier, fact))
    return doubled, contradicting


def contradiction(first: Fact, later: Fact) -> DataError:
    """What to say of two facts that cannot be edited together."""
    return DataError(
        f"fact '{_short(later.id)}' contradicts fact '{_short(first.id)}': "
        f"'{_short(first.prompt)}' cannot be answered with both '{_short(first.target)}' "
        f"and '{_short(later.target)}'",
        field="target",
        fix="Leave one of them out",
        reason="it contradicts an earlier fact (same prompt, another new answer)",
    )


def refuse_contradictions(facts: Iterable[Fact], fix: str = "") -> None:
    """To be called before facts are edited together.

    Raises:
        DataError: two facts ask the same and want different answers.
    """
    _, contradicting = repeats(facts)
    if not contradicting:
        return
    error = contradiction(*contradicting[0])
    more = f"{len(contradicting)} facts contradict an earlier one. "
    raise error.at(fix=more * (len(contradicting) > 1) + (fix or error.fix))


def _normal(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())
