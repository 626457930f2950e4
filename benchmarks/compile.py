"""`torch.compile` with the fxprune backend: is it the rewritten module, is the dense one untouched, and how fast is it?

    python -m benchmarks.compile                  # ten tiny random model families: equality (every prunable group halved)
    python -m benchmarks.compile --smollm2        # and the real SmolLM2-135M (after `make demo`): equality and speed

Equality is of the compiled model and the GraphModule that `fxprune.rewrite` makes of the same plan, as relative errors at sizes
that are compiled for and at new ones, with ``inner="eager"``. Inductor rounds in its own way, so its output on the backend's graphs
is compared with that on the rewritten module (``inductor_errors_between_the_two``); the errors of both against the eager rewritten
module are given beside it (``inductor_errors``, ``inductor_errors_of_the_rewritten``). ``wrong`` counts models with an error above
the tolerance, of the first kind or between the two. Untouched means that a hash of all the dense model's parameters and buffers is
the same.
Speed is prefill with `inner="inductor"`: the backend on the dense model against ``torch.compile`` of the rewritten module, the two
taking turns in one process. It needs an otherwise idle machine; the rest does not. Writes benchmarks/results/compile.json.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fxprune
from benchmarks.common import RESULTS, header, write
from fxprune.backend import Backend
from fxprune.passes.verify import relative_error
from tests.zoo import build, tokens

FAMILIES = ("llama", "qwen3", "gemma2", "phi3", "gpt2", "gpt_neox", "bloom", "opt", "falcon", "mixtral")
TOLERANCE = 1e-4
SHAPES = ((2, 7), (3, 11), (5, 17))


def main() -> None:
    """Measure every family, and the real model if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="torch threads (default: all cores)")
    parser.add_argument("--repeats", type=int, default=15, help="timed runs of each of the two (default: 15)")
    parser.add_argument("--length", type=int, default=128, help="tokens of the timed prompt (default: 128)")
    parser.add_argument("--ratio", type=float, default=0.2, help="share of SmolLM2's parameters to remove (default: 0.2)")
    parser.add_argument("--only", nargs="*", default=FAMILIES, metavar="FAMILY", help="measure only these families")
    parser.add_argument("--smollm2", action="store_true", help="the real SmolLM2-135M too")
    parser.add_argument("--output", type=Path, default=RESULTS / "compile.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for name in ("transformers", "fxprune"):
        logging.getLogger(name).setLevel(logging.ERROR)
    rows = {}
    for name in arguments.only:
        rows[name] = family(name, arguments.seed)
        print(name, rows[name], flush=True)
    result = {**header(arguments), "tolerance": TOLERANCE, "models": rows}
    if arguments.smollm2:
        result["SmolLM2-135M"] = smollm2(arguments)
        print("SmolLM2-135M", result["SmolLM2-135M"], flush=True)
    every = [*rows.values(), *([result["SmolLM2-135M"]] if arguments.smollm2 else [])]
    result["summary"] = {
        "models": len(every),
        "wrong": sum(map(wrong, every)),
        "worst": max(r["worst"] for r in every),
        "dense_changed": sum(not r["dense_untouched"] for r in every),
        "groups_in_plans": sum(r["groups"] for r in every),
        "groups_that_ran_dense": sum(r["ran_dense"] for r in every),
    }
    print(result["summary"])
    write(arguments.output, result)


def wrong(row: dict[str, Any]) -> bool:
    """Whether an error is above the tolerance, or not a number."""
    return not all(error < TOLERANCE for error in [*row["errors"], *row.get("inductor_errors_between_the_two", [])])


def family(name: str, seed: int) -> dict[str, Any]:
    """One tiny model with half of the units of every prunable group removed."""
    model = build(name)
    gm = fxprune.trace(model, {"input_ids": tokens(2, 7)})
    groups = fxprune.find_groups(gm)
    generator = torch.Generator().manual_seed(seed)
    keep = {g.name: torch.randperm(g.size, generator=generator)[: max(g.size // 2, g.least)] for g in groups.values() if g.prunable}
    plan = fxprune.PrunePlan.from_keep(groups, keep)
    small = fxprune.rewrite(gm, plan)
    return equality(model, small, plan, [tokens(*shape, seed=1) for shape in SHAPES], inner="eager")[0]


def equality(
    model: nn.Module, small: nn.Module, plan: fxprune.PrunePlan, batches: list[Tensor], inner: str
) -> tuple[dict[str, Any], Callable[..., Any]]:
    """Relative errors of the compiled dense model against the rewritten module, and the compiled model."""
    torch._dynamo.reset()
    before, backend = fingerprint(model), Backend(plan, inner=inner)
    compiled: Any = torch.compile(model, backend=backend)
    with torch.no_grad():
        errors = [relative_error(small(input_ids=ids).logits, compiled(input_ids=ids, use_cache=False).logits) for ids in batches]
        apart = relative_error(model(input_ids=batches[-1], use_cache=False).logits, small(input_ids=batches[-1]).logits)
    return {
        "worst": max(errors),
        "errors": errors,
        "dense_against_pruned": apart,
        "dense_untouched": fingerprint(model) == before,
        "groups": len(plan.keep),
        "graphs": len(backend.graphs),
        "ran_dense": len({n for g in backend.graphs for n in g.dense}),
    }, compiled


def fingerprint(model: nn.Module) -> str:
    """Of every parameter and buffer, bit for bit."""
    digest = hashlib.sha256()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        digest.update(name.encode() + tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def smollm2(arguments: argparse.Namespace) -> dict[str, Any]:
    """The real model, one width for all layers; also compiled by inductor, and timed."""
    from fxprune.checkpoint.source import load_source
    from fxprune.demo import model_file

    model, _ = load_source(model_file())
    gm = fxprune.trace(model, {"input_ids": torch.zeros(2, 16, dtype=torch.long)})
    groups = fxprune.find_groups(gm)
    plan = fxprune.select(groups, fxprune.score(gm, groups, "l2"), ratio=arguments.ratio, kinds=["kv_heads", "ffn"])
    small = fxprune.rewrite(gm, plan)
    generator = torch.Generator().manual_seed(arguments.seed)
    prompts = [torch.randint(0, 49152, shape, generator=generator) for shape in ((2, 16), (3, 40), (1, arguments.length))]
    found, _ = equality(model, small, plan, prompts, inner="eager")
    by_inductor, compiled = equality(model, small, plan, prompts, inner="inductor")
    rewritten: Any = torch.compile(small)
    rounding = {"inductor_errors": by_inductor["errors"], **compiled_alike(compiled, rewritten, small, prompts)}
    return {**found, "ratio": arguments.ratio, **rounding, **speed(compiled, rewritten, model, prompts, arguments.repeats)}


def compiled_alike(compiled: Any, rewritten: Any, small: nn.Module, batches: list[Tensor]) -> dict[str, list[float]]:
    """Relative errors of the compiled rewritten module against the eager one, and of the backend's output against its."""
    with torch.no_grad():
        runs = [(ids, rewritten(input_ids=ids).logits) for ids in batches]
        return {
            "inductor_errors_of_the_rewritten": [relative_error(small(input_ids=ids).logits, logits) for ids, logits in runs],
            "inductor_errors_between_the_two": [
                relative_error(logits, compiled(input_ids=ids, use_cache=False).logits) for ids, logits in runs
            ],
        }


def speed(compiled: Any, rewritten: Any, model: nn.Module, prompts: list[Tensor], repeats: int) -> dict[str, Any]:
    """Median milliseconds for the last prompt of both, in turns; the other prompts only let both compile for symbolic sizes."""
    runs: dict[str, Callable[[Tensor], Any]] = {
        "backend": lambda ids: compiled(input_ids=ids, use_cache=False),
        "rewritten": lambda ids: rewritten(input_ids=ids),
        "dense_eager": lambda ids: model(input_ids=ids, use_cache=False),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    with torch.no_grad():
        for run in runs.values():
            for ids in [*prompts, prompts[-1]]:
                run(ids)
        for turn in range(repeats):
            for name in list(runs) if turn % 2 else reversed(runs):
                start = time.perf_counter()
                runs[name](prompts[-1])
                seconds[name].append(time.perf_counter() - start)
    medians = {name: round(1000 * statistics.median(s), 2) for name, s in seconds.items()}
    turns = [b / r for b, r in zip(seconds["backend"], seconds["rewritten"], strict=True)]
    return {
        "milliseconds": medians,
        "backend_over_rewritten": round(medians["backend"] / medians["rewritten"], 4),
        "backend_over_rewritten_median_of_turns": round(statistics.median(turns), 4),
        "runs_ms": {name: [round(1000 * s, 2) for s in values] for name, values in seconds.items()},
    }


if __name__ == "__main__":
    main()
