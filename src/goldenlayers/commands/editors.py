"""``golden editors``: what can edit, what it can be told, and the published presets."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from goldenlayers.commands.help import field_texts


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
    texts = field_texts(EditSettings)
    settings = [
        (f.name, getattr(EditSettings(), f.name), texts.get(f.name, ""))
        for f in dataclasses.fields(EditSettings)
    ]
    show(table("Settings (--set NAME VALUE)", ("name", "default", "what it is"), settings))
    presets = [(name, *p.shape[:2], p.layer) for name, p in PRESETS.items()]
    show(table("Presets", ("name", "layers", "width", "edited layer"), presets))
    return 0
