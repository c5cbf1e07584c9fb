"""Several edits as one: what contradicts is refused, what is there twice is told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from goldenlayers.delta import WeightDelta
from goldenlayers.errors import UserError


def added_up(deltas: Sequence[WeightDelta], names: Sequence[str]) -> tuple[WeightDelta, list[str]]:
    """The sum of edits of one model, and warnings about facts that several of them edit.

    Args:
        deltas: at least one.
        names: what to call each in messages, such as its folder.

    Raises:
        UserError: two edits answer one prompt differently, or were made on different weights.
    """
    first: dict[tuple[str, str], tuple[int, Mapping[str, Any]]] = {}
    doubled: list[str] = []
    for number, delta in enumerate(deltas):
        for fact in delta.facts:
            if fact.get("undone"):
                continue
            subject, prompt, target = (_plain(fact.get(k)) for k in ("subject", "prompt", "target"))
            where, earlier = first.setdefault((subject, prompt), (number, fact))
            if where == number:
                continue
            if _plain(earlier.get("target")) != target:
                raise UserError(
                    f"two of the edits contradict: '{prompt}' → '{_plain(earlier.get('target'))}' "
                    f"in {names[where]}, and '{target}' in {names[number]}",
                    fix="Leave one of them out",
                )
            doubled.append(f"'{prompt}' → '{target}' in {names[where]} and {names[number]}")
    total = deltas[0]
    for delta in deltas[1:]:
        total = total + delta
    if not doubled:
        return total, []
    some = "; ".join(doubled[:3]) + (f"; and {len(doubled) - 3} more" if doubled[3:] else "")
    many = "1 fact is" if len(doubled) == 1 else f"{len(doubled)} facts are"
    return total, [
        f"{many} edited by more than one of the runs, so the change is there twice ({some}). "
        "Leave one of the runs out."
    ]


def _plain(value: Any) -> str:
    return " ".join(str(value or "").split())
