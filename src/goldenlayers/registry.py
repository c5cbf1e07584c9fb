"""Things that have a name: editors, layer methods, metrics, dataset formats; ours and others'.

A package adds its own by ``register``, or by an entry point, which needs no import by the user:

    [project.entry-points."goldenlayers.editors"]
    my-editor = "my_package:MyEditor"
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar

from goldenlayers.errors import UserError, near_matches
from goldenlayers.shown import shown

T = TypeVar("T")


class Registry(Generic[T]):
    """Names and what they stand for, in the order of registration; installed packages come last.

    Installed packages are looked up once. Nothing of one is imported before its name is asked for,
    or all things are (``values``).

    Args:
        kind: what is named, in words ("editor").
        group: of the entry points ("goldenlayers.editors").
        ours: names and things to begin with; no installed package can take these names.
    """

    def __init__(self, kind: str, group: str, ours: Iterable[tuple[str, T]] = ()) -> None:
        self.kind, self.group = kind, group
        self._known: dict[str, T] = dict(ours)
        self._broken: dict[str, UserError] = {}

    def register(self, name: str, thing: T, *, replace: bool = False) -> T:
        """Add ``thing``; returns it.

        Raises:
            UserError: the name is taken, unless ``replace`` is set.
        """
        if name in self and not replace:
            raise UserError(
                f"there is {self.kind} '{name}' already", fix="Choose another name, or replace=True"
            )
        self._known[name] = thing
        return thing

    def unregister(self, name: str) -> None:
        """Take a registered thing out again; nothing happens if there is none."""
        self._known.pop(name, None)

    def refresh(self) -> None:
        """Look again at which packages are installed, when the registry is used next."""
        self.__dict__.pop("_installed", None)
        self._broken.clear()

    def __contains__(self, name: object) -> bool:
        return name in self._known or name in self._installed

    def __iter__(self) -> Iterator[str]:
        yield from {**self._known, **self._installed}

    def __len__(self) -> int:
        return len({**self._known, **self._installed})

    def __getitem__(self, name: str) -> T:
        """What ``name`` stands for.

        Raises:
            UserError: unknown, with near matches; or the package that brings it cannot be imported.
        """
        if name not in self._known:
            if name not in self._installed:
                raise UserError(f"unknown {self.kind} '{name}'", fix=near_matches(name, self))
            self._known[name] = self._imported(self._installed[name])
        return self._known[name]

    def known(self) -> tuple[T, ...]:
        """The things at hand: what is registered or was asked for; imports nothing."""
        return tuple(self._known.values())

    def values(self) -> tuple[T, ...]:
        """All things. One whose package cannot be imported is left out, with a warning, once."""
        found = []
        for name in self:
            broken = name in self._broken
            try:
                found.append(self[name])
            except UserError as error:
                if not broken:
                    warnings.warn(shown(str(error)), RuntimeWarning, stacklevel=2)
        return tuple(found)

    @cached_property
    def _installed(self) -> dict[str, EntryPoint]:
        return {point.name: point for point in entry_points(group=self.group)}

    def _imported(self, point: EntryPoint) -> T:
        if point.name not in self._broken:
            try:
                return point.load()
            except Exception as error:
                package = point.dist.name if point.dist else point.module
                self._broken[point.name] = UserError(
                    f"the {self.kind} '{point.name}' of the package '{package}' cannot be "
                    f"imported: {type(error).__name__}: {error}",
                    fix=f"Mend or remove the package {package}",
                )
        raise self._broken[point.name]
