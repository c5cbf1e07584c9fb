"""What the model reads while its keys are collected: documents packed into rows, or text that it
samples itself.

A source runs the model batch by batch; hooks set by the caller see the keys. Rows all have the same
length. Positions below ``skip`` are never counted: models park attention on the first token (BOS,
or the first word where the tokenizer adds no BOS), whose keys are so large, and so unlike those of
any other token, that a second moment with them in it describes little else.

Shapes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator
from contextlib import suppress
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from goldenlayers.errors import UserError
from goldenlayers.hooks import last_logits
from goldenlayers.statistics.documents import Documents, windows

if TYPE_CHECKING:
    from goldenlayers.models import Model


TEXT_LENGTH = 256
SAMPLE_LENGTH = 128
# One step of sampling reads all weights for one token per row, so rows are nearly free up to some
# number. Fixed, since another number of rows would be another text.
SAMPLE_ROWS = 64
# A passage gives about one row (4 characters per token in most languages).
_CHARACTERS_PER_TOKEN = 4


class Finished(Exception):  # noqa: N818 - not an error: the last wanted layer has been read
    """Ends a forward pass behind the last wanted layer."""


class Observer:
    """What a source tells its collector about the next forward pass."""

    stop_after_last: bool = False  # nothing behind the last wanted layer is needed: raise Finished
    position: int = 0  # of the pass's first token, in its row
    rows: int = 0  # B


class Source(ABC):
    """Rows of ``length`` tokens, of which those from position ``skip`` on count."""

    identity: dict[str, Any]
    description: str
    length: int
    skip: int
    batch_rows: int

    @property
    def tokens_per_row(self) -> int:
        """Keys that one row gives."""
        return self.length - self.skip

    @abstractmethod
    def run(self, model: Model, observer: Observer, first: int, n_rows: int) -> Generator[int]:
        """Run the model on rows ``first`` to ``n_rows``; yields the number of rows of each batch.

        ``first`` is a multiple of ``batch_rows``. Ends early when there is no more text.
        """


class TextSource(Source):
    """Documents packed into rows without padding.

    Passages of documents in seeded random order are joined by blank lines, tokenised and cut into
    rows; each row gets in front what the tokenizer puts before a text (BOS). Special tokens inside
    the text are left out. A rest shorter than a row is dropped.
    """

    def __init__(
        self, documents: Documents, model: Model, *, length: int, batch_tokens: int, seed: int
    ) -> None:
        self.documents, self.seed = documents, seed
        self.tokenizer: Any = model.tokenizer
        self.special = special_ids(model)
        self.front = front_ids(model)
        self.length = length
        self.skip = max(1, len(self.front))
        self.batch_rows = max(1, batch_tokens // length)
        self.description = f"{documents.name} (seed {seed})"
        self.identity = {**documents.identity, "seed": seed, "length": length, "skip": self.skip}

    def rows(self) -> Iterator[list[int]]:
        """Token ids, ``length`` a row."""
        order = np.random.default_rng(self.seed).permutation(len(self.documents)).tolist()
        stream: list[int] = []
        body = self.length - len(self.front)
        for passage in windows(self.documents, order, _CHARACTERS_PER_TOKEN * self.length):
            # Without offsets, which slow tokenizers would need quadratic time for.
            text = passage.rstrip() + "\n\n"
            ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            stream += [i for i in ids if i not in self.special]
            while len(stream) >= body:
                yield [*self.front, *stream[:body]]
                stream = stream[body:]

    def batches(self, first: int, n_rows: int) -> Iterator[Tensor]:
        """Ids (B, T), B = ``batch_rows`` except in the last batch."""
        rows = islice(self.rows(), first, n_rows)
        while batch := list(islice(rows, self.batch_rows)):
            yield torch.tensor(batch)

    def run(self, model: Model, observer: Observer, first: int, n_rows: int) -> Generator[int]:
        observer.stop_after_last = True
        for ids in self.batches(first, n_rows):
            observer.position, observer.rows = 0, len(ids)
            with suppress(Finished):
                model.hf(input_ids=ids.to(model.device), use_cache=False)
            yield len(ids)


class SampledSource(Source):
    """Text sampled from the model at temperature 1, with its keys read in the same pass.

    Each row starts from what the tokenizer puts before a text, else from BOS, else (no BOS) from a
    random token. Special tokens and ids without a token are never drawn, so a row is one running
    text. Batch ``i`` depends on (seed, i) only.
    """

    def __init__(self, model: Model, *, length: int, seed: int) -> None:
        self.seed, self.length = seed, length
        self.front = front_ids(model) or bos_ids(model)
        self.skip = max(1, len(self.front))
        self.batch_rows = SAMPLE_ROWS
        self.allowed = drawable(model)
        self.description = f"text sampled from the model (seed {seed})"
        self.identity = {"kind": "sampled", "seed": seed, "length": length, "skip": self.skip}
        self.identity |= {"rows": SAMPLE_ROWS, "temperature": 1}

    def run(self, model: Model, observer: Observer, first: int, n_rows: int) -> Generator[int]:
        observer.stop_after_last = False
        for start in range(first, n_rows, self.batch_rows):
            rows = min(self.batch_rows, n_rows - start)
            self.sample(model, observer, start // self.batch_rows, rows)
            yield rows

    def sample(self, model: Model, observer: Observer | None, index: int, n_rows: int) -> Tensor:
        """Sample batch ``index``: ids (B, T). The model also reads the last token drawn."""
        digest = hashlib.sha256(f"key statistics {self.seed} {index}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        n_drawn = self.length - max(1, len(self.front))
        # Drawn on the CPU whatever the device, and for a full batch whatever the rows wanted.
        draws = torch.rand(n_drawn, self.batch_rows, generator=generator, dtype=torch.float64)
        choices = self.allowed.nonzero()[:, 0].cpu()
        if self.front:
            ids = torch.tensor(self.front).repeat(n_rows, 1)
        else:
            picks = torch.randint(len(choices), (self.batch_rows, 1), generator=generator)
            ids = choices[picks][:n_rows]
        ids = ids.to(model.device)
        text, past = [ids], None
        for step in range(n_drawn + 1):
            if observer is not None:
                observer.position = 0 if step == 0 else text[0].shape[1] + step - 1
                observer.rows = n_rows
            logits, past = last_logits(model, ids, past, again=observer is None)
            if step < n_drawn:
                ids = _draw(logits, self.allowed, draws[step, :n_rows, None])  # (B, 1)
                text.append(ids)
        return torch.cat(text, 1).cpu()


def _draw(logits: Tensor, allowed: Tensor, uniform: Tensor) -> Tensor:
    """One token per row (B, 1) by inverting the distribution function at ``uniform`` (B, 1)."""
    logits = logits.float().masked_fill(~allowed, float("-inf"))
    mass = torch.softmax(logits, -1).cumsum(-1)  # (B, V), rising to about 1
    target = uniform.to(mass) * mass[:, -1:]
    # The first token whose mass exceeds the target: never one of probability 0.
    ids = torch.searchsorted(mass, target, right=True)
    return ids.clamp(max=int(allowed.nonzero().max()))


def special_ids(model: Model) -> frozenset[int]:
    """Ids of special tokens, the one for unknown characters excepted."""
    tokenizer = model.tokenizer
    unknown = getattr(tokenizer, "unk_token_id", None)
    added = getattr(tokenizer, "added_tokens_decoder", {})  # turn marks, unused ids, …
    marked = [index for index, token in added.items() if token.special]
    return frozenset(int(i) for i in [*tokenizer.all_special_ids, *marked] if i != unknown)


def front_ids(model: Model) -> list[int]:
    """What the tokenizer puts before every text."""
    special = special_ids(model)
    ids, _ = model.encoder.tokens("a")
    return ids[: next((i for i, token in enumerate(ids) if token not in special), len(ids))]


def bos_ids(model: Model) -> list[int]:
    """The token that begins a text, [] if the tokenizer has none, whatever the model's default."""
    bos = getattr(model.tokenizer, "bos_token_id", None)
    return [bos] if isinstance(bos, int) and bos >= 0 else []


def drawable(model: Model) -> Tensor:
    """(V,) bool: ids that stand for text. Padded vocabularies have ids without a token, and
    models that also see have ids that stand for images.
    """
    allowed = torch.zeros(model.layers.vocab_size, dtype=torch.bool)
    allowed[[i for i in model.tokenizer.get_vocab().values() if i < len(allowed)]] = True
    barred = {*special_ids(model), getattr(model.tokenizer, "unk_token_id", None)}
    for name, value in vars(model.config).items():
        if name.endswith(("_token_id", "_token_index")):
            barred.update(value if isinstance(value, list | tuple) else [value])
    for token in barred:
        if isinstance(token, int) and 0 <= token < len(allowed):
            allowed[token] = False
    if not allowed.any():
        raise UserError("the tokenizer has no ordinary tokens to sample")
    return allowed.to(model.device)
