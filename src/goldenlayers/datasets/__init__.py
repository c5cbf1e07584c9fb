"""Fact data: the starter facts, one small reader per public format, and our own fields."""

from goldenlayers.datasets.factset import FactSet
from goldenlayers.datasets.fields import Record, Row
from goldenlayers.datasets.formats import FORMATS, Format
from goldenlayers.datasets.jsonl import schema_text, write_jsonl
from goldenlayers.datasets.loading import DatasetInfo, list_datasets, load_facts

__all__ = [
    "FORMATS",
    "DatasetInfo",
    "FactSet",
    "Format",
    "Record",
    "Row",
    "list_datasets",
    "load_facts",
    "schema_text",
    "write_jsonl",
]
