"""What a model answers, as a person reads it: greedy text and the probability of the new answer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from goldenlayers.facts import Fact
from goldenlayers.joints import join
from goldenlayers.shown import put

if TYPE_CHECKING:
    from goldenlayers.models.model import Model

_SHOWN = 20


@dataclass(frozen=True)
class Answer:
    """Greedy continuation with its leading space, p(new answer | prompt), and whether greedy
    decoding gives it.
    """

    text: str
    probability: float
    is_new: bool


def greedy_answers(model: Model, facts: Sequence[Fact], tokens: int = 10) -> list[Answer]:
    """The model's answer to every fact's prompt, as it is right now."""
    import torch

    from goldenlayers.decoding import forced_predictions, greedy
    from goldenlayers.hooks import final_hidden
    from goldenlayers.losses import token_nll
    from goldenlayers.tokens import pad_ids

    encoder = model.encoder
    prompts = [encoder.fact(fact) for fact in facts]
    targets = [encoder.fact(fact, fact.target) for fact in facts]
    texts = greedy(model, [p.ids for p in prompts], tokens)
    forced = forced_predictions(model, targets)
    answers = []
    for prompt, new, hits, target in zip(prompts, texts, forced, targets, strict=True):
        with torch.no_grad():
            ids = pad_ids([target.ids], model.device).ids
            hidden = final_hidden(model, ids)[0, target.n_prompt - 1 : -1]
            nll = token_nll(model.layers, hidden, ids[0, target.n_prompt :])
        answers.append(
            Answer(
                encoder.continuation(prompt.ids, new),
                math.exp(-float(nll.sum())),
                tuple(hits) == target.answer_ids,
            )
        )
    return answers


def show(
    model: Model, facts: Sequence[Fact], before: Sequence[Answer], after: Sequence[Answer]
) -> None:
    """A table of answers before and after, for up to 20 facts."""
    from goldenlayers.report.terminal import show as show_table
    from goldenlayers.report.terminal import table

    # In quotes, so that a space before an answer, or none, is seen.
    def said(answer: Answer) -> str:
        return f"{answer.text!r} ({answer.probability:.3f})"

    def wanted(fact: Fact) -> str:
        joint = fact.joint_of(fact.prompt, fact.target)
        text, end = join(fact.prompt, fact.target, joint)
        return repr(text[end:])

    rows = [
        (fact.prompt, wanted(fact), said(old), said(new), "yes" if new.is_new else "NO")
        for fact, old, new in list(zip(facts, before, after, strict=True))[:_SHOWN]
    ]
    more = f" (first {_SHOWN} of {len(facts)})" if len(facts) > _SHOWN else ""
    columns = ("prompt", "new answer", "before (p of new)", "after (p of new)", "took")
    show_table(table(f"Answers of {model.name}{more}", columns, rows))
    if len(facts) > 1:
        took = sum(answer.is_new for answer in after)
        put(f"{took} of {len(facts)} edits took")
