"""The joints of prompts and answers that the characters leave open: settled, recorded and told."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from goldenlayers.commands.shared import unfinished_settings
from goldenlayers.shown import say

if TYPE_CHECKING:
    from goldenlayers.decoding import Settled
    from goldenlayers.facts import Fact
    from goldenlayers.models.model import Model

T = TypeVar("T", bound=Any)


def settle(config: T, model: Model, *sets: Sequence[Fact] | None) -> tuple[T, list[list[Fact]]]:
    """The facts with their joints settled, and the config that holds what the model decided.

    Each of ``sets`` is settled (None gives no facts). What the config or an unfinished run at its
    ``out`` has decided already is not decided again; anything new is said.
    """
    from goldenlayers.decoding import joints_record, settle_joints

    new: dict[Settled, None] = {}
    recorded = config.joints or unfinished_settings(config).get("joints")
    found = [
        settle_joints(
            model,
            facts or (),
            recorded=recorded if isinstance(recorded, Mapping) else None,
            on_settled=lambda some: new.update(dict.fromkeys(some)),
        )
        for facts in sets
    ]
    if new:
        say(joints_told(list(new)))
    record = {name: joints for facts in found for name, joints in joints_record(facts).items()}
    return dataclasses.replace(config, joints=record), found


def joints_told(settled: Sequence[Settled]) -> str:
    """What the model decided about the joints, with the clearest example of each form."""
    parts = []
    for joint, what in (("none", "no space"), ("space", "a space")):
        mine = [one for one in settled if one.joint == joint]
        if mine:
            one = max(mine, key=lambda one: abs(one.none - one.space))
            factor = math.exp(min(abs(one.none - one.space), 700.0))
            times = f"{factor:.0f}" if factor >= 10 else f"{factor:.1f}"
            few = f"{len(mine)} times, as in " if len(settled) > 1 else ""
            parts.append(
                f"{what} {few}between {_end(one.prompt)!r} and {_begin(one.answer)!r} "
                f"({times if factor < 1e6 else 'a million or more'} times as likely)"
            )
    return (
        "Where the characters leave open whether a space stands between prompt and answer, the "
        f"model decides: {'; '.join(parts)}. --joint space or none fixes it."
    )


def _end(text: str) -> str:
    return text if len(text) <= 30 else f"…{text[-29:]}"


def _begin(text: str) -> str:
    return text if len(text) <= 30 else f"{text[:29]}…"
