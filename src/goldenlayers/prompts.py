"""What stands in a prompt, and behind it: where its subject is and whether two texts name the same
one, and the joint to the answer, a space or nothing, told by their characters.

Where the characters leave the joint open (code, prices, paths, quotations) this module says so, and
the model decides (:func:`goldenlayers.decoding.settle_joints`).
"""

from __future__ import annotations

import re
import unicodedata
from typing import Literal


def plain_subject(subject: str) -> str:
    """The subject without regard to case and spaces: what two facts about one thing share."""
    return " ".join(subject.casefold().split())


def filled(text: str, subject: str) -> str:
    """``text`` with the subject in place of its one "{}", if that is what "{}" stands for.

    A mention that is a part of a longer word ("Go" in "Google") is none here, or short subjects
    could have no template. Only letters that have a case, and digits, make such words: in Chinese
    or Thai, words touch.
    """
    if text.count("{}") != 1:
        return text
    for found in re.finditer(re.escape(subject), text):
        before, after = text[: found.start()][-1:], text[found.end() :][:1]
        if not any(map(_of_a_word, before + after)):
            return text
    return text.replace("{}", subject)


def _of_a_word(character: str) -> bool:
    return character == "_" or character.isdigit() or character.lower() != character.upper()


def mentions(subject: str, text: str) -> bool:
    """Whether ``text`` names the subject, by itself and not inside a longer word (see
    :func:`filled`); letter case, accents, marks and spaces aside.
    """
    wanted, within = _simple(subject), _simple(text)
    at = within.find(wanted) if wanted else -1
    while at >= 0:
        end = at + len(wanted)
        if not any(map(_of_a_word, within[max(0, at - 1) : at] + within[end : end + 1])):
            return True
        at = within.find(wanted, at + 1)
    return False


def plain_words(text: str) -> str:
    """The words of a text, without letter case, accents and marks: what two writings of it share.

    The text itself where it has none.
    """
    return " ".join(re.sub(r"[\W_]+", " ", _simple(text)).split()) or text


def new_words(question: str, answer: str) -> list[str]:
    """The words of an answer that do not stand in the question: what it says of its own."""
    asked = set(plain_words(question).split())
    return [word for word in plain_words(answer).split() if word not in asked]


def _simple(text: str) -> str:
    if not text.isascii():
        split = unicodedata.normalize("NFKD", text.translate(_KEYBOARD))
        text = "".join(c for c in split if not unicodedata.combining(c) and _seen(c))
    return " ".join(text.casefold().split())


def _seen(character: str) -> bool:
    """False for zero-width spaces, soft hyphens and marks of direction."""
    return unicodedata.category(character) != "Cf"


def find_subject(subject: str, text: str) -> tuple[int, int] | None:
    """Character span of ``subject`` in ``text``: its last mention, whole words preferred.

    The last mention is the one next to the question's end; a mention inside another word
    ("Iran" in "Iranian") counts only when there is no other.
    """
    subject = subject.strip()
    if not subject:
        return None
    # Not by a pattern: to compile one for every fact takes longer than to look.
    at = last = text.rfind(subject)
    while at >= 0:
        end = at + len(subject)
        beside = text[max(0, at - 1) : at] + text[end : end + 1]
        if not any(c.isalnum() or c == "_" for c in beside):
            return at, end
        at = text.rfind(subject, 0, end - 1)
    return (last, last + len(subject)) if last >= 0 else None


def near_subject(subject: str, prompt: str) -> str | None:
    """What stands in the prompt in place of the subject when only its form differs.

    Form: letter case, accents and other Unicode forms, quotation marks, dashes, spaces, and
    characters that are not seen. None if nothing does.
    """
    wanted, _ = _plain(subject.strip())
    text, origin = _plain(prompt)
    at = text.rfind(wanted) if wanted else -1
    if at < 0:
        return None
    start, end = origin[at], origin[at + len(wanted) - 1] + 1
    while end < len(prompt) and unicodedata.combining(prompt[end]):
        end += 1
    return prompt[start:end]


# What word processors and sites write for the keyboard's marks.
_KEYBOARD = str.maketrans(
    dict.fromkeys("‘’‚‛′ʹʻʼ´`＇", "'")
    | dict.fromkeys("“”„‟″«»＂", '"')
    | dict.fromkeys("‐‑‒–—―−﹘﹣－", "-")
)


def _plain(text: str) -> tuple[str, list[int]]:
    """Text without differences of form, and each character's place in ``text``."""
    letters: list[str] = []
    origin: list[int] = []
    for place, character in enumerate(text.translate(_KEYBOARD)):
        if not _seen(character):
            continue
        for letter in unicodedata.normalize("NFKD", character).casefold():
            if unicodedata.combining(letter):
                continue
            letter = " " if letter.isspace() else letter
            if letter == " " and letters and letters[-1] == " ":
                continue
            letters.append(letter)
            origin.append(place)
    return "".join(letters), origin


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
