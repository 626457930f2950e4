"""Part ``recovery``: LoRA on a model pruned by 20 %, `fxprune.recover` beside plain transformers Trainer and peft.

Both train the same pruned model in the same process, one after the other, on the same random examples with the same LoRA (r 8,
alpha 16, dropout 0.05, all seven projections), optimizer and precision, about as many real tokens in an optimizer step, and no more
tokens in a forward pass. Tokens per second count no padding and no warm-up. The target is 1.3 times the plain Trainer. Which units
went makes no difference to speed: LLM-Pruner's recipe with magnitudes, so that no gradient is needed.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

import fxprune
from benchmarks.gpu import plain
from benchmarks.gpu.arithmetic import Work, mean_context, utilisation
from benchmarks.gpu.examples import Setting, settings
from benchmarks.gpu.meter import Measured, free, measure
from benchmarks.gpu.pace import LORA, WARM, Pace
from benchmarks.gpu.session import Session
from benchmarks.paper.common import Row
from fxprune.errors import FxPruneError
from fxprune.recovery.adapters import twin
from fxprune.recovery.result import RecoveryReport

TARGET = 1.3
RATIO = 0.2
ATTEMPTS = 3


def run(session: Session) -> None:
    """Prune, then both settings."""
    kept: list[Any] = []

    def prune() -> Row:
        result = fxprune.prune(session.model, RATIO, recipe="llm-pruner", criterion="l2")
        kept.append(result.model)
        return {"removed": round(result.report.removed, 5), "form": result.form, "stages": result.report.seconds}

    if session.attempt("recovery", {"setting": "the model"}, prune) is None:
        return
    session.forget()  # both sides train with the pruned model alone in memory
    for number, name in enumerate(("full", "alpaca")):
        session.attempt("recovery", {"setting": name}, partial(_compare, session, kept[0], number))


def _compare(session: Session, model: nn.Module, number: int) -> Row:
    """Both sides, with half the rows in a forward pass where memory runs out on either."""
    rows = session.forward_rows
    for attempt in range(ATTEMPTS):
        setting = settings(session.scale, rows, WARM + session.scale.steps, session.seed)[number]
        try:
            return _both(session, model, setting)
        except (torch.OutOfMemoryError, FxPruneError) as error:
            if rows == 1 or attempt == ATTEMPTS - 1 or not _out_of_memory(error):
                raise
            rows //= 2
            print(f"out of memory: again with {rows} rows in a forward pass", flush=True)
        free(session.device)
    raise AssertionError("the last attempt returns or raises")


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)


def _both(session: Session, model: nn.Module, setting: Setting) -> Row:
    bf16 = session.dtype == torch.bfloat16
    options: dict[str, Any] = {"bf16": bf16, "seed": session.seed}
    pace = Pace(session.device, session.scale.steps)
    report, took = measure(session.device, lambda: _recover(model, setting, pace, **options))
    flops = Work.of(model).training_flops(report.trained_parameters, mean_context(setting.examples.lengths.tolist()))

    def side(pace: Pace, tokens: list[int], took: Measured, loss: float, trained: int) -> Row:
        found = pace.to_json(tokens)
        used = utilisation(found["tokens_per_second"], flops, session.peak_tflops)
        facts = {
            "model_flops_utilisation": float(f"{used:.4g}"),
            "peak_bytes": took.peak,
            "loss": round(loss, 4),
            "trained": trained,
        }
        return {**found, **facts}

    own = side(pace, report.history["tokens"], took, report.history["loss"][-1], report.trained_parameters)
    own |= {"forward_rows": setting.forward_rows, "step_rows": setting.rows, "choices": report.choices}
    print(f"fxprune.recover: {own['tokens_per_second']:,.0f} tokens/s", flush=True)
    pace = Pace(session.device, session.scale.steps)
    done, took = measure(session.device, lambda: plain.train(twin(model), setting, pace, **options))
    other = side(pace, done.tokens, took, done.loss, done.trained)
    other |= {"forward_examples": setting.forward_examples, "accumulate": setting.accumulate}
    print(f"Trainer: {other['tokens_per_second']:,.0f} tokens/s", flush=True)
    ratio = own["tokens_per_second"] / other["tokens_per_second"]
    return {
        "examples": "random tokens, " + ("lengths of Alpaca" if setting.name == "alpaca" else "every row full"),
        "mean_length": round(setting.examples.tokens / len(setting.examples), 1),
        "row": session.scale.row,
        "lora": LORA,
        "precision": "bf16 autocast" if bf16 else "fp32",
        "flops_per_token": round(flops),
        "peak_tflops": session.peak_tflops,
        "fxprune": own,
        "trainer": other,
        "speedup": round(ratio, 4),
        "target": TARGET,
        "met": ratio >= TARGET,
    }


def _recover(model: nn.Module, setting: Setting, pace: Pace, *, bf16: bool, seed: int) -> RecoveryReport:
    def watch(what: str, done: int, total: int) -> None:
        if what.startswith("recovery"):
            pace.step(done)

    result = fxprune.recover(
        model,
        setting.examples,
        progress=watch,
        **LORA,
        schedule="linear",
        warmup=0,
        epochs=1000,
        max_steps=pace.steps,
        batch_size=setting.rows,
        micro_batch_size=setting.forward_rows,
        cutoff=setting.cutoff,
        length=setting.row,
        packing="on",
        precision="bf16" if bf16 else "fp32",
        gradient_checkpointing="off",
        validation_samples=0,
        seed=seed,
    )
    return result.report
