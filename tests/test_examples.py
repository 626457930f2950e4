"""Every example runs as its first lines say, in a process of its own, without network, and prints what it promises."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))

SAID = {
    "networkx_questions": (
        "model.hidden: hidden of 48 units, in layers [0, 1, 2]",
        "model.layers.0.self_attn.q_proj.weight [48, 48]: 24 of 48 along dim 0, from 24 to 47",
        "model.layers.0.self_attn.o_proj.weight [48, 48]: 24 of 48 along dim 1, from 24 to 47",
        "model.hidden (group): 12 parts without it",
        "model.layers.0.mlp.gate_proj.weight[0] -> linear_4: linear, forward",
        "mul_19 -> model.layers.0.mlp.down_proj.weight[1]: linear, forward",
        "over FFN couplings: no",
        "layer 0 - layer 1: model.hidden\n",
    ),
    "compiler_pass": ("RewritePass", "RecipeSelection", "run an ImportancePass before the SelectionPass"),
    "custom_operator": ("pinned: there is no rule at gated", "up.weight is (24, 16)", "called with width 12"),
    "with_torch_compile": (
        "the plan removes 20.0% of 32,400 parameters",
        "what the backend compiled: graph 0/0: 32,400 -> 25,920 parameters\n  pruned model.layers.0.mlp.ffn: 96 -> 51",
        "the dense module is as it was: 32,400 parameters",
    ),
    "with_trainer": ("saved and loaded      15,520 parameters", "its configuration     2 heads, 48 FFN channels"),
}
"""What must be among what an example prints: its answers, as far as they are the same on every machine."""


def test_every_example_is_asked() -> None:
    assert sorted(SAID) == [path.stem for path in EXAMPLES]


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(path: Path, tmp_path: Path) -> None:
    about = ast.get_docstring(ast.parse(path.read_text())) or ""
    assert f"python examples/{path.name}" in about
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("COV_", "PYTEST"))}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error::UserWarning:__main__", str(path)]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False, timeout=600)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert len(ran.stdout.splitlines()) >= 5
    for words in SAID[path.stem]:
        assert words in ran.stdout
