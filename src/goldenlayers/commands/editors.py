"""``golden editors``: what can edit, each editor's settings, and the published presets."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from typing import Any

from goldenlayers.config import EditorsConfig


def run(config: EditorsConfig) -> int:
    """Print the editors, the settings of each, and the presets."""
    from goldenlayers.editors import EDITORS, PRESETS, InContext
    from goldenlayers.report.terminal import show, table

    del config
    editors = {name: EDITORS[name] for name in EDITORS}
    rows = [
        (name, "many" if e.edits_together else "one", "yes" if e.needs_statistics else "no")
        for name, e in editors.items()
    ]
    show(table("Editors", ("name", "facts per solve", "key statistics"), rows))
    # A setting is shown once, with all that have it; the same name may say something else there.
    owners: dict[tuple[str, Any, str], list[str]] = {}
    for name, kind in {**editors, InContext.name: InContext}.items():
        texts = _texts(kind)
        for f in dataclasses.fields(kind):
            owners.setdefault((f.name, f.default, texts.get(f.name, "")), []).append(name)
    settings = [
        (setting, default, ", ".join(names), text)
        for (setting, default, text), names in owners.items()
    ]
    columns = ("name", "default", "of", "what it is")
    show(table("Settings (--set NAME VALUE)", columns, settings))
    presets = [(name, *p.shape[:2], p.layer) for name, p in PRESETS.items()]
    show(table("Presets", ("name", "layers", "width", "edited layer"), presets))
    return 0


def _texts(kind: type) -> dict[str, str]:
    """The string under each field of a dataclass and its bases, from their sources."""
    found: dict[str, str] = {}
    for one in reversed([c for c in kind.__mro__ if dataclasses.is_dataclass(c)]):
        try:
            (body,) = ast.parse(inspect.cleandoc("\n" + inspect.getsource(one))).body
        except (OSError, TypeError, SyntaxError, ValueError):  # no source: an editor of others
            continue
        assert isinstance(body, ast.ClassDef)
        for field, text in zip(body.body, body.body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant)
            ):
                found[field.target.id] = " ".join(str(text.value.value).split())
    return found
