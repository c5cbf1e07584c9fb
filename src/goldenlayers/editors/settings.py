"""The editors' settings: one set of defaults for every model family.

Step sizes and bounds are relative to the model's own norms, so they need no file per model.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from goldenlayers.errors import UserError, check_number

# The least and the most of what is counted; more would only fill the memory, or never end.
_COUNTS = {
    "steps": (1, 100_000),
    "prefixes": (0, 1_000),
    "prefix_tokens": (1, 1_000),
    "layers_before": (0, 1_000),
    "demonstrations": (0, 1_000),
}
_MAY_BE_ZERO = ("kl_factor", "weight_decay", "stop_loss", "emmet_lambda")
_LARGEST = 1e12  # of the others


@dataclass(frozen=True, kw_only=True)
class EditSettings:
    """What the editors can be told. Each field names the editors that read it."""

    steps: int = 25
    """Most optimisation steps per fact (all but in-context)."""

    lr: float = 0.25
    """Length of a step as a share of the clean value's length (rome, r-rome, memit, emmet,
    alphaedit, pmet)."""

    ft_lr: float = 0.02
    """ft-l, ft-m: size of a step per weight, as a share of the matrix's root mean square."""

    lr_absolute: bool = False
    """Take lr, ft_lr and epsilon as they stand, per coordinate, as published settings do."""

    clamp: float = 4.0
    """Longest change of a value, in lengths of the clean value (the locate-then-edit editors)."""

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

    layers_before: int = 0
    """memit, pmet, emmet, alphaedit: spread the edit over this many more layers, ending with the
    chosen one."""

    memit_lambda: float = 0.1
    """memit, pmet: weight of what is kept, in MLP widths (a mean key of the text weighs one)."""

    memit_lambda_absolute: bool = False
    """memit, pmet: take memit_lambda in tokens of the statistics' text, as published (15000)."""

    emmet_lambda: float = 0.0
    """emmet: how far the equality may give way; 0 holds it exactly."""

    null_space: float = 0.1
    """alphaedit: the directions that may be edited hold this share of the text's key energy."""

    null_space_absolute: bool = False
    """alphaedit: take null_space as an absolute eigenvalue, as published."""

    l2: float = 0.1
    """alphaedit: weight of the update's size, as a share of the text's mean squared key."""

    l2_absolute: bool = False
    """alphaedit: take l2 in squared key units, as published (10)."""

    epsilon: float = 0.1
    """ft-l: most any weight may change, as a share of the matrix's root mean square."""

    prompt_last: bool = False
    """ft-l: predict every token of the answer from the prompt's last position, as published."""

    demonstrations: int = 8
    """in-context: worked examples put before the prompt."""

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if f.type == "bool":
                if not isinstance(value, bool):
                    raise UserError(f"{f.name} is {value!r}", expected="true or false")
            elif f.type == "int":
                check_number(f.name, value, *_COUNTS[f.name])
            else:
                above = f.name not in _MAY_BE_ZERO
                check_number(f.name, value, 0, _LARGEST, whole=False, above=above)
        if not self.null_space_absolute and self.null_space > 1:
            raise UserError(
                f"null_space is {self.null_space}",
                expected="a share of the text's key energy, at most 1",
                fix="For an eigenvalue, as published, also set null_space_absolute",
            )

    @property
    def of_values(self) -> tuple[float | int | bool, ...]:
        """The settings that the value optimisation reads: with these equal, so is its result."""
        return (
            self.steps,
            self.lr,
            self.lr_absolute,
            self.clamp,
            self.kl_factor,
            self.weight_decay,
            self.block_norm,
            self.stop_loss,
            self.prefixes,
            self.prefix_tokens,
        )

    def replace(self, **changes: float | int | bool) -> EditSettings:
        """A copy with some fields changed.

        Raises:
            UserError: an unknown field, with near matches.
        """
        from goldenlayers.errors import near_matches

        names = {f.name for f in dataclasses.fields(self)}
        for name in changes:
            if name not in names:
                raise UserError(f"unknown setting '{name}'", fix=near_matches(name, names))
        return dataclasses.replace(self, **changes)
