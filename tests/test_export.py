"""What a prune leaves is a module like any other to torch's compilers: torch.compile, torch.export, AOTInductor."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import fxprune

from .compiling import feeds, untraced
from .zoo import build, tokens

__all__ = ["untraced"]  # a fixture

SHAPES = ((2, 7), (3, 11), (5, 17), (4, 6))


@pytest.fixture(scope="module")
def pruned() -> fxprune.PruneResult:
    """A one-layer Llama with half of its heads, query groups and FFN."""
    torch.manual_seed(0)
    model = build("llama", num_hidden_layers=1)
    return fxprune.prune(model, units={"kv_heads": 0.5, "query_groups": 0.34, "ffn": 0.5}, recipe="magnitude")


def logits(output: Any) -> Tensor:
    return output.logits


def test_the_graph_module_compiles_whole_once_for_fixed_and_once_for_symbolic_sizes(pruned: fxprune.PruneResult) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(pruned.graph_module, fullgraph=True, backend=counter)
    with torch.no_grad():
        for shape in SHAPES:
            ids = tokens(*shape)
            torch.testing.assert_close(logits(compiled(input_ids=ids)), logits(pruned.graph_module(input_ids=ids)))
    assert counter.frame_count == 2


@pytest.mark.parametrize("form", ["graph_module", "model"])
def test_an_exported_program_survives_a_file_and_runs_at_other_sizes(
    pruned: fxprune.PruneResult, form: str, tmp_path: Path
) -> None:
    module: Any = getattr(pruned, form)
    extra = {} if form == "graph_module" else {"use_cache": False}
    dim = torch.export.Dim.DYNAMIC
    with torch.no_grad():
        program = torch.export.export(
            module,
            (),
            {"input_ids": tokens(2, 7), **extra},
            dynamic_shapes={"input_ids": {0: dim, 1: dim}, **dict.fromkeys(extra)},
        )
    torch.export.save(program, tmp_path / "pruned.pt2")
    loaded: Any = torch.export.load(tmp_path / "pruned.pt2").module()
    held = sum(p.numel() for p in {id(p): p for p in program.parameters()}.values())
    assert held == pruned.report.parameters_after < pruned.report.parameters_before
    with torch.no_grad():
        for shape in SHAPES:
            ids = tokens(*shape)
            expected = logits(pruned.graph_module(input_ids=ids))
            torch.testing.assert_close(logits(loaded(input_ids=ids, **extra)), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler")
def test_aot_inductor_compiles_a_pruned_module(tmp_path: Path) -> None:
    made, x = feeds(1), torch.randn(2, 4, 6)
    dim = torch.export.Dim.DYNAMIC
    with torch.no_grad():
        program = torch.export.export(made.small, (x,), dynamic_shapes=({0: dim, 1: dim},))
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "pruned.pt2"))
        loaded = torch._inductor.aoti_load_package(package)
        for shape in ((2, 4, 6), (3, 9, 6)):
            x = torch.randn(shape)
            torch.testing.assert_close(loaded(x), made.small(x), atol=1e-5, rtol=1e-4)
