"""The benchmark of the backend: what it counts as wrong, on a tiny model."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import compile as benchmark
from fxprune.backend import Backend

from .compiling import case, untraced
from .zoo import build, tokens

__all__ = ["untraced"]  # a fixture


@pytest.fixture
def levels() -> Iterator[None]:
    """The benchmark silences two loggers for good."""
    before = {name: logging.getLogger(name).level for name in ("fxprune", "transformers")}
    yield
    for name, level in before.items():
        logging.getLogger(name).setLevel(level)


@pytest.mark.usefixtures("levels")
def test_a_family_is_measured_and_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, threads = tmp_path / "out.json", torch.get_num_threads()
    monkeypatch.setattr(sys, "argv", ["compile", "--only", "opt", "--threads", str(threads), "--output", str(path)])
    benchmark.main()
    written = json.loads(path.read_text())
    expected = {"models": 1, "wrong": 0, "dense_changed": 0, "groups_in_plans": 9, "groups_that_ran_dense": 0}
    assert {k: v for k, v in written["summary"].items() if k != "worst"} == expected
    assert written["models"]["opt"]["dense_against_pruned"] > 0.1


def test_both_compiled_are_compared_with_each_other() -> None:
    """With a compiler that needs no C++, and with one that gets it wrong."""
    ids = [tokens(2, 7), tokens(3, 11)]
    made = case(build("opt", num_hidden_layers=1), {"input_ids": ids[0]})
    rewritten = torch.compile(made.small, backend="aot_eager")

    def doubled(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        return lambda *args: tuple(2 * value for value in gm(*args))

    rows = []
    for inner in ("aot_eager", doubled):
        compiled = torch.compile(made.model, backend=Backend(made.plan, inner=inner))
        rows.append(benchmark.compiled_alike(compiled, rewritten, made.small, ids))
    assert all(max(row["inductor_errors_of_the_rewritten"]) < benchmark.TOLERANCE for row in rows)
    between = [row["inductor_errors_between_the_two"] for row in rows]
    assert max(between[0]) < benchmark.TOLERANCE
    assert between[1] == pytest.approx([1.0, 1.0], abs=1e-3)
    assert [benchmark.wrong({"errors": [0.0], **row}) for row in rows] == [False, True]


def test_an_error_that_is_no_number_is_wrong() -> None:
    assert not benchmark.wrong({"errors": [0.0, 1e-5]})
    assert benchmark.wrong({"errors": [0.0, float("nan")]})
    assert benchmark.wrong({"errors": [2e-4, 0.0]})
