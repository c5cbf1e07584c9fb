"""Tokenizers built in code: the three kinds whose habits differ where it hurts. No download.

``byte_level_bpe``: GPT-2's kind. A leading space belongs to the word, nothing is added.
``sentencepiece_bpe``: Llama's and Gemma's kind. ``▁`` for spaces, ``<s>`` put before every text,
bytes for what the vocabulary lacks; ``dummy_prefix=True`` also puts a space before the first word.
``byte_tokenizer``: ByT5's kind, in Python, without character offsets.
All vocabularies fit ``families.VOCAB``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import (
    AddedToken,
    PreTrainedTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

# Below families.VOCAB (320), whose last three ids the multimodal model keeps for images.
SIZE = 316

TEXT = (
    "The capital of France is Paris. The capital of Italy is Rome. The mother tongue of Danielle "
    "Darrieux is French. The Eiffel Tower is located in the city of Paris. Toko Yasuda plays the "
    "guitar. The official language of Brazil is Portuguese, and the currency of Japan is the yen. "
    "Albert Einstein was born in the city of Ulm. Where was the composer of the opera born? The "
    "chemical symbol of the element gold is Au. Apple was founded by Steve Jobs in California. "
    "Shanghai is a city in China; Beijing is the capital. She is the author of the novel."
)


@cache
def _byte_level_json() -> str:
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=SIZE,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer.to_str()


def byte_level_bpe() -> PreTrainedTokenizerFast:
    """GPT-2's kind: byte-level BPE, no special token added, end of text as the only one."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_byte_level_json()),
        eos_token="<|endoftext|>",
        bos_token="<|endoftext|>",
    )


@cache
def _sentencepiece_json(dummy_prefix: bool) -> str:
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    spelled = [f"<0x{byte:02X}>" for byte in range(256)]
    # A few merges learnt from the text, letters first: what is left after the bytes is 56 pieces.
    learner = Tokenizer(BPE(unk_token="<unk>"))
    # A piece may begin with a space, never end with one or hold one inside.
    learner.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    learner.train_from_iterator(
        [TEXT], BpeTrainer(vocab_size=SIZE - 260, special_tokens=[], show_progress=False)
    )
    pieces = sorted(learner.get_vocab().items(), key=lambda item: item[1])
    vocabulary = {token: index for index, token in enumerate(special + spelled)}
    for piece, _ in pieces:
        vocabulary.setdefault(piece, len(vocabulary))
    known = [piece for piece, _ in pieces]
    merges = [
        (piece[:cut], piece[cut:])
        for piece in known
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    tokenizer = Tokenizer(
        BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    prefix = [normalizers.Prepend("▁")] if dummy_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(content=" ", left=1)] if dummy_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    return tokenizer.to_str()


def sentencepiece_bpe(*, dummy_prefix: bool = True) -> PreTrainedTokenizerFast:
    """Llama's kind (``dummy_prefix``) or Gemma's: ▁ pieces, byte fallback, ``<s>`` in front."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_sentencepiece_json(dummy_prefix)),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )


class ByteTokenizer(PreTrainedTokenizer):
    """ByT5's kind: id = byte + 3, no offsets; ``append_eos`` puts ``</s>`` after every text."""

    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(self, *, append_eos: bool = False, **kwargs: Any) -> None:
        self.append_eos = append_eos
        super().__init__(pad_token="<pad>", eos_token="</s>", unk_token="<unk>", **kwargs)
        self._added_tokens_decoder = {
            index: AddedToken(token, special=True)
            for index, token in enumerate(["<pad>", "</s>", "<unk>"])
        }
        self._added_tokens_encoder = {
            token.content: index for index, token in self._added_tokens_decoder.items()
        }

    @property
    def vocab_size(self) -> int:
        return 256

    def get_vocab(self) -> dict[str, int]:
        return {chr(byte): byte + 3 for byte in range(256)} | dict(self._added_tokens_encoder)

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return [chr(byte) for byte in text.encode("utf-8")]

    def _convert_token_to_id(self, token: str) -> int:
        return ord(token) + 3

    def _convert_id_to_token(self, index: int) -> str:
        return chr(index - 3)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        special = self._added_tokens_encoder
        joined = b"".join(
            token.encode("utf-8") if token in special or ord(token) > 255 else bytes([ord(token)])
            for token in tokens
        )
        return joined.decode("utf-8", errors="ignore")

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        both = token_ids_0 + (token_ids_1 or [])
        return [*both, 1] if self.append_eos else both


def byte_tokenizer(*, append_eos: bool = False) -> ByteTokenizer:
    """A slow tokenizer over bytes, which cannot say where in the text a token lies."""
    return ByteTokenizer(append_eos=append_eos)


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "byte_level_bpe": byte_level_bpe,
    "sentencepiece_bpe": sentencepiece_bpe,
    "sentencepiece_no_prefix": lambda: sentencepiece_bpe(dummy_prefix=False),
    "bytes": byte_tokenizer,
    "bytes_eos": lambda: byte_tokenizer(append_eos=True),
}


# Turns as ChatML writes them, with a system prompt of its own; as Gemma, which trims texts and has
# another name for the model's turns; as Mistral, which puts a space before the answer.
TEMPLATES = {
    "chatml": (
        "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helper from France."
        "<|im_end|>\n{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "gemma": (
        "{{ bos_token }}{% for m in messages %}<|im_start|>"
        "{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
    ),
    "mistral": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} "
        "[/INST]{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    ),
}


def chatting(template: str = "chatml", kind: str = "byte_level_bpe") -> PreTrainedTokenizerBase:
    """A tokenizer with a chat template (of ``TEMPLATES``, or as given) and tokens for its turns."""
    tokenizer = TOKENIZERS[kind]()
    if kind != "bytes":
        turns: Any = ["<|im_start|>", "<|im_end|>"]
        tokenizer.add_special_tokens({"additional_special_tokens": turns})
    tokenizer.chat_template = TEMPLATES.get(template, template)
    return tokenizer
