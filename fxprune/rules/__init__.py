"""One rule per operator family; importing this package registers them all."""

from . import indexing, linear, pointwise, reductions, views
from .registry import Call, Resize, Rule, Value, registered, rule, rule_for

__all__ = [
    "Call",
    "Resize",
    "Rule",
    "Value",
    "indexing",
    "linear",
    "pointwise",
    "reductions",
    "registered",
    "rule",
    "rule_for",
    "views",
]
