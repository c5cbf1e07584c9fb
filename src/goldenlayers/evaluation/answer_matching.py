"""Whether a generated continuation begins with an answer: normalisation and matching of text."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator

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
