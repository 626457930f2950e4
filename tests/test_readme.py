"""The code that the documentation shows runs as it stands, on a tiny local checkpoint called ``my-model``."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from fxprune.cli import main

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


@pytest.mark.parametrize(("file", "count"), [("README.md", 6), ("docs/rules.md", 1), ("docs/sensitivity.md", 1)])
def test_python_blocks_run_in_order(file: str, count: int, workplace: Path) -> None:
    found = blocks(file, "python")
    assert len(found) >= count
    names: dict[str, Any] = {}
    for number, code in enumerate(found):
        exec(compile(code, f"{file}, python block {number + 1}", "exec"), names)
    if file == "README.md":
        assert (workplace / "my-model-20" / "model.safetensors").is_file()
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


def test_shell_commands_of_the_first_screen_run(workplace: Path) -> None:
    shell = "".join(blocks("README.md", "bash"))
    commands = [line.split("#")[0] for line in shell.splitlines() if line.startswith("fxprune ")]
    assert len(commands) >= 2
    for command in commands:
        assert main(shlex.split(command)[1:]) == 0, command
    assert (workplace / "my-model-20" / "config.json").is_file()


def test_every_option_and_command_that_the_readme_names_exists(capsys: pytest.CaptureFixture[str]) -> None:
    text = re.sub(r"`python -m benchmarks[^`]*`", "", (ROOT / "README.md").read_text())  # those have options of their own
    options = set(re.findall(r"`(?:[^`]*\s)?(--[a-z-]+)", text))
    known = ""
    for command in ("prune", "recover", "groups", "sensitivity", "verify", "eval", "demo"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        known += capsys.readouterr().out
    assert options
    assert not {o for o in options if o not in known}
