"""The held-out text whose perplexity an edit may change: read once per state of the weights.

It is the same text for every fact, so what one plan has read of it serves the others.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from goldenlayers.delta.apply import Changes, changes_in_force, untouched
from goldenlayers.errors import UserError
from goldenlayers.evaluation.reading import Ids, Pass, Read, Reading, States, read, states_hold
from goldenlayers.evaluation.scoring import Outcome, outcome_of

if TYPE_CHECKING:
    from goldenlayers.delta import Selection
    from goldenlayers.models.model import Model

_WINDOW = 256  # tokens of one window of the held-out text
_STATE_BYTES = 1 << 28  # for its kept states, beside those of the plan in work


class HeldOut:
    """A held-out text, and what the model has said to it so far.

    Args:
        model: a loaded model.
        text: the text.
        n_tokens: how many tokens of it.
        batch_size: rows per batch; None fits it to the device.

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
        if self._under is None or not _same(self._under[0], now):
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


def _same(old: tuple[Changes, ...], new: tuple[Changes, ...]) -> bool:
    # The same objects: comparing the numbers would cost as much as a pass.
    return len(old) == len(new) and all(a is b for a, b in zip(old, new, strict=True))


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
