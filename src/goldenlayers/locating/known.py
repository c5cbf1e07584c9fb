"""Old answers: which ones the model knows, and the model's own answer where the data has none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from goldenlayers.decoding import end_ids, forced_predictions, greedy, settle_joints
from goldenlayers.errors import DataError
from goldenlayers.facts import Fact

if TYPE_CHECKING:
    from goldenlayers.models import Model

# How tokenizers write white space inside their vocabulary: byte-level BPE, SentencePiece.
_BLANK = "ĠĊĉčÂ▁ \t\r\n"


def known_facts(
    model: Model,
    facts: Sequence[Fact],
    *,
    batch_size: int = 32,
    on_dropped: Callable[[list[DataError]], None] | None = None,
) -> list[Fact]:
    """The facts whose old answer is the model's greedy continuation of the prompt.

    ``on_dropped`` is called with the errors of the others.
    """
    asked = [fact for fact in facts if fact.target_old is not None]
    encodings = [model.encoder.fact(fact, fact.target_old or "") for fact in asked]
    found = forced_predictions(model, encodings, batch_size=batch_size)
    known = [
        fact
        for fact, encoding, tokens in zip(asked, encodings, found, strict=True)
        if tuple(tokens) == encoding.answer_ids
    ]
    if on_dropped is not None and len(known) < len(facts):
        kept = {id(fact) for fact in known}
        on_dropped([_unknown(fact) for fact in facts if id(fact) not in kept])
    return known


def _unknown(fact: Fact) -> DataError:
    if fact.target_old is None:
        reason = "no old answer in the data"
        return DataError(f"fact '{fact.id}' has {reason}", reason=reason)
    return DataError(
        f"the model does not answer '{fact.prompt}' with '{fact.target_old}' (fact '{fact.id}')",
        reason="the model does not give the old answer",
    )


def blank_ids(model: Model) -> list[int]:
    """Tokens that show nothing: white space, special and end-of-text tokens."""
    vocabulary = model.tokenizer.get_vocab().items()
    blank = {i for token, i in vocabulary if not token.strip(_BLANK)}
    blank |= {i for token, i in vocabulary if token in ("<0x09>", "<0x0A>", "<0x0D>", "<0x20>")}
    blank |= set(model.tokenizer.all_special_ids) | end_ids(model)
    limit = model.layers.vocab_size
    return sorted(i for i in blank if 0 <= i < limit)


def fill_old_answers(
    model: Model, facts: Sequence[Fact], *, batch_size: int = 32
) -> tuple[list[Fact], list[DataError]]:
    """Fill each missing old answer with the model's own greedy continuation, marked as such.

    The continuation has at most as many tokens as the new answer and ends at a line break. It may
    not begin with white space or the end of the text: instruction-tuned models put a line break
    after a question, and a blank answer would say nothing about the old knowledge. Facts whose
    continuation already is the new answer are no edits: they are returned apart, with the reason.
    The joints of the new old answers are settled.
    """
    missing = [i for i, fact in enumerate(facts) if fact.target_old is None]
    if not missing:
        return list(facts), []
    encoder = model.encoder
    prompts = [encoder.fact(facts[i]) for i in missing]
    wanted = [len(encoder.fact(facts[i], facts[i].target).answer_ids) for i in missing]

    def stop(row: int, new: list[int]) -> bool:
        return len(new) >= wanted[row] or "\n" in model.tokenizer.decode(new)

    continuations = greedy(
        model,
        [p.ids for p in prompts],
        max(wanted),
        batch_size=batch_size,
        stop=stop,
        forbid_first=blank_ids(model),
    )
    filled: dict[int, Fact] = {}
    dropped: list[DataError] = []
    for i, tokens in zip(missing, continuations, strict=True):
        text = str(model.tokenizer.decode(tokens, skip_special_tokens=True))
        answer = text.split("\n")[0].strip()
        try:
            filled[i] = facts[i].with_old(answer)
        except DataError as error:
            dropped.append(
                DataError(
                    f"fact '{facts[i].id}' is no edit: the model's own answer '{answer}' gives "
                    f"this: {error.problem}",
                    field="target_new",
                    reason="the model's own answer is the new one, or none",
                )
            )
    kept = [
        filled.get(i, fact)
        for i, fact in enumerate(facts)
        if fact.target_old is not None or i in filled
    ]
    return settle_joints(model, kept), dropped
