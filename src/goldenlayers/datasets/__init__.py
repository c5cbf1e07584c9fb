"""Fact data: the starter facts, one small reader per public format, and our own fields."""

from goldenlayers.datasets.factset import FactSet
from goldenlayers.datasets.jsonl import schema_text, write_jsonl
from goldenlayers.datasets.loading import DatasetInfo, list_datasets, load_facts

__all__ = [
    "DatasetInfo",
    "FactSet",
    "list_datasets",
    "load_facts",
    "schema_text",
    "write_jsonl",
]
