"""Which class loads a checkpoint, and how."""

from __future__ import annotations

from .numbers import Record, part

TRANSFORMERS_FORMS = ("uniform", "per-layer", None)
"""Forms that transformers loads; None is a report of an earlier version, or of a recovery alone."""


def loading_class(record: Record) -> str:
    """The transformers class whose ``from_pretrained`` loads it.

    With widths of its own in every layer that is the auto class which the configuration binds to the modelling file: the model's
    own class would not read that file.
    """
    kind = str(part(record.report, "dense").get("class") or "")
    if record.report.get("form") == "per-layer" and record.auto:
        return record.auto
    return "AutoModelForCausalLM" if not kind or kind.endswith(("ForCausalLM", "LMHeadModel")) else kind


def form_said(record: Record) -> str:
    """What the form means, in a sentence; empty where the report has none."""
    name = loading_class(record)
    said = {
        "uniform": f"a stock transformers class: `{name}.from_pretrained(dir)` loads it, fxprune is not needed",
        "per-layer": "widths of its own in every layer: `fxprune.load(dir)`, or "
        f"`{name}.from_pretrained(dir, trust_remote_code=True)`",
        "module": "a plain module: `fxprune.load(dir, model=dense)`",
        "graph": "the rewritten graph only",
    }
    return said.get(str(record.report.get("form")), "")
