"""How a question is put to a model, and how what it said before and after an edit becomes rows.

Scores of shares, successes and probabilities run from 0 to 100 (magnitudes from -100), kl is in
nats, fluency and perplexity in their own units. What cannot be scored has the score None and a
reason; it is never left out and never 0.

Definitions: ROME (Meng et al. 2022, arXiv 2202.05262, section 3.2 and 3.4) for CounterFact's own
metrics and fluency; EasyEdit's token-level accuracy for rewrite, rephrase and portability; Yang et
al. 2025 (arXiv 2502.11177) for generation accuracy.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from goldenlayers.evaluation.generation import matches_answer
from goldenlayers.facts import Fact

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from goldenlayers.evaluation.metrics import Question
    from goldenlayers.evaluation.reading import Ids, Read

ScoreRow = dict[str, Any]
"""{"fact", "metric", "probe", "kind"?, "score", "before"?, "soft"?, "evidence"?, "reason"?}, one
per fact, probe and metric; those of a sweep have "layer", those of a sequence "step". "before" is
the score of the untouched model, "soft" the soft score (:class:`Score`).
"""
Range = tuple[float, float]


class Score(NamedTuple):
    """A row's score, its evidence, and its soft score: by probabilities, where ``value`` counts
    hits. It says more of few facts.
    """

    value: float
    evidence: dict[str, Any]
    soft: float | None = None


Scored = list[Score]
"""A score for each row of a question."""

SHARE: Range = (0.0, 100.0)
POSITIVE: Range = (0.0, math.inf)
NO_NUMBER = "the model's output is not a number"
FAILED = "the edit failed: "
"""How the reason of a row begins whose fact could not be edited."""


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


@dataclass(frozen=True)
class Scoring:
    """A way to ask and to score, which several metrics may share.

    Attributes:
        score: (question, outcome before, outcome after, tokens as text) → a score and its evidence
            for each row. A score that is not finite leaves the row unscored.
        needs: of the model. "forced": its predictions along the answer (and along the question's
            ``other`` answer), read in one pass. "generated": its free greedy answer. "sampled":
            text drawn from it. "held-out": its predictions along the held-out text.
        rows: endings of the names of the rows, each with its lowest and highest score.
        nll: whether the answers' negative log-likelihood is read, too.
        left: whether it is read how much is left of what the untouched model found likeliest.
        kl: whether the divergence from the untouched model behind the prompt is read, too.
        continued: whether a question without answer is read along the untouched model's own
            continuation.
    """

    score: Callable[[Question, Outcome, Outcome, Words], Scored]
    needs: Literal["forced", "generated", "sampled", "held-out"] = "forced"
    rows: tuple[tuple[str, Range], ...] = (("", SHARE),)
    nll: bool = False
    left: bool = False
    kl: bool = False
    continued: bool = False


def rows_of(
    fact: Fact,
    question: Question,
    before: Outcome,
    after: Outcome,
    words: Words,
    was: Scored,
) -> list[ScoreRow]:
    """The question's rows: one, or two where it gives two metrics (success and magnitude).

    ``was`` are the scores of the untouched model; there are none where it said nothing.
    """
    reason = after.reason or before.reason
    if reason:
        return unscored(fact, question, reason)
    found = was if after is before else question.scoring.score(question, before, after, words)
    return [
        _row(fact, question, metric, one, was=old.value)
        if math.isfinite(one.value)
        else _row(fact, question, metric, Score(math.nan, one.evidence), NO_NUMBER)
        for metric, one, old in zip(question.row_metrics, found, was, strict=True)
    ]


def unscored(fact: Fact, question: Question, reason: str) -> list[ScoreRow]:
    """The question's rows without a score."""
    nothing = Score(math.nan, {})
    return [_row(fact, question, metric, nothing, reason) for metric in question.row_metrics]


def _row(
    fact: Fact,
    question: Question,
    metric: str,
    score: Score,
    reason: str = "",
    was: float = math.nan,
) -> ScoreRow:
    row: ScoreRow = {"fact": fact.id, "metric": metric, "probe": question.probe}
    if question.kind:
        row["kind"] = question.kind
    row["score"] = None if math.isnan(score.value) else round(score.value, 6)
    if math.isfinite(was):
        row["before"] = round(was, 6)
    if score.soft is not None and math.isfinite(score.soft):
        row["soft"] = round(score.soft, 6)
    row["evidence"] = score.evidence
    return row | ({"reason": reason} if reason else {})


def fluency(tokens: Sequence[Hashable] | str) -> float:
    """(2/3·H₂ + 4/3·H₃)/2 × 100, H_n the entropy in bits of the n-grams (ROME's "fluency").

    100 tokens without a repeated pair give 662; healthy text lies near 600, one word again and
    again gives 0. The value grows with the length of the text: compare equal lengths only.

    Args:
        tokens: generated tokens or words, about 100; a string is cut into words and marks.

    Returns:
        NaN below three tokens, which hold no 3-gram.
    """
    words = re.findall(r"\w+|[^\w\s]", tokens) if isinstance(tokens, str) else list(tokens)
    if len(words) < 3:
        return math.nan
    return 100 * (2 / 3 * _entropy(words, 2) + 4 / 3 * _entropy(words, 3)) / 2


def _entropy(words: Sequence[Hashable], n: int) -> float:
    import numpy as np

    counts = Counter(zip(*(words[i:] for i in range(n)), strict=False))
    shares = np.array(list(counts.values())) / counts.total()
    return max(0.0, float(-(shares * np.log2(shares)).sum()))


def _answer(question: Question, before: Outcome, after: Outcome, words: Words) -> Scored:
    """Share of the answer's tokens that are the arg-max under teacher forcing."""
    was, now = before.reads[0].tokens, after.reads[0].tokens
    target = after.reads[0].targets
    evidence = {"answer": words(target), "before": words(was), "after": words(now)}
    # The soft score: the geometric mean of the tokens' probabilities.
    soft = 100 * math.exp(-_number(after.reads[0].nll))
    return [Score(_alike(now, target), evidence, soft)]


def _stay(question: Question, before: Outcome, after: Outcome, words: Words) -> Scored:
    """Share of positions whose arg-max token is the same before and after."""
    was, now = before.reads[0].tokens, after.reads[0].tokens
    evidence = {"answer": question.answer, "before": words(was), "after": words(now)}
    # The soft score: how much of what was likely is left.
    left = 1.0 if after is before else after.reads[0].left
    return [Score(_alike(was, now), evidence, None if left is None else 100 * min(1.0, left))]


def _stay_twice(question: Question, before: Outcome, after: Outcome, words: Words) -> Scored:
    """As :func:`_stay`, for the row of all probes and that of the probe's own sort."""
    (found,) = _stay(question, before, after, words)
    return [found, Score(found.value, {}, found.soft)]


def _alike(a: Ids, b: Ids) -> float:
    same = [x == y for x, y in zip(a, b, strict=True)]
    return 100 * sum(same) / len(same)


def _compare(question: Question, before: Outcome, after: Outcome, words: Words) -> Scored:
    """[NLL(other) > NLL(answer)], and e^-NLL(answer) - e^-NLL(other); NLL mean per token."""
    was = [_number(r.nll) for r in before.reads]
    now = [_number(r.nll) for r in after.reads]
    if any(math.isnan(nll) for nll in now):
        return [Score(math.nan, {})] * 2
    evidence = {
        "answers": [question.answer, question.other],
        "nll_before": [round(nll, 6) for nll in was],
        "nll_after": [round(nll, 6) for nll in now],
    }
    success = 100.0 * (now[1] > now[0])
    magnitude = 100 * (math.exp(-now[0]) - math.exp(-now[1]))
    return [Score(success, evidence), Score(magnitude, evidence)]


def _generated(question: Question, before: Outcome, after: Outcome, words: Words) -> Scored:
    """Whether free greedy decoding begins with the answer or an alias of it."""
    right = matches_answer(after.text, question.answer or "", question.aliases)
    evidence: dict[str, Any] = {"answer": question.answer}
    evidence |= {"before": before.text, "after": after.text}
    if question.aliases:
        evidence["aliases"] = list(question.aliases)
    return [Score(100.0 * right, evidence)]


def _fluency(question: Question, before: Outcome, after: Outcome, words: Words) -> Scored:
    """Weighted 2- and 3-gram entropy of the sampled tokens."""
    was = round(fluency(before.tokens), 6)
    evidence = {"fluency_before": was, "before": before.text, "after": after.text}
    return [Score(fluency(after.tokens), evidence)]


def _kl(question: Question, before: Outcome, after: Outcome, words: Words) -> Scored:
    """KL(p_before ‖ p_after) of the next token behind an unrelated prompt, in nats."""
    # The untouched model is its own reference: no pass was made, and nothing moved.
    kl = 0.0 if after is before else _number(after.reads[0].kl)
    was, now = words(before.reads[0].tokens), words(after.reads[0].tokens)
    return [Score(kl, {"prompt": question.prompt, "before": was, "after": now})]


def _perplexity(question: Question, before: Outcome, after: Outcome, words: Words) -> Scored:
    """Exp of the mean NLL per token of the held-out text, after and before."""
    evidence = {"tokens": sum(len(r.tokens) for r in after.reads)}
    return [Score(_perplexity_of(one), evidence) for one in (after, before)]


def _perplexity_of(outcome: Outcome) -> float:
    count = sum(len(r.tokens) for r in outcome.reads)
    mean = math.fsum(_number(r.nll) * len(r.tokens) for r in outcome.reads) / count
    return math.exp(mean) if mean < 700 else math.inf


def _number(value: float | None) -> float:
    return math.nan if value is None else value


ANSWER = Scoring(_answer, nll=True)
STAY = Scoring(_stay, left=True, continued=True)
STAY_SUBJECT, STAY_NEIGHBOUR = (
    replace(STAY, score=_stay_twice, rows=(("", SHARE), (ending, SHARE)))
    for ending in ("_subject", "_neighbour")
)
COMPARE = Scoring(_compare, rows=(("_success", SHARE), ("_magnitude", (-100.0, 100.0))), nll=True)
GENERATED = Scoring(_generated, "generated")
FLUENCY = Scoring(_fluency, "sampled", (("", POSITIVE),))
KL = Scoring(_kl, rows=(("", (-1e-3, math.inf)),), kl=True)
PERPLEXITY = Scoring(_perplexity, "held-out", (("", POSITIVE), ("_before", POSITIVE)))
