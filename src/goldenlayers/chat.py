"""Prompts as an instruction model is asked them: in a user's turn, by the tokenizer's own template.

The template is rendered as transformers does it, with its own default system prompt; the text up to
where the model's turn begins is that of ``apply_chat_template(..., add_generation_prompt=True)``,
letter for letter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from goldenlayers.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Texts that stand for the user's and the model's, where a template is looked at.
_USER, _MODEL = "goldenusertext", "goldenmodeltext"


class ChatTemplate:
    """A tokenizer's chat template.

    ``gap`` is what it writes between the header of the model's turn and the answer (nothing, or a
    space); ``end_id`` the token that ends that turn, None where the template has none.

    Raises:
        UserError: the tokenizer has no template, or one that fails or does not hold one text of
            the user's as it is.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, name: str = "the model") -> None:
        self._tokenizer, self._name = tokenizer, name
        if not getattr(tokenizer, "chat_template", None):
            raise UserError(
                f"the tokenizer of {name} has no chat template, so it cannot be asked in chat form",
                expected="an instruction model",
                fix="Leave --chat out, or put the model's chat_template.jinja beside its tokenizer",
            )
        asked = self._render(_USER)
        self._before, found, self._behind = asked.partition(_USER)
        if not found or _USER in self._behind:
            raise self._odd("does not write the user's text once")
        self.gap, end = "", ""
        answered = self._render(_USER, _MODEL)
        gap, found, rest = answered.removeprefix(asked).partition(_MODEL)
        if found and answered.startswith(asked) and not gap.strip():
            self.gap, end = gap, rest
        ids = list(tokenizer(end, add_special_tokens=False)["input_ids"]) if end.strip() else []
        special = getattr(tokenizer, "added_tokens_decoder", {})
        self.end_id: int | None = ids[0] if ids and ids[0] in special else None

    def around(self, text: str) -> tuple[str, int, int]:
        """The whole text up to where the model answers; the characters in it at which ``text``
        begins and ends. Space around ``text`` that the template drops is not there.

        Raises:
            UserError: the template changes the text, or what stands around it.
        """
        whole = self._render(text)
        before, behind = len(self._before), len(whole) - len(self._behind)
        kept = whole[before:behind]
        at = text.find(kept)
        around = self._before + kept + self._behind
        if at < 0 or not kept or around != whole:
            raise self._odd(f"does not write the text '{text[:60]}' as it is")
        return whole, before - at, behind

    def _render(self, user: str, model: str = "") -> str:
        turns = [{"role": "user", "content": user}]
        turns += [{"role": "assistant", "content": model}] if model else []
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    turns, tokenize=False, add_generation_prompt=not model
                )
            )
        except Exception as error:  # a template is code of a file from anywhere
            raise self._odd(f"fails ({type(error).__name__}: {str(error)[:200]})") from error

    def _odd(self, problem: str) -> UserError:
        return UserError(
            f"the chat template of {self._name} {problem}", fix="Leave --chat out, or mend it"
        )
