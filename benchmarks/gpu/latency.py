"""Part ``latency``: prefill and decode of the dense model and of models pruned by 20 % and 50 %, beside the ideal.

The ideal is time in proportion to the work: operations for prefill, bytes for decode (`benchmarks.gpu.arithmetic`); the target is
90 % of that speed-up. Measured twice: ``eager``, stock transformers with its growing cache as `fxprune eval --latency` does it, and
``graph``, without waiting for Python (`benchmarks.gpu.replay`); the target is judged by the second. Which units went makes no
difference, so they are chosen by magnitude; widths are the same in all layers.
"""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import Any

import fxprune
from benchmarks.gpu.arithmetic import Gain, Work
from benchmarks.gpu.meter import free
from benchmarks.gpu.replay import measure_replayed
from benchmarks.gpu.session import Session
from benchmarks.paper.common import Row
from fxprune.api import PruneResult
from fxprune.evaluation import measure_latency

TARGET = 0.9
RATIOS = (0.2, 0.5)
WAYS = ("eager", "graph")


def run(session: Session) -> None:
    """The dense model, then each pruned one, at every batch size in both ways."""
    dense: dict[tuple[int, str], Row | None] = {}
    for batch, way in product(session.scale.batches, WAYS):
        work = partial(_times, session, session.model, batch, way)
        dense[batch, way] = session.attempt("latency", {"ratio": 0.0, "batch": batch, "way": way}, work)
    for ratio in RATIOS:
        kept: list[PruneResult] = []
        for batch, way in product(session.scale.batches, WAYS):
            pruned = partial(_pruned, session, ratio, kept, batch, way, dense[batch, way])
            session.attempt("latency", {"ratio": ratio, "batch": batch, "way": way}, pruned)
        kept.clear()
        free(session.device)


def _pruned(session: Session, ratio: float, kept: list[PruneResult], batch: int, way: str, dense: Row | None) -> Row:
    if not kept:
        recipe = {"recipe": "magnitude", "multiple": session.scale.multiple}
        gm, _ = session.trace
        kept.append(fxprune.prune(session.model, ratio, recipe=recipe, graph=gm, inputs=session.example))
    report = kept[0].report
    facts = {"removed": round(report.removed, 5), "form": kept[0].form, "widths": _widths(report.widths)}
    found = _times(session, kept[0].model, batch, way)
    return {**facts, **found, **({} if dense is None else against(dense, found))}


def _widths(widths: dict[str, list[int]]) -> dict[str, list[int]]:
    """[before, after] of the first layer's groups; the others are alike."""
    return {name: sizes for name, sizes in widths.items() if ".0." in name}


def _times(session: Session, model: Any, batch: int, way: str) -> Row:
    free(session.device)
    scale, work = session.scale, Work.of(model)
    options = {"new_tokens": scale.new_tokens, "repeats": session.repeats}
    if way == "eager":
        found = measure_latency(model, prompt=scale.prompt, batch=batch, seed=session.seed, **options).to_json()
    else:
        found = measure_replayed(model, session.tokens(batch, scale.prompt), **options)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "prompt": scale.prompt,
        **options,
        "prefill_flops": work.prefill_flops(batch, scale.prompt),
        "decode_bytes": work.decode_bytes(batch, scale.prompt + scale.new_tokens),
        **{name: round(found[name], 3) for name in ("prefill_ms", "decode_ms")},
    }


def against(dense: Row, pruned: Row) -> Row:
    """The gains of both, and whether they meet the target."""
    pairs = {"prefill": ("prefill_ms", "prefill_flops"), "decode": ("decode_ms", "decode_bytes")}
    gains = {name: Gain.of((dense[time], pruned[time]), (dense[done], pruned[done])) for name, (time, done) in pairs.items()}
    met = all(gain.share >= TARGET for gain in gains.values())
    return {"gain": {name: vars(gain) for name, gain in gains.items()}, "target": TARGET, "met": met}
