"""Other people's passes before, between and after ours, in torch's PassManager: what must last lasts, and numbers are equal."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx import Graph, GraphModule
from torch.fx.experimental.const_fold import FoldedGraphModule, split_const_subgraphs
from torch.fx.passes.dialect.common.cse_pass import CSEPass
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.fx.passes.infra.pass_base import PassBase, PassResult
from torch.fx.passes.infra.pass_manager import PassManager, pass_result_wrapper
from torch.fx.passes.shape_prop import ShapeProp

import fxprune
from fxprune.errors import UsageError
from fxprune.passes import CompensationPass, DependencyPass, ImportancePass, RewritePass, SelectionPass, VerifyPass
from fxprune.passes.rewrite import DENSE

from .closeness import relative
from .zoo import build, tokens

INPUTS = {"input_ids": tokens(2, 16)}
OURS = ("DependencyPass", "ImportancePass", "SelectionPass", "RewritePass")


@pytest.fixture(scope="module")
def base() -> GraphModule:
    """A traced Llama with tied embeddings."""
    return fxprune.trace(build("llama"), INPUTS)


@pytest.fixture
def traced(base: GraphModule) -> GraphModule:
    made = copy.deepcopy(base)
    made.meta = {key: value for key, value in made.meta.items() if not key.startswith("fxprune.")}
    return made


def ours() -> list[Any]:
    return [DependencyPass(), ImportancePass("l1"), SelectionPass(ratio=0.2), RewritePass()]


@pytest.fixture(scope="module")
def usual(base: GraphModule) -> dict[str, Any]:
    """What our passes alone make of it: logits, and units kept."""
    small = PassManager(ours())(base).graph_module
    with torch.no_grad():
        return {"logits": small(input_ids=tokens(3, 9, seed=5)).logits, "keep": small.meta["fxprune.plan"].counts()}


def split(gm: GraphModule) -> Any:
    """Constants split off, and not computed yet; torch warns of attributes that it is about to set itself."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Failed to fetch module|Attempted to insert a get_attr Node", UserWarning)
        return split_const_subgraphs(gm)


class FoldConstants(PassBase):
    """torch.fx's constant folding; ``gm.meta`` is lost."""

    def call(self, graph_module: GraphModule) -> PassResult:
        folded = split(graph_module)
        folded.run_folding()
        return PassResult(folded, True)


class FoldInPlace(PassBase):
    """Inductor's constant folding: in place, constants become buffers of new names."""

    def call(self, graph_module: GraphModule) -> PassResult:
        from torch._inductor.constant_folding import constant_fold

        constant_fold(graph_module)
        return PassResult(graph_module, True)


class Shapes(PassBase):
    """ShapeProp writes ``node.meta["tensor_meta"]``."""

    def call(self, graph_module: GraphModule) -> PassResult:
        ShapeProp(graph_module).propagate(INPUTS["input_ids"])
        assert all("tensor_meta" in n.meta for n in graph_module.graph.nodes if n.op == "call_function" and "clone" in n.name)
        return PassResult(graph_module, False)


class FakeShapes(PassBase):
    """FakeTensorProp writes ``node.meta["val"]``, with fixed sizes."""

    def call(self, graph_module: GraphModule) -> PassResult:
        FakeTensorProp(graph_module, FakeTensorMode(allow_non_fake_inputs=True)).propagate(INPUTS["input_ids"])
        return PassResult(graph_module, False)


class DeadCode(PassBase):
    """Dead code elimination, with some to eliminate."""

    def call(self, graph_module: GraphModule) -> PassResult:
        node = next(n for n in graph_module.graph.nodes if n.op in ("call_function", "call_module") and n.users)
        with graph_module.graph.inserting_after(node):
            graph_module.graph.call_function(torch.ops.aten.relu.default, (node,))
        assert graph_module.graph.eliminate_dead_code()
        graph_module.recompile()
        return PassResult(graph_module, True)


class Copy(PassBase):
    """A pass that builds a module anew: no ``gm.meta``, and nodes of other names."""

    def call(self, graph_module: GraphModule) -> PassResult:
        graph = Graph()
        made = graph.graph_copy(graph_module.graph, {})
        graph.output(made)
        graph.set_codegen(graph_module.graph._codegen)
        for number, node in enumerate(graph.nodes):
            if node.op in ("call_function", "call_module"):
                node.name = f"n{number}"
        return PassResult(GraphModule(graph_module, graph), True)


class Annotate(PassBase):
    """A small quantiser: linear maps shall be int8, as a tag, and as torchao's quantisers say it: what each input node shall be."""

    def call(self, graph_module: GraphModule) -> PassResult:
        for node in linears(graph_module):
            node.meta["custom"] = {**node.meta.get("custom", {}), "quantise": "int8"}
            node.meta["quantization_annotation"] = {"input_qspec_map": dict.fromkeys(node.all_input_nodes, "int8")}
        return PassResult(graph_module, False)


def tagged(gm: GraphModule) -> list[torch.fx.Node]:
    return [node for node in gm.graph.nodes if node.meta.get("custom", {}).get("quantise") == "int8"]


def annotated(gm: GraphModule) -> list[torch.fx.Node]:
    """Nodes with an annotation, which must be of their own inputs in their own graph."""
    found = [node for node in gm.graph.nodes if "quantization_annotation" in node.meta]
    for node in found:
        assert node.meta["quantization_annotation"] == {"input_qspec_map": dict.fromkeys(node.all_input_nodes, "int8")}
        assert all(source.graph is gm.graph for source in node.meta["quantization_annotation"]["input_qspec_map"])
    return found


def linears(gm: GraphModule) -> list[torch.fx.Node]:
    def linear(node: torch.fx.Node) -> bool:
        if node.op == "call_module":
            return isinstance(gm.get_submodule(str(node.target)), nn.Linear)
        return node.target is torch.ops.aten.linear.default

    return [node for node in gm.graph.nodes if linear(node)]


def forget_nodes(gm: GraphModule) -> None:
    """All ``node.meta`` goes."""
    for node in gm.graph.nodes:
        node.meta.clear()


def forget_module(gm: GraphModule) -> None:
    """All ``gm.meta`` goes."""
    gm.meta.clear()


THEIRS: dict[str, Callable[[], Any]] = {
    "fold": FoldConstants,
    "fold-in-place": FoldInPlace,
    "shapes": Shapes,
    "fake-shapes": FakeShapes,
    "dead-code": DeadCode,
    "cse": CSEPass,
    "annotate": Annotate,
    "copy": Copy,
    "forget-nodes": lambda: pass_result_wrapper(forget_nodes),
    "forget-module": lambda: pass_result_wrapper(forget_module),
}
LOSE_MODULE_META = ("fold", "cse", "copy", "forget-module")


def logits(gm: GraphModule) -> Tensor:
    with torch.no_grad():
        ids = tokens(3, 9, seed=5)
        out = gm(ids) if isinstance(gm, FoldedGraphModule) else gm(input_ids=ids)
    return out[0] if isinstance(out, tuple) else out.logits  # CSEPass forgets what the module returns: leaves come out


@pytest.mark.parametrize("name", [n for n in THEIRS if n != "forget-nodes"])
def test_before_all_of_ours(name: str, traced: GraphModule, usual: dict[str, Any]) -> None:
    if name == "fake-shapes":  # fixed sizes: such a trace runs at these only
        small = PassManager([THEIRS[name](), *ours()])(traced).graph_module
        assert small.meta["fxprune.plan"].counts() == usual["keep"]
        return
    small = PassManager([THEIRS[name](), *ours()])(traced).graph_module
    assert small.meta["fxprune.plan"].counts() == usual["keep"]
    assert relative(usual["logits"], logits(small)) < 1e-6


@pytest.mark.parametrize("name", THEIRS)
@pytest.mark.parametrize("place", [1, 2, 3])
def test_between_ours(name: str, place: int, traced: GraphModule, usual: dict[str, Any]) -> None:
    """A plan is as it would be without them, or the pass that misses something names the pass that must run again."""
    passes = ours()
    manager = PassManager([*passes[:place], THEIRS[name](), *passes[place:]])
    if name in LOSE_MODULE_META and place > 1:
        with pytest.raises(Exception, match=f"when running the '{OURS[place]}' pass") as caught:
            manager(traced)
        assert isinstance(caught.value.__cause__, UsageError)
        missing = ("run an ImportancePass before the SelectionPass", "run a SelectionPass before the RewritePass")[place - 2]
        assert missing in str(caught.value.__cause__)
        return
    small = manager(traced).graph_module
    assert small.meta["fxprune.plan"].counts() == usual["keep"]
    assert relative(usual["logits"], logits(small)) < 1e-6


@pytest.mark.parametrize("name", ["fold", "fold-in-place", "shapes", "dead-code", "cse", "annotate", "forget-nodes"])
def test_after_all_of_ours(name: str, traced: GraphModule, usual: dict[str, Any]) -> None:
    small = PassManager([*ours(), VerifyPass(inputs=INPUTS), THEIRS[name]()])(traced).graph_module
    assert relative(usual["logits"], logits(small)) < 1e-6
    if name not in LOSE_MODULE_META:
        assert small.meta["fxprune.verify"].ok
    else:
        with pytest.raises(UsageError, match="give a VerifyPass the dense module and the plan, or run a RewritePass before it"):
            VerifyPass(inputs=INPUTS)(small)


def test_lost_node_meta_prunes_nothing_and_says_so(traced: GraphModule, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("fxprune.passes.dependency.log.warning", lambda text, *values: said.append(text % values))
    forget_nodes(traced)
    groups = fxprune.find_groups(traced)
    assert not [g for g in groups.values() if g.prunable]
    (line,) = said
    count = sum(n.op not in ("get_attr", "output") for n in traced.graph.nodes)
    assert line == (
        f"{count} of {count} nodes have no example value (node.meta['val']), and what they touch is pinned: "
        "run a FakeTensorProp, or trace the model again"
    )


def test_a_fake_tensor_prop_brings_the_groups_back(traced: GraphModule, base: GraphModule) -> None:
    forget_nodes(traced)
    FakeShapes()(traced)
    found, expected = fxprune.find_groups(traced), fxprune.find_groups(base)
    sizes = {n: g.size for n, g in expected.items() if g.prunable}
    assert {n: g.size for n, g in found.items() if g.prunable} == sizes


def test_constants_that_are_not_computed_yet_are_asked_for(traced: GraphModule) -> None:
    folded = split(traced)
    with pytest.raises(UsageError, match=r"are not computed yet: call run_folding\(\) on it first"):
        DependencyPass()(folded)


def test_tags_last_and_what_depends_on_sizes_does_not(traced: GraphModule) -> None:
    passes = [Shapes(), Annotate(), *ours()]
    small = PassManager(passes)(traced).graph_module
    assert tagged(small) == linears(small)
    assert len(tagged(small)) == len(linears(traced)) == 15
    assert all(node.op == "call_module" for node in tagged(small))
    assert not [n for n in small.graph.nodes if {"val", "tensor_meta"} & set(n.meta)]
    assert all("nn_module_stack" in node.meta for node in tagged(small))


@pytest.mark.parametrize("place", range(5))
def test_annotations_of_nodes_stay_on_their_graph(place: int, traced: GraphModule, usual: dict[str, Any]) -> None:
    """Tags go along through the rewrite (the fourth pass); what names nodes is of the graph that it was written on."""
    passes = ours()
    small = PassManager([*passes[:place], Annotate(), *passes[place:]])(traced).graph_module
    before = place < 4
    assert tagged(traced) == annotated(traced) == (linears(traced) if before else [])
    assert tagged(small) == linears(small)
    assert annotated(small) == ([] if before else linears(small))
    Annotate()(small)
    assert annotated(small) == linears(small)
    assert relative(usual["logits"], logits(small)) < 1e-6


def test_only_what_the_documentation_names_lasts(traced: GraphModule) -> None:
    tags: dict[str, Any] = {"custom": {"mine": 1}, "partitioner_tag": "part", "quantization_tag": "int8", "source_fn_stack": []}
    for node in traced.graph.nodes:
        node.meta |= {**tags, "mine": 1, "quantization_annotation": {node: "int8"}}
    small = PassManager(ours())(traced).graph_module
    kept = {key for node in small.graph.nodes for key in node.meta}
    assert kept == {*tags, "nn_module_stack", "stack_trace", "torch_fn"}
    for node in linears(small):
        assert {key: node.meta[key] for key in tags} == tags


def test_a_graph_that_changed_behind_the_groups_is_looked_at_again(traced: GraphModule) -> None:
    """An operator that keeps its dimension whole, put in after the groups were found: the plan must know."""
    groups = fxprune.find_groups(traced)
    scores = fxprune.score(traced, groups, "l1")
    plan = fxprune.select(groups, scores, units={"ffn": 0.25})
    node = next(n for n in traced.graph.nodes if n.target is torch.ops.aten.silu.default)
    with traced.graph.inserting_after(node):
        turned = traced.graph.call_function(torch.ops.aten.flip.default, (node, [-1]))
    node.replace_all_uses_with(turned, lambda user: user is not turned)
    turned.meta["val"] = node.meta["val"]
    traced.recompile()
    with pytest.raises(fxprune.errors.PlanError, match=r"group 'model\.layers\.0\.mlp\.ffn' cannot be pruned"):
        RewritePass(plan)(traced)
    ImportancePass("l1")(traced)
    SelectionPass(units={"ffn": 0.25}, widths="per-layer")(traced)
    assert set(traced.meta["fxprune.plan"].keep) == {"model.layers.1.mlp.ffn"}
    report = fxprune.verify(traced, fxprune.rewrite(traced, traced.meta["fxprune.plan"]), traced.meta["fxprune.plan"], INPUTS)
    assert report.max_rel_error < 1e-6


def test_a_copy_is_pruned_with_its_own_weights(traced: GraphModule) -> None:
    """``copy.deepcopy`` takes ``gm.meta`` along, and with it groups that hold the first module's tensors."""
    DependencyPass()(traced)
    twin = copy.deepcopy(traced)
    with torch.no_grad():
        twin.get_parameter("model.norm.weight").mul_(3)
    ImportancePass("l1")(twin)
    SelectionPass(ratio=0.2)(twin)
    small = fxprune.rewrite(twin, twin.meta["fxprune.plan"])
    torch.testing.assert_close(small.get_parameter("model.norm.weight"), twin.get_parameter("model.norm.weight"))
    assert fxprune.verify(twin, small, twin.meta["fxprune.plan"], INPUTS).max_rel_error < 1e-6


class Twice(nn.Module):
    """One weight read by two calls, with a bias and without."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x) + nn.functional.linear(x, self.up.weight)))


def test_a_weight_that_is_read_in_two_ways_is_one_module_once() -> None:
    """The second call is none of the module, which adds a bias."""
    gm = fxprune.trace(Twice(), torch.randn(3, 6))
    groups = fxprune.find_groups(gm)
    (width,) = (g for g in groups.values() if g.size == 10)
    plan = fxprune.PrunePlan.from_keep(groups, {width.name: [1, 2, 7]})
    small = fxprune.rewrite(gm, plan)
    assert fxprune.verify(gm, small, plan, torch.randn(5, 6)).max_rel_error < 1e-6
    assert [n.op for n in small.graph.nodes if "linear" in n.name or n.target == "up"] == ["call_module", "call_function"]


def test_compensation_between_their_passes(traced: GraphModule) -> None:
    batches = [{"input_ids": tokens(4, 16)}]
    manager = PassManager([Annotate(), *ours(), VerifyPass(inputs=INPUTS), CompensationPass(batches), DeadCode()])
    small = manager(traced).graph_module
    assert small.meta["fxprune.compensation"].maps
    assert small.meta[DENSE]() is traced
    with torch.no_grad():
        wide, narrow = traced(input_ids=tokens(4, 16)).logits, small(input_ids=tokens(4, 16)).logits
    assert wide.shape == narrow.shape
