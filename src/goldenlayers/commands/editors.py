"""``golden editors``: what can edit, each editor's settings, and the published presets."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from goldenlayers.commands.help import field_texts


@dataclass(frozen=True, kw_only=True)
class EditorsConfig:
    """List the editors, their settings and the published presets.

    golden editors
    golden edit smollm2-135m --facts facts.jsonl --method memit --set layers_before 3
    """


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
        texts = field_texts(kind)
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
