"""Exactness: every prunable group pruned to random units, alone and all at once, against the masked dense model.

    python -m benchmarks.exactness                  # tiny random models of every family in tests/zoo.py, tied and untied
    python -m benchmarks.exactness --smollm2        # and the real SmolLM2-135M (after `make demo` has installed it), ~3 min more

Writes benchmarks/results/exactness.json. Nothing is timed, so the machine need not be idle.
"""

from __future__ import annotations

import argparse
import logging
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

import fxprune
from benchmarks.common import RESULTS, header, write
from fxprune.groups import PruneGroup
from tests.zoo import ZOO, build, tokens

TOLERANCE = 1e-4


def measure(model: nn.Module, inputs: dict[str, Tensor], seed: int, repeats: int) -> dict[str, Any]:
    """Worst relative errors over groups pruned alone and over all at once.

    Args:
        model: A causal or masked LM.
        inputs: What is run; the trace is made with other sizes.
        seed: Of the kept units.
        repeats: Random choices of units for each.
    """
    gm = fxprune.trace(model, {"input_ids": tokens(2, 7)})
    groups = fxprune.find_groups(gm)
    free = [g for g in groups.values() if g.prunable]
    generator = torch.Generator().manual_seed(seed)

    def some(group: PruneGroup) -> Tensor:
        count = int(torch.randint(group.least, group.size, (1,), generator=generator))
        return torch.randperm(group.size, generator=generator)[:count]

    def error(keep: dict[str, Tensor]) -> float:
        plan = fxprune.PrunePlan.from_keep(groups, keep)
        return fxprune.verify(gm, fxprune.rewrite(gm, plan), plan, inputs).max_rel_error

    alone = [error({g.name: some(g)}) for g in free for _ in range(repeats)]
    together = [error({g.name: some(g) for g in free}) for _ in range(repeats)]
    return {
        "groups": dict(Counter(g.kind for g in free)),
        "pinned": {g.name: g.reason for g in groups.values() if not g.prunable},
        "checked": len(alone) + len(together),
        "worst_alone": max(alone),
        "worst_together": max(together),
        "wrong": sum(not e < TOLERANCE for e in alone + together),
    }


def main() -> None:
    """Measure every family, and the real model if asked."""
    parser = argparse.ArgumentParser(description="exactness over model families")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=2, help="random choices of kept units for each group")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--smollm2", action="store_true", help="the real SmolLM2-135M too")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    rows = {}
    for name in ZOO:
        for tied in (True, False):
            label = f"{name}, {'tied' if tied else 'untied'}"
            rows[label] = measure(build(name, tied=tied), {"input_ids": tokens(3, 11, seed=1)}, arguments.seed, arguments.repeats)
            print(label, rows[label]["worst_alone"], rows[label]["worst_together"], flush=True)
    if arguments.smollm2:
        from fxprune.checkpoint.source import load_source
        from fxprune.demo import model_file

        model, _ = load_source(model_file())
        rows["SmolLM2-135M"] = measure(model, {"input_ids": tokens(2, 16, seed=1)}, arguments.seed, 1)
        print("SmolLM2-135M", rows["SmolLM2-135M"]["worst_alone"], rows["SmolLM2-135M"]["worst_together"], flush=True)
    summary = {
        "families": len(ZOO),
        "checks": sum(r["checked"] for r in rows.values()),
        "wrong": sum(r["wrong"] for r in rows.values()),
        "worst": max(max(r["worst_alone"], r["worst_together"]) for r in rows.values()),
        "tolerance": TOLERANCE,
    }
    print(summary)
    write(RESULTS / "exactness.json", {**header(arguments), "summary": summary, "models": rows})


if __name__ == "__main__":
    main()
