"""``golden ask``: talk to the model, with and without edits."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from goldenlayers.commands import shared
from goldenlayers.commands.edit import saved_delta, tell_rounding
from goldenlayers.config import AskConfig
from goldenlayers.shown import put

if TYPE_CHECKING:
    from goldenlayers.delta import WeightDelta
    from goldenlayers.models.model import Model


def run(config: AskConfig) -> int:
    """Print the greedy continuation and the likeliest next tokens."""
    deltas = [saved_delta(path) for path in config.delta]
    model = shared.load_model(config)
    if config.prompt.endswith(" "):
        shared.say(
            "The prompt ends in a space, and is asked so; most models expect the space as a part "
            "of the next word, and answer better without it."
        )
    for delta in deltas:
        delta.check(model, force=config.force)
        tell_rounding(delta, model)
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
                shared.say(f"Two of the edits contradict: '{prompt}' → '{before}' and '{target}'")


def _answer(model: Model, config: AskConfig, title: str) -> None:
    import torch

    from goldenlayers.decoding import greedy
    from goldenlayers.hooks import last_logits

    prompt = model.encoder.verbatim(config.prompt)
    room = model.encoder.max_length
    count = config.tokens if room is None else min(config.tokens, room - len(prompt))
    (tokens,) = greedy(model, [prompt.ids], count) if count > 0 else ([],)
    if count < config.tokens:
        shared.say(f"Only {max(0, count)} tokens: the model's context ends there")
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
