"""More than one graph, or one that takes and gives more than a model does: pruned soundly, or dense and said."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

import fxprune
from fxprune.backend import Backend, GraphRecord

from .compiling import Case, Feed, case, feeds, untraced
from .zoo import build, tokens

__all__ = ["untraced"]  # a fixture


def close(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def pruned(graphs: list[GraphRecord]) -> set[str]:
    return {n for g in graphs for n in g.pruned}


def dense(graphs: list[GraphRecord]) -> dict[str, str]:
    return {n: reason for g in graphs for n, reason in g.dense.items()}


def test_graph_breaks_between_whole_groups_cost_nothing() -> None:
    made = feeds(3, breaks=True)
    compiled, graphs = made.compile()
    with torch.no_grad():
        for shape in ((2, 4, 6), (3, 7, 6)):
            x = torch.randn(shape)
            close(compiled(x), made.small(x))
    assert pruned(graphs) == set(made.plan.keep)
    assert not dense(graphs)


def test_frames_of_one_module_class_are_pruned_each_with_its_own_units() -> None:
    """Dynamo would call the first layer's graph for all layers: parameters are inputs to it."""
    made = feeds(3)
    for block in made.model.blocks:  # type: ignore[union-attr]
        block.register_forward_pre_hook(lambda module, args: torch._dynamo.graph_break())
    compiled, graphs = made.compile()
    x = torch.randn(2, 4, 6)
    with torch.no_grad():
        close(compiled(x), made.small(x))
        close(compiled(x), made.small(x))
    assert pruned(graphs) == set(made.plan.keep)


class Cut(nn.Module):
    """A graph break inside of the first feed-forward block; the second is whole."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Feed(), Feed()

    def forward(self, x: Tensor) -> Tensor:
        """Two blocks."""
        h = self.first.widen(x)
        torch._dynamo.graph_break()
        return self.second(self.first.down(h))


def test_a_group_that_a_graph_break_cuts_runs_dense_in_both_graphs(caplog: pytest.LogCaptureFixture) -> None:
    made = case(Cut(), (torch.randn(3, 5, 6),), kinds=["ffn"])
    compiled, graphs = made.compile()
    x = torch.randn(2, 4, 6)
    with torch.no_grad():
        result = compiled(x)
        only = fxprune.find_groups(gm := fxprune.trace(made.model, (x,)))
        part = fxprune.PrunePlan.from_keep(only, {"second.ffn": made.plan.keep["second.ffn"]})
        close(result, fxprune.rewrite(gm, part)(x))
    assert pruned(graphs) == {"second.ffn"}
    assert [g.dense for g in graphs] == [
        {"first.ffn": "the graph holds only a part of it (1 of its parameters are in another graph)"},
        {"first.ffn": "the graph holds only a part of it (2 of its parameters are in another graph)"},
    ]
    assert [r.levelno for r in caplog.records] == [logging.WARNING] * 2
    assert caplog.messages[0] == (
        f"graph {graphs[0].graph}: 1 of the plan's groups run dense here: first.ffn: "
        "the graph holds only a part of it (1 of its parameters are in another graph)"
    )


class Shared(nn.Module):
    """One block for two calls: one whole, and one that a graph break cuts, in this order or the other."""

    def __init__(self, *, whole_first: bool) -> None:
        super().__init__()
        self.feed, self.whole_first = Feed(), whole_first

    def forward(self, x: Tensor) -> Tensor:
        """Both calls."""
        if self.whole_first:
            x = self.feed(x)
        h = self.feed.widen(x)
        torch._dynamo.graph_break()
        x = self.feed.down(h)
        if not self.whole_first:
            torch._dynamo.graph_break()
            x = self.feed(x)
        return x


def test_parameters_that_another_graph_uses_dense_are_dense_here_too() -> None:
    made = case(Shared(whole_first=False), (torch.randn(3, 5, 6),), kinds=["ffn"])
    compiled, graphs = made.compile()
    x = torch.randn(2, 4, 6)
    with torch.no_grad():
        close(compiled(x), made.model(x))
    assert not pruned(graphs)
    assert dense(graphs[-1:]) == {"feed.ffn": "another graph uses its parameters too, and cannot prune them"}


class Twice(nn.Module):
    """A whole use of a block in the first graph, a cut one behind a graph break."""

    def __init__(self) -> None:
        super().__init__()
        self.feed = Feed()

    def forward(self, x: Tensor) -> Tensor:
        """Whole, break, cut."""
        x = self.feed(x)
        torch._dynamo.graph_break()
        h = self.feed.widen(x)
        torch._dynamo.graph_break()
        return self.feed.down(h)


def test_a_result_that_would_be_neither_dense_nor_pruned_is_refused() -> None:
    made = case(Twice(), (torch.randn(3, 5, 6),), kinds=["ffn"])
    compiled, _ = made.compile()
    with torch.no_grad(), pytest.raises(BackendCompilerFailed) as caught:
        compiled(torch.randn(2, 4, 6))
    text = str(caught.value)
    assert "FxPruneError: 'feed.ffn' is pruned in frame " in text
    assert "uses its parameters too but has to run it dense (the graph holds only a part of it" in text
    assert "a result of both would be neither. Leave it out of the plan, or remove the graph break" in text


@dataclass
class Cached:
    """A Llama, plans for its key-value heads and FFN, and the part of that which a cache leaves.

    Attributes:
        made: With the whole plan.
        half: The rewritten trace with the FFN alone.
        ffn: Names of the FFN groups.
    """

    made: Case
    half: Any
    ffn: set[str]


@pytest.fixture(scope="module")
def cached() -> Cached:
    """One layer."""
    made = case(build("llama", num_hidden_layers=1), {"input_ids": tokens(2, 7)}, kinds=["ffn", "kv_heads"])
    gm = fxprune.trace(made.model, {"input_ids": tokens(2, 7)})
    ffn = {n: u for n, u in made.plan.keep.items() if n.endswith("ffn")}
    return Cached(made, fxprune.rewrite(gm, fxprune.PrunePlan.from_keep(fxprune.find_groups(gm), ffn)), set(ffn))


def test_a_cache_that_is_returned_keeps_heads_dense_and_says_what_to_do(cached: Cached, caplog: pytest.LogCaptureFixture) -> None:
    torch._dynamo.reset()
    compiled, graphs = cached.made.compile()
    ids = tokens(3, 11)
    with torch.no_grad():
        out = compiled(ids, use_cache=True)
        close(out.logits, cached.half(input_ids=ids).logits)
        assert out.past_key_values.layers[0].keys.shape[1] == 2
        close(compiled(ids, use_cache=False).logits, cached.made.small(input_ids=ids).logits)
    assert set(graphs[0].dense) == set(cached.made.plan.keep) - cached.ffn
    assert "its units leave the graph (a graph break, or a KV cache: use_cache=False keeps it inside)" in caplog.text
    assert graphs[-1].dense == {}


def test_generate_with_a_static_cache_prunes_what_the_cache_does_not_hold(cached: Cached, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache is an input that the graph writes to."""
    torch._dynamo.reset()
    model: Any = cached.made.model
    backend, ids = Backend(cached.made.plan, inner="eager"), tokens(2, 5)
    expected = ids
    with torch.no_grad():
        for _ in range(4):
            expected = torch.cat([expected, cached.half(input_ids=expected).logits[:, -1].argmax(-1, keepdim=True)], 1)
        monkeypatch.setattr(model, "forward", torch.compile(model.forward, backend=backend))
        found = model.generate(ids, max_new_tokens=4, do_sample=False, cache_implementation="static", pad_token_id=0)
    assert found.tolist() == expected.tolist()
    assert pruned(backend.graphs) == cached.ffn
    reasons = set(dense(backend.graphs).values())
    assert any("its units enter the graph from outside (a graph break, or a KV cache)" in r for r in reasons)


class Writes(nn.Module):
    """Writes to an input, in part or to what it returns, beside a prunable block."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.feed, self.how = Feed(), how
        self.calls: Tensor
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor, memory: Tensor) -> Any:
        """The block, and a note of it in memory."""
        y = self.feed(x)
        if self.how == "buffer":
            self.calls.add_(1)
            return y
        memory[:, :2].copy_(y[:, :2])
        return {"input": y, "returned": (y, memory), "view": (y, memory[:, 1:])}[self.how]


@pytest.mark.parametrize("how", ["input", "returned", "view", "buffer"])
def test_what_a_graph_writes_to_is_written(how: str) -> None:
    torch.manual_seed(0)
    made = case(Writes("input"), (torch.randn(3, 5, 6), torch.zeros(3, 5, 6)), kinds=["ffn"])
    model: Any = made.model
    model.how = how
    compiled, graphs = made.compile()
    x, memory = torch.randn(2, 4, 6), torch.zeros(2, 4, 6)
    with torch.no_grad():
        found = compiled(x, memory)
        expected = made.small(x, torch.zeros(2, 4, 6)) if how in ("input", "returned") else model.feed(x)
    y = found[0] if isinstance(found, tuple) else found
    if how in ("input", "returned"):
        assert pruned(graphs) == {"feed.ffn"}
        close(y, expected[0] if isinstance(expected, tuple) else expected)
    else:
        said = {
            "view": "the graph returns a view of an input that it writes to",
            "buffer": "the graph writes to a buffer or a parameter",
        }
        assert dense(graphs) == {"feed.ffn": said[how]}
        close(y, expected)
    if how == "buffer":
        assert model.calls.item() == 1
    else:
        close(memory[:, :2], y[:, :2])
        assert memory[:, 2:].abs().max() == 0
    if how == "returned":
        assert found[1] is memory


class Notes(nn.Module):
    """Writes what it computes into memory before it reads its input again."""

    def __init__(self) -> None:
        super().__init__()
        self.feed = Feed()

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """``f(x) + x``, where x may be what was written to."""
        y = self.feed(x)
        memory.copy_(2 * y)
        return x + y


@pytest.mark.parametrize("at_first", [True, False])
def test_inputs_that_share_memory_run_dense(at_first: bool, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    made = case(Notes(), (torch.randn(3, 5, 6), torch.zeros(3, 5, 6)), kinds=["ffn"])
    compiled, graphs = made.compile()
    x, base = torch.randn(2, 4, 6), torch.randn(2, 4, 6)
    with torch.no_grad():
        if not at_first:
            close(compiled(x, torch.zeros(2, 4, 6)), made.small(x, torch.zeros(2, 4, 6)))
        y = made.model.get_submodule("feed")(base)
        close(compiled(base[:], base.view(2, 4, 6)), 3 * y)  # x is 2 y by the time it is added
        close(base, 2 * y)
    if at_first:
        assert not pruned(graphs)
        assert list(dense(graphs)) == ["feed.ffn"]
    else:
        said = "a pruned graph was called with inputs that share memory, and it writes to one: it ran dense"
        assert caplog.messages == [said]


def test_neighbours_in_one_buffer_share_no_memory() -> None:
    """As caches of all layers in one tensor."""
    torch.manual_seed(0)
    made = case(Notes(), (torch.randn(3, 5, 6), torch.zeros(3, 5, 6)), kinds=["ffn"])
    compiled, graphs = made.compile()
    both = torch.randn(2, 2, 4, 6)
    with torch.no_grad():
        expected = made.small(both[0].clone(), torch.zeros(2, 4, 6))
        close(compiled(both[0], both[1]), expected)
    assert pruned(graphs) == {"feed.ffn"}


def test_autocast_runs_dense() -> None:
    made, x = feeds(1), torch.randn(2, 4, 6)
    compiled, graphs = made.compile()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        close(compiled(x), made.model(x))
    assert dense(graphs) == {"blocks.0.ffn": "the graph is compiled under autocast"}


class Regions(nn.Module):
    """Has an autocast region."""

    def __init__(self, *, enabled: bool) -> None:
        super().__init__()
        self.feed, self.enabled = Feed(), enabled

    def forward(self, x: Tensor) -> Tensor:
        """The block in the region."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.enabled):
            return self.feed(x)


@pytest.mark.parametrize("enabled", [False, True])
def test_an_autocast_region_runs_dense_unless_it_is_switched_off(enabled: bool) -> None:
    made, x = case(Regions(enabled=False), (torch.randn(3, 5, 6),), kinds=["ffn"]), torch.randn(2, 4, 6)
    made.model.enabled = enabled  # type: ignore[assignment]
    compiled, graphs = made.compile()
    with torch.no_grad():
        close(compiled(x), made.model(x) if enabled else made.small(x))
    assert dense(graphs) == ({"feed.ffn": "the graph has an autocast region"} if enabled else {})


def test_control_flow_runs_dense() -> None:
    class Branch(Feed):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cond(x.sum() > 0, lambda y: y + 1, lambda y: y - 1, (super().forward(x),))

    plain = Feed()
    made = case(plain, (torch.randn(3, 5, 6),), kinds=["ffn"])
    model = Branch()
    model.load_state_dict(plain.state_dict())
    backend = Backend(made.plan, inner="eager")
    x = torch.randn(2, 4, 6)
    with torch.no_grad():
        close(torch.compile(model, backend=backend)(x), model(x))
    assert list(dense(backend.graphs)) == ["ffn"]
    assert "control flow" in dense(backend.graphs)["ffn"]


class Marked(torch.Tensor):
    """A tensor class of somebody else's, as sharded and quantised weights are."""


def test_parameters_of_a_tensor_class_run_dense() -> None:
    made, x = feeds(1), torch.randn(2, 4, 6)
    block: Any = made.model.get_submodule("blocks.0")
    block.up.weight = nn.Parameter(block.up.weight.detach().as_subclass(Marked))
    assert type(block.up.weight) is Marked
    compiled, graphs = made.compile()
    with torch.no_grad():
        close(compiled(x).as_subclass(Tensor), made.model(x).as_subclass(Tensor))
    assert not pruned(graphs)
    assert dense(graphs) == {"blocks.0.ffn": "'blocks.0.up.weight' is a Marked"}
