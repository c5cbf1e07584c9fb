"""A comparison of layer choices, and answers before and after an edit, for the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from goldenlayers.facts import Fact
from goldenlayers.joints import join
from goldenlayers.report.terminal import show, table
from goldenlayers.shown import put, say

if TYPE_CHECKING:
    from goldenlayers.comparing import Choice, Comparison
    from goldenlayers.models.model import Model
    from goldenlayers.truth import TransferMatrix

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


def show_answers(
    model: Model, facts: Sequence[Fact], before: Sequence[Answer], after: Sequence[Answer]
) -> None:
    """A table of answers before and after, for up to 20 facts."""

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
    show(table(f"Answers of {model.name}{more}", columns, rows))
    if len(facts) > 1:
        took = sum(answer.is_new for answer in after)
        put(f"{took} of {len(facts)} edits took")


def show_comparison(found: Comparison, title: str, data: str) -> None:
    """Print the choices, best first below the yardsticks, and the curves over proxy facts."""
    marks = [one for one in found.choices if one.method in ("golden", "oracle", "random")]
    rest = [one for one in found.choices if one not in marks]
    rest.sort(key=lambda one: (one.regret.value != one.regret.value, one.regret.value))
    name = "Overall" if found.metric == "overall" else found.metric
    columns = ("choice", "facts", "layer", name, "regret", "at", "rho", "cost")
    facts = f"{found.n_facts} facts" + (f" of {data}" if data else "")
    show(table(f"{title}: {facts}", columns, [_line(one) for one in [*marks, *rest]]))
    put(
        "regret: points below the golden layer, with the 95 % interval over the facts",
        "at: the golden layer's place in the choice's own order",
        "rho: rank correlation of its layer scores with the sweep's",
        "cost: seconds, and how many times as long the sweep takes",
    )
    if curves := [one for one in found.proxy_sizes if len(one.points) > 1]:
        sizes = sorted({point.n for one in curves for point in one.points})
        rows = []
        for one in curves:
            at = {p.n: f"{_number(p.regret)} {100 * p.wins:.0f}%" for p in one.points}
            rows.append((_short(one.name), *(at.get(n) for n in sizes)))
        heading = "Mean regret with N proxy facts, and how often the golden layer is chosen"
        show(table(heading, ("choice", *map(str, sizes)), rows))
    if found.transfer is not None:
        show(_matrix(found.transfer))
    for one in found.choices:
        if one.note and one.method not in ("oracle", "random"):
            put(f"{_short(one.name)}: {one.note}.")
    for warning in found.warnings:
        say(f"Warning: {warning}.")


def _matrix(found: TransferMatrix) -> Any:
    """Rows: whose golden layer. Columns: on which sweep it is judged."""
    letters = [chr(ord("A") + i) if i < 26 else str(i + 1) for i in range(len(found.names))]
    rows = [
        (f"{letter}: {name}", layer, *(_number(one.value) for one in regrets))
        for letter, name, layer, regrets in zip(
            letters, found.names, found.golden, found.regret, strict=True
        )
    ]
    heading = "Regret of each sweep's golden layer, judged by each sweep"
    return table(heading, ("chosen on", "layer", *(f"on {x}" for x in letters)), rows)


def _line(one: Choice) -> tuple[Any, ...]:
    regret = _number(one.regret.value)
    if one.regret.low == one.regret.low and one.method != "golden":
        regret = f"{regret} ({one.regret.low:.1f} to {one.regret.high:.1f})"
    cost = None if one.seconds is None else f"{one.seconds:.1f} s"
    if cost is not None and one.speed_up is not None and one.method not in ("golden", "oracle"):
        cost = f"{cost}, {one.speed_up:.0f}x"
    correlation = None if one.spearman != one.spearman else f"{one.spearman:.2f}"
    name, facts, score = _short(one.name), one.n_proxy or None, _number(one.score)
    return name, facts, one.layer, score, regret, one.golden_rank, correlation, cost


def _short(name: str) -> str:
    """A name without the settings that are the default."""
    return name.replace(" mlp", "").replace(" sequence", "").replace("+", " + ")


def _number(value: float) -> str | None:
    return None if value != value else f"{value:.1f}"
