"""What is asked of a model for each metric: the probes of the facts, one question per future row.

A question that the data cannot fill (no rephrasings, no answer) is there with its reason, so it
is counted. Nothing here needs a model.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from goldenlayers.errors import UserError, near_matches
from goldenlayers.facts import Fact

DEFAULT_METRICS = ("rewrite", "rephrase", "locality", "portability")
METRICS = (*DEFAULT_METRICS, "generation", "counterfact", "fluency", "kl", "perplexity")
"""What can be asked for. generation gives generation_rewrite, generation_rephrase and
generation_portability, counterfact efficacy_, paraphrase_ and neighborhood_ success and magnitude.
"""

FAILED = "the edit failed: "
"""How the reason of a row begins whose fact could not be edited."""

Rule = Literal["answer", "stay", "compare", "generate", "fluency", "kl", "perplexity"]

KL_PROMPTS = 5
FLUENCY_PROMPTS = 3


@dataclass(frozen=True, slots=True)
class Question:
    """One probe of one fact under one metric.

    ``fact`` is the fact's place in the list. ``rule`` says how it is scored: ``answer`` arg-max
    against the answer, ``stay`` arg-max before against after, ``compare`` NLL of ``answer`` against
    NLL of ``other``, ``generate`` free decoding, where ``aliases`` are as good as the answer.
    ``reason``: why it cannot be scored, if so.
    """

    fact: int
    metric: str
    rule: Rule
    probe: int | None
    kind: str = ""
    prompt: str = ""
    answer: str | None = None
    other: str | None = None
    aliases: tuple[str, ...] = ()
    reason: str | None = None

    @property
    def row_metrics(self) -> tuple[str, ...]:
        """The metrics of the rows this question gives."""
        if self.rule == "compare":
            return f"{self.metric}_success", f"{self.metric}_magnitude"
        if self.rule == "perplexity":
            return "perplexity", "perplexity_before"
        return (self.metric,)


def check_metrics(names: Sequence[str]) -> tuple[str, ...]:
    """The metrics without repetition.

    Raises:
        UserError: none, or an unknown one.
    """
    for name in names:
        if name not in METRICS:
            raise UserError(f"unknown metric '{name}'", fix=near_matches(name, METRICS))
    if not names:
        raise UserError("no metric is asked for", fix=near_matches("", METRICS))
    return tuple(dict.fromkeys(names))


def questions(
    facts: Sequence[Fact],
    metrics: Sequence[str] = DEFAULT_METRICS,
    *,
    others: Sequence[Fact] | None = None,
    seed: int = 0,
) -> list[Question]:
    """All questions of the facts, fact by fact.

    Args:
        facts: the facts to be judged.
        metrics: names of ``METRICS``.
        others: whose locality prompts are the unrelated prompts of kl; default ``facts``.
        seed: of that draw; each fact's draw depends on its id alone.
    """
    makers = [_MAKERS[name] for name in check_metrics(metrics)]
    pool = _unrelated(facts if others is None else others) if "kl" in metrics else []
    return [
        question
        for i, fact in enumerate(facts)
        for make in makers
        for question in make(i, fact, pool, seed)
    ]


Pool = list[tuple[str, str]]


def _rewrite(i: int, fact: Fact, _pool: Pool, _seed: int) -> Iterator[Question]:
    yield Question(i, "rewrite", "answer", 0, prompt=fact.prompt, answer=fact.target)


def _rephrase(i: int, fact: Fact, _pool: Pool, _seed: int) -> Iterator[Question]:
    for n, prompt in enumerate(fact.rephrasings):
        yield Question(i, "rephrase", "answer", n, prompt=prompt, answer=fact.target)
    if not fact.rephrasings:
        yield Question(i, "rephrase", "answer", None, reason="the fact has no rephrasings")


def _locality(i: int, fact: Fact, _pool: Pool, _seed: int) -> Iterator[Question]:
    for n, p in enumerate(fact.locality):
        yield Question(i, "locality", "stay", n, p.kind, p.prompt, p.answer)
    if not fact.locality:
        yield Question(i, "locality", "stay", None, reason="the fact has no locality probes")


def _portability(i: int, fact: Fact, _pool: Pool, _seed: int) -> Iterator[Question]:
    for n, p in enumerate(fact.portability):
        reason = None if p.answer else "the probe has no answer"
        yield Question(i, "portability", "answer", n, p.kind, p.prompt, p.answer, reason=reason)
    if not fact.portability:
        yield Question(
            i, "portability", "answer", None, reason="the fact has no portability probes"
        )


def _generation(i: int, fact: Fact, _pool: Pool, _seed: int) -> Iterator[Question]:
    name = "generation_rewrite"
    yield Question(i, name, "generate", 0, prompt=fact.prompt, answer=fact.target)
    name = "generation_rephrase"
    for n, prompt in enumerate(fact.rephrasings):
        yield Question(i, name, "generate", n, prompt=prompt, answer=fact.target)
    if not fact.rephrasings:
        yield Question(i, name, "generate", None, reason="the fact has no rephrasings")
    name = "generation_portability"
    for n, p in enumerate(fact.portability):
        reason = None if p.answer else "the probe has no answer"
        yield Question(
            i, name, "generate", n, p.kind, p.prompt, p.answer, aliases=p.aliases, reason=reason
        )
    if not fact.portability:
        yield Question(i, name, "generate", None, reason="the fact has no portability probes")


def _counterfact(i: int, fact: Fact, _pool: Pool, _seed: int) -> Iterator[Question]:
    new, old = fact.target, fact.target_old
    missing = None if old else "the fact has no old answer"
    yield Question(
        i, "efficacy", "compare", 0, prompt=fact.prompt, answer=new, other=old, reason=missing
    )
    for n, prompt in enumerate(fact.rephrasings):
        yield Question(
            i, "paraphrase", "compare", n, prompt=prompt, answer=new, other=old, reason=missing
        )
    if not fact.rephrasings:
        yield Question(i, "paraphrase", "compare", None, reason="the fact has no rephrasings")
    near = [(n, p) for n, p in enumerate(fact.locality) if p.kind == "neighborhood"]
    for n, p in near:
        # The right answer is to stay ahead of the new one. In CounterFact it is the old answer.
        right = p.answer or old
        missing = None if right else "the probe has no answer"
        if right == new:
            missing = "the probe's own answer is the new answer"
        yield Question(
            i, "neighborhood", "compare", n, p.kind, p.prompt, right, new, reason=missing
        )
    if not near:
        yield Question(
            i, "neighborhood", "compare", None, reason="the fact has no neighbourhood probes"
        )


def _fluency(i: int, fact: Fact, _pool: Pool, _seed: int) -> Iterator[Question]:
    prompts = fact.generation_prompts[:FLUENCY_PROMPTS] or (fact.prompt,)
    for n, prompt in enumerate(prompts):
        yield Question(i, "fluency", "fluency", n, prompt=prompt)


def _kl(i: int, fact: Fact, pool: Pool, seed: int) -> Iterator[Question]:
    own = {fact.prompt, *fact.rephrasings, *(p.prompt for p in fact.locality)}
    own |= {p.prompt for p in fact.portability}
    subject = fact.subject.casefold()
    free = [
        text for owner, text in pool
        if owner != fact.id and text not in own and subject not in text.casefold()
    ]  # fmt: skip
    free = list(dict.fromkeys(free))
    drawn = random.Random(f"{seed}/kl/{fact.id}").sample(free, min(KL_PROMPTS, len(free)))
    for n, prompt in enumerate(drawn):
        yield Question(i, "kl", "kl", n, prompt=prompt)
    if not drawn:
        yield Question(i, "kl", "kl", None, reason="there are no unrelated prompts")


def _perplexity(i: int, _fact: Fact, _pool: Pool, _seed: int) -> Iterator[Question]:
    yield Question(i, "perplexity", "perplexity", 0)


_MAKERS: Mapping[str, Any] = {
    "rewrite": _rewrite,
    "rephrase": _rephrase,
    "locality": _locality,
    "portability": _portability,
    "generation": _generation,
    "counterfact": _counterfact,
    "fluency": _fluency,
    "kl": _kl,
    "perplexity": _perplexity,
}


def _unrelated(facts: Sequence[Fact]) -> Pool:
    """(owner, prompt) of every locality prompt; where there is none, the facts' own prompts."""
    found = [(fact.id, probe.prompt) for fact in facts for probe in fact.locality]
    return found or [(fact.id, fact.prompt) for fact in facts]
