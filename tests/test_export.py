"""What a prune leaves is a module like any other to torch's compilers: torch.compile, torch.export, AOTInductor, ONNX."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import fxprune

from .closeness import relative
from .compiling import untraced
from .zoo import build, tokens

__all__ = ["untraced"]  # a fixture

SHAPES = ((2, 7), (3, 11), (5, 17), (4, 6))
ANY = torch.export.Dim.DYNAMIC
FORMS = ("graph_module", "model")
WIDTHS = ("uniform", "per-layer")

compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler: g++ is not installed")


@functools.cache
def made(widths: str) -> fxprune.PruneResult:
    """A one-layer Llama with half of its heads, query groups and FFN; or two layers, of which one stays whole."""
    torch.manual_seed(0)
    if widths == "uniform":
        units = {"kv_heads": 0.5, "query_groups": 0.34, "ffn": 0.5}
        result = fxprune.prune(build("llama", num_hidden_layers=1), units=units, recipe="magnitude")
    else:
        options: dict[str, Any] = {"ranking": "global", "widths": "per-layer", "protect": ["model.layers.1*"]}
        result = fxprune.prune(build("llama"), 0.1, recipe="magnitude", **options)
    assert result.form == widths, result.report.note
    return result


def extra(form: str) -> dict[str, Any]:
    """What the eager model must be told, so that it returns no cache; the graph has none."""
    return {"use_cache": False} if form == "model" else {}


def exported(widths: str, form: str, via: Callable[..., Any] = torch.export.export) -> Any:
    """The program of a pruned module, of any batch and length."""
    shapes = {"input_ids": {0: ANY, 1: ANY}, **dict.fromkeys(extra(form))}
    with torch.no_grad():
        return via(getattr(made(widths), form), (), kwargs={"input_ids": tokens(2, 7), **extra(form)}, dynamic_shapes=shapes)


def same(widths: str, run: Callable[[Tensor], Any]) -> None:
    """At every size, the logits of the rewritten graph."""
    for shape in SHAPES:
        with torch.no_grad():
            assert relative(made(widths).graph_module(input_ids=tokens(*shape)).logits, run(tokens(*shape))) < 1e-5


@pytest.mark.parametrize("widths", WIDTHS)
def test_the_graph_module_compiles_whole_once_for_fixed_and_once_for_symbolic_sizes(widths: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(made(widths).graph_module, fullgraph=True, backend=counter)
    same(widths, lambda ids: compiled(input_ids=ids).logits)
    assert counter.frame_count == 2


@pytest.mark.slow
@compiler
def test_inductor_compiles_the_whole_graph_module() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(made("uniform").graph_module, fullgraph=True, dynamic=True)
    same("uniform", lambda ids: compiled(input_ids=ids).logits)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("widths", WIDTHS)
def test_an_exported_program_survives_a_file_and_runs_at_other_sizes(widths: str, form: str, tmp_path: Path) -> None:
    report, program = made(widths).report, exported(widths, form)
    torch.export.save(program, tmp_path / "pruned.pt2")
    loaded: Any = torch.export.load(tmp_path / "pruned.pt2").module()
    held = sum(p.numel() for p in {id(p): p for p in program.parameters()}.values())
    assert held == report.parameters_after < report.parameters_before
    same(widths, lambda ids: loaded(input_ids=ids, **extra(form)).logits)


@pytest.mark.slow
@compiler
def test_aot_inductor_compiles_a_pruned_model(tmp_path: Path) -> None:
    """Of other widths in docs/serving.md."""
    program, path = exported("uniform", "graph_module"), str(tmp_path / "pruned.pt2")
    loaded = torch._inductor.aoti_load_package(torch._inductor.aoti_compile_and_package(program, package_path=path))
    same("uniform", lambda ids: loaded(input_ids=ids).logits)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("widths", WIDTHS)
def test_onnx_runtime_computes_the_same(widths: str, form: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="ONNX needs onnxscript, which is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    exported(widths, form, functools.partial(torch.onnx.export, dynamo=True, verbose=False)).save(tmp_path / "pruned.onnx")
    session = runtime.InferenceSession(tmp_path / "pruned.onnx", providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_inputs()] == ["input_ids"]
    same(widths, lambda ids: torch.from_numpy(session.run(None, {"input_ids": ids.numpy()})[0]))
