"""Things that have a name: editors, layer methods, metrics, dataset formats; ours and others'.

A package adds its own by ``register``, or by an entry point, which needs no import by the user:

    [project.entry-points."goldenlayers.editors"]
    my-editor = "my_package:MyEditor"
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar

from goldenlayers.errors import UserError, near_matches

T = TypeVar("T")


class Registry(Generic[T]):
    """Names and what they stand for, in the order of registration; others' packages come last.

    Nothing is imported from an installed package before its name, or all of them, are asked for.

    Args:
        kind: what is named, in a word ("editor").
        group: of the entry points ("goldenlayers.editors").
    """

    def __init__(self, kind: str, group: str) -> None:
        self.kind, self.group = kind, group
        self._known: dict[str, T] = {}

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

    def __contains__(self, name: object) -> bool:
        return name in self._known or name in self._installed()

    def __iter__(self) -> Iterator[str]:
        yield from [*self._known, *(n for n in self._installed() if n not in self._known)]

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __getitem__(self, name: str) -> T:
        """What ``name`` stands for.

        Raises:
            UserError: unknown, with near matches; or the package that brings it cannot be imported.
        """
        if name not in self._known:
            installed = self._installed()
            if name not in installed:
                raise UserError(f"unknown {self.kind} '{name}'", fix=near_matches(name, self))
            self._known[name] = self._imported(installed[name])
        return self._known[name]

    def _installed(self) -> dict[str, EntryPoint]:
        return {point.name: point for point in entry_points(group=self.group)}

    def _imported(self, point: EntryPoint) -> T:
        try:
            return point.load()
        except Exception as error:
            package = point.dist.name if point.dist else point.module
            raise UserError(
                f"the {self.kind} '{point.name}' of the package '{package}' cannot be imported: "
                f"{type(error).__name__}: {error}",
                fix=f"Mend or remove the package {package}",
            ) from error
