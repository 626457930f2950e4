"""Memory of a step of LHSPG: base weights, adapters, their optimizer, activations; no dense gradient.

    python -m benchmarks.shear_memory [--rows smollm2-135m,float32,4x512 llama-7b,bfloat16,1x2048] [--device cuda] [--rank 8]

For each row (a Llama's shape, the dtype of its base weights, samples x tokens) the step of a LoRA training without LHSPG is
*computed*: its operators run on fake tensors, which have sizes and no contents, and the bytes of all tensors that live at one time
are counted. Rows that take less than four fifths of what is free on the device are also *measured*, with random weights and LHSPG
around AdamW (ratio 0.2): a step of warm-up, the one that begins a period (saliency and selection), and one of shrinking. On a CPU
the same count is made of the real tensors; on CUDA it is ``torch.cuda.max_memory_allocated``. ``over_computed`` is what LHSPG adds,
and what the account leaves out. ``dense_gradients`` is what a gradient of every base weight would add; a step that leaves one fails
here.

Writes benchmarks/results/shear_memory.json. MiB throughout.
"""

from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fxprune

from . import common

ROWS = ("smollm2-135m,float32,4x512", "smollm2-135m,bfloat16,4x512", "llama-7b,bfloat16,1x2048")
NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LIMIT = 1.1
"""A measured peak may be so many times the computed one."""
ROOM = 0.8
"""Of what is free on a device, the most that a row may take to be measured."""
MIB = 2**20


@dataclass(frozen=True)
class Row:
    """One model and batch."""

    shape: common.Shape
    dtype: torch.dtype
    samples: int
    length: int

    @classmethod
    def read(cls, text: str) -> Row:
        """``smollm2-135m,float32,4x512``."""
        shape, dtype, tokens = text.split(",")
        samples, length = map(int, tokens.split("x"))
        return cls(common.SHAPES[shape], getattr(torch, dtype), samples, length)

    def build(self, device: str, rank: int, seed: int) -> nn.Module:
        """The shape with adapters of all linear layers, in training mode."""
        base = self.shape.build(device, seed, str(self.dtype).removeprefix("torch."))
        config = LoraConfig(r=rank, target_modules=list(NAMES), task_type="CAUSAL_LM")
        return get_peft_model(base, config, low_cpu_mem_usage=device == "meta").train()


class Live(TorchDispatchMode):
    """Counts the bytes of the tensors that operators made and that still live; a storage counts once."""

    def __init__(self, held: Any = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.known: dict[int, Any] = {}
        self.now = self.peak = 0
        for tensor in held:
            self.add(tensor)

    def add(self, tensor: Tensor) -> None:
        """Count a tensor's storage for as long as it lives."""
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self.known:
            return

        def gone(_: Any) -> None:
            self.now -= size
            del self.known[key]

        self.known[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self.add(tensor)
        return made


def main() -> None:
    parser = common.parser(__doc__, "shear_memory.json")
    parser.add_argument("--rows", nargs="+", default=ROWS, metavar="SHAPE,DTYPE,TOKENS", help="(default: %(default)s)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rank", type=int, default=8)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    result: dict[str, Any] = {**common.header(arguments), "measure": "MiB of live tensors", "limit": LIMIT, "rows": {}}
    for text in arguments.rows:
        row = Row.read(text)
        found = computed(row, arguments.rank)
        if found["peak"] < ROOM * free(torch.device(arguments.device)):
            found["measured"] = measured(row, arguments)
            found["over_computed"] = round(max(found["measured"].values()) / found["peak"], 4)
            found["within_limit"] = found["over_computed"] <= LIMIT
        result["rows"][text] = found
        print(text, found, flush=True)
    common.write(arguments.output, result)


def free(device: torch.device) -> float:
    """MiB that are free on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / MIB
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) / 1024


def computed(row: Row, rank: int) -> dict[str, Any]:
    """The second step of AdamW over the adapters (its state is there by then), without contents."""
    model = row.build("meta", rank, seed=0)
    base = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    adapters = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    with FakeTensorMode():
        hollow(model)
        ids = torch.zeros(row.samples, row.length, dtype=torch.long)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4)
        with Live((*model.parameters(), *model.buffers(), ids)) as live:
            for _ in range(2):
                resting, live.peak = live.now, live.now
                loss = model(input_ids=ids, labels=ids).loss
                held = live.now - resting
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                del loss
    return {
        **{name: round(size / MIB, 1) for name, size in (("base_weights", base), ("adapters", adapters))},
        "adapters_with_gradients_and_moments": round(4 * adapters / MIB, 1),
        "activations": round(held / MIB, 1),
        "dense_gradients": round(base / MIB, 1),
        "peak": round(live.peak / MIB, 1),
    }


def hollow(model: nn.Module) -> None:
    """Give a model of the meta device fake tensors of the CPU in place of its parameters and buffers, tied where they were."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    empty = torch.empty(tensor.shape, dtype=tensor.dtype)
                    trained = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if trained else empty
                tensors[name] = made[id(tensor)]  # type: ignore[assignment]


def measured(row: Row, arguments: Any) -> dict[str, float]:
    """The peak of each kind of step, with contents."""
    device = torch.device(arguments.device)
    model = row.build(arguments.device, arguments.rank, arguments.seed)
    generator = torch.Generator().manual_seed(arguments.seed)
    ids = torch.randint(0, row.shape.vocabulary, (row.samples, row.length), generator=generator).to(device)
    gm = fxprune.trace(model, {"input_ids": ids[:, :8]})
    optimizer = fxprune.LHSPG(
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4),
        gm,
        fxprune.find_groups(gm),
        ratio=0.2,
        warmup=2,
        periods=1,
        period_steps=2,
    )
    gc.collect()
    live = Live((*model.parameters(), *model.buffers(), ids))
    found = {}
    with live:
        for what in ("first", "warm-up", "begin of a period", "shrinking"):
            live.peak = live.now
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            if any(p.grad is not None for p in model.parameters() if not p.requires_grad):
                raise AssertionError("a base weight has a gradient")
            optimizer.zero_grad()
            found[what] = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else live.peak
    del found["first"]  # the optimizer's state is made in it
    return {what: round(size / MIB, 1) for what, size in found.items()}


if __name__ == "__main__":
    main()
