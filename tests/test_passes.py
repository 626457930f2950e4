"""The passes as passes: in torch's PassManager, under torch.compile, and under PEFT."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassResult
from torch.fx.passes.infra.pass_manager import PassManager

import fxprune
from fxprune.errors import UsageError, VerificationError
from fxprune.passes import DependencyPass, ImportancePass, RewritePass, SelectionPass, VerifyPass
from fxprune.passes.base import Pass

VOCABULARY = 61


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """A tiny GQA Llama with random weights and tied embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=4,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def ids() -> Tensor:
    """Token ids ``[3, 9]``."""
    return torch.randint(0, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def traced(model: nn.Module, ids: Tensor) -> GraphModule:
    """The traced model, without any pass's annotations."""
    return fxprune.trace(model, {"input_ids": ids})


@pytest.fixture(scope="module")
def small(model: nn.Module, ids: Tensor) -> GraphModule:
    """The model with one of two kv heads, one of three query groups and a third of the FFN removed."""
    gm = fxprune.trace(model, {"input_ids": ids})
    groups = fxprune.find_groups(gm)
    plan = fxprune.select(groups, fxprune.score(gm, groups, "l1"), units={"kv_heads": 0.5, "query_groups": 0.34, "ffn": 0.33})
    return fxprune.rewrite(gm, plan)


def test_the_pipeline_runs_in_torchs_pass_manager(traced: GraphModule, ids: Tensor) -> None:
    manager = PassManager(
        [
            DependencyPass(),
            ImportancePass("taylor1", [{"input_ids": ids}]),
            SelectionPass(ratio=0.2),
            RewritePass(),
            VerifyPass(inputs={"input_ids": ids}),
        ]
    )
    result = manager(traced)
    assert result.modified
    done = result.graph_module
    assert done.meta["fxprune.verify"].ok
    assert done.meta["fxprune.plan"].recipe["removed"] == pytest.approx(0.2, abs=0.01)
    assert sum(p.numel() for p in done.parameters()) < sum(p.numel() for p in traced.parameters())


def test_analysis_passes_leave_the_graph_alone_and_annotate_it(traced: GraphModule) -> None:
    before = str(traced.graph)
    result = PassManager([DependencyPass(), ImportancePass("l2"), SelectionPass(units=0.34)])(traced)
    assert not result.modified
    assert str(result.graph_module.graph) == before
    weight = next(n for n in traced.graph.nodes if n.target == "model.layers.0.mlp.up_proj.weight")
    assert weight.meta["fxprune.groups"] == ["model.hidden", "model.layers.0.mlp.ffn"]
    assert weight.meta["fxprune.scores"]["model.layers.0.mlp.ffn"].shape == (40,)


def test_selection_without_scores_and_rewrite_without_a_plan_say_what_is_missing(traced: GraphModule) -> None:
    with pytest.raises(UsageError, match="run an ImportancePass before the SelectionPass"):
        SelectionPass(ratio=0.2)(traced)
    with pytest.raises(UsageError, match="run a SelectionPass before the RewritePass, or give it a plan"):
        RewritePass()(traced)
    with pytest.raises(UsageError, match="give a VerifyPass the dense module and the plan, or run a RewritePass before it"):
        VerifyPass(inputs={})(traced)


def test_a_wrong_rewrite_fails_the_verify_pass(traced: GraphModule, ids: Tensor) -> None:
    groups = fxprune.find_groups(traced)
    plan = fxprune.select(groups, fxprune.score(traced, groups, "l1"), ratio=0.2)
    small = fxprune.rewrite(traced, plan)
    with torch.no_grad():
        small.get_parameter("model.layers.1.mlp.down_proj.weight")[0, 0] += 1.0
    with pytest.raises(VerificationError, match=r"the pruned network differs from its reference \(masked dense\)"):
        VerifyPass(traced, plan, {"input_ids": ids})(small)


def test_ensures_sees_the_resulting_module(traced: GraphModule) -> None:
    seen: list[GraphModule] = []

    class Replace(Pass):
        def call(self, graph_module: GraphModule) -> PassResult:
            return PassResult(GraphModule(graph_module, graph_module.graph), True)

        def ensures(self, graph_module: GraphModule) -> None:
            seen.append(graph_module)

    result = Replace()(traced)
    assert result is not None
    assert seen == [result.graph_module]
    assert seen[0] is not traced


def test_real_submodules_stand_under_their_original_paths(small: GraphModule, model: nn.Module) -> None:
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            assert type(small.get_submodule(path)) is type(module), path
    assert small.get_submodule("lm_head").weight is small.get_submodule("model.embed_tokens").weight
    up: Any = small.get_submodule("model.layers.0.mlp.up_proj")
    assert (up.in_features, up.out_features) == (24, 27)


def test_the_rewritten_module_shares_no_memory_with_the_dense_one(small: GraphModule, model: nn.Module) -> None:
    theirs = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    assert not theirs & {p.untyped_storage().data_ptr() for p in [*small.parameters(), *small.buffers()]}


def test_torch_compile_runs_the_whole_graph_at_new_batch_and_sequence_sizes(small: GraphModule) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(small, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((3, 9), (1, 4), (5, 21)):
        batch = torch.randint(0, VOCABULARY, shape)
        with torch.no_grad():
            torch.testing.assert_close(compiled(input_ids=batch).logits, small(input_ids=batch).logits)


@pytest.mark.slow
def test_torch_compile_with_inductor(small: GraphModule, ids: Tensor) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(small, fullgraph=True, dynamic=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(input_ids=ids).logits, small(input_ids=ids).logits, atol=1e-5, rtol=1e-4)


def test_peft_injects_lora_by_name_and_trains(model: nn.Module, ids: Tensor) -> None:
    from peft import LoraConfig, get_peft_model

    gm = fxprune.trace(model, {"input_ids": ids})
    groups = fxprune.find_groups(gm)
    module: Any = fxprune.rewrite(gm, fxprune.select(groups, fxprune.score(gm, groups, "l1"), ratio=0.2))
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    torch.manual_seed(0)
    lora = get_peft_model(module, LoraConfig(r=4, target_modules=names))
    adapted = {n.split(".lora_A")[0] for n, _ in lora.named_parameters() if "lora_A" in n}
    assert len(adapted) == 2 * len(names)
    optimiser = torch.optim.AdamW([p for p in lora.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        logits = lora(input_ids=ids).logits
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05


def test_a_views_symbolic_size_that_holds_pruned_heads_is_rewritten() -> None:
    """``view(batch * heads, ...)``: the size is an expression in the graph, not an integer."""

    class Folded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.o = (nn.Linear(12, 12) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            b, s, _ = x.shape
            q, k, v = (f(x).view(b, s, 4, 3).transpose(1, 2).reshape(b * 4, s, 3) for f in (self.q, self.k, self.v))
            weights = torch.bmm(q, k.transpose(1, 2)).softmax(-1)
            return self.o(torch.bmm(weights, v).view(b, 4, s, 3).transpose(1, 2).reshape(b, s, 12))

    torch.manual_seed(0)
    gm = fxprune.trace(Folded(), torch.randn(2, 5, 12))
    groups = fxprune.find_groups(gm)
    heads = next(g for g in groups.values() if g.kind == "kv_heads")
    assert heads.size == 4
    plan = fxprune.PrunePlan.from_keep(groups, {heads.name: [0, 3]})
    for shape in ((2, 5, 12), (3, 7, 12)):
        assert fxprune.verify(gm, fxprune.rewrite(gm, plan), plan, torch.randn(shape)).max_rel_error < 1e-6


class Kernelised(nn.Module):
    """Attention whose feature map is not zero at zero: a zeroed parameter does not silence a removed unit."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.q, self.k, self.v = nn.Linear(6, 10), nn.Linear(6, 10), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Linear attention over ``x [batch, length, 6]``."""
        q, k = (nn.functional.elu(f(x)) + 1 for f in (self.q, self.k))
        if self.how == "einsum":
            return torch.einsum("bqd,bkd->bqk", q, k) @ self.v(x)
        if self.how == "linear":
            return nn.functional.linear(q, k[0]) @ self.v(x)
        return q @ k.transpose(1, 2) @ self.v(x)


@pytest.mark.parametrize("how", ["matmul", "einsum", "linear"])
def test_the_reference_contracts_over_the_kept_units(how: str) -> None:
    torch.manual_seed(0)
    gm = fxprune.trace(Kernelised(how), torch.randn(2, 5, 6))
    groups = fxprune.find_groups(gm)
    width = next(g for g in groups.values() if g.size == 10)
    assert width.prunable, width.reason
    plan = fxprune.PrunePlan.from_keep(groups, {width.name: [0, 2, 3, 9]})
    small = fxprune.rewrite(gm, plan)
    x = torch.randn(3, 7, 6)
    report = fxprune.verify(gm, small, plan, x)
    assert report.max_rel_error < 1e-6
    assert report.reference == "masked dense, statistics over the kept units"
    with torch.no_grad():
        small.get_parameter("q.weight").add_(0.1)
    assert not fxprune.verify(gm, small, plan, x).ok
