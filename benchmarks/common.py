"""What the benchmarks share: model shapes, facts about the machine, measured child processes, JSON results."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
TORCH_PRUNING = "1.6.1"

INSTALL_HINT = (
    f"Torch-Pruning is measured if it is installed in a directory of its own: python -m pip install torch-pruning=={TORCH_PRUNING} "
    "--no-deps --target DIR, then --torch-pruning DIR"
)


@dataclass(frozen=True)
class Shape:
    """A Llama's sizes; weights are random, since neither memory nor tracing depends on their values."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocabulary: int
    tied: bool

    def build(self, device: str = "cpu", seed: int = 0, dtype: str = "float32") -> Any:
        """A ``LlamaForCausalLM`` of this shape, seeded, in evaluation mode; made in its dtype from the start."""
        import torch
        from transformers import AutoModelForCausalLM, LlamaConfig

        config = LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.ffn,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            vocab_size=self.vocabulary,
            tie_word_embeddings=self.tied,
            use_cache=False,
        )
        torch.manual_seed(seed)
        with torch.device(device):
            model: Any = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
        model.eval()
        return model


SHAPES = {
    s.name: s
    for s in (
        Shape("smollm2-135m", 30, 576, 9, 3, 64, 1536, 49152, True),
        Shape("llama-7b", 32, 4096, 32, 32, 128, 11008, 32000, False),
        Shape("llama-70b", 80, 8192, 64, 8, 128, 28672, 32000, False),
        Shape("tiny", 2, 48, 6, 2, 8, 64, 101, True),  # to try the scripts
    )
}


def parser(doc: str | None, output: str) -> argparse.ArgumentParser:
    """The options that every benchmark takes."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--repeats", type=int, default=3, help="runs of each variant; the median is reported (default: 3)")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="torch threads (default: all cores)")
    made.add_argument("--only", nargs="+", default=None, metavar="VARIANT", help="measure only these")
    made.add_argument("--torch-pruning", type=Path, default=None, metavar="DIR", help=INSTALL_HINT)
    made.add_argument("--output", type=Path, default=RESULTS / output, help="where the JSON goes (default: %(default)s)")
    made.add_argument("--child", default=None, help=argparse.SUPPRESS)
    return made


def torch_pruning(directory: Path | None) -> Any:
    """The Torch-Pruning package out of its own directory, quiet about parameters that it finds unwrapped."""
    if directory is not None:
        sys.path.insert(0, str(directory.resolve()))
    warnings.filterwarnings("ignore", message=r"(?s)Unwrapped parameters detected")
    return importlib.import_module("torch_pruning")


def child(
    module: str,
    variant: str,
    arguments: argparse.Namespace,
    *,
    timeout: float,
    extra: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Run one variant in a process of its own and read the JSON that it prints last.

    Returns:
        What the child measured; ``{"error": reason}`` if it failed or ran out of time.
    """
    command = [sys.executable, "-m", module, "--child", variant, "--seed", str(arguments.seed), "--threads", str(arguments.threads)]
    command += ["--repeats", str(arguments.repeats), *extra]
    if arguments.torch_pruning is not None:
        command += ["--torch-pruning", str(arguments.torch_pruning)]
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", **(environment or {})}
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=variables, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"not finished after {timeout:.0f} s"}
    if run.returncode:
        return {"error": (run.stderr.strip().splitlines() or [f"exit status {run.returncode}"])[-1][:300]}
    found: dict[str, Any] = json.loads(run.stdout.strip().splitlines()[-1])
    return found


def machine() -> dict[str, Any]:
    """Processor, cores, memory, load and system."""
    model = next(
        (line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), platform.processor()
    )
    memory = next((int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), 0)
    return {
        "processor": model or platform.machine(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory / 2**20, 1),
        "system": platform.platform(),
        "load_average_before": [round(n, 2) for n in os.getloadavg()],
    }


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def versions() -> dict[str, str]:
    """Of what is measured."""
    import torch
    import transformers

    import fxprune

    return {
        "fxprune": fxprune.__version__,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def header(arguments: argparse.Namespace) -> dict[str, Any]:
    """The part of a result that says how to get it again."""
    return {
        "command": " ".join(["python -m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "seed": arguments.seed,
        "threads": arguments.threads,
        "repeats": arguments.repeats,
        "versions": versions(),
        "machine": machine(),
    }


def write(path: Path, data: Mapping[str, Any]) -> None:
    """Write a result in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(data, indent=1) + "\n")
    beside.replace(path)
    print(path)
