"""Goldenlayers: find the golden layer, edit knowledge there, measure what changed."""
__version__="0.1.0"
