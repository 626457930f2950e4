"""The torch.compile backend: the dense module stays as it is, the compiled graph computes what a plan leaves of it."""

from .compiler import Backend
from .named import compile_pruned
from .record import GraphRecord

__all__ = ["Backend", "GraphRecord", "compile_pruned"]
