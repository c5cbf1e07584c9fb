"""``golden ask``: talk to the model, with and without edits."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from goldenlayers.commands import shared
from goldenlayers.commands.options import RARE, Consent, ModelOptions, Sources
from goldenlayers.shown import put, say

if TYPE_CHECKING:
    from goldenlayers.delta import WeightDelta
    from goldenlayers.models.model import Model


@dataclass(frozen=True, kw_only=True)
class AskConfig(ModelOptions):
    """Ask a model, with and without edits.

    golden ask smollm2-135m "The capital of Italy is"
    golden ask smollm2-135m "The capital of Italy is" --delta my-edit
    """

    prompt: Annotated[Positional[str], arg(metavar="PROMPT")]
    """What the model is to continue."""

    delta: Annotated[Sources, arg(metavar="RUN ...")] = dataclasses.field(default_factory=list)
    """Run folders of `golden edit`; several are added up."""

    tokens: int = 20
    """Most tokens of the answer."""

    top: int = 5
    """How many candidates for the next token to show."""

    force: Annotated[Consent, RARE] = False
    """Apply a delta although it was made on other weights."""


def run(config: AskConfig) -> int:
    """Print the greedy continuation and the likeliest next tokens."""
    from goldenlayers.delta import WeightDelta

    deltas = [WeightDelta.load(path) for path in config.delta]
    model = shared.load_model(config)
    if config.prompt.endswith(" "):
        say(
            "The prompt ends in a space, and is asked so; most models expect the space as a part "
            "of the next word, and answer better without it."
        )
    for delta in deltas:
        delta.check(model, force=config.force)
        shared.tell_rounding(delta, model)
    _tell_contradictions(deltas)
    _answer(model, config, "as it is" if deltas else "")
    if deltas:
        with ExitStack() as stack:
            for delta in deltas:
                stack.enter_context(delta.applied(model, force=config.force))
            _answer(model, config, "edited")
    return 0


def _tell_contradictions(deltas: Sequence[WeightDelta]) -> None:
    """Say it where two of the edits give one prompt different answers."""
    answers: dict[object, object] = {}
    for delta in deltas:
        for fact in delta.facts:
            prompt, target = fact.get("prompt"), fact.get("target")
            before = answers.setdefault(prompt, target)
            if prompt and before != target:
                say(f"Two of the edits contradict: '{prompt}' → '{before}' and '{target}'")


def _answer(model: Model, config: AskConfig, title: str) -> None:
    import torch

    from goldenlayers.decoding import greedy
    from goldenlayers.hooks import last_logits

    prompt = model.encoder.verbatim(config.prompt)
    room = model.encoder.max_length
    count = config.tokens if room is None else min(config.tokens, room - len(prompt))
    (tokens,) = greedy(model, [prompt.ids], count) if count > 0 else ([],)
    if count < config.tokens:
        say(f"Only {max(0, count)} tokens: the model's context ends there")
    if title:
        put(f"{title}:")
    more = model.encoder.continuation(prompt.ids, tokens)
    first, *others = (prompt.text + more).split("\n")
    # No line of a text can pass for one of ours.
    put(f"  {first}", *(f"  | {line}" for line in others), limit=None)
    if config.top:
        with torch.no_grad():
            logits, _ = last_logits(model, torch.tensor([prompt.ids], device=model.device))
        best = logits[0].float().softmax(-1).topk(min(config.top, model.layers.vocab_size))
        candidates = (
            f"{model.encoder.continuation(prompt.ids, [i], with_special=True)!r} {p:.3f}"
            for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        )
        put("  next: " + "  ".join(candidates))
