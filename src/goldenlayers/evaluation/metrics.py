"""The metrics: what each asks of a model about a fact, one question per future row, and how it
scores the answer. Nothing here needs a model.

A question that the data cannot fill (no rephrasings, no answer) is there with its reason, so it
is counted.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from goldenlayers.errors import UserError, near_matches
from goldenlayers.evaluation.scoring import (
    ANSWER,
    COMPARE,
    FLUENCY,
    GENERATED,
    KL,
    PERPLEXITY,
    STAY,
    STAY_NEIGHBOUR,
    STAY_SUBJECT,
    Range,
    Scoring,
)
from goldenlayers.facts import Fact, Probe
from goldenlayers.prompts import mentions
from goldenlayers.registry import Registry

KL_PROMPTS = 5
FLUENCY_PROMPTS = 3


@dataclass(frozen=True, slots=True)
class Question:
    """One probe of one fact under one metric.

    ``metric`` names its rows, and ``probe`` numbers those of one name. ``other`` is an answer to
    compare ``answer`` with; ``aliases`` are as good as ``answer``. ``reason``: why it cannot be
    scored, if so. ``fact``, the fact's place in the list, is filled in by :func:`questions`, and so
    is ``scoring``, unless the question has one of its own.
    """

    metric: str
    probe: int | None
    kind: str = ""
    prompt: str = ""
    answer: str | None = None
    other: str | None = None
    aliases: tuple[str, ...] = ()
    reason: str | None = None
    fact: int = 0
    scoring: Scoring = ANSWER

    @property
    def row_metrics(self) -> tuple[str, ...]:
        """The metrics of the rows this question gives."""
        return tuple(self.metric + ending for ending, _ in self.scoring.rows)


@dataclass(frozen=True)
class Around:
    """What a metric may use beside the fact: other facts, and the seed of a draw from them."""

    facts: tuple[Fact, ...]
    seed: int = 0

    @cached_property
    def unrelated(self) -> list[tuple[str, str]]:
        """(fact's id, prompt) of every locality prompt; without any, the facts' own prompts."""
        found = [(fact.id, probe.prompt) for fact in self.facts for probe in fact.locality]
        return found or [(fact.id, fact.prompt) for fact in self.facts]


@dataclass(frozen=True)
class Metric:
    """What is asked about a fact, and how it is scored.

    Attributes:
        name: what it is asked for by.
        ask: the questions about a fact. A draw depends on ``Around.seed`` and the fact's id alone.
        scoring: how the questions are put and scored.
        questions: names of the questions, where they are others than the metric's.
        by_kind: whether probes are averaged within each kind first, then over the kinds.
        lower_is_better: it has no golden layer then: an edit that changes nothing would be best.
    """

    name: str
    ask: Callable[[Fact, Around], Iterable[Question]]
    scoring: Scoring = ANSWER
    questions: tuple[str, ...] = ()
    by_kind: bool = False
    lower_is_better: bool = False

    @cached_property
    def rows(self) -> Mapping[str, Range]:
        """The names of its rows, each with the lowest and highest score."""
        names = self.questions or (self.name,)
        return {name + ending: bounds for name in names for ending, bounds in self.scoring.rows}


def _rewrite(fact: Fact, around: Around) -> Iterator[Question]:
    return _prompts("rewrite", (fact.prompt,), fact.target)


def _rephrase(fact: Fact, around: Around) -> Iterator[Question]:
    return _prompts("rephrase", fact.rephrasings, fact.target)


def _locality(fact: Fact, around: Around) -> Iterator[Question]:
    """What must stay, by whom it is about; and apart from it what contradicts the edit."""
    found = list(_probes(LOCALITY, fact.locality))
    for question, probe in zip(found, fact.locality, strict=False):
        if probe.contradicts:
            yield replace(question, metric=CONTRADICTING)
        else:
            same = mentions(fact.subject, probe.prompt)
            yield replace(question, scoring=STAY_SUBJECT if same else STAY_NEIGHBOUR)
    if not fact.locality:
        yield from found
    elif not fact.must_stay:
        yield Question(LOCALITY, None, reason="all locality probes of the fact contradict the edit")


def _portability(fact: Fact, around: Around) -> Iterator[Question]:
    return _probes("portability", fact.portability)


def _generation(fact: Fact, around: Around) -> Iterator[Question]:
    yield from _prompts("generation_rewrite", (fact.prompt,), fact.target)
    yield from _prompts("generation_rephrase", fact.rephrasings, fact.target)
    yield from _probes("generation_portability", fact.portability)


def _counterfact(fact: Fact, around: Around) -> Iterator[Question]:
    new, old = fact.target, fact.target_old
    missing = None if old else "the fact has no old answer"
    yield from _prompts("efficacy", (fact.prompt,), new, old, missing)
    yield from _prompts("paraphrase", fact.rephrasings, new, old, missing)
    name = "neighborhood"
    near = [(n, p) for n, p in enumerate(fact.locality) if p.kind == name]
    for n, p in near:
        # The right answer is to stay ahead of the new one. In CounterFact it is the old answer.
        right = p.answer or old
        missing = None if right else "the probe has no answer"
        if right == new:
            missing = "the probe's own answer is the new answer"
        yield Question(name, n, p.kind, p.prompt, right, new, reason=missing)
    if not near:
        yield Question(name, None, reason="the fact has no neighbourhood probes")


def _fluency(fact: Fact, around: Around) -> Iterator[Question]:
    return _prompts("fluency", fact.generation_prompts[:FLUENCY_PROMPTS] or (fact.prompt,))


def _kl(fact: Fact, around: Around) -> Iterator[Question]:
    own = {fact.prompt, *fact.rephrasings}
    own |= {probe.prompt for probe in (*fact.locality, *fact.portability)}
    subject = fact.subject.casefold()
    free = [
        text for owner, text in around.unrelated
        if owner != fact.id and text not in own and subject not in text.casefold()
    ]  # fmt: skip
    free = list(dict.fromkeys(free))
    draw = random.Random(f"{around.seed}/kl/{fact.id}")
    drawn = draw.sample(free, min(KL_PROMPTS, len(free)))
    return _prompts("kl", drawn, missing="there are no unrelated prompts")


def _perplexity(fact: Fact, around: Around) -> Iterator[Question]:
    yield Question("perplexity", 0)


def _prompts(
    metric: str,
    prompts: Sequence[str],
    answer: str | None = None,
    other: str | None = None,
    reason: str | None = None,
    missing: str = "the fact has no rephrasings",
) -> Iterator[Question]:
    """One question per prompt; where there is none, one that says so."""
    for n, prompt in enumerate(prompts):
        yield Question(metric, n, "", prompt, answer, other, reason=reason)
    if not prompts:
        yield Question(metric, None, reason=missing)


def _probes(metric: str, probes: Sequence[Probe]) -> Iterator[Question]:
    what = metric.removeprefix("generation_")
    for n, p in enumerate(probes):
        reason = None if p.answer or what == LOCALITY else "the probe has no answer"
        yield Question(metric, n, p.kind, p.prompt, p.answer, aliases=p.aliases, reason=reason)
    if not probes:
        yield Question(metric, None, reason=f"the fact has no {what} probes")


LOCALITY, CONTRADICTING = "locality", "locality_contradicting"
BY_PROBE = (LOCALITY, "locality_subject", "locality_neighbour", CONTRADICTING)
"""The rows of locality: all that must stay, the parts of it, and what contradicts the edit."""
_GENERATION = ("generation_rewrite", "generation_rephrase", "generation_portability")
_OURS = (
    Metric("rewrite", _rewrite),
    Metric("rephrase", _rephrase),
    Metric(LOCALITY, _locality, STAY, BY_PROBE),
    Metric("portability", _portability, by_kind=True),
    Metric("generation", _generation, GENERATED, _GENERATION, by_kind=True),
    Metric("counterfact", _counterfact, COMPARE, ("efficacy", "paraphrase", "neighborhood")),
    Metric("fluency", _fluency, FLUENCY),
    Metric("kl", _kl, KL, lower_is_better=True),
    Metric("perplexity", _perplexity, PERPLEXITY, lower_is_better=True),
)
METRICS: Registry[Metric] = Registry(
    "metric", "goldenlayers.metrics", [(one.name, one) for one in _OURS]
)
"""What can be asked for."""
DEFAULT_METRICS = ("rewrite", "rephrase", "locality", "portability")
"""What is asked for where nothing is named, and what Overall is made of."""
HARMONIC = DEFAULT_METRICS[:3]
"""What the harmonic mean is made of: it is low where one of them is, as of no edit at all."""


def metrics_of(wanted: Iterable[str | Metric]) -> tuple[Metric, ...]:
    """The metrics, each once; names stand for those of ``METRICS``.

    Raises:
        UserError: none, or an unknown one.
    """
    found = dict.fromkeys(METRICS[one] if isinstance(one, str) else one for one in wanted)
    if not found:
        raise UserError("no metric is asked for", fix=near_matches("", METRICS))
    return tuple(found)


def check_metrics(names: Iterable[str]) -> tuple[str, ...]:
    """The metrics' names without repetition.

    Raises:
        UserError: none, or an unknown one.
    """
    return tuple(metric.name for metric in metrics_of(names))


def need_text(metrics: Iterable[str | Metric]) -> bool:
    """Whether one of the metrics reads a held-out text, as perplexity does."""
    return any(metric.scoring.needs == "held-out" for metric in metrics_of(metrics))


def metric_of(row: str) -> Metric | None:
    """The metric that a row's name belongs to, of those at hand; or an installed one so called."""
    found = next((metric for metric in METRICS.known() if row in metric.rows), None)
    if found is None and row in METRICS:
        try:
            return METRICS[row]
        except UserError:  # a row can be read without the package that made it
            return None
    return found


def lower_is_better(row: str) -> bool:
    """Whether rows of this name have no golden layer, as of kl, or of what an edit should move."""
    if row == CONTRADICTING:
        return True
    metric = metric_of(row)
    return metric is not None and metric.lower_is_better


def questions(
    facts: Sequence[Fact],
    metrics: Iterable[str | Metric] = DEFAULT_METRICS,
    *,
    others: Sequence[Fact] | None = None,
    seed: int = 0,
) -> list[Question]:
    """All questions of the facts, fact by fact.

    Args:
        facts: the facts to be judged.
        metrics: metrics, or their names in ``METRICS``.
        others: whose locality prompts are the unrelated prompts of kl; default ``facts``.
        seed: of that draw; each fact's draw depends on its id alone.

    Raises:
        UserError: no metric, or an unknown one.
    """
    around = Around(tuple(facts if others is None else others), seed)
    chosen = metrics_of(metrics)
    return [
        replace(question, fact=i, scoring=_own(question.scoring, metric))
        for i, fact in enumerate(facts)
        for metric in chosen
        for question in metric.ask(fact, around)
    ]


def _own(scoring: Scoring, metric: Metric) -> Scoring:
    return metric.scoring if scoring is ANSWER else scoring
