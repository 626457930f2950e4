"""Weights that change, and whose they are: compiled code follows the live parameters of the right module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

import fxprune
from fxprune.backend import Backend

from .compiling import Block, Case, Feed, Stack, case, feeds, untraced

__all__ = ["untraced"]  # a fixture


def close(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def rewritten(model: nn.Module, plan: fxprune.PrunePlan) -> Any:
    """What the plan makes of the model as it is now."""
    return fxprune.rewrite(fxprune.trace(model, (torch.randn(3, 5, 6),)), plan)


def other_data(model: nn.Module) -> None:
    for p in model.parameters():
        p.data = p.data * 3


def fused_step(model: nn.Module) -> None:
    """It writes to parameters, and their versions stay."""
    versions = [p._version for p in model.parameters()]
    with torch.enable_grad():
        model(torch.randn(2, 4, 6)).sum().backward()
    torch.optim.AdamW(model.parameters(), lr=0.1, fused=True).step()
    assert [p._version for p in model.parameters()] == versions


def loaded(model: nn.Module) -> None:
    model.load_state_dict({n: t + 1 for n, t in model.state_dict().items()})


def assigned(model: nn.Module) -> None:
    model.load_state_dict({n: t + 1 for n, t in model.state_dict().items()}, assign=True)


def rounded(model: nn.Module) -> None:
    model.to(torch.bfloat16).to(torch.float32)


@pytest.mark.parametrize("change", [other_data, fused_step, loaded, assigned, rounded])
def test_weights_that_change_are_followed(change: Callable[[nn.Module], None]) -> None:
    made, x = feeds(1), torch.randn(2, 4, 6)
    compiled, graphs = made.compile()
    with torch.no_grad():
        close(compiled(x), made.small(x))
        change(made.model)
        expected = rewritten(made.model, made.plan)(x)
        assert (expected - made.small(x)).abs().max() > 1e-4
        torch.testing.assert_close(compiled(x), expected, atol=1e-6, rtol=1e-5)
    assert [set(g.pruned) for g in graphs] == [{"blocks.0.ffn"}] * len(graphs)


def test_parts_of_one_buffer_are_told_apart() -> None:
    """Flat parameters: other data in the same storage."""
    made, x = feeds(1), torch.randn(2, 4, 6)
    flat, weight = torch.randn(2, 10, 6), made.model.get_parameter("blocks.0.up.weight")
    weight.data = flat[0]
    compiled, _ = made.compile()
    with torch.no_grad():
        compiled(x)
        weight.data = flat[1]
        close(compiled(x), rewritten(made.model, made.plan)(x))


def test_another_dtype_is_compiled_with_slices_of_its_own() -> None:
    made, x = feeds(1), torch.randn(2, 4, 6)
    compiled, _ = made.compile()
    with torch.no_grad():
        compiled(x)
        made.model.double()
        close(compiled(x.double()), rewritten(made.model, made.plan)(x.double()))


def test_inference_tensors_are_read_at_every_call() -> None:
    made, x = feeds(1), torch.randn(2, 4, 6)
    with torch.inference_mode():
        model = Stack(1).eval()
        compiled = torch.compile(model, backend=Backend(made.plan, inner="eager"))
        compiled(x)
        model.get_parameter("blocks.0.up.weight").mul_(2)
        close(compiled(x), rewritten(model, made.plan)(x))


class Normalised(nn.Module):
    """A prunable block with running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Conv1d(4, 8, 1), nn.BatchNorm1d(8), nn.Conv1d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Up, normalise, down."""
        return self.down(torch.relu(self.norm(self.up(x))))


def test_statistics_that_training_writes_are_seen() -> None:
    """Batch normalisation writes to its buffers, and their versions stay."""
    torch.manual_seed(0)
    x = torch.randn(5, 4, 6)
    made = case(Normalised(), (x,))
    compiled, graphs = made.compile()
    with torch.no_grad():
        close(compiled(x), made.small(x))
        made.model.train()
        close(compiled(x), made.model(x))
        made.model.eval()
        expected = fxprune.rewrite(fxprune.trace(made.model, (x,)), made.plan)(x)
        assert (expected - made.small(x)).abs().max() > 0.01
        close(compiled(x), expected)
    assert [(bool(g.pruned), dict(g.dense)) for g in graphs] == [
        (True, {}),
        (False, {"channels": "the graph writes to a buffer or a parameter"}),
    ]


def test_a_layer_without_a_plan_does_not_stand_in_for_the_next() -> None:
    """Layers share a frame: a graph compiled dense for the first is not the second's."""
    made = feeds(3)
    gm = fxprune.trace(made.model, (torch.randn(3, 5, 6),))
    units = {"blocks.1.ffn": made.plan.keep["blocks.1.ffn"]}
    plan = fxprune.PrunePlan.from_keep(fxprune.find_groups(gm), units)
    for block in made.model.get_submodule("blocks").children():
        block.register_forward_pre_hook(lambda module, args: torch._dynamo.graph_break())
    backend, x = Backend(plan, inner="eager"), torch.randn(2, 4, 6)
    with torch.no_grad():
        close(torch.compile(made.model, backend=backend)(x), fxprune.rewrite(gm, plan)(x))
    assert [set(g.pruned) for g in backend.graphs] == [set(), {"blocks.1.ffn"}, set()]


def test_a_trace_with_older_parameters_is_not_the_model() -> None:
    made, x = feeds(1), torch.randn(2, 4, 6)
    trace = fxprune.trace(made.model, (torch.randn(3, 5, 6),))
    made.model.get_submodule("blocks.0.up").weight = nn.Parameter(torch.randn(10, 6))
    compiled, graphs = made.compile()
    with torch.no_grad():
        close(compiled(x), rewritten(made.model, made.plan)(x))
    assert set(graphs[0].pruned) == {"blocks.0.ffn"}
    assert trace.get_parameter("blocks.0.up.weight") is not made.model.get_parameter("blocks.0.up.weight")


class Cut(nn.Module):
    """A stack of one block, and a graph break in it."""

    def __init__(self, stack: nn.Module) -> None:
        super().__init__()
        self.stack = stack

    def forward(self, x: Tensor) -> Any:
        """``x + f(x)``."""
        block: Any = self.stack.get_submodule("blocks.0")
        h = block.widen(x)
        torch._dynamo.graph_break()
        return x + block.down(h)


def test_what_one_model_cannot_prune_another_of_its_kind_can() -> None:
    made, twin, x = feeds(1), Stack(1), torch.randn(2, 4, 6)
    backend = Backend(made.plan, inner="eager")
    with torch.no_grad():
        close(torch.compile(made.model, backend=backend)(x), made.small(x))
        close(torch.compile(Cut(twin), backend=backend)(x), twin(x))
    assert [(list(g.pruned), list(g.dense)) for g in backend.graphs] == [
        (["blocks.0.ffn"], []),
        ([], ["blocks.0.ffn"]),
        ([], ["blocks.0.ffn"]),
    ]


def test_two_models_of_the_plan_in_one_graph_are_refused() -> None:
    made, twin, x = feeds(1), Stack(1), torch.randn(2, 4, 6)

    def both(y: Tensor) -> Any:
        return made.model(y) - twin(y)

    compiled = torch.compile(both, backend=Backend(made.plan, inner="eager"))
    with torch.no_grad(), pytest.raises(BackendCompilerFailed) as caught:
        compiled(x)
    assert (
        "PlanError: one graph has parameters of several live modules that the plan fits: compile them apart, or, if they are the "
        "same under different names, delete all but one"
    ) in str(caught.value)


class Thrice(nn.Module):
    """Three residual places for two modules, or for others of any kind."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        """One after the other."""
        for block in self.blocks:
            x = block(x)
        return x


class Weightless(nn.Module):
    """A residual block that attends without parameters."""

    def forward(self, x: Tensor) -> Tensor:
        """``x + softmax(x x') x``."""
        return x + torch.softmax(x @ x.transpose(1, 2), -1) @ x


def dropping(model: nn.Module, path: str) -> Case:
    torch.manual_seed(0)
    return case(model, (torch.randn(3, 5, 6),), kinds=["none"], drop=[path])


def test_a_second_place_of_a_block_that_cannot_be_dropped_is_said() -> None:
    first, x = Block(), torch.randn(2, 4, 6)
    made = dropping(Thrice(first, first, Block()), "blocks.1")
    compiled, graphs = made.compile()
    with torch.no_grad():
        close(compiled(x), made.model(x))
    assert [(g.dropped, list(g.dense)) for g in graphs] == [((), ["blocks.1"])]
    assert graphs[0].dense["blocks.1"].startswith("the block is not whole in this graph, or what it computes leaves the graph")


def test_a_block_without_parameters_cannot_be_dropped_in_compiled_graphs() -> None:
    made = dropping(Thrice(Block(), Weightless(), Feed()), "blocks.1")
    compiled, _ = made.compile()
    with torch.no_grad(), pytest.raises(BackendCompilerFailed) as caught:
        compiled(torch.randn(2, 4, 6))
    message = "the plan drops 'blocks.1', which has no parameters: compiled graphs do not tell where it is"
    assert f"PlanError: {message}" in str(caught.value)
