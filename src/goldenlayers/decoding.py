"""What a model answers: greedy continuation, and its arg-max tokens along a given answer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

import torch

from goldenlayers.hooks import final_hidden, last_logits
from goldenlayers.losses import argmax_rows
from goldenlayers.memory import fitting
from goldenlayers.models.broken import not_a_number
from goldenlayers.tokens import Encoding, equal_length_groups, length_batches

if TYPE_CHECKING:
    from goldenlayers.models.model import Model

Stop = Callable[[int, list[int]], bool]


def end_ids(model: Model) -> frozenset[int]:
    """Every token that ends a text for this model: the tokenizer's and the generation config's."""
    found: set[int] = set()
    config = getattr(model.hf, "generation_config", None)
    for value in (
        getattr(model.tokenizer, "eos_token_id", None),
        getattr(config, "eos_token_id", None),
    ):
        if isinstance(value, int):
            found.add(value)
        elif isinstance(value, Collection):
            found.update(int(v) for v in value)
    return frozenset(found)


@torch.no_grad()
def greedy(
    model: Model,
    rows: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    batch_size: int = 32,
    stop: Stop | None = None,
    on_batch: Callable[[list[int]], None] | None = None,
    forbid_first: Sequence[int] = (),
) -> list[list[int]]:
    """The arg-max continuation of each row of token ids, up to ``max_new_tokens``.

    Rows of equal length decode together with a cache, so no row is ever padded. A row ends at an
    end-of-text token (not included) or when ``stop(row index, new ids)`` says so; the token that
    made it stop is kept. ``on_batch`` is told the row indices of each batch
    before it is run. ``forbid_first`` are tokens not allowed as the first one. Where memory runs
    out, a batch is halved.

    Raises:
        OutOfMemory: memory runs out on a single row.
    """
    ends = end_ids(model)
    results: list[list[int]] = [[] for _ in rows]

    def decode(members: list[int]) -> list[list[int]]:
        if on_batch is not None:
            on_batch(members)
        ids = torch.tensor([list(rows[i]) for i in members], device=model.device)
        new: dict[int, list[int]] = {i: [] for i in members}
        running = set(members)
        past = None
        for step in range(max_new_tokens):
            logits, past = last_logits(model, ids, past)
            if step == 0 and forbid_first:
                logits[:, list(forbid_first)] = float("-inf")
            ids = logits.argmax(-1, keepdim=True)
            for i, token in zip(members, ids[:, 0].tolist(), strict=True):
                if i not in running:
                    continue
                if token in ends:
                    running.discard(i)
                    continue
                new[i].append(token)
                if stop is not None and stop(i, new[i]):
                    running.discard(i)
            if not running:
                break
        return list(new.values())

    groups = equal_length_groups(rows, batch_size)
    for members, found in fitting(groups, decode, lambda i: f"a text of {len(rows[i])} tokens"):
        for i, new in zip(members, found, strict=True):
            results[i] = new
    return results


@torch.no_grad()
def forced_predictions(
    model: Model,
    encodings: Sequence[Encoding],
    *,
    batch_size: int = 32,
    on_batch: Callable[[list[int]], None] | None = None,
) -> list[list[int]]:
    """Arg-max tokens at each encoding's answer positions, under teacher forcing.

    Equal to ``answer_ids`` exactly where free greedy decoding would have given the answer. Where
    memory runs out, a batch is halved.

    Raises:
        OutOfMemory: memory runs out on a single text.
    """
    results: list[list[int]] = [[] for _ in encodings]

    def predict(members: list[int]) -> list[list[int]]:
        if on_batch is not None:
            on_batch(members)
        part = [encodings[i] for i in members]
        batch = model.encoder.pad(part, model.device)
        cells = [(b, t) for b, e in enumerate(part) for t in range(e.n_prompt - 1, len(e) - 1)]
        rows, columns = zip(*cells, strict=True)
        hidden = final_hidden(model, batch.ids)[list(rows), list(columns)]
        found: list[list[int]] = [[] for _ in members]
        for b, token in zip(rows, argmax_rows(model.layers, hidden).tolist(), strict=True):
            found[b].append(token)
        return found

    groups = length_batches([len(e) for e in encodings], batch_size)
    sizes = [f"a text of {len(e)} tokens" for e in encodings]
    for members, found in fitting(groups, predict, sizes.__getitem__):
        for i, tokens in zip(members, found, strict=True):
            results[i] = tokens
    return results


@torch.no_grad()
def sample(
    model: Model, count: int, n_tokens: int, generator: torch.Generator, *, batch_size: int = 32
) -> list[str]:
    """``count`` texts of ``n_tokens`` tokens drawn from the model at temperature 1.

    They begin with the BOS token, or where the model has none with a drawn plain token. End-of-text
    and other special tokens are never drawn, so that every text has its full length.
    """
    special = sorted({*end_ids(model), *model.tokenizer.all_special_ids})
    special = [i for i in special if 0 <= i < model.layers.vocab_size]
    start, _ = model.encoder.tokens("a")
    has_bos = bool(start) and start[0] in model.tokenizer.all_special_ids
    texts: list[str] = []
    while len(texts) < count:
        size = min(batch_size, count - len(texts))
        if has_bos:
            ids = torch.full((size, 1), start[0])
        else:
            plain = torch.ones(model.layers.vocab_size)
            plain[special] = 0
            ids = torch.multinomial(plain, size, replacement=True, generator=generator)[:, None]
        rows, past = [] if has_bos else [ids], None
        ids = ids.to(model.device)
        while len(rows) < n_tokens:
            logits, past = last_logits(model, ids, past)
            logits[:, special] = float("-inf")
            chances = logits.float().softmax(-1).cpu()
            if not bool(torch.isfinite(chances).all()):
                raise not_a_number(
                    model.hf,
                    f"{model.name} predicts values that are not a number, so no text can be drawn",
                )
            drawn = torch.multinomial(chances, 1, generator=generator)  # on the CPU: same anywhere
            rows.append(drawn)
            ids = drawn.to(model.device)
        for row in torch.cat(rows, dim=1).tolist():
            texts.append(str(model.tokenizer.decode(row, skip_special_tokens=True)))
    return texts
