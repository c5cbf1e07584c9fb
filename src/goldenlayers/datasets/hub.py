"""The records of a data set on the hub, by the datasets library (extra ``hub``)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from goldenlayers.datasets.arrow import MOST_ROWS
from goldenlayers.datasets.records import Table
from goldenlayers.errors import UserError, shortened

_USUAL_SPLITS = frozenset({"train", "test", "validation", "valid", "dev", "val"})


def from_hub(address: str) -> Table:
    """The records of a data set on the hub: ``owner/name[:config][:split]``.

    One part after the name is a split if it is called like one (train, test, validation, or a
    slice such as "train[:100]"), and a configuration otherwise. Rows count from 1; the hash is
    over the records, since a hub data set has no one file.

    Raises:
        UserError: the extra ``hub`` is missing, the address is malformed, the data set cannot be
            had, or it has several splits and none was chosen.
    """
    name, config, split = parse_address(address)
    shown = shortened(f"hub:{address}", 200)
    try:
        import datasets as library  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError(
            f"{shown} needs the package 'datasets', which is not installed",
            fix="pip install 'goldenlayers[hub]'",
        ) from None
    try:
        found: Any = library.load_dataset(name, config, split=split)
    except Exception as error:  # the client's errors are many; the user needs the first line
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"the data set '{shortened(name)}' could not be loaded from the hub "
            f"({shortened(first, 200)})",
            expected="hub:owner/name[:config][:split]",
        ) from error
    if isinstance(found, Mapping):
        splits = sorted(map(str, found))
        if len(splits) != 1:
            raise UserError(
                f"{shown} has the splits {shortened(', '.join(splits), 200)}",
                fix=f"Choose one: {shown}:{splits[0] if splits else 'train'}",
            )
        found = found[splits[0]]
    if len(found) > MOST_ROWS:
        raise UserError(
            f"{shown} has {len(found):,} rows",
            expected=f"at most {MOST_ROWS:,}",
            fix=f"Take a part: hub:{shortened(name)}:{split or 'train'}[:1000]",
        )
    rows = tuple((number, dict(record)) for number, record in enumerate(found, 1))
    if not rows:
        raise UserError(f"{shown} is empty", expected="at least one record")
    text = json.dumps([record for _, record in rows], sort_keys=True, default=str)
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    return Table(name, f"hub:{address}", digest, rows)


def parse_address(address: str) -> tuple[str, str | None, str | None]:
    """(name, configuration or None, split or None) of ``owner/name[:config][:split]``."""
    name, _, rest = address.partition(":")
    # A slice has a colon of its own: "train[:100]".
    head, bracket, tail = rest.partition("[")
    config, colon, split = head.partition(":")
    if colon:
        split += bracket + tail
    elif bracket or config in _USUAL_SPLITS:
        config, split = "", config + bracket + tail
    if not name.strip() or ":" in split.partition("[")[0]:
        raise UserError(
            f"'{shortened(f'hub:{address}')}' is not an address of a data set",
            expected="hub:owner/name[:config][:split]",
        )
    return name, config or None, split or None
