"""Text for calibration, recovery and evaluation: sources, templates, examples, batches, and whether two texts overlap."""

from .batches import Batches
from .examples import Examples, join, load_examples
from .overlap import Sketch, check_overlap
from .packing import packs_apart
from .sources import Source, Sources, by_name, parse_sources, rows
from .templates import Example, documents, render, texts, whole_text

__all__ = [
    "Batches",
    "Example",
    "Examples",
    "Sketch",
    "Source",
    "Sources",
    "by_name",
    "check_overlap",
    "documents",
    "join",
    "load_examples",
    "packs_apart",
    "parse_sources",
    "render",
    "rows",
    "texts",
    "whole_text",
]
