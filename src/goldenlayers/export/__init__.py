"""Handing an edit on to where models are served: a LoRA adapter for ``peft`` and vLLM, one for
llama.cpp, or a whole merged checkpoint; each with a model card.
"""

from goldenlayers.export.adding import added_up
from goldenlayers.export.card import read_check, write_card
from goldenlayers.export.llama_cpp import export_gguf, export_gguf_merged, mergeable
from goldenlayers.export.merged import export_merged, whole_dtype
from goldenlayers.export.peft import PeftExport, export_peft
from goldenlayers.export.places import refuse_place

__all__ = [
    "PeftExport",
    "added_up",
    "export_gguf",
    "export_gguf_merged",
    "export_merged",
    "export_peft",
    "mergeable",
    "read_check",
    "refuse_place",
    "whole_dtype",
    "write_card",
]
