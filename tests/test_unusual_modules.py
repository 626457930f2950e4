"""Modules that people write and no architecture of transformers has: pruned exactly, or left whole, or refused with a word."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from fxprune.api import PruneResult
from fxprune.errors import PlanError, UsageError

X = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
KINDS = ["ffn", "channels", "other", "hidden"]


class Net(nn.Module):
    """An FFN, and what subclasses do with it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Any:
        """``[..., 8]`` to ``[..., 8]``."""
        return self.down(F.relu(self.up(x)))


class Of(Net):
    """The FFN's output handed to a function."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        """Whatever the function makes of it."""
        return self.function(super().forward(x))


class Inner(Net):
    """A function between the FFN's maps."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        """``[..., 8]`` to ``[..., 8]``."""
        return self.down(self.function(self.up(x)))


def halved(model: nn.Module, inputs: Any = X, **options: Any) -> PruneResult:
    settings: dict[str, Any] = {"recipe": "magnitude", "units": 0.5, "kinds": KINDS, "widths": "per-layer"}
    for module in model.modules():
        module.training = False  # a graph of torch.export refuses eval()
    return fxprune.prune(model, inputs=inputs, **{**settings, **options})


def test_verify_compares_every_kind_of_output() -> None:
    for function in (
        lambda h: h.argmax(-1),
        lambda h: h > 0,
        lambda h: torch.fft.rfft(h, dim=1),
        lambda h: h.masked_fill(h > 0, float("-inf")),
        lambda h: (h, h[:, :, :0], h.argmax(-1)),
    ):
        model = Of(function)
        result = halved(model, kinds=["ffn"])
        assert result.report.verify is not None
        assert result.report.verify.ok
        kept = torch.zeros(32).index_fill_(0, result.plan.keep["ffn"], 1)
        hook = model.up.register_forward_hook(lambda module, args, out, kept=kept: out * kept)
        expected, found = model(X), result.graph_module(X)
        hook.remove()
        torch.testing.assert_close(found, expected)


def test_wrong_integers_are_found() -> None:
    model = Of(lambda h: (h.argmax(-1), h > 0))
    gm = fxprune.trace(model.eval(), X)
    plan = halved(model, graph=gm, kinds=["ffn"]).plan
    other = Of(lambda h: ((h + torch.arange(8)).argmax(-1), h > 0)).eval()
    assert 0 < fxprune.verify(gm, other, plan, X).max_rel_error <= 1


@pytest.mark.parametrize(
    "function",
    [
        lambda h: torch.log2(h.abs()),
        lambda h: torch.lgamma(h.abs()),
        lambda h: torch.logit(h.abs() / (1 + h.abs())),
        lambda h: torch.remainder(h, h.abs()),
        lambda h: torch.addcdiv(h, h, h),
    ],
)
def test_what_is_undefined_where_a_unit_is_gone_is_no_error(function: Callable[[Tensor], Tensor]) -> None:
    assert halved(Inner(function)).plan.counts() == {"ffn": 16}


def test_a_convolution_with_a_computed_weight() -> None:
    class Computed(Net):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(12, 32, 3))

        def forward(self, x: Tensor) -> Tensor:
            return F.conv1d(torch.sigmoid(self.up(x)).transpose(1, 2), self.weight + 1.0)

    assert list(halved(Computed()).plan.counts().values()) == [16]


def test_the_norm_of_a_decomposed_graph() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 8)).eval()
    gm: Any = torch.export.export(model, (X,)).run_decompositions().module()
    groups = fxprune.find_groups(gm)
    name = next(n for n in groups if groups[n].prunable)
    plan = fxprune.PrunePlan.from_keep(groups, {name: range(8)})
    assert fxprune.verify(gm, fxprune.rewrite(gm, plan), plan, (X,)).max_rel_error < 1e-6


def test_strides_reach_into_other_units_memory() -> None:
    class Windows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both, self.one, self.other = nn.Linear(8, 32), nn.Linear(16, 8), nn.Linear(16, 8)

        def forward(self, x: Tensor) -> Tensor:
            q, k = torch.tanh(self.both(x)).chunk(2, -1)
            a, b, c = q.stride()
            return self.one(q.as_strided((3, 2, 4, 16), (a, b * 2, b, c))).mean((1, 2)) + self.other(k).mean(1)

    groups = fxprune.find_groups(fxprune.trace(Windows().eval(), torch.randn(3, 8, 8)))
    assert groups["ffn"].reason == "read by strides"
    assert not any(group.prunable for group in groups.values())


def test_control_flow_is_carried_over() -> None:
    class Branching(Net):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            h = torch.cond(h.sum() > 0, lambda t: torch.relu(self.second(t)), lambda t: self.second(t) * 2, (h,))
            out: Tensor = super().forward(h)
            return out

    model = Branching()
    result = halved(model, kinds=["ffn"])
    kept = torch.zeros(32).index_fill_(0, result.plan.keep["ffn"], 1)
    model.up.register_forward_hook(lambda module, args, out: out * kept)
    for x in (X, -X, torch.randn(2, 4, 8)):
        with torch.no_grad():
            torch.testing.assert_close(result.graph_module(x), model(x))
            torch.testing.assert_close(copy.deepcopy(result.graph_module)(x), model(x))


def test_symbolic_groups_and_shapes() -> None:
    class Normed(Net):
        def forward(self, x: Tensor) -> Tensor:
            h = self.up(x)
            out: Tensor = self.down(F.layer_norm(h, h.shape[1:]))
            return out

    class Modulated(nn.Module):
        """As many groups as images, as in StyleGAN2."""

        def __init__(self) -> None:
            super().__init__()
            self.weight, self.style, self.out = nn.Parameter(torch.randn(32, 3, 3, 3)), nn.Linear(3, 3), nn.Conv2d(32, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            n = x.shape[0]
            w = (self.weight[None] * (self.style(x.mean((2, 3)))[:, None, :, None, None] + 1)).reshape(-1, 3, 3, 3)
            out: Tensor = self.out(F.conv2d(x.reshape(1, -1, 8, 8), w, padding=1, groups=n).reshape(n, 32, 8, 8))
            return out

    for model, x in ((Normed(), X[:2]), (Modulated(), torch.randn(2, 3, 8, 8))):
        result = halved(model, x)
        assert list(result.plan.counts().values()) == [16]
        assert result.graph_module(torch.cat([x, x])).shape[0] == 4


def test_a_module_within_a_linear_keeps_its_buffers() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.tensor(0.5))

        def forward(self, x: Tensor) -> Tensor:
            return x * cast(Tensor, self.scale)

    class Scaled(nn.Linear):
        def __init__(self, before: int, after: int) -> None:
            super().__init__(before, after)
            self.observer = Scale()

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.observer(x), self.weight, self.bias)

    result = halved(nn.Sequential(Scaled(8, 16), nn.ReLU(), Scaled(16, 8)))
    assert result.form == "module"
    assert "0.observer.scale" in dict(result.graph_module.named_buffers())


def test_a_row_for_padding_among_rows_that_go() -> None:
    class Quantiser(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.book, self.down = nn.Linear(8, 12), nn.Embedding(16, 12, padding_idx=14), nn.Linear(12, 8)

        def forward(self, x: Tensor) -> Tensor:
            z, w = self.up(x), self.book.weight
            far = z.pow(2).sum(-1, keepdim=True) - 2 * z @ w.t() + w.pow(2).sum(-1)
            out: Tensor = self.down(self.book(far.argmin(-1)))
            return out

    result = halved(Quantiser())
    assert result.plan.counts()["book.other"] == 8
    assert "Padding_idx must be within num_embeddings" in (result.report.note or "")


def test_what_cannot_be_copied_is_pruned_as_a_graph() -> None:
    model = Net()
    model.last = torch.ones(1, requires_grad=True) * 2
    result = halved(model)
    assert result.form == "graph"
    assert "this Net cannot be copied: Only Tensors created explicitly by the user" in (result.report.note or "")


def test_parameters_of_other_natures() -> None:
    class Complex(Net):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, dtype=torch.complex64))

        def forward(self, x: Tensor) -> Any:
            return super().forward(x) * self.weight.abs().sum()

    model = Complex()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([1, 2j, 0.5, -0.1j]))
    result = halved(model)
    assert result.plan.counts() == {"ffn": 16, "other": 2}
    assert result.plan.keep["other"].tolist() == [0, 1]
    broken = Complex()
    with torch.no_grad():
        broken.weight[0] = float("nan")
    with pytest.raises(fxprune.errors.FxPruneError, match="parameter 'weight' holds NaN or infinite values"):
        halved(broken)
    with pytest.raises(UsageError, match=r"parameter '0.weight' has no size yet: run this Sequential once before it is traced"):
        halved(nn.Sequential(nn.LazyLinear(16), nn.Linear(16, 8)))


def test_a_graph_that_was_traced_again_has_no_old_groups() -> None:
    symbolic = torch.fx.symbolic_trace(Net().eval())
    fxprune.find_groups(symbolic)
    assert halved(symbolic).plan.counts() == {"ffn": 16}
    gm = fxprune.trace(Net().eval(), X)
    fxprune.find_groups(gm)
    for node in gm.graph.nodes:
        if node.target is torch.ops.aten.relu.default:
            node.target, node.args = torch.ops.aten.flip.default, (node.args[0], [-1])
    gm.recompile()
    with pytest.raises((UsageError, PlanError), match="flip"):
        halved(gm)
    again = halved(halved(Net()).graph_module)
    assert again.plan.counts() == {"ffn": 8}
    assert again.graph_module.get_parameter("up.weight").shape[0] == 8


def test_a_part_under_autocast_is_said(caplog: pytest.LogCaptureFixture) -> None:
    class Cast(Net):
        def forward(self, x: Tensor) -> Any:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return super().forward(x)

    with caplog.at_level(logging.WARNING, logger="fxprune"):
        fxprune.trace(Cast().eval(), X)
    assert "the model's forward runs a part under torch.autocast (bfloat16); the graph computes it" in caplog.text


def test_inputs_of_a_verification() -> None:
    model = Net().eval()
    gm = fxprune.trace(model, {"x": X})
    plan = halved(model, {"x": X}, graph=gm).plan
    small = fxprune.rewrite(gm, plan)
    errors = [fxprune.verify(gm, small, plan, inputs).max_rel_error for inputs in ({"x": X}, (X,), X)]
    assert errors[0] == errors[1] == errors[2] < 1e-6
    for inputs, said in (
        ({"y": X}, "the graph takes x, and the inputs have no 'x'"),
        (torch.randn(2, 5, 9), r"x.shape\[2\] is 9, and the graph was traced for 8: trace the model"),
        (5, "inputs are a mapping of keyword arguments, a tuple or one tensor, got 5"),
    ):
        with pytest.raises(UsageError, match=said):
            fxprune.verify(gm, small, plan, inputs)

    class Nested(Net):
        def forward(self, batch: Any) -> Any:
            return super().forward(batch["x"])

    assert halved(Nested(), {"batch": {"x": X}}).plan.counts() == {"ffn": 16}


def test_arguments_of_another_type() -> None:
    for option, said in (
        ({"protect_first": 1.5}, "protect_first must be a whole number of at least 0, got 1.5"),
        ({"floor": "a"}, "floor is a share of units"),
        ({"kinds": {"ffn": "x"}}, "a pace must be 0 or a positive number"),
        ({"tolerance": "a"}, "tolerance is the largest relative error, a number from 0 on, got 'a'"),
        ({"tolerance": float("nan")}, "tolerance is the largest relative error, a number from 0 on, got nan"),
        ({"graph": 5}, "graph= is what fxprune.trace returned, not 5"),
    ):
        with pytest.raises(UsageError, match=said):
            halved(Net(), **option)
    with pytest.raises(UsageError, match=r"a rule names the operators that it is for, such as torch.ops.aten.mm, got none"):
        fxprune.rule()
    with pytest.raises(UsageError, match=r"such as torch.ops.aten.mm, got 5"):
        fxprune.rule(5)


def test_units_that_are_none() -> None:
    groups = fxprune.find_groups(fxprune.trace(Net().eval(), X))
    for units in (None, "abc", {1, 2}, [1.7]):
        with pytest.raises(PlanError, match="the units of group 'ffn' must be whole numbers, got "):
            fxprune.PrunePlan.from_keep(groups, {"ffn": units})  # type: ignore[dict-item]
    for gone, said in (
        ([1.7], "the units of group 'ffn' must be whole numbers, got float32"),
        ([-1], "a unit of group 'ffn' is out of range: it has 32"),
        ([99], "a unit of group 'ffn' is out of range: it has 32"),
    ):
        with pytest.raises(PlanError, match=said):
            fxprune.PrunePlan.from_removed(groups, {"ffn": torch.tensor(gone)})
    with pytest.raises(PlanError, match="the plan names a prune group 'fnn' that the model does not have"):
        fxprune.PrunePlan.from_removed(groups, {"fnn": torch.tensor([1])})
