"""What every editor is: a frozen dataclass of its own settings, that turns facts into a delta.

Step sizes and bounds are relative to the model's own norms, so one set of defaults serves every
model family and there is no file per model.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from goldenlayers.delta import WeightDelta
from goldenlayers.errors import UserError, check_number
from goldenlayers.facts import Fact

if TYPE_CHECKING:
    from goldenlayers.editors.editing import Editing

# The least and the most of what is counted; more would only fill the memory, or never end.
_COUNTS = {
    "steps": (1, 100_000),
    "prefixes": (0, 1_000),
    "prefix_tokens": (1, 1_000),
    "layers_before": (0, 1_000),
    "demonstrations": (0, 1_000),
    "neighbours": (0, 10_000),
}
_ABOVE_ZERO = (
    "lr",
    "ft_lr",
    "clamp",
    "memit_lambda",
    "null_space",
    "l2",
    "epsilon",
    "clear_weight",
)
_NOT_NEGATIVE = ("kl_factor", "weight_decay", "stop_loss", "emmet_lambda")
_LARGEST = 1e12  # of all other numbers


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings under a name, each a bool, a whole number or a number with a default.

    Raises:
        UserError: a value of another kind than the default, or out of its range.
    """

    name: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value, kind = getattr(self, f.name), type(f.default)
            if kind is bool:
                if not isinstance(value, bool):
                    raise UserError(f"{f.name} is {value!r}", expected="true or false")
            elif kind is int:
                check_number(f.name, value, *_COUNTS.get(f.name, (-_LARGEST, _LARGEST)))
            elif kind is float:
                above = f.name in _ABOVE_ZERO
                low = 0 if above or f.name in _NOT_NEGATIVE else -_LARGEST
                check_number(f.name, value, low, _LARGEST, whole=False, above=above)

    def to_json(self) -> dict[str, Any]:
        """The settings by name."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, kw_only=True)
class ValueSearch(Settings):
    """Settings of the value search: see :func:`goldenlayers.editors.values.optimise_values`."""

    steps: int = 20
    """Most optimisation steps per fact."""

    adam: bool = False
    """Steps of Adam, as published, which take two to three times as many as quasi-Newton steps."""

    lr: float = 0.25
    """With adam: length of a step as a share of the clean value's length."""

    lr_absolute: bool = False
    """With adam: take lr as it stands, per coordinate, as published settings do."""

    clamp: float = 4.0
    """Longest change of a value, in lengths of the clean value."""

    kl_factor: float = 0.0625
    """Weight of keeping what the model says of the subject, the KL term at "{subject} is a"."""

    weight_decay: float = 1e-3
    """Weight of the change's length against the clean value's length, squared."""

    block_norm: bool = False
    """Count clamp and weight_decay against the length of the block's output at the lookup token, as
    published for memit, emmet and alphaedit, in place of the MLP's output."""

    stop_loss: float = 0.05
    """A fact is done when its loss is below this."""

    prefixes: int = 5
    """Texts sampled from the model that are put before the prompt, beside the bare prompt."""

    prefix_tokens: int = 8
    """Tokens of each sampled text."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("lr", "lr_absolute"):
            if not self.adam and getattr(self, name) != getattr(ValueSearch, name):
                raise UserError(
                    f"{name} is for steps of Adam", fix=f"Set adam true, too, or leave {name} out"
                )

    @property
    def of_values(self) -> tuple[float | int | bool, ...]:
        """What the value search reads: with these equal, so is its result."""
        return tuple(getattr(self, f.name) for f in dataclasses.fields(ValueSearch))


@dataclass(frozen=True, kw_only=True)
class Clearing(Settings):
    """Settings of editors that can stay clear of other names: see :mod:`.clearing`.

    Not a part of :class:`ValueSearch`: the values found are the same with and without.
    """

    neighbours: int = 0
    """Stay clear of so many names, those of the package's pool that are nearest to the subject."""

    clear_weight: float = 10.0
    """What each name to stay clear of weighs: alone, it gets 1 + this times less of the edit."""


@dataclass(frozen=True, kw_only=True)
class Editor(Settings, ABC):
    """An editor: facts in, a :class:`WeightDelta` out; the model is never changed.

    Attributes:
        name: what it is called by, and what its deltas say they were made by.
        needs_statistics: whether it reads the key statistics of its layers.
        edits_together: whether it can write many facts in one solve.
        race_depths: shares of the depth at which a race of layers tries it, beside the published
            depth (docs/results/golden-layers.md has the evidence).
        carries_over: whether a layer that one kind of facts chose is no harm to another kind.
    """

    needs_statistics: ClassVar[bool] = False
    edits_together: ClassVar[bool] = False
    race_depths: ClassVar[tuple[float, ...]] = (1 / 3, 2 / 3)
    carries_over: ClassVar[bool] = True

    def layers(self, layer: int) -> list[int]:
        """The layers that an edit at ``layer`` writes to, ascending."""
        return [layer]

    def each(self, work: Editing, facts: Sequence[Fact]) -> list[WeightDelta]:
        """One delta per fact, each made on the model as it is."""
        return [self.together(work, [fact]) for fact in facts]

    @abstractmethod
    def together(self, work: Editing, facts: Sequence[Fact]) -> WeightDelta:
        """One delta that holds all facts, made at ``work.layer``; at least one fact.

        An editor with ``edits_together`` False is never given several.
        """


def needed_layers(editor: Editor, layers: Sequence[int]) -> list[int]:
    """The layers whose key statistics edits at ``layers`` need, ascending; none where the editor
    reads none.
    """
    if not editor.needs_statistics:
        return []
    return sorted({one for layer in layers for one in editor.layers(layer)})
