"""What a recovery trains, and the merge of its adapters, against peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from fxprune.errors import UsageError
from fxprune.recovery.adapters import merged, prepare, target_layers
from fxprune.recovery.adapters import trained as trained_parameters
from fxprune.recovery.settings import Recovery

from .closeness import relative
from .recovering import logits, losses, pruned, trained, weights
from .zoo import build, tokenizer


def with_random_adapters(model: nn.Module, settings: Recovery) -> nn.Module:
    """The student with adapters that are not zero, in evaluation mode."""
    student = prepare(model, settings, wide=True)
    with torch.no_grad():
        for parameter in trained_parameters(student).values():
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    return student.eval()


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon_new", "gpt_neox"])
@pytest.mark.parametrize("rslora", [False, True])
def test_merged_weights_are_adapter_and_model(family: str, rslora: bool) -> None:
    """The reference is peft: its forward pass with the adapter, and its own merge."""
    model = build(family)
    settings = Recovery(rank=4, alpha=6.0, rslora=rslora)
    student = with_random_adapters(model, settings)
    made = merged(model, {n: p.detach() for n, p in trained_parameters(student).items()}, settings)
    assert type(made) is type(model)
    assert not [m for m in made.modules() if "peft" in type(m).__module__]
    assert not hasattr(made, "peft_config")
    assert relative(logits(student), logits(made)) < 1e-5
    assert relative(logits(model), logits(made)) > 1e-2, "the adapter did nothing: no test"
    for module in student.modules():
        if hasattr(module, "lora_A"):
            module.merge()  # type: ignore[operator]
    assert relative(logits(student), logits(made)) < 1e-5


def test_the_graphs_merge_is_the_eager_models() -> None:
    result, settings = pruned(), Recovery()
    student = with_random_adapters(result.graph_module, settings)
    tensors = {n: p.detach() for n, p in trained_parameters(student).items()}
    graph, eager = merged(result.graph_module, tensors, settings), merged(cast(nn.Module, result.model), tensors, settings)
    assert relative(logits(student), logits(graph)) < 1e-5
    assert relative(logits(graph), logits(eager)) < 1e-5
    assert set(target_layers(result.graph_module, settings)) == set(target_layers(cast(nn.Module, result.model), settings))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("graph", [True, False])
def test_all_means_every_linear_layer_but_the_output_embedding(tied: bool, graph: bool) -> None:
    result = pruned(tied=tied)
    model = result.graph_module if graph else cast(nn.Module, result.model)
    found = target_layers(model, Recovery())
    assert {name.rpartition(".")[2] for name in found} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    assert len(found) == 14
    reference = get_peft_model(build("llama", tied=tied), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    assert set(found) == {n.removeprefix("base_model.model.") for n, m in reference.named_modules() if hasattr(m, "lora_A")}


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (("q_proj",), ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]),
        (("model.layers.1.mlp.*",), [f"model.layers.1.mlp.{n}_proj" for n in ("gate", "up", "down")]),
        (("mlp.up_proj", "lm_head"), ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj", "lm_head"]),
    ],
    ids=str,
)
def test_patterns_of_targets(patterns: tuple[str, ...], expected: list[str]) -> None:
    assert target_layers(build("llama", tied=False), Recovery(targets=patterns)) == expected


def test_targets_that_cannot_be() -> None:
    with pytest.raises(UsageError) as caught:
        target_layers(build("llama"), Recovery(targets=("lm_head",)))
    assert str(caught.value) == (
        "the target 'lm_head' shares its weight with 'model.embed_tokens.weight': merging an adapter into it would change both; "
        "leave it out, or untie them first"
    )
    with pytest.raises(UsageError, match=r"the target 'qproj' matches no linear layer; did you mean 'q_proj'\?"):
        target_layers(build("llama"), Recovery(targets=("qproj",)))
    with pytest.raises(UsageError, match=r"this Embedding has no linear layer that could take an adapter; .* method=full"):
        target_layers(nn.Embedding(3, 2), Recovery())


def test_the_target_is_not_changed(text: Path) -> None:
    model = build("llama")
    frozen = model.get_parameter("model.layers.0.mlp.up_proj.weight").requires_grad_(False)
    model.train()
    before = weights(model)
    for method in ("lora", "full"):
        result = trained(model, str(text), tokenizer=tokenizer(), method=method)
        assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
        assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["model.layers.0.mlp.up_proj.weight"]
        assert model.training
        assert not frozen.requires_grad
        assert model.config.use_cache is True  # type: ignore[union-attr]
        assert not result.model.training
        assert [n for n, p in result.model.named_parameters() if not p.requires_grad] == ["model.layers.0.mlp.up_proj.weight"]
        assert result.model.config.use_cache is True  # type: ignore[union-attr]
        assert [n for n, _ in result.model.named_parameters()] == list(before)
        assert result.model.get_parameter("model.embed_tokens.weight") is cast(Any, result.model).lm_head.weight
        layers = [m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
        adapters = 16 * sum(m.in_features + m.out_features for m in layers)
        assert result.report.trained_parameters == (adapters if method == "lora" else result.report.parameters - frozen.numel())


def test_full_training_changes_every_parameter(text: Path) -> None:
    before = weights(cast(nn.Module, pruned().model))
    result = trained(pruned(), str(text), method="full")
    assert not [n for n, p in result.model.named_parameters() if torch.equal(p, before[n])]
    assert result.report.trained_parameters == result.report.parameters == sum(p.numel() for p in before.values())
    assert losses(result)[-1] < losses(result)[0]
    frozen = build("gpt2").requires_grad_(False)
    with pytest.raises(
        UsageError, match=r"every parameter of this GPT2LMHeadModel is frozen \(requires_grad=False\): thaw some, or"
    ):
        trained(frozen, str(text), tokenizer=tokenizer(), method="full")


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("mixtral", {}, "of the parameters are in no linear layer, so that no adapter trains them ('model.layers.0.mlp.experts."),
        ("mixtral", {"targets": "q_proj"}, ""),
        ("mixtral", {"method": "full"}, ""),
        ("gpt2", {}, ""),  # its Conv1D is a linear layer
        ("llama", {"tied": False}, ""),
    ],
)
def test_what_no_adapter_reaches(name: str, options: dict[str, Any], said: str, text: Path) -> None:
    model = build(name, **{n: v for n, v in options.items() if n == "tied"})
    settings = {n: v for n, v in options.items() if n != "tied"}
    notes = trained(model, str(text), tokenizer=tokenizer(), max_steps=1, **settings).report.notes
    found = [note for note in notes if "no adapter trains them" in note]
    assert len(found) == bool(said)
    assert all(said in note for note in found)
