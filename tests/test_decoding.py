"""Greedy and forced decoding against a loop over whole texts without cache."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from evaluations import tight
from families import shared
from reference import full_logits, slow_greedy
from tokenizers_built import TOKENIZERS

from goldenlayers.decoding import end_ids, forced_predictions, greedy, sample
from goldenlayers.errors import UserError
from goldenlayers.models import Model
from goldenlayers.tokens import Encoding

ROWS = [[9, 70, 33, 150, 41], [201, 4, 5], [7, 8, 9, 10, 11, 12, 13, 14, 15, 16], [5, 4, 77]]


@cache
def wrapped(name: str, tokenizer: str = "byte_level_bpe") -> Model:
    return Model.wrap(shared(name), TOKENIZERS[tokenizer]())


def test_greedy_equals_a_loop_without_cache(family: str) -> None:
    model = wrapped(family)
    assert greedy(model, ROWS, 4) == [slow_greedy(model, row, 4, end_ids(model)) for row in ROWS]


def test_forced_predictions_of_every_family(family: str) -> None:
    model = wrapped(family)
    encodings = [Encoding("", tuple(row), ((0, 0),) * len(row), cut) for row, cut in
                 zip(ROWS, (2, 1, 7, 2), strict=True)]  # fmt: skip
    found = forced_predictions(model, encodings, batch_size=3)
    for encoding, tokens in zip(encodings, found, strict=True):
        expected = full_logits(model, encoding.ids).argmax(-1)
        assert tokens == expected[encoding.n_prompt - 1 : -1].tolist()


@pytest.mark.parametrize("name", ["gpt2", "opt", "bloom", "gemma3", "olmo2", "llama", "mpt"])
def test_forced_equals_greedy_along_the_models_own_answer(name: str) -> None:
    model = wrapped(name)
    new = greedy(model, ROWS, 5)
    encodings = [
        Encoding("", (*row, *more), ((0, 0),) * (len(row) + len(more)), len(row))
        for row, more in zip(ROWS, new, strict=True)
        if more
    ]
    told: list[int] = []
    found = forced_predictions(model, encodings, batch_size=2, on_batch=told.extend)
    assert found == [list(e.answer_ids) for e in encodings]
    assert sorted(told) == list(range(len(encodings)))
    # The control: along another answer, the first prediction stays and the answer is not given.
    wrong = [
        Encoding("", (*e.ids[: e.n_prompt], (e.answer_ids[0] + 1) % 300, 3), e.spans, e.n_prompt)
        for e in encodings
    ]
    for own, other, e in zip(found, forced_predictions(model, wrong), wrong, strict=True):
        assert other[0] == own[0] and other != list(e.answer_ids)


def test_batch_size_does_not_matter_and_batches_are_told() -> None:
    model = wrapped("llama")
    told: list[list[int]] = []
    one = greedy(model, ROWS, 4, batch_size=1)
    assert greedy(model, ROWS, 4, batch_size=8, on_batch=told.append) == one
    assert sorted(i for b in told for i in b) == [0, 1, 2, 3]
    assert all(len({len(ROWS[i]) for i in b}) == 1 for b in told)
    assert greedy(model, [], 4) == []


def test_stopping() -> None:
    model = wrapped("llama")
    whole = greedy(model, ROWS, 6)

    def stop(row: int, new: list[int]) -> bool:
        return len(new) == row + 1

    assert greedy(model, ROWS, 6, stop=stop) == [w[: i + 1] for i, w in enumerate(whole)]
    assert all(len(w) == 6 for w in whole)


def test_an_end_token_ends_a_row_and_is_not_in_it() -> None:
    model = wrapped("llama")
    whole = greedy(model, ROWS, 5)
    end = whole[0][2]
    ended = copy.copy(model)
    ended.hf = copy.deepcopy(model.hf)
    assert ended.hf.generation_config is not None
    ended.hf.generation_config.eos_token_id = [end, 2]
    ended.layers = type(model.layers).of(ended.hf)
    assert end in end_ids(ended) and 2 in end_ids(ended)
    expected = [w[: w.index(end)] if end in w else w for w in whole]
    assert greedy(ended, ROWS, 5) == expected
    assert expected[0] == whole[0][:2]


def test_forbidden_first_tokens() -> None:
    model = wrapped("llama")
    (plain,) = greedy(model, ROWS[:1], 2)
    logits = full_logits(model, ROWS[0])[-1]
    order = logits.argsort(descending=True).tolist()
    (other,) = greedy(model, ROWS[:1], 2, forbid_first=order[:3])
    assert plain[0] == order[0] and other[0] == order[3]
    assert other[1] == slow_greedy(model, [*ROWS[0], order[3]], 1)[0]


@pytest.mark.parametrize("tokenizer", ["byte_level_bpe", "sentencepiece_bpe", "bytes"])
def test_samples_are_seeded_full_length_and_plain(tokenizer: str) -> None:
    model = wrapped("llama", tokenizer)

    def draw(seed: int, batch_size: int = 32) -> list[str]:
        return sample(model, 3, 6, torch.Generator().manual_seed(seed), batch_size=batch_size)

    texts = draw(0)
    assert len(texts) == 3 and len(set(texts)) == 3
    assert texts == draw(0) and texts != draw(1)
    assert len(draw(0, batch_size=2)) == 3
    for token in model.tokenizer.all_special_tokens:
        assert not any(token in text for text in texts)


def test_sampling_follows_the_models_probabilities() -> None:
    """The second token's frequencies after BOS are the softmax, special tokens left out."""
    model = wrapped("gemma3", "sentencepiece_bpe")
    seen = torch.zeros(model.layers.vocab_size)
    special = sorted({*end_ids(model), *model.tokenizer.all_special_ids})
    logits = full_logits(model, [1])[-1]
    logits[special] = float("-inf")
    expected = logits.softmax(-1)
    drawn: list[int] = []
    decode = model.tokenizer.decode

    class Spy:
        all_special_ids = model.tokenizer.all_special_ids
        eos_token_id = model.tokenizer.eos_token_id

        def decode(self, row: list[int], **kwargs: object) -> object:
            drawn.extend(row)
            return decode(row)

    spied = copy.copy(model)
    _ = spied.encoder  # cached: it keeps the real tokenizer
    spied.tokenizer = Spy()  # pyright: ignore[reportAttributeAccessIssue]
    sample(spied, 3000, 1, torch.Generator().manual_seed(0), batch_size=3000)
    seen.index_add_(0, torch.tensor(drawn), torch.ones(len(drawn)))
    assert len(drawn) == 3000 and not seen[special].any()
    assert float((seen / 3000 - expected).abs().sum()) < 0.4  # total variation of a fair draw
    uniform = torch.full_like(expected, 1 / len(expected))
    assert float((seen / 3000 - uniform).abs().sum()) > 0.4


def test_what_is_decoded_does_not_depend_on_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrapped("llama")
    rows = [[9, 70, 33], [201, 4, 5], [7, 8, 9], [5, 4, 77], [6, 7]]
    encodings = [Encoding("", tuple(row), ((0, 0),) * len(row), 1) for row in rows]
    told: list[int] = []
    new, forced = greedy(model, rows, 3), forced_predictions(model, encodings)
    tried = tight(monkeypatch, 2)
    stops: dict[int, int] = {}

    def stop(i: int, ids: list[int]) -> bool:
        stops[i] = len(ids)
        return False

    assert greedy(model, rows, 3, stop=stop, on_batch=told.extend) == new
    # Both the batch that was too large and its halves are told; nothing is kept of the first.
    assert sorted(told) == sorted([0, 1, 2, 3, *range(5)]) and 4 in tried
    assert stops == {i: len(ids) for i, ids in enumerate(new)}
    assert forced_predictions(model, encodings) == forced
    tight(monkeypatch, 0)
    for run in (lambda: greedy(model, rows, 3), lambda: forced_predictions(model, encodings)):
        with pytest.raises(UserError, match="memory ran out on a text of 3 tokens alone"):
            run()
