"""From what a model said before and after an edit to rows: one per fact and probe.

Scores of shares, successes and probabilities run from 0 to 100 (magnitudes from -100), kl is in
nats, fluency and perplexity in their own units. What cannot be scored has the score None and a
reason; it is never left out and never 0.

Definitions: ROME (Meng et al. 2022, arXiv 2202.05262, section 3.2 and 3.4) for CounterFact's own
metrics and fluency; EasyEdit's token-level accuracy for rewrite, rephrase and portability; Yang et
al. 2025 (arXiv 2502.11177) for generation accuracy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from goldenlayers.evaluation.answer_matching import matches_answer
from goldenlayers.evaluation.metrics import fluency
from goldenlayers.evaluation.questions import Question
from goldenlayers.facts import Fact

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from goldenlayers.evaluation.reading import Ids, Read

Row = dict[str, Any]

NO_NUMBER = "the model's output is not a number"


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """What a model said to one question: forced readings, or generated text; or why not."""

    reads: tuple[Read, ...] = ()
    text: str = ""
    tokens: Ids = ()
    reason: str | None = None


def outcome_of(reads: Sequence[Read]) -> Outcome:
    """The outcome of forced readings; a reason where a prediction is no number."""
    if any(-1 in one.tokens for one in reads):
        return Outcome(reason=NO_NUMBER)
    return Outcome(reads=tuple(reads))


class Words:
    """Single tokens as text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}

    def __call__(self, ids: Sequence[int]) -> list[str]:
        for i in ids:
            if i not in self._known:
                self._known[i] = str(self._tokenizer.decode([i]))
        return [self._known[i] for i in ids]


def rows_of(
    fact: Fact, question: Question, before: Outcome, after: Outcome, words: Words
) -> list[Row]:
    """The question's rows: one, or two where it gives two metrics (success and magnitude)."""
    reason = after.reason or before.reason
    if reason:
        return unscored(fact, question, reason)
    score = _SCORERS[question.rule]
    found = score(fact, question, before, after, words)
    rows = []
    for metric, (value, evidence) in zip(question.row_metrics, found, strict=True):
        if math.isfinite(value):
            rows.append(_row(fact, question, metric, value, evidence))
        else:
            rows.append(_row(fact, question, metric, None, evidence, NO_NUMBER))
    return rows


def unscored(fact: Fact, question: Question, reason: str) -> list[Row]:
    """The question's rows without a score."""
    return [_row(fact, question, metric, None, {}, reason) for metric in question.row_metrics]


def _row(
    fact: Fact,
    question: Question,
    metric: str,
    score: float | None,
    evidence: dict[str, Any],
    reason: str = "",
) -> Row:
    row: Row = {"fact": fact.id, "metric": metric, "probe": question.probe}
    if question.kind:
        row["kind"] = question.kind
    row |= {"score": None if score is None else round(score, 6), "evidence": evidence}
    return row | ({"reason": reason} if reason else {})


Scored = list[tuple[float, dict[str, Any]]]


def _answer(
    fact: Fact, question: Question, before: Outcome, after: Outcome, words: Words
) -> Scored:
    """Share of the answer's tokens that are the arg-max under teacher forcing."""
    target = after.reads[0].targets
    hits = [a == t for a, t in zip(after.reads[0].tokens, target, strict=True)]
    evidence = {
        "answer": words(target),
        "before": words(before.reads[0].tokens),
        "after": words(after.reads[0].tokens),
    }
    return [(100 * sum(hits) / len(hits), evidence)]


def _stay(fact: Fact, question: Question, before: Outcome, after: Outcome, words: Words) -> Scored:
    """Share of positions whose arg-max token is the same before and after."""
    old, new = before.reads[0].tokens, after.reads[0].tokens
    same = [a == b for a, b in zip(old, new, strict=True)]
    evidence = {"answer": question.answer, "before": words(old), "after": words(new)}
    return [(100 * sum(same) / len(same), evidence)]


def _compare(
    fact: Fact, question: Question, before: Outcome, after: Outcome, words: Words
) -> Scored:
    """[NLL(other) > NLL(answer)], and e^-NLL(answer) - e^-NLL(other); NLL mean per token."""
    was = [_number(r.nll) for r in before.reads]
    now = [_number(r.nll) for r in after.reads]
    if any(math.isnan(nll) for nll in now):
        return [(math.nan, {})] * 2
    evidence = {
        "answers": [question.answer, question.other],
        "nll_before": [round(nll, 6) for nll in was],
        "nll_after": [round(nll, 6) for nll in now],
    }
    success = 100.0 * (now[1] > now[0])
    return [(success, evidence), (100 * (math.exp(-now[0]) - math.exp(-now[1])), evidence)]


def _generate(
    fact: Fact, question: Question, before: Outcome, after: Outcome, words: Words
) -> Scored:
    """Whether free greedy decoding begins with the answer or an alias of it."""
    right = matches_answer(after.text, question.answer or "", question.aliases)
    evidence: dict[str, Any] = {
        "answer": question.answer,
        "before": before.text,
        "after": after.text,
    }
    if question.aliases:
        evidence["aliases"] = list(question.aliases)
    return [(100.0 * right, evidence)]


def _fluency(
    fact: Fact, question: Question, before: Outcome, after: Outcome, words: Words
) -> Scored:
    """Weighted 2- and 3-gram entropy of the sampled tokens."""
    evidence = {
        "fluency_before": round(fluency(before.tokens), 6),
        "before": before.text,
        "after": after.text,
    }
    return [(fluency(after.tokens), evidence)]


def _kl(fact: Fact, question: Question, before: Outcome, after: Outcome, words: Words) -> Scored:
    """KL(p_before ‖ p_after) of the next token behind an unrelated prompt, in nats."""
    # The untouched model is its own reference: no pass was made, and nothing moved.
    kl = 0.0 if after is before else _number(after.reads[0].kl)
    evidence = {
        "prompt": question.prompt,
        "before": words(before.reads[0].tokens),
        "after": words(after.reads[0].tokens),
    }
    return [(kl, evidence)]


def _perplexity(
    fact: Fact, question: Question, before: Outcome, after: Outcome, words: Words
) -> Scored:
    """Exp of the mean NLL per token of the held-out text, after and before."""
    evidence = {"tokens": sum(len(r.tokens) for r in after.reads)}
    return [(_perplexity_of(after), evidence), (_perplexity_of(before), evidence)]


def _perplexity_of(outcome: Outcome) -> float:
    count = sum(len(r.tokens) for r in outcome.reads)
    mean = math.fsum(_number(r.nll) * len(r.tokens) for r in outcome.reads) / count
    return math.exp(mean) if mean < 700 else math.inf


def _number(value: float | None) -> float:
    return math.nan if value is None else value


_SCORERS = {
    "answer": _answer,
    "stay": _stay,
    "compare": _compare,
    "generate": _generate,
    "fluency": _fluency,
    "kl": _kl,
    "perplexity": _perplexity,
}
