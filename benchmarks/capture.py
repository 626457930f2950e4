"""Time to trace a model and to find its prune groups, beside Torch-Pruning's dependency graph and one forward-backward.

    python -m benchmarks.capture [--torch-pruning DIR] [--repeats 3] [--only smollm2-135m-symbolic ...] [--limit 300]

Each case runs in a process of its own, ``--repeats`` times on a fresh model; reported are every time, their median, and the first
alone (which pays for what torch loads and compiles on first use). No case needs weights: smollm2-135m has random ones, llama-7b and
llama-70b (shapes of Llama-2-7B and -70B) are on the meta device.

- ``SHAPE-symbolic``, ``SHAPE-fixed``: `fxprune.trace` with symbolic and with fixed batch and sequence, then `fxprune.find_groups`.
- ``SHAPE-torch-pruning``: its dependency graph, then the enumeration of all its groups, as its pruners do it.
- ``forward-backward``: 10 x 64 tokens through smollm2-135m's shape, for scale.

A case that is not finished after ``--limit`` seconds is stopped and reported as such. Run it on an otherwise idle machine: about
12 minutes on two cores. Writes benchmarks/results/capture.json.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

from . import common

WEIGHTS = {"smollm2-135m": "random", "llama-7b": "meta", "llama-70b": "meta"}
VARIANTS = ("forward-backward", *(f"{shape}-{how}" for shape in WEIGHTS for how in ("symbolic", "fixed", "torch-pruning")))


def main() -> None:
    parser = common.parser(__doc__, "capture.json")
    parser.add_argument("--limit", type=float, default=300, metavar="SECONDS", help="for one repetition (default: 300)")
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(arguments.child, arguments)))
        return
    result = {**common.header(arguments), "weights": WEIGHTS, "unit": "seconds, median of the runs", "cases": {}}
    for variant in arguments.only or VARIANTS:
        result["cases"][variant] = run(variant, arguments)
        print(variant, result["cases"][variant], flush=True)
    common.write(arguments.output, result)


def run(variant: str, arguments: argparse.Namespace) -> dict[str, Any]:
    if variant.endswith("torch-pruning") and arguments.torch_pruning is None:
        return {"error": f"skipped. {common.INSTALL_HINT}"}
    limit = arguments.limit * arguments.repeats + 60  # importing is not counted
    return common.child("benchmarks.capture", variant, arguments, timeout=limit)


def measure(variant: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One case, in this process."""
    import torch

    torch.set_num_threads(arguments.threads)
    if variant == "forward-backward":
        return _repeat(_forward_backward, arguments, "smollm2-135m")
    shape, how = next((shape, variant.removeprefix(f"{shape}-")) for shape in WEIGHTS if variant.startswith(f"{shape}-"))
    if how == "torch-pruning":
        tp = common.torch_pruning(arguments.torch_pruning)
        return _repeat(lambda model: _torch_pruning(tp, model), arguments, shape)
    return _repeat(lambda model: _fxprune(model, fixed=how == "fixed"), arguments, shape)


def _repeat(once: Callable[[Any], dict[str, float]], arguments: argparse.Namespace, shape: str) -> dict[str, Any]:
    runs = []
    for _ in range(arguments.repeats):
        model = common.SHAPES[shape].build("meta" if WEIGHTS.get(shape) == "meta" else "cpu", arguments.seed)
        gc.collect()
        runs.append(once(model))
    table: dict[str, Any] = {key: round(statistics.median(r[key] for r in runs), 3) for key in runs[0]}
    return {
        **table,
        "first": {k: round(v, 3) for k, v in runs[0].items()},
        "runs": [{k: round(v, 3) for k, v in r.items()} for r in runs],
    }


def _fxprune(model: Any, *, fixed: bool) -> dict[str, float]:
    import torch

    import fxprune

    ids = torch.zeros(2, 16, dtype=torch.long, device=next(model.parameters()).device)
    start = time.perf_counter()
    gm = fxprune.trace(model, {"input_ids": ids}, dynamic_shapes={} if fixed else None)
    middle = time.perf_counter()
    groups = fxprune.find_groups(gm)
    end = time.perf_counter()
    return {"trace": middle - start, "groups": end - middle, "total": end - start, "found": len(groups)}


def _torch_pruning(tp: Any, model: Any) -> dict[str, float]:
    import torch

    device = next(model.parameters()).device
    ids = torch.zeros(2, 16, dtype=torch.long, device=device)
    # A ready mask: without one transformers looks at values, which a meta tensor does not have.
    example = {"input_ids": ids, "attention_mask": torch.zeros(2, 1, 16, 16, device=device)}
    start = time.perf_counter()
    graph = tp.DependencyGraph().build_dependency(model, example_inputs=example)
    middle = time.perf_counter()
    found = list(graph.get_all_groups(ignored_layers=[model.lm_head], root_module_types=[torch.nn.Linear]))
    end = time.perf_counter()
    return {"trace": middle - start, "groups": end - middle, "total": end - start, "found": len(found)}


def _forward_backward(model: Any) -> dict[str, float]:
    import torch

    from fxprune.passes.batches import causal_loss

    generator = torch.Generator().manual_seed(0)
    batch = {"input_ids": torch.randint(0, model.config.vocab_size, (10, 64), generator=generator)}
    causal_loss(model(**batch), batch).backward()  # once to warm up
    model.zero_grad()
    start = time.perf_counter()
    causal_loss(model(**batch), batch).backward()
    return {"total": time.perf_counter() - start}


if __name__ == "__main__":
    main()
