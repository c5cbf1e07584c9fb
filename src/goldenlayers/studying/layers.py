"""The layers of a study in words that hold for models of any depth."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from goldenlayers.errors import UserError
from goldenlayers.locating import published_layer
from goldenlayers.records import short


def layer_words(value: Any, where: str) -> tuple[str, ...]:
    """The words of ``layers`` in a study's file: "all", "every N", or numbers, shares ("1/6"),
    "published", "middle".

    Raises:
        UserError: a word that can be no layer; it begins with ``where``.
    """
    words = [str(one) for one in value] if isinstance(value, list) else [str(value)]
    several = words[0] == "all" or re.fullmatch(r"every [1-9][0-9]{0,3}", words[0]) if words else 0
    for word in words:
        share = re.fullmatch(r"([0-9]{1,4})/([1-9][0-9]{0,3})", word)
        right = int(share[1]) <= int(share[2]) if share else re.fullmatch(r"-?[0-9]{1,4}", word)
        if not (right or word in ("published", "middle") or (several and len(words) == 1)):
            raise UserError(
                f"{where}: {short(word)} is no layer",
                expected="all, every 2, or a list of numbers and shares of the depth such as 1/6",
            )
    if not words:
        raise UserError(f"{where}: there are none", expected="at least one layer, or all")
    return tuple(words)


def layers_named(words: Sequence[str], n_layers: int) -> dict[str, int]:
    """Layers by the words they are named with; of words for one layer the first stands.

    A share of the depth is rounded as "published" is: L layers times the share, to the next whole
    number, the last layer at most.

    Raises:
        UserError: a number that the model has no layer of.
    """
    if words[0] == "all" or words[0].startswith("every "):
        step = 1 if words[0] == "all" else int(words[0].removeprefix("every "))
        return {str(layer): layer for layer in range(0, n_layers, step)}
    found: dict[str, int] = {}
    for word in words:
        if word == "published":
            layer = published_layer(n_layers)
        elif word == "middle":
            layer = n_layers // 2
        elif "/" in word:
            above, below = map(int, word.split("/"))
            layer = min(n_layers - 1, round(above / below * n_layers))
        else:
            layer = int(word)
            if not -n_layers <= layer < n_layers:
                raise UserError(
                    f"layer {layer} is asked for, and the model has {n_layers} layers",
                    expected=f"0 to {n_layers - 1}, or a share such as 1/6",
                )
            layer = range(n_layers)[layer]
        if layer not in found.values():
            found[word] = layer
    return found
