"""Capture: every kind of module goes through one door, and what comes out is canonical."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import fxprune
from fxprune.errors import CaptureError, UsageError

from .zoo import build, tokens


class InPlace(nn.Module):
    """Changes a tensor in place, whole and in part."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        """Up, two in-place changes, down."""
        h = self.up(x)
        h.relu_()
        h[:, :4].mul_(2.0)
        return self.down(h)


class Regions(nn.Module):
    """Has a no-grad region, an autocast region, and a constant subgraph."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(5, 8)

    def forward(self, x: Tensor) -> Tensor:
        """Regions around elementwise work."""
        with torch.no_grad():
            scale = torch.arange(8).float().add(1).reciprocal()
        with torch.autocast(device_type="cpu", enabled=False):
            return self.a(x) * scale


def test_a_traced_model_computes_the_same_at_any_batch_and_sequence() -> None:
    model = build("llama")
    gm = fxprune.trace(model, {"input_ids": tokens(1, 7)})
    for shape in ((1, 3), (2, 9), (5, 17)):
        ids = tokens(*shape)
        with torch.no_grad():
            torch.testing.assert_close(gm(input_ids=ids).logits, model(ids).logits)


def test_parameters_are_the_models_own_under_their_names_and_tied_ones_are_one() -> None:
    model = build("llama")
    gm = fxprune.trace(model, {"input_ids": tokens(2, 5)})
    own = dict(model.named_parameters())
    traced = dict(gm.named_parameters())
    assert traced.keys() == own.keys()
    assert all(traced[n] is own[n] for n in own)
    assert gm.meta["aliases"] == {"lm_head.weight": "model.embed_tokens.weight"}


def test_the_graph_is_canonical() -> None:
    gm = fxprune.trace(build("llama"), {"input_ids": tokens(2, 5)})
    targets = [n.target for n in gm.graph.nodes if n.op == "call_function"]
    assert not any("_assert" in str(t) or "wrap_with" in str(t) for t in targets)
    assert not any(getattr(t, "_schema", None) is not None and t._schema.is_mutable for t in targets)
    assert {n.op for n in gm.graph.nodes} == {"placeholder", "get_attr", "call_function", "output"}


def test_in_place_operators_are_functionalised() -> None:
    model, x = InPlace(), torch.randn(3, 6)
    gm = fxprune.trace(model, x)
    assert not any(n.target._schema.is_mutable for n in gm.graph.nodes if hasattr(n.target, "_schema"))
    torch.testing.assert_close(gm(x), model(x))


def test_regions_are_inlined_and_constants_folded() -> None:
    model, x = Regions(), torch.randn(3, 5)
    gm = fxprune.trace(model, x)
    names = [str(n.target) for n in gm.graph.nodes if n.op == "call_function"]
    assert not any("wrap_with" in n or "arange" in n or "reciprocal" in n for n in names)
    assert not any(isinstance(m, GraphModule) for n, m in gm.named_modules() if n)
    torch.testing.assert_close(gm(x), model(x))


def test_a_no_grad_region_inside_grad_mode_is_inlined_and_gradients_still_flow() -> None:
    model, x = Regions(), torch.randn(3, 5)
    fxprune.trace(model, x)(x).sum().backward()
    assert model.a.weight.grad is not None


def test_a_meta_model_traces_and_has_the_same_groups() -> None:
    from transformers import LlamaForCausalLM

    real: Any = build("llama")
    with torch.device("meta"):
        meta = LlamaForCausalLM(real.config).eval()
    ids = {"input_ids": tokens(2, 5)}
    a, b = (fxprune.find_groups(fxprune.trace(m, ids)) for m in (real, meta))
    assert [(g.name, g.kind, g.size, g.prunable) for g in a.values()] == [(g.name, g.kind, g.size, g.prunable) for g in b.values()]


def test_a_symbolically_traced_module_goes_through_the_same_door() -> None:
    net = nn.Sequential(nn.Linear(4, 10), nn.GELU(), nn.Linear(10, 3))
    x = torch.randn(2, 4)
    for module in (net, torch.fx.symbolic_trace(net)):
        groups = fxprune.find_groups(fxprune.trace(module, (x,)))
        assert {g.kind: g.size for g in groups.values() if g.prunable} == {"ffn": 10}


def test_the_model_is_left_as_it_was() -> None:
    model: Any = build("llama")
    model.train()
    model.model.layers[0].eval()
    model.config.use_cache = True
    fxprune.trace(model, {"input_ids": tokens(2, 5)})
    assert model.training
    assert not model.model.layers[0].training
    assert model.config.use_cache is True


def test_float_inputs_keep_their_feature_dimension_and_free_batch_and_sequence() -> None:
    gm = fxprune.trace(nn.Linear(4, 3), torch.randn(2, 5, 4))
    assert gm(torch.randn(7, 9, 4)).shape == (7, 9, 3)


def test_failure_names_the_line_and_what_to_try() -> None:
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1 if x.sum().item() > 0 else x - 1

    with pytest.raises(CaptureError) as caught:
        fxprune.trace(Branches(), torch.randn(3, 4))
    text = str(caught.value)
    assert "could not trace Branches at " in text
    assert "test_capture.py" in text
    assert "return x + 1 if x.sum().item() > 0 else x - 1" in text
    assert "Try: " in text


@pytest.mark.parametrize(
    ("model", "inputs", "message"),
    [
        ("llama", {"input_ids": torch.zeros(1, 2)}, "expected a torch.nn.Module to trace, got str"),
        (nn.Linear(2, 2), {}, "inputs hold no tensor: pass for example {'input_ids': ids}"),
        (nn.Linear(2, 2), 3, "inputs must be a mapping, a tuple or a tensor, got int"),
    ],
)
def test_bad_input_is_named(model: Any, inputs: Any, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        fxprune.trace(model, inputs)
    assert str(caught.value) == message


class Chunked(nn.Module):
    """Adds up chunks of four tokens with a triangle whose size torch.export takes for a constant, as some state-space models do."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(5, 8)

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        """Pad to whole chunks, then mix the chunks."""
        x = nn.functional.pad(self.a(x), (0, 0, 0, (4 - x.shape[1] % 4) % 4))
        x = x if shift is None else x + shift[:, None]
        sums = x.unflatten(1, (-1, 4)).sum(2)
        count = torch.empty(1, 1, sums.shape[1]).expand(-1, -1, int(sums.shape[1]))
        return torch.ones(count.shape[-1], len(sums[0])).tril() @ sums


def test_a_trace_that_holds_for_one_size_only_is_made_again(caplog: pytest.LogCaptureFixture) -> None:
    model = Chunked()
    gm = fxprune.trace(model, (torch.randn(2, 7, 5),))
    assert "the trace holds for one size only" in caplog.text
    x = torch.randn(3, 7, 5)  # the batch is still symbolic
    torch.testing.assert_close(gm(x), model(x))
    with pytest.raises(RuntimeError, match=r"shape\[1\]"):
        gm(torch.randn(3, 11, 5))


def test_a_forward_that_changes_a_buffer_is_told(caplog: pytest.LogCaptureFixture) -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            cast(Tensor, self.calls).add_(1)
            return cast(Tensor, self.down(torch.relu(self.up(x))))

    fxprune.trace(Counter(), (torch.randn(2, 8),))
    assert "the model's forward changes its buffers (calls); the graph reads them as they are now" in caplog.text


def test_the_order_of_keywords_does_not_hide_it(caplog: pytest.LogCaptureFixture) -> None:
    fxprune.trace(Chunked(), {"shift": torch.randn(2, 8), "x": torch.randn(2, 7, 5)})
    assert "the trace holds for one size only" in caplog.text


def test_attention_that_nobody_reads_is_gone() -> None:
    class Unread(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.q = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            q = self.q(y).unflatten(-1, (2, 4)).transpose(1, 2)
            nn.functional.scaled_dot_product_attention(q, q, q)
            return y

    gm = fxprune.trace(Unread(), (torch.randn(2, 5, 8),))
    assert not any("attention" in str(n.target) for n in gm.graph.nodes)
    assert [n.target for n in gm.graph.nodes if n.op == "get_attr"] == ["a.weight", "a.bias"]
