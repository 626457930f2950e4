"""Operators without a rule, rules that users write, and rules that are broken."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule

from fxprune import rules
from fxprune.errors import UsageError
from fxprune.passes.inference import infer
from fxprune.rules import Call, Resize, registered, rule, rule_for
from fxprune.spaces import Space

from .rule_operator import mismatch, one_op
from .rule_program import choices, difference
from .rule_recipes import Case, Recipe

aten: Any = torch.ops.aten


@torch.library.custom_op("fxprune_test::fold", mutates_args=())
def fold(x: Tensor, weight: Tensor, width: int) -> Tensor:
    """``x[.., n]`` times ``weight[n]``, summed over neighbours: ``[.., n / width]``. A size argument that must be resized."""
    out: Tensor = (x * weight).unflatten(-1, (x.shape[-1] // width, width)).sum(-1)
    return out


@fold.register_fake
def _(x: Tensor, weight: Tensor, width: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // width))


def _fold_case() -> Case:
    return Case(torch.ops.fxprune_test.fold.default, (Recipe((3, 12)), Recipe((12,)), 4), {})


@pytest.fixture
def own_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    """A private copy of the registry: what a test registers is gone after it."""
    monkeypatch.setattr(rules.registry, "_RULES", dict(rules.registry._RULES))


def test_an_operator_without_a_rule_pins_everything() -> None:
    program = one_op(_fold_case())
    assert program.free() == []
    assert len(program.axes()) == 5
    assert all("there is no rule at fold_default (fxprune_test.fold)" in a.pins for a in program.axes())


@pytest.mark.usefixtures("own_rules")
def test_a_users_rule_works_with_both_halves() -> None:
    target = torch.ops.fxprune_test.fold.default

    @rule(target)
    def fold_rule(call: Call) -> list[Space]:
        x, weight = call["x"], call["weight"]
        outer, inner = call.split_product(call.unify(x[-1], weight[0]), [call.shape[-1], call["width"]])
        call.notes["inner"] = inner
        return [*x[:-1], outer]

    @fold_rule.resize
    def _(call: Resize) -> dict[str, Any]:
        return {"width": call.kept(call.notes["inner"])}

    assert rule_for(target) is fold_rule
    assert registered()[target] is fold_rule
    program = one_op(_fold_case())
    assert sorted(a.size for a in program.free()) == [3, 3, 4]
    for choice in choices(program.free(), torch.Generator().manual_seed(0)):
        through = all(map(program.passes_through, choice))
        assert mismatch(_fold_case(), program, choice, through) == ""


@pytest.mark.usefixtures("own_rules")
def test_a_users_rule_goes_before_the_pointwise_tag_and_the_packet() -> None:
    @rule(aten.add.Tensor)
    def mine(call: Call) -> Any:
        return call.give_up("my add is special")[0]

    assert rule_for(aten.add.Tensor) is mine
    program = one_op(Case(aten.add.Tensor, (Recipe((3, 4)), Recipe((3, 4))), {}))
    assert program.free() == []


def test_a_misspelt_way_with_numbers_is_an_error() -> None:
    with pytest.raises(UsageError, match="'escape', 'pass' or 'own', not 'passes'"):
        rule("mylib::misspelt", numbers="passes")


def _raises(call: Call) -> Any:
    call.notes["group"] = call["x"][0]
    raise KeyError("forgotten")


@pytest.mark.usefixtures("own_rules")
@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (_raises, "the rule failed (KeyError)"),
        (lambda call: call["x"].dims, "the rule does not cover this case"),
        (lambda call: call["x"].dims[:1], "the rule does not cover this case"),
        (lambda call: [call["x"].dims, call["x"].dims], "the rule does not cover this case"),
        (lambda call: None, "the rule failed (TypeError)"),
    ],
    ids=["raises", "wrong sizes", "wrong rank", "too many outputs", "nothing"],
)
def test_a_broken_rule_pins_and_leaves_the_call_alone(broken: Callable[[Call], Any], reason: str) -> None:
    made = rule(torch.ops.fxprune_test.fold.default)(broken)

    @made.resize
    def _(call: Resize) -> dict[str, Any]:
        raise AssertionError("a call that gave up must not be resized")

    program = one_op(_fold_case())
    assert program.free() == []
    assert all(any(p.startswith(reason) for p in a.pins) for a in program.axes())
    assert difference(program.run_pruned({}), program.run(program.inputs)) == ""


def test_an_output_that_is_no_tensor_keeps_its_place() -> None:
    x, weight = torch.randn(2, 3, 6), torch.randn(6)
    _, mean, scale = aten.native_layer_norm(x, [6], weight, weight, 1e-5)
    graph = Graph()
    given_nodes = [graph.placeholder(n) for n in ("grad", "x", "mean", "scale", "weight", "bias")]
    for node, tensor in zip(given_nodes, (x, x, mean, scale, weight, weight), strict=True):
        node.meta["val"] = tensor
    grad, values, *rest = given_nodes
    back = graph.call_function(aten.native_layer_norm_backward.default, (grad, values, [6], *rest, [True, False, True]))
    back.meta["val"] = aten.native_layer_norm_backward(x, x, [6], mean, scale, weight, weight, [True, False, True])
    assert back.meta["val"][1] is None
    bias = graph.call_function(operator.getitem, (back, 2))
    bias.meta["val"] = back.meta["val"][2]
    graph.output(bias)
    found = infer(GraphModule(nn.Module(), graph))
    assert found.values["getitem"].shape == [6]
