"""Peak memory of the importance pass, beside a forward-backward that frees each gradient, whole gradients and Torch-Pruning.

    python -m benchmarks.memory [--torch-pruning DIR] [--repeats 3] [--only fxprune-taylor1 ...]

Every variant runs in a process of its own on a Llama of SmolLM2-135M's shape (random weights, float32; ``--shape`` and ``--dtype``
say otherwise), with 10 x 64 random tokens
(LLM-Pruner's calibration) and with 1 x 64, where activations are small beside gradients, as they are in larger models. What is
reported is resident memory (VmHWM of /proc/self/status, reset just before the measured part): its peak, and the peak
above what was resident before, with the model (and its trace) in memory and one tiny forward-backward done, so that libraries are
loaded. Freed blocks go back to the system at once (MALLOC_MMAP_THRESHOLD_), so resident memory is memory in use.

Variants, all with the loss of `fxprune.score` and no optimiser:

- ``freed-traced``, ``freed-eager``: forward-backward, each parameter's gradient dropped by a post-accumulate hook; on the traced
  GraphModule and on the eager model. The reference.
- ``whole-traced``, ``whole-eager``: forward-backward, gradients kept.
- ``fxprune-*``: `fxprune.score` with that criterion. ``taylor2`` and ``taylor_mixed`` take one sample at a time.
- ``torch-pruning-taylor``: whole gradient, then GroupTaylorImportance over all groups of Torch-Pruning's dependency graph.

Needs Linux. About 30 s a run on two cores. Writes benchmarks/results/memory.json.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from . import common

TOKENS = ("10x64", "1x64")
CRITERIA = ("taylor1", "taylor2", "taylor_vector", "taylor_mixed", "kfac")
VARIANTS = (
    "freed-traced",
    "freed-eager",
    "whole-traced",
    "whole-eager",
    *(f"fxprune-{c}" for c in CRITERIA),
    "torch-pruning-taylor",
)
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": f"{1 << 17}", "MALLOC_TRIM_THRESHOLD_": f"{1 << 17}"}
"""glibc hands blocks of 128 KiB or more back as soon as they are freed, so that resident memory is memory in use."""
LIMIT = 1.25
"""The importance pass may take so many times the memory of the reference (on the same traced module)."""


def main() -> None:
    parser = common.parser(__doc__, "memory.json")
    parser.add_argument("--shape", choices=common.SHAPES, default="smollm2-135m")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights (default: float32)")
    parser.add_argument("--tokens", nargs="+", default=TOKENS, metavar="SAMPLESxLENGTH")
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(arguments.child, arguments)))
        return
    result = {
        **common.header(arguments),
        "model": f"Llama, shape of {arguments.shape}, random weights, {arguments.dtype}",
        "measure": "MiB of resident memory (VmHWM); above_model: peak less what was resident just before; over_weights: "
        "the weights and that, over the weights",
        "tokens": {},
    }
    for tokens in arguments.tokens:
        variants = {}
        for variant in arguments.only or VARIANTS:
            runs = [run(variant, tokens, arguments) for _ in range(arguments.repeats)]
            variants[variant] = runs[0] if "error" in runs[0] else summary(runs)
            print(tokens, variant, variants[variant], flush=True)
        result["tokens"][tokens] = {"variants": variants, "ratio_to_freed_traced": ratios(variants)}
    common.write(arguments.output, result)


def run(variant: str, tokens: str, arguments: argparse.Namespace) -> dict[str, Any]:
    if variant.startswith("torch-pruning") and arguments.torch_pruning is None:
        return {"error": f"skipped. {common.INSTALL_HINT}"}
    extra = ["--shape", arguments.shape, "--dtype", arguments.dtype, "--tokens", tokens]
    return common.child("benchmarks.memory", variant, arguments, timeout=1800, extra=extra, environment=ALLOCATOR)


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        **{key: round(statistics.median(r[key] for r in runs), 1) for key in ("weights", "before", "peak", "above_model")},
        "over_weights": round(1 + statistics.median(r["above_model"] / r["weights"] for r in runs), 3),
        "above_model_of_each_run": [r["above_model"] for r in runs],
    }


def ratios(variants: dict[str, Any]) -> dict[str, Any]:
    """Memory of each variant over that of the reference: above the model, and as a whole."""
    reference = variants.get("freed-traced", {})
    if "above_model" not in reference:
        return {}
    measured = {n: v for n, v in variants.items() if "above_model" in v}
    table: dict[str, Any] = {
        n: {key: round(v[key] / reference[key], 3) for key in ("above_model", "peak")}
        for n, v in measured.items()
        if v is not reference
    }
    ours = [v["above_model"] for n, v in table.items() if n.startswith("fxprune-")]
    return {**table, "limit": LIMIT, "within_limit": bool(ours) and max(ours) <= LIMIT}


def measure(variant: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One variant, in this process."""
    import torch

    import fxprune
    from fxprune.passes.batches import causal_loss

    torch.set_num_threads(arguments.threads)
    shape = common.SHAPES[arguments.shape]
    model = shape.build(seed=arguments.seed, dtype=arguments.dtype)
    samples, length = map(int, arguments.tokens[0].split("x"))
    generator = torch.Generator().manual_seed(arguments.seed)
    batch = {"input_ids": torch.randint(0, shape.vocabulary, (samples, length), generator=generator)}
    small = {"input_ids": torch.randint(0, shape.vocabulary, (2, 8), generator=generator)}
    eager = variant.endswith("eager") or variant.startswith("torch-pruning")
    module = model if eager else fxprune.trace(model, small)

    def backward(data: dict[str, Any], *, free: bool) -> None:
        hooks = [p.register_post_accumulate_grad_hook(_free) for p in module.parameters()] if free else []
        causal_loss(module(**data), data).backward()
        for hook in hooks:
            hook.remove()

    work: Callable[[], object]
    if variant.startswith("fxprune-"):
        criterion, groups = variant.removeprefix("fxprune-"), fxprune.find_groups(module)
        work = partial(fxprune.score, module, groups, criterion=criterion, calibration=[batch])
    elif variant.startswith("torch-pruning"):
        importance, groups_of = _torch_pruning(model, small, arguments.torch_pruning)

        def work() -> object:
            backward(batch, free=False)
            return [importance(group) for group in groups_of()]

    else:
        work = partial(backward, batch, free=variant.startswith("freed"))
    backward(small, free=True)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    work()
    peak = _resident("VmHWM")
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
    return {"weights": round(weights, 1), "before": before, "peak": peak, "above_model": round(peak - before, 1)}


def _free(parameter: Any) -> None:
    parameter.grad = None


def _torch_pruning(model: Any, example: dict[str, Any], directory: Path | None) -> tuple[Any, Callable[[], Any]]:
    import torch

    tp = common.torch_pruning(directory)
    graph = tp.DependencyGraph().build_dependency(model, example_inputs=example)
    options = {"ignored_layers": [model.lm_head], "root_module_types": [torch.nn.Linear]}
    return tp.importance.GroupTaylorImportance(), lambda: graph.get_all_groups(**options)


def _resident(key: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:"))
    return round(int(line.split()[1]) / 1024, 1)


if __name__ == "__main__":
    main()
