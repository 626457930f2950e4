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
    "compiler_pass": ("RewritePass", "RecipeSelection", "run an ImportancePass before the SelectionPass"),
    "custom_operator": ("pinned: there is no rule at gated", "up.weight is (24, 16)", "called with width 12"),
    "with_torch_compile": ("the dense module is as it was",),
    "with_trainer": ("saved and loaded", "its configuration     2 heads, 48 FFN channels"),
}
"""What must be among what an example prints; of others, only that they print something."""


def test_there_are_examples() -> None:
    assert set(SAID) <= {path.stem for path in EXAMPLES}


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
    for words in SAID.get(path.stem, ()):
        assert words in ran.stdout
