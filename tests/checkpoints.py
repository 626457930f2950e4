"""Checkpoints under test: how a model is pruned for one, and every way in which one is loaded and run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fxprune
from fxprune import PrunePlan
from fxprune.api import PruneResult, prune

from .closeness import relative
from .zoo import build, tokens

SHAPES = ((1, 5), (3, 11), (2, 16))
PROMPT, NEW = (2, 6), 8

_STOCK = """
import json, os, sys
sys.modules["fxprune"] = None  # an import of it fails, wherever it may be installed
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging
logging.set_verbosity_error()
logging.disable_progress_bar()
torch.set_num_threads(1)
for line in sys.stdin:
    asked = json.loads(line)
    try:
        model = AutoModelForCausalLM.from_pretrained(asked["directory"], trust_remote_code=asked["trust"]).eval()
        model.generation_config.eos_token_id = None
        given = load_file(asked["inputs"])
        with torch.no_grad():
            made = {n: model(input_ids=x).logits for n, x in given.items() if n != "prompt"}
            options = {"max_new_tokens": asked["new"], "do_sample": False, "use_cache": True, "pad_token_id": 0}
            prompt = given["prompt"]
            made["prompt"] = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
        save_file({n: x.contiguous() for n, x in made.items()}, asked["outputs"])
        if asked["resave"]:
            model.save_pretrained(asked["resave"])
        answer = {"class": type(model).__name__, "module": type(model).__module__, "dtype": str(model.dtype)}
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(answer), flush=True)
"""


class Stock:
    """A process with transformers and without fxprune, asked by lines of JSON: starting one for each test would take minutes."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH" and not k.startswith("COV_")}
        environment |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(scratch / "modules"), "PYTHONWARNINGS": "ignore"}
        command = [sys.executable, "-c", _STOCK]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=scratch, env=environment)
        self.asked = 0

    def __call__(
        self, directory: Path, inputs: dict[str, Tensor], *, trust: bool = False, resave: Path | None = None
    ) -> tuple[dict[str, str], dict[str, Tensor]]:
        """What the process says of a checkpoint, and its logits for each input and its continuation of ``prompt``."""
        self.asked += 1
        given, made = (self.scratch / f"{kind}{self.asked}.safetensors" for kind in ("inputs", "outputs"))
        save_file(inputs, given)
        asked = {"directory": str(directory), "inputs": str(given), "outputs": str(made), "trust": trust, "new": NEW}
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({**asked, "resave": str(resave) if resave else ""}) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        assert "error" not in answer, answer["error"]
        return answer, load_file(made)

    def close(self) -> None:
        """End the process."""
        with self.process:
            assert self.process.stdin is not None
            self.process.stdin.close()


def inputs() -> dict[str, Tensor]:
    return {**{f"{b}x{s}": tokens(b, s, seed=s) for b, s in SHAPES}, "prompt": tokens(*PROMPT, seed=7)}


def expected_of(result: PruneResult) -> dict[str, Tensor]:
    """The rewritten graph's logits, and its greedy continuation of the prompt without any cache."""
    given = inputs()
    with torch.no_grad():
        made = {n: result.graph_module(input_ids=x).logits for n, x in given.items() if n != "prompt"}
        ids = given["prompt"]
        for _ in range(NEW):
            ids = torch.cat([ids, result.graph_module(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    return {**made, "prompt": ids}


def outputs_of(model: Any) -> dict[str, Tensor]:
    """The same of an eager model, which generates with its KV cache."""
    given = inputs()
    prompt = given["prompt"]
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        made = {n: model(input_ids=x).logits for n, x in given.items() if n != "prompt"}
        options: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "use_cache": True, "pad_token_id": 0}
        made["prompt"] = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    return made


def assert_same(expected: dict[str, Tensor], actual: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    for name, logits in expected.items():
        if name == "prompt":
            assert torch.equal(logits, actual[name]), "generated other tokens"
        else:
            assert relative(logits, actual[name]) < tolerance, name


def check(result: PruneResult, directory: Path, stock: Stock) -> nn.Module:
    """Save, and load by every way there is: in this process, and in one without fxprune. Returns what `fxprune.load` gave."""
    result.save_pretrained(directory)
    assert os.listdir(directory.parent) == [directory.name], "something was left beside the checkpoint"
    expected = expected_of(result)
    assert result.model is not None
    assert_same(expected, outputs_of(result.model))
    loaded = fxprune.load(directory)
    assert not loaded.training
    assert_same(expected, outputs_of(loaded))
    answer, made = stock(directory, inputs(), trust=result.form == "per-layer")
    assert_same(expected, made)
    assert answer["class"] == type(result.model).__name__ == type(result.dense_model).__name__
    assert answer["module"].startswith("transformers." if result.form == "uniform" else "transformers_modules.")
    return loaded


def pruned(model: nn.Module, **options: Any) -> PruneResult:
    return prune(model, recipe={"criterion": "l1"}, **options)


def stated(name: str, keep: Callable[[str, int], Any], drop: tuple[str, ...] = (), **changes: Any) -> PruneResult:
    """Prune by a plan: ``keep(group, size)`` gives the units that stay, or None."""
    model = build(name, **changes)
    groups = fxprune.find_groups(fxprune.trace(model, {"input_ids": tokens(2, 16)}))
    kept = {n: units for n, g in groups.items() if g.prunable and (units := keep(n, g.size)) is not None}
    return prune(model, plan=PrunePlan.from_keep(groups, kept, drop=drop))


def even_less(name: str, size: int) -> list[int] | None:
    """FFN widths that differ from layer to layer."""
    return list(range(size - 9 - 8 * int(name.split(".")[2]))) if name.endswith("ffn") else None
