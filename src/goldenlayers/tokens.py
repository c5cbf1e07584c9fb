"""The only place that indexes tokens: rendering, subject and answer spans, padding, batching.

Everything goes by character offsets, so a doubled or lost space, a BOS counted as answer, or a
subject that is tokenised differently in mid-sentence cannot happen silently.

Shapes: B sequences, T tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from goldenlayers.errors import UserError
from goldenlayers.facts import Fact
from goldenlayers.prompts import Joint, find_subject, join

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from goldenlayers.chat import ChatTemplate


class TooLongError(UserError):
    """A text does not fit the model's context."""


@dataclass(frozen=True, slots=True)
class Encoding:
    """A tokenised text, with where its prompt ends and where its subject's last token stands.

    ``ids`` are all T token ids (BOS included if the tokenizer adds one); ``spans`` the character
    span of each in ``text``; tokens ``ids[n_prompt:]`` are the answer; ``lookup`` is the index of
    the subject's last token (the lookup token), None where the text does not hold the subject;
    ``start`` the character at which the prompt begins, behind what a chat template writes.
    """

    text: str
    ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]
    n_prompt: int
    lookup: int | None = None
    start: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def asking(self) -> Encoding:
        """All tokens but the answer's last, from which nothing is predicted (all, if no answer)."""
        if self.n_prompt == len(self.ids):
            return self
        return dataclasses.replace(self, ids=self.ids[:-1], spans=self.spans[:-1])

    @property
    def until_lookup(self) -> Encoding:
        """The tokens up to the lookup token, which causal attention reads no further than."""
        if self.lookup is None or self.lookup == len(self.ids) - 1:
            return self
        end = self.lookup + 1
        return dataclasses.replace(
            self, ids=self.ids[:end], spans=self.spans[:end], n_prompt=min(self.n_prompt, end)
        )

    @property
    def answer_ids(self) -> tuple[int, ...]:
        return self.ids[self.n_prompt :]


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Right-padded sequences. ``ids`` (B, T) long, ``lengths`` (B,) long.

    No attention mask is needed: with causal attention a real token never sees the padding on its
    right, and positions count from 0 in every row. A test holds this for every family.
    """

    ids: Tensor
    lengths: Tensor

    @property
    def mask(self) -> Tensor:
        """(B, T) bool, True at real tokens."""
        return torch.arange(self.ids.shape[1], device=self.ids.device) < self.lengths[:, None]


class TextEncoder:
    """Turns texts into :class:`Encoding` with one tokenizer.

    Args:
        tokenizer: a transformers tokenizer, fast or slow (without offsets).
        max_length: the model's context in tokens, None if unlimited.
        chat: the template that every prompt stands in, the answer in the model's turn; None asks
            prompts as they are.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int | None = None,
        chat: ChatTemplate | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.chat = chat

    def tokens(self, text: str, *, whole: bool = False) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and character spans of ``text`` as the model sees a text's beginning.

        Special tokens in front (BOS) are kept with an empty span; those behind (EOS) are dropped.
        A text that is ``whole`` (a chat), or already begins with the BOS token's own text, gets
        none.
        """
        bos = getattr(self.tokenizer, "bos_token", None)
        special = not (whole or (isinstance(bos, str) and bos and text.startswith(bos)))
        fast = bool(getattr(self.tokenizer, "is_fast", False))
        encoded: Any = self.tokenizer(
            text,
            add_special_tokens=special,
            return_offsets_mapping=fast,
            return_special_tokens_mask=True,
            verbose=False,
        )
        ids: list[int] = list(encoded["input_ids"])
        marks: list[int] = list(encoded["special_tokens_mask"])
        if special and not fast:
            marks = self._marks_of_slow(ids, marks, text)
        if special:
            while ids and marks[-1]:
                ids.pop()
                marks.pop()
        else:
            marks = [0] * len(ids)
        n_front = next((i for i, mark in enumerate(marks) if not mark), len(ids))
        if fast:
            spans = [(int(a), int(b)) for a, b in encoded["offset_mapping"][: len(ids)]]
        else:
            spans = self._spans_by_decoding(ids, n_front, text)
        for i in range(n_front):
            spans[i] = (0, 0)
        return ids, spans

    def _marks_of_slow(self, ids: list[int], marks: list[int], text: str) -> list[int]:
        # Tokenizers written in Python often call nothing special: the ids that are there only
        # with special tokens asked for are those.
        plain = list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        for front in range(len(ids) - len(plain) + 1):
            if ids[front : front + len(plain)] == plain:
                behind = len(ids) - front - len(plain)
                return [1] * front + [0] * len(plain) + [1] * behind
        return marks

    def _spans_by_decoding(self, ids: list[int], n_front: int, text: str) -> list[tuple[int, int]]:
        # For tokenizers without offsets: token i ends where the decoded beginning stops agreeing
        # with the text. A half-written character decodes to U+FFFD and so adds nothing yet; such
        # a token gets the whole character once it is complete.
        ends: list[int] = []
        for i in range(n_front, len(ids)):
            decoded = self.tokenizer.decode(
                ids[n_front : i + 1], clean_up_tokenization_spaces=False
            )
            decoded = decoded if isinstance(decoded, str) else "".join(decoded)
            ends.append(_agreement(decoded, text))
        if ends and ends[-1] != len(text):
            raise UserError(
                f"this tokenizer gives no character offsets and does not decode its own tokens "
                f"back to the text ('{text[:60]}')",
                fix="Use the fast version of the tokenizer",
            )
        spans, start = [(0, 0)] * n_front, 0
        for end in ends:
            spans.append((start, end if end > start else start + 1))
            start = max(start, end)
        return spans

    def verbatim(self, text: str) -> Encoding:
        """Tokenise a text to be continued, letter for letter as it is, or answered in a chat.

        Raises:
            TooLongError: more tokens than the model's context.
            UserError: it has no tokens.
        """
        if self.chat is not None:
            return self.encode(text)
        ids, spans = self.tokens(text)
        self._check(text, ids)
        return Encoding(text, tuple(ids), tuple(spans), len(ids))

    def continuation(
        self, ids: Sequence[int], new: Sequence[int], *, with_special: bool = False
    ) -> str:
        """The text of ``new`` tokens behind ``ids``, its leading space included."""

        # Not decoded by themselves: some tokenizers drop the space of a text's first word.
        def text(part: Sequence[int]) -> str:
            return str(
                self.tokenizer.decode(
                    list(part),
                    skip_special_tokens=not with_special,
                    clean_up_tokenization_spaces=False,
                )
            )

        before, whole = text(ids), text([*ids, *new])
        # No file of ours holds a NUL.
        return whole[_agreement(before, whole) :].replace("\0", "\ufffd")

    def encode(
        self, prompt: str, answer: str = "", subject: str | None = None, joint: Joint = "auto"
    ) -> Encoding:
        """Tokenise ``prompt`` with ``answer`` behind it; find the subject's last mention.

        ``joint`` is what stands between the two: see :func:`goldenlayers.prompts.join`. In a chat
        it says nothing: the template does.

        Raises:
            TooLongError: more tokens than the model's context.
            UserError: the text has no tokens, or the answer none, or nothing stands before it.
        """
        if self.chat is None:
            text, boundary = join(prompt, answer, joint)
            start, end = 0, boundary
        else:
            text, start, end = self.chat.around(prompt)
            boundary = len(text)
            text += self.chat.gap + answer.lstrip() if answer else ""
        ids, spans = self.tokens(text, whole=self.chat is not None)
        n_prompt = len(ids)
        if answer:
            if any(a < boundary < b for a, b in spans):
                ids, spans = self._tokens_apart(text, boundary)
            n_prompt = next((i for i, (_, end) in enumerate(spans) if end > boundary), len(ids))
            if n_prompt == len(ids):
                raise UserError(f"the answer '{answer}' has no tokens after '{prompt[-60:]}'")
            if n_prompt == 0:
                raise UserError(f"nothing stands before the answer '{answer[:60]}'")
        self._check(text[start:], ids)
        lookup = None
        if subject is not None and (span := find_subject(subject, text[start:end])) is not None:
            lookup = last_token_in(spans, (start + span[0], start + span[1]))
        return Encoding(text, tuple(ids), tuple(spans), n_prompt, lookup, start)

    def _check(self, text: str, ids: Sequence[int]) -> None:
        if not ids:
            raise UserError(f"the text '{text[:60]}' has no tokens")
        if self.max_length is not None and len(ids) > self.max_length:
            raise TooLongError(
                f"the text '{text[:60]}…' has {len(ids)} tokens",
                expected=f"at most {self.max_length}, the model's context",
            )

    def _tokens_apart(self, text: str, boundary: int) -> tuple[list[int], list[tuple[int, int]]]:
        # One token holds the prompt's end and the answer's beginning (scripts without spaces,
        # brackets). A model that is asked the prompt gets it whole and answers in tokens of its
        # own, so the two are tokenised apart; the answer behind a line break, as in mid-text.
        whole = self.chat is not None
        ids, spans = self.tokens(text[:boundary], whole=whole)
        more, places = self.tokens("\n" + text[boundary:], whole=whole)
        for token, (start, end) in zip(more, places, strict=True):
            if start < 1 < end:
                raise UserError(f"the tokens of '{text[:60]}' do not tell prompt and answer apart")
            if end > 1:
                ids.append(token)
                spans.append((start + boundary - 1, end + boundary - 1))
        return ids, spans

    def fact(self, fact: Fact, answer: str = "") -> Encoding:
        """The fact's own prompt with ``answer``, joined as the fact has it, its lookup token found.

        Raises:
            UserError: no token overlaps the subject (a tokenizer that drops it).
        """
        joint = fact.joint_of(fact.prompt, answer)
        encoding = self.encode(fact.prompt, answer, fact.subject, joint)
        if encoding.lookup is None:
            raise UserError(f"fact '{fact.id}': the tokenizer has no token for '{fact.subject}'")
        return encoding

    def pad(self, encodings: Sequence[Encoding], device: torch.device | str = "cpu") -> Batch:
        """Right-pad to the longest. Returns a :class:`Batch` of len(encodings) rows."""
        return pad_ids([e.ids for e in encodings], device)


def _agreement(left: str, right: str) -> int:
    """How many characters two texts have in common at their beginning."""
    pairs = enumerate(zip(left, right, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(left), len(right)))


def pad_ids(rows: Sequence[Sequence[int]], device: torch.device | str) -> Batch:
    """Right-pad rows of token ids to the longest.

    A row is padded with its own last token: any valid id serves, since padding is never seen, and
    models warn (or build masks) when they meet their padding token.
    """
    lengths = torch.tensor([len(row) for row in rows])
    width = int(lengths.max())
    ids = torch.tensor([[*row, *[row[-1]] * (width - len(row))] for row in rows])
    return Batch(ids.to(device), lengths.to(device))


def subject_tokens(fact: Fact, encoding: Encoding) -> tuple[int, int]:
    """Tokens [start, end) of the subject's last mention; end − 1 is the lookup token.

    ``encoding`` is of :meth:`TextEncoder.fact`, which refuses a subject without tokens.
    """
    start, end = (encoding.start + place for place in fact.subject_span)
    within = _tokens_in(encoding.spans, (start, end))
    return within[0], within[-1] + 1


def last_token_in(spans: Sequence[tuple[int, int]], span: tuple[int, int]) -> int | None:
    """Index of the last token whose characters overlap ``span``."""
    overlapping = _tokens_in(spans, span)
    return overlapping[-1] if overlapping else None


def _tokens_in(spans: Sequence[tuple[int, int]], span: tuple[int, int]) -> list[int]:
    """Indices of the tokens whose characters overlap ``span``."""
    start, end = span
    return [i for i, (a, b) in enumerate(spans) if a < end and b > start]


def length_batches(
    lengths: Sequence[int], batch_size: int, tokens: int | None = None
) -> Iterator[list[int]]:
    """Indices in batches of similar length, so that little is spent on padding.

    Longest first: if memory does not suffice, that shows at once and not after an hour. A batch
    has at most ``batch_size`` members, and with ``tokens`` at most so many tokens, or one member.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    while order:
        size = batch_size
        if tokens is not None:
            size = min(size, max(1, tokens // max(1, lengths[order[0]])))
        yield order[:size]
        del order[:size]


def equal_length_groups(rows: Iterable[Sequence[int]], batch_size: int) -> Iterator[list[int]]:
    """Indices of rows of exactly equal length, at most ``batch_size`` together (no padding)."""
    groups: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(len(row), []).append(i)
    for _, members in sorted(groups.items(), reverse=True):
        for start in range(0, len(members), batch_size):
            yield members[start : start + batch_size]


def context_length(config: Any) -> int | None:
    """The model's context in tokens as its configuration tells, None when it does not."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for name in ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length"):
        value = getattr(text, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None
