"""Goldenlayers: find the golden layer of a language model, edit its knowledge there, and measure.

    import goldenlayers as gl

    model = gl.load("smollm2-135m")
    ranking = gl.locate(model, gl.load_facts("starter", limit=200))
    print(ranking.golden_layer)

Names are imported when they are first used: ``import goldenlayers`` itself loads no torch.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from goldenlayers.checking import Check, check
    from goldenlayers.choosing import Chosen, choose_edits
    from goldenlayers.datasets import FactSet, load_facts
    from goldenlayers.delta import WeightDelta
    from goldenlayers.editors import (
        AlphaEdit,
        ClearRome,
        Editing,
        Editor,
        Emmet,
        FtL,
        FtM,
        InContext,
        Memit,
        Pmet,
        Rome,
        RRome,
        edit,
        edit_each,
    )
    from goldenlayers.errors import DataError, UserError
    from goldenlayers.evaluation import Evaluation, evaluate
    from goldenlayers.export import export_gguf, export_gguf_merged, export_merged, export_peft
    from goldenlayers.facts import Fact, Probe
    from goldenlayers.locating import CMA, LGA, Fixed, Race, Saliency, Transfer, locate
    from goldenlayers.locating.ranking import LayerRanking
    from goldenlayers.models import LayerMap, Model, load
    from goldenlayers.progress import Progress
    from goldenlayers.statistics import KeyStatistics, key_statistics
    from goldenlayers.studying import Study, StudyResult, study
    from goldenlayers.sweeping import Sweep, Workers, sweep

    __version__: str

# Module → the public names that live in it.
_ROOMS = {
    "checking": "Check check",
    "choosing": "Chosen choose_edits",
    "datasets": "FactSet load_facts",
    "delta": "WeightDelta",
    "editors": "AlphaEdit ClearRome Editing Editor Emmet FtL FtM InContext Memit Pmet "
    "RRome Rome edit edit_each",
    "errors": "DataError UserError",
    "evaluation": "Evaluation evaluate",
    "export": "export_gguf export_gguf_merged export_merged export_peft",
    "facts": "Fact Probe",
    "locating": "CMA Fixed LGA Race Saliency Transfer locate",
    "locating.ranking": "LayerRanking",
    "models": "LayerMap Model load",
    "progress": "Progress",
    "statistics": "KeyStatistics key_statistics",
    "studying": "Study StudyResult study",
    "sweeping": "Sweep Workers sweep",
}
_HOMES = {name: room for room, names in _ROOMS.items() for name in names.split()}

__all__ = [
    "CMA",
    "LGA",
    "AlphaEdit",
    "Check",
    "Chosen",
    "ClearRome",
    "DataError",
    "Editing",
    "Editor",
    "Emmet",
    "Evaluation",
    "Fact",
    "FactSet",
    "Fixed",
    "FtL",
    "FtM",
    "InContext",
    "KeyStatistics",
    "LayerMap",
    "LayerRanking",
    "Memit",
    "Model",
    "Pmet",
    "Probe",
    "Progress",
    "RRome",
    "Race",
    "Rome",
    "Saliency",
    "Study",
    "StudyResult",
    "Sweep",
    "Transfer",
    "UserError",
    "WeightDelta",
    "Workers",
    "__version__",
    "check",
    "choose_edits",
    "edit",
    "edit_each",
    "evaluate",
    "export_gguf",
    "export_gguf_merged",
    "export_merged",
    "export_peft",
    "key_statistics",
    "load",
    "load_facts",
    "locate",
    "study",
    "sweep",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use; the version is the installed package's."""
    if name == "__version__":
        value: Any = _version()
    elif name in _HOMES:
        value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    setattr(sys.modules[__name__], name, value)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("goldenlayers")
    except PackageNotFoundError:  # run from a source tree that was never installed
        return "0+unknown"
