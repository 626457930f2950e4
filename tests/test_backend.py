"""torch.compile with the fxprune backend: what it computes is the rewritten graph, and the dense model is as it was."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

import fxprune
from fxprune.backend import Backend, GraphRecord

from .compiling import Feed, Stack, case, feeds, untraced
from .zoo import build, tokens

__all__ = ["untraced"]  # a fixture


def close(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_group_of_a_model_is_pruned_and_new_sizes_are_followed(family: str, caplog: pytest.LogCaptureFixture) -> None:
    """Residual stream, heads, their widths, query groups and FFN, at once."""
    model = build(family, num_hidden_layers=1)
    made = case(model, {"input_ids": tokens(2, 7)})
    before = {n: t.clone() for n, t in model.state_dict().items()}
    compiled, graphs = made.compile()
    with torch.no_grad():
        for shape in ((2, 7), (3, 11), (5, 17)):
            ids = tokens(*shape, seed=1)
            close(compiled(ids, use_cache=False).logits, made.small(input_ids=ids).logits)
    assert [set(g.pruned) for g in graphs] == [set(made.plan.keep)] * len(graphs)
    assert len(graphs) == 2, "one graph of fixed sizes, one of symbolic ones"
    assert "fxprune" not in {r.name for r in caplog.records}
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert graphs[1].parameters[1] == sum(p.numel() for p in made.small.parameters())


def test_inductor_compiles_what_is_left_of_the_plan() -> None:
    made = feeds(1)
    compiled, graphs = made.compile(inner="inductor", dynamic=True)
    with torch.no_grad():
        for shape in ((2, 4, 6), (3, 7, 6)):
            x = torch.randn(shape)
            close(compiled(x), made.small(x))
    assert [len(g.pruned) for g in graphs] == [1]


def test_aot_eager_and_a_callable_compile_it_too() -> None:
    made, x = feeds(), torch.randn(2, 4, 6)
    seen: list[list[tuple[int, ...]]] = []

    def own(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        seen.append([tuple(p.shape) for p in gm.parameters()])
        return gm.forward

    for inner in ("aot_eager", own):
        torch._dynamo.reset()
        compiled, _ = made.compile(inner=inner)
        with torch.no_grad():
            close(compiled(x), made.small(x))
    assert seen == [[(5, 6), (5,), (6, 5), (6,)] * 2]


def test_symbolic_sizes_and_floats_from_the_start() -> None:
    class Scaled(Feed):
        def __init__(self) -> None:
            super().__init__()
            self.scale = 0.5

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.scale

    model = Scaled()
    made = case(model, (torch.randn(3, 5, 6),))
    compiled, graphs = made.compile(dynamic=True)
    with torch.no_grad():
        for shape in ((2, 4, 6), (7, 3, 6)):
            x = torch.randn(shape)
            close(compiled(x), made.small(x))
        model.scale = 2.0
        close(compiled(x), made.small(x) * 4)
    assert all(len(g.pruned) == 1 for g in graphs)


def test_blocks_are_dropped() -> None:
    torch.manual_seed(0)
    made = case(Stack(3), (torch.randn(3, 5, 6),), kinds=["ffn"], drop=["blocks.1"])
    compiled, graphs = made.compile()
    x = torch.randn(2, 4, 6)
    with torch.no_grad():
        close(compiled(x), made.small(x))
    assert graphs[0].dropped == ("blocks.1",)


def test_written_weights_are_seen_and_what_is_not_cut_is_not_copied() -> None:
    made, x = feeds(1), torch.randn(2, 4, 6)
    held: list[Tensor] = []

    def spy(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        held.extend(gm.parameters())
        return gm.forward

    compiled, _ = made.compile(inner=spy)
    with torch.inference_mode():
        close(compiled(x), made.small(x))
    with torch.no_grad():
        made.model.get_parameter("blocks.0.up.weight").mul_(2.0)
        made.model.get_parameter("blocks.0.down.bias").add_(1.0)
    again = fxprune.rewrite(fxprune.trace(made.model, (torch.randn(3, 5, 6),)), made.plan)
    with torch.inference_mode():
        close(compiled(x), again(x))
    assert any(p is made.model.get_parameter("blocks.0.down.bias") for p in held)
    assert not any(p.requires_grad for p in held if p.shape == (5, 6))


def test_recompiles_share_their_slices() -> None:
    made = feeds(1)
    held: list[list[Tensor]] = []

    def spy(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        held.append([p for p in gm.parameters() if 5 in p.shape])
        return gm.forward

    compiled, _ = made.compile(inner=spy)
    with torch.no_grad():
        compiled(torch.randn(2, 4, 6)), compiled(torch.randn(3, 7, 6))
    assert len(held) == 2
    assert len(held[0]) == 3
    assert all(a is b for a, b in zip(*held, strict=True))


def test_gradients_are_refused_in_words() -> None:
    made, x = feeds(), torch.randn(2, 4, 6)
    compiled, _ = made.compile()
    with pytest.raises(BackendCompilerFailed) as caught:
        compiled(x)
    assert "UsageError: the pruned computation is for inference, and gradients are enabled" in str(caught.value)
    assert "call the compiled model under torch.no_grad() or torch.inference_mode()" in str(caught.value)
    made.model.requires_grad_(False)
    close(compiled(x), made.small(x))


def test_a_plan_of_a_model_of_other_sizes_is_refused() -> None:
    made, wide = feeds(2), Stack(2)
    for block in wide.blocks:
        block.up, block.down = nn.Linear(6, 12), nn.Linear(12, 6)
    with torch.no_grad(), pytest.raises(BackendCompilerFailed) as caught:
        torch.compile(wide, backend=Backend(made.plan, inner="eager"))(torch.randn(2, 4, 6))
    message = "the plan was made for another form of group 'blocks.0.ffn': it had 10 units there, and here it has 12"
    assert f"PlanError: {message}" in str(caught.value)


def test_parameters_of_another_model_run_dense_and_it_is_said(caplog: pytest.LogCaptureFixture) -> None:
    made, other, x = feeds(2), Feed(), torch.randn(2, 4, 6)
    backend = Backend(made.plan, inner="eager")
    with torch.no_grad():
        close(torch.compile(other, backend=backend)(x), other(x))
    assert "its parameters are not of the model that the plan was made for: it runs dense" in caplog.text
    assert [(g.pruned, g.dense) for g in backend.graphs] == [({}, {})]


def test_parameters_that_torch_freezes_run_dense_and_it_is_said(caplog: pytest.LogCaptureFixture) -> None:
    made, x = feeds(), torch.randn(2, 4, 6)
    with torch._inductor.config.patch(freezing=True):
        compiled, graphs = made.compile()
        with torch.no_grad():
            assert torch.equal(compiled(x), made.model(x))
    assert not graphs[0].pruned
    assert set(graphs[0].dense) == set(made.plan.keep)
    assert "the graph holds tensors of its own, as with torch._inductor.config.freezing" in caplog.text


def test_a_plan_that_no_live_module_fits_is_refused() -> None:
    model = Feed()
    plan = fxprune.PrunePlan(keep={"x": torch.tensor([0])}, sizes={"x": 2}, members={"x": [["nowhere.at.all", 0]]})
    with torch.no_grad(), pytest.raises(BackendCompilerFailed) as caught:
        torch.compile(model, backend=Backend(plan, inner="eager"))(torch.randn(2, 4, 6))
    assert "PlanError: the plan was made for another model: no live module has a parameter 'nowhere.at.all'" in str(caught.value)


def test_a_record_reads_well() -> None:
    record = GraphRecord("0/1", {"a.ffn": (8, 3)}, ("layers.2",), dict.fromkeys("bcde", "why"), (1000, 900))
    assert str(record).splitlines() == [
        "graph 0/1: 1,000 -> 900 parameters",
        "  pruned a.ffn: 8 -> 3",
        "  dropped layers.2",
        *(f"  dense {n}: why" for n in "bcde"),
    ]
    assert record.warning() == "graph 0/1: 4 of the plan's groups run dense here: b, c and 2 more: why"
    assert str(GraphRecord("1/0")) == "graph 1/0: nothing of the plan is in it"


def test_reset_forgets(caplog: pytest.LogCaptureFixture) -> None:
    made = feeds(1)
    compiled, graphs = made.compile()
    with torch.no_grad():
        compiled(torch.randn(2, 4, 6))
    assert len(graphs) == 1
    torch._dynamo.reset()
    assert not graphs


@pytest.mark.parametrize("how", ["wrapper", "function", "submodule"])
def test_parameters_are_known_wherever_the_frame_begins(how: str) -> None:
    made, x = feeds(), torch.randn(2, 4, 6)
    backend = Backend(made.plan, inner="eager")
    model: Any = made.model
    with torch.no_grad():
        if how == "wrapper":
            run: Any = torch.compile(nn.Sequential(nn.Identity(), model), backend=backend)
        elif how == "function":

            def call(y: Tensor) -> Any:
                return model(y)

            run = torch.compile(call, backend=backend)
        else:
            for block in model.blocks:
                block.compile(backend=backend)
            run = model
        close(run(x), made.small(x))
    assert {n for g in backend.graphs for n in g.pruned} == set(made.plan.keep)


def test_two_models_of_one_kind_keep_apart() -> None:
    """Dynamo calls one compiled graph for both, with the parameters of each."""
    made, x = feeds(), torch.randn(2, 4, 6)
    torch.manual_seed(9)
    twin = Stack()
    backend = Backend(made.plan, inner="eager")
    other = fxprune.rewrite(fxprune.trace(twin, (torch.randn(3, 5, 6),)), made.plan)
    with torch.no_grad():
        close(torch.compile(made.model, backend=backend)(x), made.small(x))
        close(torch.compile(twin, backend=backend)(x), other(x))
        close(torch.compile(made.model, backend=backend)(x), made.small(x))


def test_other_parameters_than_those_it_was_compiled_for_run_dense(caplog: pytest.LogCaptureFixture) -> None:
    made, x = feeds(1), torch.randn(2, 4, 6)
    kept: list[tuple[Any, list[Any]]] = []
    backend = Backend(made.plan, inner="eager")

    def spy(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        kept.append((backend(gm, example_inputs), example_inputs))
        return kept[0][0]

    with torch.no_grad():
        close(torch.compile(made.model, backend=spy)(x), made.small(x))
        run, arguments = kept[0]
        others = [nn.Parameter(a.clone()) if isinstance(a, nn.Parameter) else a for a in arguments]
        close(run(*others)[0], made.model(x))
    assert "a pruned graph was called with other parameters than it was compiled for: it ran dense" in caplog.text
    assert logging.getLogger("fxprune").name == caplog.records[-1].name
