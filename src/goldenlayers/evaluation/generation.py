"""Free generation for evaluation: greedy answers with a natural stop, sampled text for fluency;
and whether what was generated begins with an answer.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import random
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from goldenlayers.decoding import end_ids, greedy
from goldenlayers.hooks import last_logits
from goldenlayers.progress import in_smaller_batches
from goldenlayers.tokens import equal_length_groups

if TYPE_CHECKING:
    from goldenlayers.models import Model

_HYPHENS = "-\u2010\u2011"
_UNSPACED = ("CJK UNIFIED", "CJK COMPAT", "HIRAGANA", "THAI", "LAO", "KHMER", "MYANMAR")
_REWRITES = (
    (re.compile(r"(?<!\w)[^\W\d_](?:\.[^\W\d_])+(?!\w)"), lambda m: m.group().replace(".", "")),
    (re.compile(r"(?<=\w)['\u2019]s(?!\w)"), " "),
    (re.compile(r"(?<=\w)['\u2019](?=\w)"), ""),
    (re.compile(r"(?<=\d),(?=\d{3}(?!\d))"), ""),
    (re.compile(rf"(?<=\w)[{_HYPHENS}](?=\w)"), " \0 "),
)


def normalise_answer(text: str) -> list[str]:
    """The words of a text in the form answers are compared in.

    NFKC, case folded, invisible characters dropped; initials joined ("U.S." = "US"), possessive
    "'s", thousands commas, articles and punctuation dropped, the decimal point kept. Scripts
    written without spaces (Han, kana, Thai, ...) count one character as a word. A hyphen inside a
    word stays as a word of its own, "-".
    """
    return _words(text, drop_articles=True)


def matches_answer(continuation: str, answer: str, aliases: Iterable[str] = ()) -> bool:
    """Whether a continuation begins with the answer, or an alias, as whole words.

    Both sides are normalised (:func:`normalise_answer`). "Parish" does not match "Paris", nor
    "Guinea-Bissau" "Guinea"; "Paris, France" does match "Paris". Accents count: other spellings
    belong in ``aliases``.

    Raises:
        TypeError: ``aliases`` is one string, whose letters would each count as an answer.
    """
    if isinstance(aliases, str):
        raise TypeError("aliases must be a list of strings, not one string")
    return any(_begins_with(continuation, one) for one in (answer, *aliases))


def _words(text: str, *, drop_articles: bool) -> list[str]:
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    # Direction marks, zero-width joiners, soft hyphens and the Arabic stretching stroke.
    text = "".join(c for c in text if unicodedata.category(c) != "Cf" and c != "\u0640")
    for pattern, new in _REWRITES:
        text = pattern.sub(new, text)
    words = "".join(_spell(text)).replace("\0", "-").split()
    return [w for w in words if not (drop_articles and w in ("a", "an", "the"))]


def _spell(text: str) -> Iterator[str]:
    """The characters of the words; a space for what stands between them."""
    for i, char in enumerate(text):
        before, after = text[i - 1 : i], text[i + 1 : i + 2]
        category = unicodedata.category(char)
        if category[0] in "LN":
            own = unicodedata.name(char, "").startswith(_UNSPACED)
            joined = before and unicodedata.name(before, "").startswith(_UNSPACED)
            yield f" {char}" if own or joined else char
        elif char in "-\u2212" and after.isdigit() and not before.strip():
            yield "\u2212"  # a minus sign: -5 is not 5
        elif (
            category[0] == "M"  # vowel signs and accents belong to their letter
            or char == "\0"
            or category == "Sc"  # $5 is not 5
            or (char == "." and before.isdigit() and after.isdigit())
            or (char in "+#" and before and not before.isspace())  # C++ and C# are not C
        ):
            yield char
        else:
            yield " "


def _begins_with(continuation: str, answer: str) -> bool:
    wanted = _words(answer, drop_articles=True)
    drop = bool(wanted)  # "A" as an answer (a vitamin, a grade) is no article
    wanted = [w for w in wanted or _words(answer, drop_articles=False) if w != "-"]
    if not wanted:  # marks only: compare as written
        plain = unicodedata.normalize("NFKC", answer).strip()
        return bool(plain) and unicodedata.normalize("NFKC", continuation).strip().startswith(plain)
    words = _words(continuation, drop_articles=drop)
    at = [i for i, word in enumerate(words) if word != "-"][: len(wanted)]
    if [words[i] for i in at] != wanted:
        return False
    return words[at[-1] + 1 : at[-1] + 2] != ["-"]


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
