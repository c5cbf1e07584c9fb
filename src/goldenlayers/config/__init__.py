"""Options of commands that do not stand with their command yet."""

from goldenlayers.commands.options import Role, roles, to_record, whole_number
from goldenlayers.config.edits import EditConfig, EvaluateConfig
from goldenlayers.config.layers import LocateConfig, SweepConfig

__all__ = [
    "EditConfig",
    "EvaluateConfig",
    "LocateConfig",
    "Role",
    "SweepConfig",
    "roles",
    "to_record",
    "whole_number",
]
