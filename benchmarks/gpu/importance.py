"""Part ``importance``: memory and seconds of tracing, grouping, scoring, and of a whole prune, on a model that was never on a CPU.

Memory is the peak of `torch.cuda.max_memory_allocated` within a step, the model's weights included; the target is below 1.25 times
the weights. LLM-Pruner's authors say about 80 GB for LLaMA-7B (issue 18 of their repository).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial

import fxprune
from benchmarks.gpu.meter import measure
from benchmarks.gpu.scale import Scale
from benchmarks.gpu.session import Session
from benchmarks.paper.common import Row
from fxprune.recipes import RECIPES, SETTINGS

TARGET = 1.25
RATIO = 0.2


@dataclass(frozen=True)
class Case:
    """A scoring: a criterion, and the calibration tokens it reads, ``batch_size`` samples at a time."""

    criterion: str
    samples: int
    length: int
    batch_size: int


def cases(scale: Scale) -> list[Case]:
    """LLM-Pruner's calibration, and ours; each once with fewer samples at a time, and so with fewer activations in memory."""
    ours = {**SETTINGS, **RECIPES["default"]}
    criterion, length = ours["criterion"], ours["length"]
    return [
        Case("taylor1", 10, 64, 10),
        Case("taylor1", 10, 64, 5),
        Case("taylor2", 10, 64, 10),  # one sample at a time, whatever the batch
        Case(criterion, scale.samples, length, ours["batch_size"]),
        Case(criterion, scale.samples, length, 2),
    ]


def run(session: Session) -> None:
    """All cases, then the prune."""
    if session.attempt("importance", {"step": "trace"}, partial(_trace, session)) is None:
        return
    for case in cases(session.scale):
        session.attempt("importance", {"step": "score", **asdict(case)}, partial(_score, session, case))
    session.attempt("importance", {"step": "prune", "recipe": "llm-pruner", "ratio": RATIO}, partial(_prune, session))


def weight_bytes(session: Session) -> int:
    """Of the dense model."""
    return sum(p.numel() * p.element_size() for p in session.model.parameters())


def _trace(session: Session) -> Row:
    _, built = measure(session.device, lambda: session.model)
    gm, traced = session.trace
    groups, grouped = measure(session.device, lambda: fxprune.find_groups(gm))
    weights = weight_bytes(session)
    return {
        "parameters": sum(p.numel() for p in session.model.parameters()),
        "groups": len(groups),
        **{name: m.to_json(weights) for name, m in (("build", built), ("trace", traced), ("find_groups", grouped))},
    }


def _score(session: Session, case: Case) -> Row:
    gm, _ = session.trace
    groups = fxprune.find_groups(gm)
    batches = [{"input_ids": part} for part in session.tokens(case.samples, case.length).split(case.batch_size)]
    scores, measured = measure(session.device, lambda: fxprune.score(gm, groups, criterion=case.criterion, calibration=batches))
    found = measured.to_json(weight_bytes(session))
    return {"tokens": case.samples * case.length, "scored_groups": len(scores), **found, **judged(found["peak_over_weights"])}


def judged(ratio: float | None) -> Row:
    """Beside the target."""
    return {"target": TARGET, "met": None if ratio is None else ratio < TARGET}


def _prune(session: Session) -> Row:
    result, measured = measure(session.device, lambda: fxprune.prune(session.model, ratio=RATIO, recipe="llm-pruner"))
    report = result.report
    return {
        **measured.to_json(weight_bytes(session)),
        "removed": round(report.removed, 5),
        "parameters": report.parameters_after,
        "form": result.form,
        "verify_error": report.verify.max_rel_error if report.verify else None,
        "stages": report.seconds,
    }
