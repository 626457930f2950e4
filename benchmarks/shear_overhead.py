"""What LHSPG adds to a training step: seconds of the projection, and of the choice at a period's start, beside the step itself.

    python -m benchmarks.shear_overhead [--shape smollm2-135m] [--tokens 4x512] [--device cpu] [--dtype float32] [--rank 8]
    python -m benchmarks.shear_overhead --shape tiny --tokens 2x16 --repeats 2 --output FILE       # to try it

A Llama of that shape with random weights and peft LoRA in all of its linear layers is trained on random tokens with AdamW (of the
adapters), wrapped by LHSPG: no warm-up, ``--periods`` periods, ratio 0.2. Each training step is timed whole, and inside it the
wrapped optimizer's step; what is left of LHSPG's step is the method's: in most steps the projection of the redundant units, in the
first step of a period also saliency and selection. Medians of the steps of the last period (the most units are zero then) but its
first; what the first steps of periods take longer is ``choice``, and ``share_with_choice_every_50_steps`` counts a fiftieth of it.

Projections are measured one after another, in one process. Writes benchmarks/results/shear_overhead.json.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

from . import common

LIMIT = 0.05
"""The projection may take this share of a training step."""
PROJECTIONS = ("half-space", "linear")


def main() -> None:
    parser = common.parser(__doc__, "shear_overhead.json")
    parser.add_argument("--shape", choices=common.SHAPES, default="smollm2-135m")
    parser.add_argument("--tokens", default="4x512", metavar="SAMPLESxLENGTH", help="of a step (default: %(default)s)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the base weights")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--ratio", type=float, default=0.2)
    parser.add_argument("--periods", type=int, default=2)
    arguments = parser.parse_args()
    result: dict[str, Any] = {
        **common.header(arguments),
        "model": f"Llama, shape of {arguments.shape}, random weights, {arguments.dtype}; LoRA of rank {arguments.rank}",
        "measure": "seconds; share: of the whole training step; period: --repeats steps and the first",
        "limit": LIMIT,
        "projections": {},
    }
    for projection in arguments.only or PROJECTIONS:
        found = measure(projection, arguments)
        result["projections"][projection] = found
        print(projection, found, flush=True)
    common.write(arguments.output, result)


def measure(projection: str, arguments: Any) -> dict[str, Any]:
    """One projection."""
    import torch
    from peft import LoraConfig, get_peft_model

    import fxprune

    torch.set_num_threads(arguments.threads)
    shape, device = common.SHAPES[arguments.shape], torch.device(arguments.device)
    samples, length = map(int, arguments.tokens.split("x"))
    base = shape.build(seed=arguments.seed).to(device, getattr(torch, arguments.dtype))
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model: Any = get_peft_model(base, LoraConfig(r=arguments.rank, target_modules=names, task_type="CAUSAL_LM"))
    generator = torch.Generator().manual_seed(arguments.seed)
    ids = torch.randint(0, shape.vocabulary, (samples, length), generator=generator).to(device)
    gm = fxprune.trace(model, {"input_ids": ids[:, :8]})
    period = arguments.repeats + 1
    optimizer = fxprune.LHSPG(
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4),
        gm,
        fxprune.find_groups(gm),
        ratio=arguments.ratio,
        warmup=0,
        periods=arguments.periods,
        period_steps=period,
        projection=projection,
    )
    clock = Clock(device)
    inner = optimizer.inner.step
    spent: list[float] = []

    def timed(*args: Any, **options: Any) -> Any:
        start = clock.now()
        found = inner(*args, **options)
        spent.append(clock.now() - start)
        return found

    optimizer.inner.step = timed  # type: ignore[method-assign]
    model.train()
    rows: list[tuple[float, float, float]] = []
    model(input_ids=ids, labels=ids).loss.backward()  # libraries warm up
    optimizer.zero_grad()
    while not optimizer.done:
        start = clock.now()
        model(input_ids=ids, labels=ids).loss.backward()
        before = clock.now()
        optimizer.step()
        after = clock.now()
        optimizer.zero_grad()
        rows.append((clock.now() - start, spent[-1], after - before - spent[-1]))
    first = [row for i, row in enumerate(rows) if i % period == 0]
    steady = rows[-period + 1 :]
    whole, wrapped, own = (statistics.median(column) for column in zip(*steady, strict=True))
    choice = statistics.median(row[2] for row in first) - own
    return {
        "step": round(whole, 5),
        "wrapped_optimizer": round(wrapped, 5),
        "projection": round(own, 5),
        "share": round(own / whole, 4),
        "share_of_each_step": [round(row[2] / row[0], 4) for row in steady],
        "choice": round(choice, 5),
        "share_with_choice_every_50_steps": round((own + choice / 50) / (whole + choice / 50), 4),
        "within_limit": own / whole <= LIMIT,
        "removed": round(optimizer.history[-1]["removed"], 4),
    }


class Clock:
    """Seconds, after what was asked of the device is done."""

    def __init__(self, device: Any) -> None:
        self.cuda = device.type == "cuda"

    def now(self) -> float:
        """The time."""
        if self.cuda:
            import torch

            torch.cuda.synchronize()
        return time.perf_counter()


if __name__ == "__main__":
    main()
