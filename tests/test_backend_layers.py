"""Layers that are compiled each for itself: torch limits the graphs of one code, and every layer has its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fxprune.backend import Backend

from .compiling import Case, case, feeds, untraced
from .zoo import build, tokens

__all__ = ["untraced"]  # a fixture

LAYERS = 10
"""More than the graphs that torch makes of one code."""

LAST = (
    "graph {} is the last that torch compiles of its code (torch._dynamo.config.{} is {}): what needs another one runs dense, and "
    "no record tells of it{}. Raise the limit before the first call"
)


def close(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """By this backend."""
    return [r.getMessage() for r in caplog.records if r.name == "fxprune"]


def compiled(made: Case, how: str, backend: Backend) -> Any:
    """The model in pieces: a frame for each block, or graph breaks that make them."""
    model: Any = made.model
    if how == "regional":
        for block in model.blocks:
            block.compile(backend=backend)
        return model
    if how == "hooks":
        for block in model.blocks:
            block.register_forward_pre_hook(lambda module, args: torch._dynamo.graph_break())
    return torch.compile(model, backend=backend)


@pytest.mark.parametrize("how", ["regional", "hooks", "breaks"])
def test_more_layers_than_the_limit_are_all_pruned(how: str, caplog: pytest.LogCaptureFixture) -> None:
    assert torch._dynamo.config.recompile_limit < LAYERS
    made = feeds(LAYERS, breaks=how == "breaks")
    backend = Backend(made.plan, inner="eager")
    run = compiled(made, how, backend)
    with torch.no_grad():
        for shape in ((2, 4, 6), (3, 7, 6)):
            x = torch.randn(shape)
            close(run(x), made.small(x))
    assert [set(g.pruned) for g in backend.graphs] == [{f"blocks.{i}.ffn"} for i in range(LAYERS)] * 2
    assert not backend.unseen
    assert not said(caplog)


def test_a_backend_for_each_layer_will_do() -> None:
    made, x = feeds(LAYERS), torch.randn(2, 4, 6)
    model: Any = made.model
    for block in model.blocks:
        block.compile(backend=Backend(made.plan, inner="eager"))
    with torch.no_grad():
        close(model(x), made.small(x))


def test_the_last_graph_of_a_code_is_said_with_what_no_graph_has_seen(caplog: pytest.LogCaptureFixture) -> None:
    """The modules are items of a list, which torch counts together."""
    made, x = feeds(LAYERS), torch.randn(2, 4, 6)
    model: Any = made.model
    blocks, backend = list(model.blocks), Backend(made.plan, inner="eager")

    def layer(y: Tensor, index: int) -> Any:
        return blocks[index](y)

    def every(y: Tensor) -> Any:
        run = torch.compile(layer, backend=backend, dynamic=False)
        for index in range(LAYERS):
            y = run(y, index)
        return y

    with torch.no_grad():
        found = every(x)
        assert (found - made.small(x)).abs().max() > 0.01
        unseen = "; 2 of the plan's groups are in no graph so far: blocks.8.ffn, blocks.9.ffn"
        assert said(caplog) == [LAST.format(backend.graphs[7].graph, "recompile_limit", 8, unseen)]
        assert backend.unseen == ["blocks.8.ffn", "blocks.9.ffn"]
        torch._dynamo.reset()
        assert backend.unseen == list(made.plan.keep)
        with torch._dynamo.config.patch(recompile_limit=LAYERS):
            close(every(x), made.small(x))
        assert not backend.unseen


def test_sizes_without_end_are_said_too(caplog: pytest.LogCaptureFixture) -> None:
    made = feeds(1)
    run, graphs = made.compile(dynamic=False)
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=2):
        for length in (3, 4):
            x = torch.randn(2, length, 6)
            close(run(x), made.small(x))
        x = torch.randn(2, 5, 6)
        close(run(x), made.model(x))
    assert said(caplog) == [LAST.format(graphs[1].graph, "recompile_limit", 2, "")]


def test_the_limit_of_all_layers_together_is_said(caplog: pytest.LogCaptureFixture) -> None:
    made, x = feeds(4), torch.randn(2, 4, 6)
    backend = Backend(made.plan, inner="eager")
    run = compiled(made, "regional", backend)
    with torch.no_grad(), torch._dynamo.config.patch(accumulated_recompile_limit=3):
        run(x)
    unseen = "; 1 of the plan's groups are in no graph so far: blocks.3.ffn"
    assert said(caplog) == [LAST.format(backend.graphs[2].graph, "accumulated_recompile_limit", 3, unseen)]
    assert backend.unseen == ["blocks.3.ffn"]


def test_regions_of_a_llama_prune_what_is_whole_in_them() -> None:
    made = case(build("llama", num_hidden_layers=3), {"input_ids": tokens(2, 7)}, kinds=["ffn", "kv_heads"])
    model: Any = made.model
    backend, ids = Backend(made.plan, inner="eager"), tokens(3, 11)
    for block in model.model.layers:
        block.compile(backend=backend)
    with torch.no_grad():
        close(model(ids, use_cache=False).logits, made.small(input_ids=ids).logits)
    assert {n for g in backend.graphs for n in g.pruned} == set(made.plan.keep)
    assert not backend.unseen
