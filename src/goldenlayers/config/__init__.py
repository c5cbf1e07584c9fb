"""One dataclass per command: its fields are the flags, the help, the checks and the saved record.

A field is documented once, in the string under it. Nothing heavy is imported here.
"""

from goldenlayers.commands.options import (
    ApartOptions,
    DataOptions,
    JointOptions,
    ModelOptions,
    Role,
    default_settings,
    from_record,
    refuse_bad_names,
    roles,
    to_record,
    types_of,
    whole_number,
)
from goldenlayers.config.edits import (
    AskConfig,
    EditConfig,
    EditorsConfig,
    EvaluateConfig,
    ExportConfig,
)
from goldenlayers.config.layers import CompareConfig, LocateConfig, SweepConfig
from goldenlayers.config.things import DatasetsConfig, ModelsConfig, RunConfig

__all__ = [
    "ApartOptions",
    "AskConfig",
    "CompareConfig",
    "DataOptions",
    "DatasetsConfig",
    "EditConfig",
    "EditorsConfig",
    "EvaluateConfig",
    "ExportConfig",
    "JointOptions",
    "LocateConfig",
    "ModelOptions",
    "ModelsConfig",
    "Role",
    "RunConfig",
    "SweepConfig",
    "default_settings",
    "from_record",
    "refuse_bad_names",
    "roles",
    "to_record",
    "types_of",
    "whole_number",
]
