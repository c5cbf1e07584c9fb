"""What to try after an edit that could be better."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from goldenlayers.editors import EDITORS
from goldenlayers.editors.base import Clearing

if TYPE_CHECKING:
    from goldenlayers.checking import Check
    from goldenlayers.delta import WeightDelta


def advice_on(found: Check, delta: WeightDelta) -> tuple[str, ...]:
    """What to try next after an edit, none of it what the edit did already."""
    if found.verdict == "did not take":
        return tuple(stronger(delta.settings))
    layer = () if found.verdict == "good" else ("another --layer",)
    moved = found.share("neighbours").failed or found.share("unrelated").failed
    if found.verdict == "narrow" or not moved:
        return layer
    mine = [kind for kind in EDITORS.known() if kind.name in delta.method.split("+")]
    can_clear = any(issubclass(kind, Clearing) for kind in mine)
    parts = delta.settings.get("parts")  # of a sum; of a file that may come from anyone
    each = [one for one in (parts if isinstance(parts, list) else []) if isinstance(one, Mapping)]
    clear = any(one.get("neighbours") for one in (delta.settings, *each))
    if not (can_clear and clear):
        other = can_clear and delta.method != "rome"
        return ("--set neighbours 128" if other else "--method clear-rome", *layer)
    hit = dict.fromkeys(one.name for one in found.worst if one.name)
    names = " ".join(f"'{name}'" for name in list(hit)[:3])
    return (*([f"--clear-of {names}"] if names else []), *layer)


def stronger(settings: Mapping[str, Any]) -> list[str]:
    """What may make an edit take; of its settings, those that are lower."""
    more = {"steps": 50, "clamp": 8}
    lower = [
        f"--set {name} {value}"
        for name, value in more.items()
        if isinstance(now := settings.get(name), int | float) and now < value
    ]
    return ["another --layer", *lower]
