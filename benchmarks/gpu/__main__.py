"""A 7B-shaped model on one GPU: memory and seconds of pruning it, recovery speed beside Trainer and peft, latency beside the ideal.

    python -m benchmarks.gpu --parts importance,latency,recovery --model-shape 7b --output FILE
    python -m benchmarks.gpu --device cpu --dtype float32 --model-shape tiny --output FILE     # to try it

Weights are random: neither memory nor speed depends on them. Every row is in the file as soon as it is known; what fails is there
with its error, and the rest goes on. ``run.sh`` runs each part in a process of its own, with a time limit. A call with the same
settings measures again and replaces the rows.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import RESULTS
from benchmarks.gpu import importance, latency, recovery
from benchmarks.gpu.scale import SCALES
from benchmarks.gpu.session import Session
from benchmarks.paper.common import Book, run
from fxprune.commands.common import quiet_libraries
from fxprune.devices import find_device
from fxprune.errors import UsageError, nearest

PARTS: dict[str, Callable[[Session], None]] = {"importance": importance.run, "latency": latency.run, "recovery": recovery.run}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def main(arguments: Sequence[str] | None = None) -> None:
    made = argparse.ArgumentParser("benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--parts", default=",".join(PARTS), metavar="A,B", help="(default: %(default)s)")
    made.add_argument("--model-shape", choices=SCALES, default="7b", help="(default: 7b)")
    made.add_argument("--device", default="cuda", help="(default: cuda)")
    made.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the weights (default: bfloat16)")
    made.add_argument("--peak-tflops", type=float, default=989.4, help="dense bf16 peak of the device (default: 989.4, H100 SXM)")
    made.add_argument("--forward-rows", type=int, default=None, help="rows of a forward pass in training (default: 8 at 7b)")
    made.add_argument("--repeats", type=int, default=5, help="of each latency measurement (default: 5)")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--output", type=Path, default=RESULTS / "gpu.json", help="where the JSON goes (default: %(default)s)")
    a = made.parse_args(arguments)
    chosen = [part.strip() for part in a.parts.split(",")]
    for part in chosen:
        if part not in PARTS:
            raise UsageError(f"unknown part '{part}'; {nearest(part, PARTS)}")
    for name in ("peak_tflops", "forward_rows", "repeats"):
        if (value := getattr(a, name)) is not None and value <= 0:
            raise UsageError(f"--{name.replace('_', '-')} must be above 0, got {value:g}")
    device = find_device(a.device)
    quiet_libraries()
    scale = SCALES[a.model_shape]
    a.threads = torch.get_num_threads()
    book = Book(a.output, a, "gpu")
    book.current["command"] = book.current["command"].replace("benchmarks.paper.gpu", "benchmarks.gpu")
    book.current["gpu"] = gpu(device)
    rows = a.forward_rows or scale.forward_rows
    session = Session(a.model_shape, scale, device, DTYPES[a.dtype], a.seed, a.repeats, a.peak_tflops, rows, book)
    for name in chosen:
        PARTS[name](session)
    print(a.output)


def gpu(device: torch.device) -> dict[str, Any] | None:
    """What is known of it; None for a CPU."""
    if device.type != "cuda":
        return None
    found = torch.cuda.get_device_properties(device)
    return {
        "name": found.name,
        "memory_gib": round(found.total_memory / 2**30, 1),
        "multiprocessors": found.multi_processor_count,
        "capability": f"{found.major}.{found.minor}",
        "cuda": torch.version.cuda,
    }


if __name__ == "__main__":
    raise SystemExit(run(main))
