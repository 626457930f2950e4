"""The code that the documentation shows runs as it stands, on a tiny local checkpoint called ``my-model``."""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fxprune.cli import _parser, main

ROOT = Path(__file__).parents[1]


def blocks(file: str, language: str) -> list[str]:
    """The fenced code blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / file).read_text(), flags=re.MULTILINE | re.DOTALL)


def make_checkpoint(directory: Path) -> None:
    """A tiny GQA Llama with a word-level tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = sorted(set(re.findall(r"\w+|[^\w\s]", (ROOT / "README.md").read_text())))[:300]
    vocabulary = {w: i for i, w in enumerate(["<unk>", "<s>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>").save_pretrained(directory)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(directory)


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current directory of its own, with ``my-model`` in it."""
    make_checkpoint(tmp_path / "my-model")
    words = re.findall(r"\w+", (ROOT / "README.md").read_text())
    rows = [
        {"instruction": " ".join(words[i : i + 9]), "input": "", "output": " ".join(words[i + 9 : i + 20])}
        for i in range(0, 800, 20)
    ]
    (tmp_path / "alpaca.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "wiki.txt").write_text("\n".join(" ".join(words[i : i + 40]) for i in range(800, 1600, 40)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


PAGES = [path.relative_to(ROOT).as_posix() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))]


def with_graphviz() -> dict[str, Any]:
    """The same, where pictures can be drawn."""
    if shutil.which("dot") is None:
        pytest.skip("the program dot (Graphviz) is not installed")
    return pruned_before()


def pruned_before() -> dict[str, Any]:
    """What pages that begin after a prune stand on: checkpoints, and the names of the README's first blocks."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import fxprune

    model, tokenizer = AutoModelForCausalLM.from_pretrained("my-model"), AutoTokenizer.from_pretrained("my-model")
    graph = fxprune.trace(model, {"input_ids": torch.arange(32).view(2, 16)})
    results = {}
    for share in (10, 20):
        results[share] = fxprune.prune(model, share / 100, graph=graph, recipe="magnitude", tokenizer=tokenizer)
        results[share].save_pretrained(f"my-model-{share}")
    names = {"fxprune": fxprune, "model": model, "tokenizer": tokenizer, "gm": graph}
    return names | {"result": results[20], "groups": results[20].groups}


def adapted() -> dict[str, Any]:
    """A model with adapters, and text for as many steps as the page's example takes."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    import fxprune

    model: Any = AutoModelForCausalLM.from_pretrained("my-model")
    peft_model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    ids = torch.arange(16).view(2, 8)

    def loss_of(module: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return module(input_ids=batch, labels=batch).loss

    return {"torch": torch, "fxprune": fxprune, "peft_model": peft_model, "ids": ids, "data": [ids] * 300, "loss_of": loss_of}


BEFORE = {"docs/lorashear.md": adapted, "docs/report.md": pruned_before, "docs/explorer.md": with_graphviz}
SLOW = ("docs/serving.md",)
OPTIONAL = {"g++", "onnxruntime", "onnxscript", "torchao"}


def installed(code: str) -> bool:
    """Whether all is there that a block says it needs: ``# pip install torchao``, ``# apt install g++``."""
    said = re.match(r"# (?:pip|apt) install (.+)\n", code)
    names = said[1].split() if said else []
    assert OPTIONAL.issuperset(names), names
    return all(importlib.util.find_spec(name) or shutil.which(name) for name in names)


def test_pages_with_code_are_found() -> None:
    assert {"README.md", "docs/rules.md", "docs/sensitivity.md", "docs/concepts.md", *BEFORE} <= {
        p for p in PAGES if blocks(p, "python")
    }


@pytest.mark.parametrize(
    "file", [pytest.param(page, marks=[pytest.mark.slow] * (page in SLOW)) for page in PAGES if blocks(page, "python")]
)
def test_code_blocks_run_in_order(file: str, workplace: Path) -> None:
    found = blocks(file, "python")
    assert len(found) >= {"README.md": 6}.get(file, 1)
    names: dict[str, Any] = BEFORE[file]() if file in BEFORE else {}
    if file == "README.md":  # whoever reads it from the top has typed these before
        commands = [
            line.split("#")[0] for code in blocks(file, "bash") for line in code.splitlines() if line.startswith("fxprune ")
        ]
        assert len(commands) >= 5
        for command in commands:
            assert main(shlex.split(command)[1:]) == 0, command
        assert (workplace / "my-model-20" / "modeling_fxprune.py").is_file()
    for number, code in enumerate(found):
        if installed(code):
            exec(compile(code, f"{file}, python block {number + 1}", "exec"), names)
    if file == "README.md":
        assert (workplace / "my-model-uniform" / "model.safetensors").is_file()
        assert not (workplace / "my-model-uniform" / "modeling_fxprune.py").exists()
        assert (workplace / "my-model-per-layer" / "modeling_fxprune.py").is_file()


def test_the_rule_in_the_documentation_is_exact() -> None:
    import fxprune

    exec(blocks("docs/rules.md", "python")[0], {})

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = torch.nn.Linear(6, 20), torch.nn.Linear(10, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(torch.ops.docs.swiglu(self.up(x), 10))

    gm = fxprune.trace(Net(), torch.randn(3, 6))
    groups = fxprune.find_groups(gm)
    width = next(g for g in groups.values() if g.prunable)
    assert width.size == 10
    plan = fxprune.PrunePlan.from_keep(groups, {width.name: [1, 2, 7]})
    assert fxprune.verify(gm, fxprune.rewrite(gm, plan), plan, torch.randn(5, 6)).max_rel_error < 1e-6


def every_option() -> set[str]:
    """Every option of every command."""
    (commands,) = (action for action in _parser()._actions if isinstance(action, argparse._SubParsersAction))
    return {option for parser in commands.choices.values() for action in parser._actions for option in action.option_strings}


@pytest.mark.parametrize("file", PAGES)
def test_every_option_that_a_page_names_exists(file: str) -> None:
    text = re.sub(r"`[^`\n]*python -m [^`]*`", "", (ROOT / file).read_text())  # benchmarks have options of their own
    named = set(re.findall(r"`(?:[^`\n]*\s)?(--[a-z-]+)", text))
    named |= {o for code in blocks(file, "bash") for o in re.findall(r"\s(--[a-z-]+)", code)}
    assert named or file != "README.md"
    assert not named - every_option()
