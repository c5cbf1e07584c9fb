"""``golden editors``: what can edit, what it can be told, and the published presets."""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class EditorsConfig:
    """List the editors, their settings and the published presets.

    golden editors
    golden edit smollm2-135m --facts facts.jsonl --method memit --set layers_before 3
    """


def run(config: EditorsConfig) -> int:
    """Print three tables."""
    from goldenlayers.editors import EDITORS, PRESETS, EditSettings
    from goldenlayers.report.terminal import show, table

    del config
    rows = [
        (
            e.name,
            "many" if e.edits_together else "one",
            "yes" if e.needs_statistics else "no",
        )
        for e in EDITORS.values()
    ]
    show(table("Editors", ("name", "facts per solve", "key statistics"), rows))
    texts = _field_texts(EditSettings)
    settings = [
        (f.name, getattr(EditSettings(), f.name), texts.get(f.name, ""))
        for f in dataclasses.fields(EditSettings)
    ]
    show(table("Settings (--set NAME VALUE)", ("name", "default", "what it is"), settings))
    presets = [(name, *p.shape[:2], p.layer) for name, p in PRESETS.items()]
    show(table("Presets", ("name", "layers", "width", "edited layer"), presets))
    return 0


def _field_texts(kind: type) -> dict[str, str]:
    """The string under each field of a dataclass, from its source."""
    import ast

    (body,) = ast.parse(inspect.getsource(kind)).body
    assert isinstance(body, ast.ClassDef)
    found: dict[str, str] = {}
    for field, text in zip(body.body, body.body[1:], strict=False):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(text, ast.Expr)
            and isinstance(text.value, ast.Constant)
        ):
            found[field.target.id] = " ".join(str(text.value.value).split())
    return found
