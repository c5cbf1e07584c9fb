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
    from goldenlayers.datasets import FactSet, load_facts
    from goldenlayers.delta import WeightDelta
    from goldenlayers.editors import EditSettings, edit, edit_each
    from goldenlayers.errors import DataError, UserError
    from goldenlayers.evaluation import Evaluation, evaluate
    from goldenlayers.export import export_merged, export_peft
    from goldenlayers.facts import Fact, Probe
    from goldenlayers.locating import CMA, LGA, Fixed, Saliency, Transfer, locate
    from goldenlayers.locating.ranking import LayerRanking
    from goldenlayers.models import LayerMap, Model, load
    from goldenlayers.racing import VerifiedChoice, verify
    from goldenlayers.statistics import KeyStatistics, key_statistics

    __version__: str

# Public name → the module it lives in.
_HOMES = {
    "CMA": "locating",
    "DataError": "errors",
    "EditSettings": "editors",
    "Evaluation": "evaluation",
    "Fact": "facts",
    "FactSet": "datasets",
    "Fixed": "locating",
    "KeyStatistics": "statistics",
    "LGA": "locating",
    "LayerMap": "models",
    "LayerRanking": "locating.ranking",
    "Model": "models",
    "Probe": "facts",
    "Saliency": "locating",
    "Transfer": "locating",
    "UserError": "errors",
    "VerifiedChoice": "racing",
    "WeightDelta": "delta",
    "edit": "editors",
    "edit_each": "editors",
    "evaluate": "evaluation",
    "export_merged": "export",
    "export_peft": "export",
    "key_statistics": "statistics",
    "load": "models",
    "load_facts": "datasets",
    "locate": "locating",
    "verify": "racing",
}

__all__ = [
    "CMA",
    "LGA",
    "DataError",
    "EditSettings",
    "Evaluation",
    "Fact",
    "FactSet",
    "Fixed",
    "KeyStatistics",
    "LayerMap",
    "LayerRanking",
    "Model",
    "Probe",
    "Saliency",
    "Transfer",
    "UserError",
    "VerifiedChoice",
    "WeightDelta",
    "__version__",
    "edit",
    "edit_each",
    "evaluate",
    "export_merged",
    "export_peft",
    "key_statistics",
    "load",
    "load_facts",
    "locate",
    "verify",
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
