"""Where a subject stands in a text, and whether two texts name the same one."""

from __future__ import annotations

import re
import unicodedata


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
    whole = list(re.finditer(rf"(?<!\w){re.escape(subject)}(?!\w)", text))
    matches = whole or list(re.finditer(re.escape(subject), text))
    return matches[-1].span() if matches else None


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
