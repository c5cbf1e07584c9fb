"""What stands between a prompt and its answer: a space or nothing, told by their characters.

Where the characters leave it open (code, prices, paths, quotations) this module says so, and the
model decides (:func:`goldenlayers.decoding.settle_joints`).
"""

from __future__ import annotations

import unicodedata
from typing import Literal

Joint = Literal["auto", "space", "none"]
JOINTS: tuple[Joint, ...] = ("auto", "space", "none")
"""auto: by the characters, and where they leave it open by the model."""

# Scripts written without spaces between words, by how their characters' names begin.
_UNSPACED = (
    "CJK", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA", "BOPOMOFO", "FULLWIDTH", "THAI", "LAO ", "KHMER",
    "MYANMAR", "TIBETAN", "JAVANESE", "BALINESE", "TAI ", "NEW TAI",
)  # fmt: skip
# Their punctuation and half-width forms, whose names tell nothing: 「」、。〜 and the like.
_UNSPACED_RANGES = ((0x3001, 0x303F), (0xFE10, 0xFE1F), (0xFE30, 0xFE4F), (0xFF01, 0xFF9F))
_SEPARATING = ",;:!?)]}…،؛؟"  # what follows begins a new word, in prose
_CLOSING = frozenset(",.;:!?)]}%»”’")  # as the answer's beginning: it belongs to what was before
# A word that holds one of these is code or an address: no mark is one of prose there.
_OF_CODE = ("://", "::", "=", "<", ">", "\\")


def join(prompt: str, answer: str, joint: Joint = "auto") -> tuple[str, int]:
    """Prompt and answer as one running text, and the character where the prompt ends.

    The prompt is kept letter for letter. If it ends in white space, that is the joint; otherwise
    ``joint`` says what stands between: one space, nothing, or (auto) what :func:`sure_joint` says,
    a space where that is nothing sure. A space counts with the answer, as it does in the tokens of
    models whose words carry their leading space; without an answer the prompt ends where it would
    end with one.
    """
    rest = answer.lstrip()
    if prompt[-1:].isspace():
        body = prompt.removesuffix(" ")
        gap = prompt[len(body) :]
    else:
        if joint == "auto":
            joint = "space" if rest != answer else sure_joint(prompt, rest) or "space"
        body, gap = prompt, " " if joint == "space" else ""
    return (body + gap + rest if rest else body), len(body)


def sure_joint(prompt: str, answer: str) -> Literal["space", "none"] | None:
    """What the characters on both sides ask for, None where they leave it open.

    Sure is: nothing beside a script without spaces (its full-width punctuation included), behind
    an opening bracket and before closing punctuation; a space between two words or numbers, and
    before a word behind a comma, colon, question mark or closing bracket of ordinary prose.
    Everything else is open: quotation marks, full stops, hyphens, currency, and all other symbols.
    """
    before, after = prompt[-1:], answer[:1]
    if not before or not after or _unspaced(before) or _unspaced(after) or before in "([{":
        return "none"
    if not _wordlike(after):
        belongs = after in _CLOSING and not _wordlike(answer[1:2])
        return "none" if belongs or answer.startswith(("'s ", "’s ")) else None
    if _wordlike(before) or (before in _SEPARATING and _in_prose(prompt, after)):
        return "space"
    return None


def _in_prose(prompt: str, after: str) -> bool:
    """Whether the separating mark at the prompt's end is one of ordinary prose."""
    word = prompt.split()[-1]
    core = word.rstrip(_SEPARATING)
    marks = word[len(core) :]
    if any(sign in word for sign in _OF_CODE):
        return False
    if not core:  # a mark that stands apart, as in French
        return True
    if core[-1].isdigit() and after.isdigit() and marks in (",", ":"):
        return False  # 1,000 and 12:30
    return core[-1] not in "([{" and not _unspaced(core[-1])


def _wordlike(char: str) -> bool:
    return bool(char) and unicodedata.category(char)[0] in "LMN"


def _unspaced(char: str) -> bool:
    if char.isascii():
        return False
    code = ord(char)
    if 0xFFA0 <= code <= 0xFFDC:  # half-width Hangul, which has spaces
        return False
    return any(low <= code <= high for low, high in _UNSPACED_RANGES) or unicodedata.name(
        char, ""
    ).startswith(_UNSPACED)
