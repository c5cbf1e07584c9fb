"""What a model answers: greedy continuation, its arg-max tokens along a given answer, and in which
form (with or without a space before it) it finds an answer likelier.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch

from goldenlayers.errors import UserError
from goldenlayers.facts import Fact
from goldenlayers.hooks import argmax_rows, final_hidden, last_logits, token_nll
from goldenlayers.models.weights import not_a_number
from goldenlayers.progress import in_smaller_batches
from goldenlayers.prompts import JOINTS, Joint, join, sure_joint
from goldenlayers.tokens import Encoding, equal_length_groups, length_batches, pad_ids

if TYPE_CHECKING:
    from goldenlayers.models import Model

_CLEARLY = math.log(5)  # in nats: how much likelier text without a space must be
_ROWS = 32  # of a batch
R = TypeVar("R")
Stop = Callable[[int, list[int]], bool]


def end_ids(model: Model) -> frozenset[int]:
    """Every token that ends a text for this model: the tokenizer's, the generation config's, and in
    a chat what ends a turn.
    """
    chat = model.encoder.chat
    found = set() if chat is None or chat.end_id is None else {chat.end_id}
    for place in (model.tokenizer, getattr(model.hf, "generation_config", None)):
        value = getattr(place, "eos_token_id", None)
        found |= {value} if isinstance(value, int) else {int(v) for v in value or ()}
    return frozenset(found)


@torch.no_grad()
def greedy(
    model: Model,
    rows: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    batch_size: int = _ROWS,
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
    return _by_text(groups, decode, [len(row) for row in rows])


class Answer(NamedTuple):
    """What a model says behind a prompt, and its likeliest next tokens with their probabilities."""

    text: str
    next: tuple[tuple[str, float], ...]


def answers(
    model: Model, rows: Sequence[Sequence[int]], counts: Sequence[int], top: int
) -> list[Answer]:
    """What the model, as its weights are, says behind each row of token ids.

    Args:
        model: a loaded model.
        rows: token ids.
        counts: for each row the most tokens of its answer; none where there is no room for one.
        top: how many of the likeliest next tokens are told.
    """
    encoder = model.encoder
    may = [i for i, count in enumerate(counts) if count > 0]
    new = greedy(
        model,
        [rows[i] for i in may],
        max(counts, default=0),
        stop=lambda i, tokens: len(tokens) >= counts[may[i]],
    )
    said = dict(zip(may, new, strict=True))
    following = likeliest(model, rows, top) if top else [[] for _ in rows]
    return [
        Answer(
            encoder.continuation(row, said.get(i, [])),
            tuple((encoder.continuation(row, [t], with_special=True), p) for t, p in candidates),
        )
        for i, (row, candidates) in enumerate(zip(rows, following, strict=True))
    ]


@torch.no_grad()
def likeliest(
    model: Model, rows: Sequence[Sequence[int]], count: int
) -> list[list[tuple[int, float]]]:
    """The ``count`` likeliest next tokens of each row, with their probabilities, best first.

    Rows of equal length run together; where memory runs out, a batch is halved.

    Raises:
        OutOfMemory: memory runs out on a single row.
    """

    def run(members: list[int]) -> list[list[tuple[int, float]]]:
        ids = torch.tensor([list(rows[i]) for i in members], device=model.device)
        chances = last_logits(model, ids)[0].float().softmax(-1)
        best = chances.topk(min(count, chances.shape[-1]))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [list(zip(*pair, strict=True)) for pair in pairs]

    return _by_text(equal_length_groups(rows, _ROWS), run, [len(row) for row in rows])


@torch.no_grad()
def forced_predictions(
    model: Model,
    encodings: Sequence[Encoding],
    *,
    batch_size: int = _ROWS,
    on_batch: Callable[[list[int]], None] | None = None,
) -> list[list[int]]:
    """Arg-max tokens at each encoding's answer positions, under teacher forcing.

    Equal to ``answer_ids`` exactly where free greedy decoding would have given the answer. Where
    memory runs out, a batch is halved.

    Raises:
        OutOfMemory: memory runs out on a single text.
    """

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

    lengths = [len(e) for e in encodings]
    return _by_text(length_batches(lengths, batch_size), predict, lengths)


def gives_already(model: Model, facts: Sequence[Fact]) -> list[bool]:
    """Whether the model, as its weights are, gives each fact's new answer: every one of its tokens
    is the likeliest behind those before it.
    """
    encodings = [model.encoder.fact(fact, fact.target) for fact in facts]
    found = forced_predictions(model, encodings)
    return [tuple(new) == one.answer_ids for new, one in zip(found, encodings, strict=True)]


@torch.no_grad()
def log_probs(model: Model, rows: Sequence[Sequence[int]], starts: Sequence[int]) -> list[float]:
    """Log-probability in nats of each row's tokens from its start (at least 1) on.

    Where memory runs out, a batch is halved.

    Raises:
        OutOfMemory: memory runs out on a single text.
    """

    def run(members: list[int]) -> list[float]:
        ids = pad_ids([rows[i] for i in members], model.device).ids
        cells = [(b, t) for b, i in enumerate(members) for t in range(starts[i], len(rows[i]))]
        where, tokens = (list(one) for one in zip(*cells, strict=True))
        hidden = final_hidden(model, ids)[where, [t - 1 for t in tokens]]
        nll = token_nll(model.layers, hidden, ids[where, tokens])
        found = [0.0] * len(members)
        for b, one in zip(where, nll.tolist(), strict=True):
            found[b] -= one
        return found

    lengths = [len(row) for row in rows]
    return _by_text(length_batches(lengths, _ROWS), run, lengths)


def _by_text(
    groups: Iterator[list[int]], work: Callable[[list[int]], list[R]], lengths: Sequence[int]
) -> list[R]:
    """What ``work`` finds for every text, in their order; a batch too large is halved."""
    found = in_smaller_batches(groups, work, lambda i: f"a text of {lengths[i]} tokens")
    results = {i: one for members, some in found for i, one in zip(members, some, strict=True)}
    return [results[i] for i in range(len(lengths))]


@dataclass(frozen=True, slots=True)
class Settled:
    """An open joint as the model has decided it.

    ``space`` and ``none`` are log-probabilities in nats of the text in both forms, each from the
    first token on in which the forms differ: given the answer, that is what sets them apart.
    """

    prompt: str
    answer: str
    space: float
    none: float

    @property
    def joint(self) -> Joint:
        """Nothing where that is clearly likelier (five times), a space otherwise.

        A space is the ordinary case: in rare wordings a small model is undecided, and a toss-up
        must not glue two words.
        """
        return "none" if self.none > self.space + _CLEARLY else "space"


def settle_joints(
    model: Model,
    facts: Sequence[Fact],
    *,
    recorded: Mapping[str, str] | None = None,
    on_settled: Callable[[list[Settled]], None] | None = None,
) -> list[Fact]:
    """The facts with every open joint decided: a space before the answer, or none.

    Open are the joints of prompts and answers that are fixed neither by the user nor by their
    characters (:func:`goldenlayers.prompts.sure_joint`). The model decides by its own probability
    of both forms, as its weights are now. Facts without open joints are handed back as they are,
    and so are facts that have been settled before. In a chat none is open: the template decides.

    Args:
        model: a loaded model.
        facts: the facts.
        recorded: joints decided earlier, as :func:`joints_record` has them: not decided anew.
        on_settled: told what the model decided now, unless that is nothing.
    """
    if model.chat:
        return list(facts)
    todo = [(fact, _open_joints(fact)) for fact in facts]
    asked: dict[tuple[str, str], Joint] = {}
    taken: dict[int, list[Joint]] = {}
    for i, (fact, pairs) in enumerate(todo):
        old = str((recorded or {}).get(fact.id, "")).split()
        if pairs and len(old) == len(pairs) and set(old) <= set(JOINTS):
            taken[i] = [joint for word in old for joint in JOINTS if joint == word]
        else:
            asked |= dict.fromkeys(pairs, "auto")
    found = compare_joints(model, list(asked))
    asked |= {(one.prompt, one.answer): one.joint for one in found}
    if found and on_settled is not None:
        on_settled(found)
    settled = []
    for i, (fact, pairs) in enumerate(todo):
        joints = taken.get(i) or [asked[pair] for pair in pairs]
        new = tuple((*pair, joint) for pair, joint in zip(pairs, joints, strict=True))
        settled.append(dataclasses.replace(fact, joints=fact.joints + new) if new else fact)
    return settled


def joints_record(facts: Sequence[Fact]) -> dict[str, str]:
    """What :func:`settle_joints` decided, by the facts' ids, in a form that a run can keep."""
    return {fact.id: " ".join(joint for *_, joint in fact.joints) for fact in facts if fact.joints}


def _open_joints(fact: Fact) -> list[tuple[str, str]]:
    """Prompts and answers of the fact whose joint is still open, each once."""
    known = {(prompt, answer) for prompt, answer, _ in fact.joints}
    return [
        pair
        for pair in dict.fromkeys(fact.pairs)
        if not pair[0][-1].isspace()
        and sure_joint(*pair) is None
        and pair not in known
        and fact.joint_of(*pair) == "auto"
    ]


def compare_joints(model: Model, pairs: Sequence[tuple[str, str]]) -> list[Settled]:
    """Each pair of prompt and answer in both forms; those that cannot be asked are left out.

    The text is tokenised as a whole, as it would stand anywhere: a tokenizer that has ``.matrix``
    as one token makes the model expect no ``matrix`` behind the token ``.``, so the answer's own
    tokens behind the prompt's would tell the wrong thing.
    """
    kept: list[tuple[str, str]] = []
    rows: list[Sequence[int]] = []
    starts: list[int] = []
    for pair in pairs:
        for lead in ("", "\n"):  # the line break is for forms that differ in their first token
            try:
                texts = [lead + join(*pair, joint)[0] for joint in ("space", "none")]
                both = [model.encoder.verbatim(text).ids for text in texts]
            except UserError:  # too long, or no tokens: whoever uses the text says so
                break
            matching = takewhile(lambda ids: ids[0] == ids[1], zip(*both, strict=False))
            alike = sum(1 for _ in matching)
            if 0 < alike < min(map(len, both)):
                kept.append(pair)
                rows += both
                starts += [alike, alike]
                break
    scores = log_probs(model, rows, starts) if rows else []
    return [
        Settled(*pair, space, none)
        for pair, space, none in zip(kept, scores[::2], scores[1::2], strict=True)
    ]


@torch.no_grad()
def sample(
    model: Model, count: int, n_tokens: int, generator: torch.Generator, *, batch_size: int = _ROWS
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
