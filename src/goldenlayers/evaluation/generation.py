"""Free generation for evaluation: greedy answers with a natural stop, sampled text for fluency.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from goldenlayers.decoding import end_ids, greedy
from goldenlayers.hooks import last_logits
from goldenlayers.memory import in_smaller_batches
from goldenlayers.tokens import equal_length_groups

if TYPE_CHECKING:
    from goldenlayers.models.model import Model

FLUENCY_TOKENS = 100
# Tokens that a free answer may need beyond the expected ones (an article, another spelling) and
# that show whether its last word ends there.
ANSWER_SLACK = 8
_TOP_K = 5  # as in ROME's released evaluation

OnBatch = Callable[[list[int]], None]


def free_answers(
    model: Model,
    rows: Sequence[Sequence[int]],
    limits: Sequence[int],
    *,
    batch_size: int = 32,
    on_batch: OnBatch | None = None,
) -> list[str]:
    """The greedy continuation of each row up to its natural end, as text.

    It ends with the text (EOS), with the line once something is written on it, or after the row's
    own limit of tokens.
    """

    def decode(ids: Sequence[int]) -> str:
        return str(model.tokenizer.decode(list(ids), skip_special_tokens=True))

    def stop(i: int, ids: list[int]) -> bool:
        return len(ids) >= limits[i] or "\n" in decode(ids).lstrip()

    found = greedy(
        model, rows, max(limits, default=1), batch_size=batch_size, stop=stop, on_batch=on_batch
    )
    return [(decode(ids).strip().splitlines() or [""])[0] for ids in found]


@torch.no_grad()
def sampled(
    model: Model,
    rows: Sequence[Sequence[int]],
    seeds: Sequence[str],
    n_tokens: int = FLUENCY_TOKENS,
    *,
    batch_size: int = 32,
    on_batch: OnBatch | None = None,
) -> list[list[int]]:
    """``n_tokens`` tokens behind each row, drawn from the five likeliest; never an end of text.

    Each row draws with its own seed, so a text does not depend on what shares its batch. Where
    memory runs out, a batch is halved.

    Raises:
        OutOfMemory: memory runs out on a single row.
    """
    ends = [i for i in sorted(end_ids(model)) if 0 <= i < model.layers.vocab_size]
    chances = [[g.random() for _ in range(n_tokens)] for g in map(random.Random, seeds)]
    results: list[list[int]] = [[] for _ in rows]

    def draw(members: list[int]) -> list[list[int]]:
        if on_batch is not None:
            on_batch(members)
        ids = torch.tensor([list(rows[i]) for i in members], device=model.device)
        past, steps = None, []
        for step in range(n_tokens):
            logits, past = last_logits(model, ids, past)  # (B, V)
            logits[:, ends] = float("-inf")
            top, tokens = logits.float().topk(min(_TOP_K, logits.shape[1]), dim=-1)
            bounds = top.double().softmax(-1).cumsum(-1).cpu()
            u = torch.tensor([[chances[i][step]] for i in members], dtype=torch.float64)
            chosen = (bounds < u).sum(-1, keepdim=True).clamp_max(top.shape[1] - 1)
            ids = tokens.gather(1, chosen.to(tokens.device))
            steps.append(ids[:, 0].tolist())
        return [list(tokens) for tokens in zip(*steps, strict=True)]

    groups = equal_length_groups(rows, batch_size)
    for members, found in in_smaller_batches(
        groups, draw, lambda i: f"a text of {len(rows[i])} tokens"
    ):
        for i, tokens in zip(members, found, strict=True):
            results[i] = tokens
    return results
