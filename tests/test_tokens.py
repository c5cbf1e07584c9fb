"""Tokens: what stands where in a text, whatever the tokenizer's habits."""

from __future__ import annotations

import random
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import shared
from tokenizers_built import TOKENIZERS
from transformers import PreTrainedTokenizerBase

from goldenlayers.errors import UserError
from goldenlayers.facts import Fact
from goldenlayers.tokens import (
    Encoding,
    TextEncoder,
    TooLongError,
    context_length,
    equal_length_groups,
    join,
    last_token_in,
    length_batches,
    pad_ids,
    subject_tokens,
)

KINDS = list(TOKENIZERS)


@cache
def encoder(kind: str) -> TextEncoder:
    return TextEncoder(TOKENIZERS[kind]())


def shown(tokenizer: PreTrainedTokenizerBase, ids: Any) -> str:
    """The text of tokens in the middle of a text, without special tokens."""
    return str(
        tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    )


# (prompt, answer, subject, the whole text)
TEXTS = [
    ("The capital of France is", "Paris", "France", "The capital of France is Paris"),
    ("The capital of France is ", "Paris", "France", "The capital of France is Paris"),
    ("The capital of France is  ", " Paris", "France", "The capital of France is  Paris"),
    ("France", "is big", "France", "France is big"),
    ("What is the capital of Peru?\n", "Lima", "Peru", "What is the capital of Peru?\nLima"),
    ("What of Peru?\n ", " Lima", "Peru", "What of Peru?\n Lima"),
    ("Peru\t", "Lima", "Peru", "Peru\tLima"),
    ("def of():\n    ", "return", "of", "def of():\n    return"),
    ("What of Peru?", "\nLima", "Peru", "What of Peru? Lima"),
    ("{subject} of {} and {0} is", "{y}", "{0}", "{subject} of {} and {0} is {y}"),
    ("Łódź é has a", "façade naïve", "Łódź é", "Łódź é has a façade naïve"),
    ("He wrote (in Rome", ") yes", "Rome", "He wrote (in Rome) yes"),
    ("The book (", "Rome)", "book", "The book (Rome)"),
    ("Rome", ", the city", "Rome", "Rome, the city"),
    ("The 😀🎉 means", "party 🎉 time", "😀🎉", "The 😀🎉 means party 🎉 time"),
    ("東京は", "日本の首都", "東京", "東京は日本の首都"),
    ("The city of 東京", "is big", "東京", "The city of 東京is big"),
    ("ประเทศไทย", "ใหญ่", "ไทย", "ประเทศไทยใหญ่"),
    ("عاصمة مصر هي", "القاهرة", "مصر", "عاصمة مصر هي القاهرة"),
    ("בירת צרפת היא", "פריז", "צרפת", "בירת צרפת היא פריז"),
    ("e\u0301te\u0301 is", "zoe\u0308", "e\u0301te\u0301", "e\u0301te\u0301 is zoe\u0308"),
]


@pytest.mark.parametrize("prompt, answer, subject, whole", TEXTS)
def test_joined_text(prompt: str, answer: str, subject: str, whole: str) -> None:
    text, boundary = join(prompt, answer)
    assert text == whole
    assert text[:boundary] == prompt.removesuffix(" ")
    assert text[boundary:].strip() == answer.strip()
    # The same beginning without an answer.
    assert join(prompt, "") == (prompt.removesuffix(" "), boundary)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prompt, answer, subject, whole", TEXTS)
def test_spans_of_every_kind(kind: str, prompt: str, answer: str, subject: str, whole: str) -> None:
    made = encoder(kind)
    encoding = made.encode(prompt, answer, subject)
    assert shown(made.tokenizer, encoding.ids).strip() == whole
    # Between them prompt and answer have every token, and each its own text.
    assert shown(made.tokenizer, encoding.ids[: encoding.n_prompt]).strip() == prompt.strip()
    assert shown(made.tokenizer, encoding.answer_ids).strip() == answer.strip()
    # The answered prompt begins with the very tokens of the bare one.
    bare = made.encode(prompt, "", subject)
    assert encoding.ids[: encoding.n_prompt] == bare.ids
    assert bare.n_prompt == len(bare) and bare.answer_ids == ()
    # The lookup token is the one that completes the subject.
    assert encoding.lookup is not None and encoding.lookup == bare.lookup
    assert encoding.lookup < encoding.n_prompt
    end = whole.rindex(subject) + len(subject)
    upto = shown(made.tokenizer, encoding.ids[: encoding.lookup + 1]).strip()
    before = shown(made.tokenizer, encoding.ids[: encoding.lookup]).strip()
    assert upto == whole[:end]
    assert before != whole[:end] and len(before.rstrip("\ufffd")) < end


@pytest.mark.parametrize("kind", KINDS)
def test_a_continuation_keeps_its_leading_space(kind: str) -> None:
    made = encoder(kind)
    for prompt, answer, gap in (("The city of France is", "Paris", " "), ("The (", "Rome", "")):
        encoding = made.encode(prompt, answer)
        bare = encoding.ids[: encoding.n_prompt]
        assert made.continuation(bare, encoding.answer_ids) == gap + answer
        assert made.continuation(bare, []) == ""


@pytest.mark.parametrize("kind", KINDS)
def test_random_texts(kind: str) -> None:
    made = encoder(kind)
    rng = random.Random(7)
    letters = "abc xyz THE of.is,'(-)09 éßł 日本 жд שלום عرب 😀 \u200d"
    done = 0
    for _ in range(120):
        prompt = "".join(rng.choice(letters) for _ in range(rng.randint(1, 20))).strip()
        answer = "".join(rng.choice(letters) for _ in range(rng.randint(1, 9))).strip()
        if not prompt or not answer:
            continue
        encoding = made.encode(prompt, answer)
        assert encoding.n_prompt >= 1
        assert shown(made.tokenizer, encoding.answer_ids).strip() == answer, (prompt, answer)
        assert shown(made.tokenizer, encoding.ids[: encoding.n_prompt]).strip() == prompt
        assert all(a <= b for a, b in encoding.spans)
        assert [b for _, b in encoding.spans] == sorted(b for _, b in encoding.spans)
        done += 1
    assert done > 90


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "prompt, subject, at",
    [
        ("Paris is near Paris, and Paris has", "Paris", 25),  # the last mention
        ("Iran and Iranian people in", "Iran", 0),  # whole words before parts of words
        ("the Iranian people of", "Iran", 4),
        ("Rome", "Rome", 0),
        ("Who founded Apple Inc.", "Apple Inc.", 12),
    ],
)
def test_lookup_of_a_repeated_subject(kind: str, prompt: str, subject: str, at: int) -> None:
    encoding = encoder(kind).encode(prompt, "xyz", subject)
    assert encoding.lookup is not None
    start, end = encoding.spans[encoding.lookup]
    assert start < at + len(subject) <= end


@pytest.mark.parametrize("kind", KINDS)
def test_subject_tokens_are_those_of_the_last_mention(kind: str) -> None:
    subject = "Danielle Darrieux"
    for prompt in (f"{subject} is not {subject} of", f"About {subject}"):
        fact = Fact(subject, prompt, "English", id="a")
        made = encoder(kind)
        encoding = made.fact(fact, "English")
        start, end = subject_tokens(fact, encoding)
        assert end - 1 == encoding.lookup
        assert shown(made.tokenizer, encoding.ids[start:end]).strip() == subject
        assert subject not in shown(made.tokenizer, encoding.ids[start + 1 : end])


def test_no_lookup_without_the_subject_or_inside_the_answer() -> None:
    made = encoder("byte_level_bpe")
    assert made.encode("The city of", "Rome", "Rome").lookup is None
    assert made.encode("The city of", "Rome").lookup is None
    assert last_token_in([(0, 1), (1, 4)], (4, 5)) is None


@pytest.mark.parametrize("kind", ["sentencepiece_bpe", "sentencepiece_no_prefix"])
def test_bos_is_there_once_and_never_answer(kind: str) -> None:
    made = encoder(kind)
    bos = made.tokenizer.bos_token_id
    plain = made.encode("The city of", "Rome", "city")
    assert plain.ids[0] == bos and plain.ids.count(bos) == 1 and plain.spans[0] == (0, 0)
    written = made.encode("<s>The city of", "Rome", "city")
    assert written.ids.count(bos) == 1 and written.ids[0] == bos
    assert shown(made.tokenizer, written.answer_ids).strip() == "Rome"
    assert written.lookup is not None
    assert written.spans[written.lookup][1] == len("<s>The city")
    # An empty prompt: BOS alone stands before the answer.
    alone = made.encode("", "Rome")
    assert alone.n_prompt == 1 and shown(made.tokenizer, alone.answer_ids).strip() == "Rome"


def test_eos_behind_a_text_is_dropped() -> None:
    with_eos, without = encoder("bytes_eos"), encoder("bytes")
    assert with_eos.tokenizer("ab")["input_ids"][-1] == with_eos.tokenizer.eos_token_id
    a = with_eos.encode("The city of", "Rome", "city")
    b = without.encode("The city of", "Rome", "city")
    assert a == b


def test_a_slow_tokenizers_front_tokens_are_special() -> None:
    class Fronted:
        """A slow tokenizer with BOS and EOS that marks nothing special."""

        is_fast, bos_token = False, None
        inner = TOKENIZERS["bytes"]()

        def __call__(self, text: str, add_special_tokens: bool = True, **_: Any) -> dict[str, Any]:
            ids = list(self.inner(text)["input_ids"])
            ids = [2, *ids, 1] if add_special_tokens else ids
            return {"input_ids": ids, "special_tokens_mask": [0] * len(ids)}

        def decode(self, ids: list[int], **kwargs: Any) -> str:
            return str(self.inner.decode(ids, **kwargs))

    ids, spans = TextEncoder(Fronted()).tokens("ab")  # pyright: ignore[reportArgumentType]
    assert ids == [2, ord("a") + 3, ord("b") + 3]
    assert spans == [(0, 0), (0, 1), (1, 2)]


def test_a_slow_tokenizer_that_changes_the_text_is_refused() -> None:
    class Lower:
        is_fast, bos_token = False, None
        inner = TOKENIZERS["bytes"]()

        def __call__(self, text: str, **kwargs: Any) -> Any:
            return self.inner(text.lower(), **kwargs)

        def decode(self, ids: list[int], **kwargs: Any) -> str:
            return str(self.inner.decode(ids, **kwargs))

    with pytest.raises(UserError, match="no character offsets"):
        TextEncoder(Lower()).encode("ABC")  # pyright: ignore[reportArgumentType]


def test_prompt_and_answer_in_one_token_are_taken_apart() -> None:
    """Where a merge runs over the joint, prompt and answer keep tokens of their own."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = {c: i for i, c in enumerate(alphabet)}
    merges = [("(", "R"), ("x", "y"), ("xy", "z")]
    vocabulary = letters | {a + b: len(letters) + i for i, (a, b) in enumerate(merges)}
    raw = Tokenizer(BPE(vocab=vocabulary, merges=merges))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    made = TextEncoder(PreTrainedTokenizerFast(tokenizer_object=raw))
    assert vocabulary["(R"] in made.tokens("a (Rome")[0]  # the merge that would straddle
    encoding = made.encode("a (", "Rome", "a")
    assert shown(made.tokenizer, encoding.answer_ids) == "Rome"
    assert shown(made.tokenizer, encoding.ids[: encoding.n_prompt]) == "a ("
    assert [encoding.text[a:b] for a, b in encoding.spans[encoding.n_prompt :]] == list("Rome")
    # Without a token of its own in the prompt there would be nothing to predict from.
    with pytest.raises(UserError, match="nothing stands before the answer"):
        made.encode("", "xyz")


def test_errors_say_what_is_wrong() -> None:
    short = TextEncoder(TOKENIZERS["bytes"](), max_length=10)
    assert len(short.encode("12345", "789")) == 9
    with pytest.raises(TooLongError, match="at most 10"):
        short.encode("1234567", "890")
    with pytest.raises(UserError, match="no tokens"):
        encoder("bytes").encode("")
    with pytest.raises(UserError, match=r"answer '  ' has no tokens"):
        encoder("bytes").encode("ab", "  ")

    class Dropping(TextEncoder):
        def tokens(
            self, text: str, *, whole: bool = False
        ) -> tuple[list[int], list[tuple[int, int]]]:
            ids, spans = super().tokens(text, whole=whole)
            return ids[-3:], spans[-3:]

    fact = Fact("Rome", "Rome is a big city", "x", id="f1")
    with pytest.raises(UserError, match=r"f1.*Rome"):
        Dropping(TOKENIZERS["bytes"]()).fact(fact)


def test_padding_is_on_the_right() -> None:
    batch = pad_ids([[5, 6, 7], [8], [9, 9]], "cpu")
    assert batch.ids.shape == (3, 3) and batch.lengths.tolist() == [3, 1, 2]
    assert batch.ids[0].tolist() == [5, 6, 7]
    assert batch.ids[1, 0] == 8 and batch.ids[2, :2].tolist() == [9, 9]
    assert batch.mask.tolist() == [[True] * 3, [True, False, False], [True, True, False]]
    made = encoder("bytes")
    rows = [made.encode("abc"), made.encode("d")]
    assert torch.equal(made.pad(rows).ids, pad_ids([r.ids for r in rows], "cpu").ids)


def test_batches_by_length_hold_every_row_once() -> None:
    rng = random.Random(0)
    lengths = [rng.randint(1, 9) for _ in range(23)]
    batches = list(length_batches(lengths, 4))
    assert sorted(i for b in batches for i in b) == list(range(23))
    assert all(len(b) <= 4 for b in batches)
    flat = [lengths[i] for b in batches for i in b]
    assert flat == sorted(lengths, reverse=True)  # what does not fit shows at once
    few = list(length_batches(lengths, 4, tokens=8))
    assert [i for b in few for i in b] == [i for b in batches for i in b]
    assert all(len(b) == 1 or len(b) * max(lengths[i] for i in b) <= 8 for b in few)
    assert max(map(len, few)) == 4 and len(few[0]) == 1
    groups = list(equal_length_groups([[0] * n for n in lengths], 3))
    assert sorted(i for g in groups for i in g) == list(range(23))
    assert all(len({lengths[i] for i in g}) == 1 and len(g) <= 3 for g in groups)


def test_context_length_of_a_config(family: str) -> None:
    expected = None if family == "bloom" else 512
    assert context_length(shared(family).config) == expected


def test_context_length_reads_other_names() -> None:
    assert context_length(SimpleNamespace(n_ctx=77)) == 77
    assert context_length(SimpleNamespace(seq_length=0)) is None


def test_encoding_is_a_plain_value() -> None:
    encoding = Encoding("ab", (1, 2), ((0, 1), (1, 2)), 1)
    assert len(encoding) == 2 and encoding.answer_ids == (2,)
