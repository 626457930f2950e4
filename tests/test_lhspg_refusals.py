"""What LHSPG does not do, and how it says so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fxprune
from fxprune import LHSPG, Selection
from fxprune.errors import PlanError, UsageError

from .shearing import ALL, IDS, fresh, trained


def made(model: Any, gm: Any, groups: Any, **more: Any) -> LHSPG:
    return LHSPG(torch.optim.SGD(trained(model), lr=0.1), gm, groups, **{"ratio": 0.2, **more})


def test_decomposed_adapters() -> None:
    with pytest.raises(UsageError) as error:
        made(*fresh(use_dora=True))
    assert "lora_A.default.weight' and '" in str(error.value)
    assert "are trained and share an axis of 5 with nothing else, as the factors of an adapter do" in str(error.value)
    assert "LHSPG knows plain LoRA of linear maps and embeddings only (W x + s B A x), and not that of " in str(error.value)


def test_adapters_of_three_factors() -> None:
    from peft import AdaLoraConfig, get_peft_model

    from .zoo import build

    config = AdaLoraConfig(
        init_r=4, target_r=2, total_step=10, tinit=1, tfinal=1, target_modules=["up_proj"], task_type="CAUSAL_LM"
    )
    model = get_peft_model(build("llama"), config)
    gm = fxprune.trace(model.eval(), IDS)
    with pytest.raises(UsageError, match=r"share an axis of 4 with nothing else, as the factors of an adapter do"):
        made(model, gm, fxprune.find_groups(gm))


def test_adapters_of_convolutions() -> None:
    """Their rank is an axis of channels."""
    from peft import LoraConfig, get_peft_model

    net = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 16, 3, padding=1), nn.Flatten(2))
    model: Any = get_peft_model(net, LoraConfig(r=4, target_modules=["0", "2"])).eval()
    gm = fxprune.trace(model, (torch.randn(2, 3, 8, 8),))
    said = (
        "'base_model.model.0.lora_A.default.weight' is trained, and its product is not added to what one linear map computes: LHSPG"
    )
    with pytest.raises(UsageError, match=said):
        LHSPG(torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1), gm, fxprune.find_groups(gm), ratio=0.2)


def test_an_optimizer_that_evaluates_again() -> None:
    model, gm, groups = fresh()
    with pytest.raises(UsageError, match="LBFGS evaluates the model again within a step, which LHSPG cannot follow"):
        LHSPG(torch.optim.LBFGS([p for p in model.parameters() if p.requires_grad]), gm, groups, ratio=0.2)


def test_merged_adapters() -> None:
    model, _, _ = fresh(targets=("gate_proj", "up_proj", "down_proj"))
    model.merge_adapter()
    gm = fxprune.trace(model, IDS)
    model.unmerge_adapter()
    with pytest.raises(UsageError, match="the optimizer trains no parameter of this graph: adapters that are merged or disabled"):
        made(model, gm, fxprune.find_groups(gm))


def test_frozen_weights_without_an_adapter() -> None:
    model, gm, groups = fresh(targets=None)
    norm = torch.optim.SGD([model.get_parameter("model.norm.weight")], lr=0.1)
    with pytest.raises(UsageError, match=r"no prune group can be brought to zero; '.*' for one: "):
        LHSPG(norm, gm, groups, ratio=0.2)


def test_a_graph_of_another_model() -> None:
    model, gm, groups = fresh()
    _, other, _ = fresh(targets=("gate_proj", "up_proj"))
    with pytest.raises(UsageError, match=r"the groups were found in another graph: '.*' is not this one's parameter"):
        made(model, other, groups)
    copy = fxprune.trace(fresh(targets=("gate_proj", "up_proj"))[0], IDS)
    with pytest.raises(UsageError, match="a copy of the model has parameters of its own"):
        made(model, copy, fxprune.find_groups(copy))
    assert made(model, gm, groups).left_out


def test_the_meta_device() -> None:
    from .zoo import build

    model = build("llama").to("meta")
    gm = fxprune.trace(model, IDS)
    with pytest.raises(UsageError, match=r"parameter '.*' is on the meta device: there are no weights to train"):
        made(model, gm, fxprune.find_groups(gm))


def test_something_else_than_an_optimizer() -> None:
    model, gm, groups = fresh()
    with pytest.raises(UsageError, match=r"expected a torch\.optim\.Optimizer to wrap, got list"):
        LHSPG(trained(model), gm, groups, ratio=0.2)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup": -1}, "warmup must be a whole number of at least 0, got -1"),
        ({"warmup": 0.5}, "warmup must be a whole number of at least 0, got 0.5"),
        ({"periods": 0}, "periods must be a whole number of at least 1, got 0"),
        ({"period_steps": True}, "period_steps must be a whole number of at least 1, got True"),
        ({"projection": "halfspace"}, "unknown projection 'halfspace'; did you mean 'half-space'?"),
        ({"penalty": -0.1}, "penalty must be 0 or a positive number, got -0.1"),
        ({"penalty": "1e-3"}, "penalty must be a number, got '1e-3'"),
        ({"epsilon": None}, "epsilon must be a number, got None"),
        ({"saliency": ["magnitude"]}, "saliency is a mapping from criterion to weight, got ['magnitude']"),
        ({"epsilon": 1.0}, "epsilon must be at least 0 and below 1, got 1.0"),
        ({"saliency": {"taylor3": 1}}, "unknown saliency criterion 'taylor3'; did you mean 'taylor2'?"),
        ({"ratio": None}, "give either ratio= (share of the base model's parameters) or selection=, not both or neither"),
        (
            {"selection": Selection(ratio=0.1)},
            "give either ratio= (share of the base model's parameters) or selection=, not both or neither",
        ),
        ({"ratio": 1.5}, "a ratio must lie between 0 and 1 (0.2 removes 20 %), got 1.5"),
        (
            {"ratio": None, "selection": Selection(ratio=0.1, ranking="global"), "protect": ("x",)},
            "protect= goes with ratio=; a selection has protect of its own",
        ),
        (
            {"ratio": None, "selection": Selection(ratio=0.1)},
            "a selection by ratio needs ranking='global', not 'local' (a selection by units may have any)",
        ),
        (
            {"ratio": None, "selection": Selection(ratio=0.1, ranking="global", kinds=("ffn", "layers"))},
            "LHSPG brings units to zero, and kind 'layers' drops whole blocks: leave it out",
        ),
        (
            {"ratio": None, "selection": Selection(units=0.1, kinds=("hidden",))},
            (
                "this model has no prunable group of kind hidden ('base_model.model.model.hidden': a norm, a softmax or a router "
                "looks at all of its units); it has ffn, head_dim, kv_heads, layers, query_groups"
            ),
        ),
    ],
)
def test_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as error:
        made(*fresh(), **options)
    assert message in str(error.value)


def test_scores_that_do_not_fit() -> None:
    model, gm, groups = fresh()
    whole = {name: torch.ones(group.size) for name, group in groups.items()}
    name = next(n for n, g in groups.items() if g.kind == "ffn")
    for wrong, message in (
        ({n: s for n, s in whole.items() if n != name}, f"scores= has nothing of group '{name}', which may lose units"),
        ({**whole, name: torch.ones(5)}, f"group '{name}' has 64 units, but its scores have shape (5,)"),
        ({**whole, name: -torch.ones(64)}, f"the scores of group '{name}' must be finite and at least 0"),
        ({**whole, name: torch.full((64,), torch.inf)}, f"the scores of group '{name}' must be finite and at least 0"),
    ):
        with pytest.raises(UsageError) as error:
            made(model, gm, groups, scores=wrong)
        assert message in str(error.value)
    with pytest.raises(UsageError, match="scores= stand in place of saliency: leave saliency= out"):
        made(model, gm, groups, scores=whole, saliency={"cosine": 1})


def test_a_target_that_cannot_be_met_is_refused_before_any_training() -> None:
    with pytest.raises(PlanError, match=r"a ratio of 60\.0% cannot be reached"):
        made(*fresh(targets=ALL[:4]), ratio=0.6)
    with pytest.raises(PlanError, match="nothing would be removed: the share is smaller than the smallest unit"):
        made(*fresh(), ratio=1e-4)


def test_protections_that_match_nothing() -> None:
    with pytest.raises(UsageError, match="protect='nowhere' matches no group and no block"):
        made(*fresh(), protect=("nowhere",))


def test_a_plan_before_anything_is_zero() -> None:
    optimizer = made(*fresh(), warmup=7)
    with pytest.raises(UsageError, match="no unit is zero after step 0: the first period begins after 7 steps"):
        optimizer.plan()


def test_sharded_parameters() -> None:
    """FSDP2 puts distributed tensors in the parameters' place, FSDP flat ones: neither holds a unit whole."""
    from torch._C._distributed_c10d import HashStore
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, gm, groups = fresh()
    said = r"the parameters are sharded \(FSDP\), and LHSPG needs every process to hold them whole: use DistributedDataParallel"
    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        sharded = torch.nn.Linear(4, 4)
        fully_shard(sharded, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(UsageError, match=said):
            LHSPG(torch.optim.SGD(sharded.parameters(), lr=0.1), gm, groups, ratio=0.2)
    finally:
        torch.distributed.destroy_process_group()
    flat = torch.nn.Parameter(torch.zeros(4))
    flat._is_flat_param = True  # type: ignore[attr-defined]
    with pytest.raises(UsageError, match=said):
        LHSPG(torch.optim.SGD([*trained(model), flat], lr=0.1), gm, groups, ratio=0.2)
