"""The questions of an evaluation as token ids: all tokenised once, limits checked; and the held-out
text whose perplexity an edit may change.

The held-out text is the same for every fact, so what one plan has read of it serves the others.

Shapes: D model width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from goldenlayers.decoding import greedy
from goldenlayers.delta.apply import changes_in_force, untouched
from goldenlayers.delta.factors import Changes
from goldenlayers.errors import UserError
from goldenlayers.evaluation.generation import ANSWER_SLACK, FLUENCY_TOKENS
from goldenlayers.evaluation.metrics import Question
from goldenlayers.evaluation.reading import Ids, Pass, Read, Reading, States, read, states_hold
from goldenlayers.evaluation.scoring import Outcome, outcome_of
from goldenlayers.facts import Fact
from goldenlayers.prompts import Joint, plain_words
from goldenlayers.tokens import TooLongError

if TYPE_CHECKING:
    from goldenlayers.delta import Selection
    from goldenlayers.models import Model

_WINDOW = 256  # tokens of one window of the held-out text
_STATE_BYTES = 1 << 28  # for its kept states, beside those of the plan in work


class HeldOut:
    """A held-out text, and what the model has said to it so far.

    The first ``n_tokens`` of the text are read; a ``batch_size`` of None fits to the device.

    Raises:
        UserError: no text, or none that gives two tokens.
    """

    def __init__(
        self, model: Model, text: str | None, n_tokens: int, *, batch_size: int | None = None
    ) -> None:
        self.model, self.batch_size = model, batch_size
        self.windows = windows(model, text, n_tokens)
        self._before: Outcome | None = None
        self._states: States | None = None
        self._under: tuple[tuple[Changes, ...], Outcome] | None = None

    def before(self) -> Outcome:
        """What the untouched model says, whatever deltas are in force; read once and kept."""
        if self._before is None:
            with untouched(self.model):
                states = States(self.model, sum(map(len, self.windows)), _STATE_BYTES)
                reads = self._read([-1], Pass(self.batch_size, states=states, keep=True))
                longest = sorted({window[:-1] for window in self.windows}, key=len)[-2:]
                if states_hold(self.model, states, longest):
                    self._states = states
                self._before = outcome_of(reads)
        return self._before

    def applied(self, first_layer: int = 0) -> Outcome:
        """What the model says with the deltas in force on it now; kept until there are others.

        ``first_layer`` is the first block they change, if that is known.
        """
        now = changes_in_force(self.model)
        if not now:
            return self.before()
        # The same objects: comparing the numbers would cost as much as a pass.
        if self._under is None or list(map(id, self._under[0])) != list(map(id, now)):
            self._under = now, outcome_of(self._read([-1], self._from(first_layer)))
        return self._under[1]

    def selected(
        self, carriers: Collection[int], selection: Selection, first_layer: int = 0
    ) -> dict[int, Outcome]:
        """What the model says with each of some edits of a selection, all in the same passes."""
        places = sorted(set(carriers))
        reads = self._read(places, self._from(first_layer, selection))
        size = len(self.windows)
        return {c: outcome_of(reads[i * size : (i + 1) * size]) for i, c in enumerate(places)}

    def _from(self, first_layer: int, selection: Selection | None = None) -> Pass:
        return Pass(self.batch_size, selection, first_layer, self._states)

    def _read(self, carriers: Collection[int], how: Pass) -> list[Read]:
        """One result per carrier and window."""
        readings = [
            Reading(w[:-1], tuple(range(len(w) - 1)), w[1:], True, carrier)
            for carrier in carriers
            for w in self.windows
        ]
        return read(self.model, readings, how)


def windows(model: Model, text: str | None, n_tokens: int) -> list[Ids]:
    """The text's first tokens in windows; what stands in front of a text (BOS) before each.

    Raises:
        UserError: no text, or none that gives two tokens.
    """
    if not text or not text.strip():
        raise no_text()
    # A whole book need not be tokenised for a page.
    ids, spans = model.encoder.tokens(text[: 16 * n_tokens])
    n_front = next((i for i, span in enumerate(spans) if span != (0, 0)), len(ids))
    front, body = ids[:n_front], ids[n_front:][:n_tokens]
    width = min(_WINDOW, model.encoder.max_length or _WINDOW) - n_front
    parts = [(*front, *body[s : s + width]) for s in range(0, len(body), width)]
    parts = [part for part in parts if len(part) > 1]
    if not parts:
        raise UserError("the held-out text has no tokens to predict")
    return parts


def no_text() -> UserError:
    """What to say where perplexity is asked for without a text."""
    return UserError("perplexity needs a held-out text", fix="Give one with --text FILE")


def continuation(model: Model) -> int:
    """Tokens of its own greedy continuation along which a locality probe without answer is
    compared: in a chat more, where an answer often begins by saying the question again.
    """
    return 24 if model.chat else 3


_SAID = 6  # of these, tokens that the question does not hold
TOO_LONG = "the text is longer than the model's context"


@dataclass(frozen=True, slots=True)
class Spec:
    """One forced text of a question: its answer, the answer's tokens, how many positions are read,
    or which of them.
    """

    answer: str
    targets: Ids
    count: int
    joint: Joint = "auto"
    places: tuple[int, ...] = ()


class Texts:
    """Token ids for the questions.

    Perplexity has no text of its own here, see ``HeldOut``. ``reasons`` says which questions (by
    place) have no text that can be run, and why.
    """

    def __init__(self, model: Model, questions: Sequence[Question], facts: Sequence[Fact]) -> None:
        self.model, self.questions, self.facts = model, questions, facts
        self.reasons: dict[int, str] = {}
        self._prompts: dict[tuple[str, str, Joint], Ids | str] = {}
        self.specs: dict[int, list[Spec]] = {}
        for u, question in enumerate(questions):
            try:
                if question.reason:
                    raise UserError(question.reason)
                self.specs[u] = self._specify(question)
            except UserError as error:
                self.reasons[u] = reason_of(error)

    def _specify(self, question: Question) -> list[Spec]:
        if question.scoring.needs == "held-out":
            return []
        specs = []
        for answer in [a for a in (question.answer, question.other) if a] or [""]:
            joint = self.facts[question.fact].joint_of(question.prompt, answer)
            encoding = self.model.encoder.encode(question.prompt, answer, joint=joint)
            if encoding.n_prompt == 0:
                raise UserError("no token stands before the answer")
            self._prompts[question.prompt, answer, joint] = encoding.ids[: encoding.n_prompt]
            targets = encoding.answer_ids
            specs.append(Spec(answer, targets, max(1, len(targets)), joint))
        return specs

    def continue_open(self, batch_size: int) -> None:
        """Fill locality probes without an answer with the untouched model's own continuation.

        In a chat all of them, as what the data has as the answer seldom begins the model's turn;
        and what is compared are the first tokens that do not say the question again.
        """
        asked, chat = self.questions, self.model.chat
        places = [
            u for u in self.specs if asked[u].scoring.continued and (chat or not asked[u].answer)
        ]
        rows = [self._prompt(self.questions[u].prompt, "", "") for u in places]
        limit, most = self.model.encoder.max_length, continuation(self.model)
        found = greedy(self.model, rows, most, batch_size=batch_size)
        for u, row, ids in zip(places, rows, found, strict=True):
            count = len(ids) + (len(ids) < most)  # the end of the text is a prediction too
            if limit is not None:
                count = max(1, min(count, limit + 1 - len(row)))
            places = self._said(asked[u].prompt, ids, count) if chat else ()
            self.specs[u] = [Spec("", tuple(ids), count, places=places)]

    def _said(self, prompt: str, ids: Sequence[int], count: int) -> tuple[int, ...]:
        """Places of an answer's first tokens that are no part of a word of the question's."""
        asked = plain_words(prompt)
        said = [plain_words(str(self.model.tokenizer.decode([i]))).strip() for i in ids[:count]]
        new = [i for i, word in enumerate(said) if word.isalnum() and word not in asked]
        return tuple(new[:_SAID])

    def readings(
        self, u: int, prefix: str, before: Sequence[Read] = (), carrier: int = -1
    ) -> list[Reading]:
        """The forced readings of a question under an edit, its prompt behind ``prefix``.

        ``before`` is what was read of the untouched model; its own pass has none.

        Raises:
            UserError: no text that can be run; with the reason.
        """
        question = self.questions[u]
        found = []
        for spec in self.specs[u]:
            prompt = self._prompt(question.prompt, spec.answer, prefix, spec.joint)
            # Behind a prefix too the answer has the tokens it has without: positions compare.
            ids = prompt + spec.targets[: spec.count - 1]
            self._fits(len(ids))
            positions = tuple(range(len(prompt) - 1, len(ids)))
            if spec.places:
                positions = tuple(positions[i] for i in spec.places)
            found.append(
                Reading(
                    ids,
                    positions,
                    spec.targets,
                    question.scoring.nll,
                    carrier,
                    before[0].hidden if before and question.scoring.kl else None,
                    keep_hidden=question.scoring.kl and not before,
                    top=before[0].top if before else (),
                    keep_top=question.scoring.left and not before,
                )
            )
        return found

    def open_prompt(self, u: int, prefix: str) -> Ids:
        """The bare prompt for free generation, which gives nothing of the answer away.

        Raises:
            UserError: prompt and generated text do not fit the context.
        """
        prompt = self._prompt(self.questions[u].prompt, "", prefix)
        self._fits(len(prompt) + self.new_tokens(u))
        return prompt

    def new_tokens(self, u: int) -> int:
        """Tokens that may be generated for a question."""
        if self.questions[u].scoring.needs == "sampled":
            return FLUENCY_TOKENS
        return max(self.specs[u][0].count, self._longest_alias(u)) + ANSWER_SLACK

    def _longest_alias(self, u: int) -> int:
        """Tokens of the longest other spelling that would be right, 0 without any."""
        question, sizes = self.questions[u], [0]
        for alias in question.aliases:
            with contextlib.suppress(UserError):  # one that has no tokens is never generated
                sizes.append(len(self.model.encoder.encode(question.prompt, alias).answer_ids))
        return max(sizes)

    def _prompt(self, prompt: str, answer: str, prefix: str, joint: Joint = "auto") -> Ids:
        """Token ids of the prompt behind a prefix, up to where the answer begins."""
        key = (prefix + prompt, answer, joint)
        if key not in self._prompts:
            try:
                encoding = self.model.encoder.encode(prefix + prompt, answer, joint=joint)
                self._prompts[key] = encoding.ids[: encoding.n_prompt]
            except UserError as error:
                self._prompts[key] = reason_of(error)
        found = self._prompts[key]
        if isinstance(found, str):
            raise UserError(found)
        return found

    def _fits(self, length: int) -> None:
        limit = self.model.encoder.max_length
        if limit is not None and length > limit:
            raise UserError(TOO_LONG)


def reason_of(error: UserError) -> str:
    """The kind of problem, in words that are the same for every question that has it."""
    if isinstance(error, TooLongError):
        return TOO_LONG
    found = error.found
    return "the answer has no tokens" if "has no tokens after" in found else found
