"""Recovery: what is trained, the losses against plain torch, peft and transformers' Trainer, the merge, and what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments

import fxprune
from fxprune.data import Batches, load_examples
from fxprune.errors import CheckpointError, FxPruneError, UsageError
from fxprune.recovery import loop
from fxprune.recovery.adapters import merged, prepare, target_layers
from fxprune.recovery.adapters import trained as trained_parameters
from fxprune.recovery.memory import Sizes, fitting, token_bytes
from fxprune.recovery.objective import Objective, divergence, hidden_distance, inputs_of, keeps_apart
from fxprune.recovery.run import recover
from fxprune.recovery.settings import Recovery

from .recovering import SMALL, logits, losses, pruned, trained, uneven, weights, write_instructions, write_text
from .test_cli import tokenizer
from .zoo import VOCABULARY, build, tokens


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.jsonl")


def unpacked(text: Path, **options: Any) -> Batches:
    """Batches as a recovery with these settings makes them."""
    examples = load_examples(str(text), tokenizer(), cutoff=SMALL["cutoff"], completion_only=False, seed=0, **options)
    train, _ = examples.split(len(examples) // 10, 0)
    return Batches(train, batch_size=SMALL["batch_size"], length=SMALL["cutoff"], packing=False, pad_id=2, seed=0)


def error(expected: Tensor, actual: Tensor) -> float:
    return float((expected - actual).abs().max() / expected.abs().max())


# --- training ---------------------------------------------------------------------------------------------------------------------


def test_the_eager_model_and_its_graph_learn_the_same(text: Path) -> None:
    result = pruned()
    eager = trained(result, str(text), packing="off")
    graph = trained(result.graph_module, str(text), packing="off", tokenizer=tokenizer())
    assert losses(eager) == pytest.approx(losses(graph), abs=1e-4)
    assert eager.report.validation == [pytest.approx(v, rel=1e-4) for v in graph.report.validation]
    assert error(logits(eager.model), logits(graph.model)) < 1e-4
    assert losses(eager)[-1] < losses(eager)[0] - 0.1
    before, after = cast(tuple[float, float], eager.report.perplexity)
    assert after < before


def test_training_is_what_transformers_trainer_does(text: Path, tmp_path: Path) -> None:
    """Loss, accumulation, clipping, AdamW and the schedule, step by step, on the same adapters and batches."""
    batches = unpacked(text)
    how: dict[str, Any] = {"schedule": "linear", "warmup": 3, "micro_batch_size": 2, "weight_decay": 0.1, "validation_samples": 0}
    result = trained(pruned(), batches.examples, packing="off", **how)
    assert (result.report.best_step, result.report.validation, result.report.perplexity) == (8, [], None)
    settings = Recovery(**result.report.settings)
    student = prepare(cast(nn.Module, pruned().model), settings, wide=True)
    rows = []
    for step in range(settings.max_steps or 0):
        batch = batches.batch(*divmod(step, len(batches)))
        rows += [{k: v[i : i + 2] for k, v in batch.items()} for i in range(0, len(batch["labels"]), 2)]

    class Fed(Trainer):
        def get_train_dataloader(self) -> Any:
            return DataLoader(cast(Any, rows), batch_size=None)

    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=settings.max_steps or 0,
        learning_rate=settings.lr,
        lr_scheduler_type="linear",
        warmup_steps=3,
        gradient_accumulation_steps=3,
        weight_decay=0.1,
        max_grad_norm=1.0,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        logging_nan_inf_filter=False,
    )
    trainer = Fed(model=cast(PreTrainedModel, student), args=arguments, train_dataset=cast(Any, rows))
    trainer.train()
    theirs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses(result) == pytest.approx(theirs, abs=2e-4)  # it rounds what it logs to four places
    final = {n: p.detach() for n, p in trained_parameters(student).items()}
    assert error(logits(merged(cast(nn.Module, pruned().model), final, settings)), logits(result.model)) < 1e-4


def test_micro_batches_do_not_matter(text: Path) -> None:
    whole, parts = trained(pruned(), str(text)), trained(pruned(), str(text), micro_batch_size=1)
    assert (whole.report.choices["micro_batch_size"], parts.report.choices["micro_batch_size"]) == (6, 1)
    assert losses(whole) == pytest.approx(losses(parts), abs=1e-5)


def test_the_seed_decides_everything(text: Path) -> None:
    torch.manual_seed(1)
    first = trained(pruned(), str(text), dropout=0.2)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    again, other = trained(pruned(), str(text), dropout=0.2), trained(pruned(), str(text), dropout=0.2, seed=1)
    assert losses(first) == losses(again)
    assert losses(first) != losses(other)
    assert all(torch.equal(a, b) for a, b in zip(weights(first.model).values(), weights(again.model).values(), strict=True))
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state()), "the caller's random state was touched"


def test_packed_rows_give_the_loss_of_their_examples(text: Path) -> None:
    """The first step's loss over all packed rows is the mean over all tokens of the examples, each run alone."""
    result = trained(pruned(), str(text), batch_size=500, max_steps=1, validation_samples=0, micro_batch_size=7, lr=1e-9)
    assert result.report.choices["packing"] is True
    examples = load_examples(str(text), tokenizer(), cutoff=24)
    model: Any = pruned().model
    total, count = 0.0, 0
    with torch.no_grad():
        for i in range(len(examples)):
            ids, labels = examples[i]
            total += float(functional.cross_entropy(model(input_ids=ids[None]).logits[0, :-1], labels[1:], reduction="sum"))
            count += len(labels) - 1
    assert losses(result) == pytest.approx([total / count], rel=1e-5)
    assert result.report.tokens == examples.tokens


@pytest.mark.parametrize(("family", "apart"), [("llama", True), ("gpt2", True), ("mpt", False)])
def test_packing_only_where_examples_are_kept_apart(family: str, apart: bool, text: Path) -> None:
    model = build(family).eval()
    model.config.use_cache = False  # type: ignore[union-attr]
    assert keeps_apart(model, VOCABULARY) is apart
    result = trained(model, str(text), tokenizer=tokenizer(), max_steps=1)
    assert result.report.choices["packing"] is apart
    notes = (
        []
        if apart
        else ["not packed: the MptForCausalLM does not keep packed examples apart (its attention reads no position_ids)"]
    )
    assert result.report.notes == notes
    if not apart:
        with pytest.raises(
            UsageError, match=r"packing=on: this MptForCausalLM does not keep packed examples apart .* say packing=off"
        ):
            trained(model, str(text), tokenizer=tokenizer(), packing="on")


def test_completions_only(tmp_path: Path) -> None:
    data = str(write_instructions(tmp_path / "alpaca.jsonl"))
    options: dict[str, Any] = {"cutoff": 60, "length": 60, "max_steps": 1, "validation_samples": 0, "batch_size": 100}
    answers, whole = (trained(pruned(), data, completion_only=c, **options) for c in (True, False))
    assert losses(answers) != losses(whole)
    examples = load_examples(data, tokenizer(), cutoff=60, completion_only=True)
    model: Any = pruned().model
    with torch.no_grad():
        found = [(model(input_ids=i[None]).logits[0, :-1], w[1:]) for i, w in map(examples.__getitem__, range(len(examples)))]
    total = sum(float(functional.cross_entropy(x, y, reduction="sum")) for x, y in found)
    assert losses(answers) == pytest.approx([total / sum(int((y != -100).sum()) for _, y in found)], rel=1e-5)


@pytest.mark.parametrize("changed", [{"gradient_checkpointing": "on"}, {"compile": "on"}], ids=str)
def test_memory_and_speed_change_no_loss(changed: dict[str, str], text: Path) -> None:
    expected, found = trained(pruned(), str(text)), trained(pruned(), str(text), **changed)
    assert found.report.choices[next(iter(changed))] is True
    assert losses(found) == pytest.approx(losses(expected), abs=1e-4)


def test_half_precision_is_close(text: Path) -> None:
    expected, found = trained(pruned(), str(text)), trained(pruned(), str(text), precision="bf16")
    assert (expected.report.choices["precision"], found.report.choices["precision"]) == ("fp32", "bf16")
    assert losses(found) == pytest.approx(losses(expected), abs=0.03)
    assert losses(found) != losses(expected)


def test_a_model_in_half_precision_keeps_its_dtype(text: Path) -> None:
    model = build("llama", tied=False).to(torch.bfloat16)
    for method in ("lora", "full"):
        result = trained(model, str(text), tokenizer=tokenizer(), method=method, lr=1e-2)
        assert {p.dtype for p in result.model.parameters()} == {torch.bfloat16}
        changed = [n for n, p in result.model.named_parameters() if not torch.equal(p, model.get_parameter(n))]
        assert changed
        assert losses(result)[-1] < losses(result)[0]


@pytest.mark.parametrize(
    ("limits", "steps"),
    [
        ({"max_steps": 4, "epochs": 9}, 4),
        ({"max_steps": None, "epochs": 1}, 18),
        ({"max_steps": None, "epochs": 0.5}, 9),
        ({"max_steps": None, "max_tokens": 560}, 7),
        ({"max_steps": None, "max_tokens": 1}, 1),
    ],
    ids=str,
)
def test_how_long_it_runs(limits: dict[str, Any], steps: int, text: Path) -> None:
    """108 examples of about 13.4 tokens in batches of 6: 18 steps of about 80 tokens."""
    result = trained(pruned(num_hidden_layers=1), str(text), packing="off", validation_every=0, **limits)
    assert (result.report.steps, result.report.stopped) == (steps, "all steps done")
    assert len(result.report.history["lr"]) == len(losses(result)) == steps
    assert [v["step"] for v in result.report.validation] == [0, steps]
    assert result.report.tokens == result.report.history["tokens"][-1]


STILL: dict[str, Any] = {"schedule": "constant", "warmup": 0, "validation_every": 1}


def test_the_best_weights_are_kept_and_training_stops_early(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = trained(pruned(), str(text), **{**STILL, "max_steps": 2})
    script = iter([9.0, 8.0, 7.0, 7.5, 7.0, math.nan])
    monkeypatch.setattr(loop.Training, "perplexity", lambda *_: next(script))
    result = trained(pruned(), str(text), patience=2, **STILL)
    assert result.report.stopped == "validation perplexity has not fallen for 2 measurements"
    assert (result.report.steps, result.report.best_step, result.report.perplexity) == (4, 2, (9.0, 7.0))
    assert torch.equal(logits(result.model), logits(expected.model))


def test_training_that_only_harms_changes_nothing(text: Path) -> None:
    result = trained(pruned(), str(text), lr=1.0, method="full", patience=0, **STILL)
    assert (result.report.steps, result.report.best_step) == (8, 0)
    assert torch.equal(logits(result.model), logits(cast(nn.Module, pruned().model)))


def test_validation_text_is_measured_as_plain_torch_does(text: Path, tmp_path: Path) -> None:
    other = write_text(tmp_path / "held.jsonl", rows=12, seed=7)
    # lines of fewer than 13 words and other starts: nothing in common by more than chance
    result = trained(pruned(), str(text), validation=load_examples(str(other), tokenizer(), cutoff=24))
    examples = load_examples(str(other), tokenizer(), cutoff=24)
    model: Any = result.model
    with torch.no_grad():
        each = [
            functional.cross_entropy(model(input_ids=i[None]).logits[0, :-1], w[1:], reduction="none")
            for i, w in map(examples.__getitem__, range(len(examples)))
        ]
    after = cast(tuple[float, float], result.report.perplexity)[1]
    assert after == pytest.approx(math.exp(float(torch.cat(each).mean())), rel=1e-4)
    assert cast(dict[str, Any], result.report.data["validation"])["examples"] == 12


# --- what is trained, and the merge -----------------------------------------------------------------------------------------------


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
    assert error(logits(student), logits(made)) < 1e-5
    assert error(logits(model), logits(made)) > 1e-2, "the adapter did nothing: no test"
    for module in student.modules():
        if hasattr(module, "lora_A"):
            module.merge()  # type: ignore[operator]
    assert error(logits(student), logits(made)) < 1e-5


def test_the_graphs_merge_is_the_eager_models() -> None:
    result, settings = pruned(), Recovery()
    student = with_random_adapters(result.graph_module, settings)
    tensors = {n: p.detach() for n, p in trained_parameters(student).items()}
    graph, eager = merged(result.graph_module, tensors, settings), merged(cast(nn.Module, result.model), tensors, settings)
    assert error(logits(student), logits(graph)) < 1e-5
    assert error(logits(graph), logits(eager)) < 1e-5
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


# --- distillation -----------------------------------------------------------------------------------------------------------------


def test_the_divergence_is_torchs() -> None:
    ours, theirs = torch.randn(2, 5, 11), torch.randn(2, 5, 11)
    counted = torch.tensor([[True, True, False, True, True], [False, True, True, True, False]])
    expected = sum(
        9.0 * float(nn.KLDivLoss(reduction="sum")((ours[i, j] / 3).log_softmax(-1), (theirs[i, j] / 3).softmax(-1)))
        for i in range(2)
        for j in range(5)
        if counted[i, j]
    )
    assert float(divergence(ours, theirs, counted, 3.0)) == pytest.approx(expected, rel=1e-5)


def test_the_distance_of_hidden_states() -> None:
    ours, theirs = (tuple(torch.randn(2, 6, 4) for _ in range(3)) for _ in range(2))
    counted = torch.tensor([[True, True, False, True, True], [False, True, True, True, False]])
    each = [((a - b) ** 2).sum(-1) / (b**2).sum(-1) for a, b in zip(ours[1:], theirs[1:], strict=True)]
    expected = (each[0][:, :-1][counted].sum() + each[1][:, :-1][counted].sum()) / 2
    assert float(hidden_distance(ours, theirs, counted)) == pytest.approx(float(expected), rel=1e-5)


def test_a_loss_with_everything_in_it(text: Path) -> None:
    """(1 - w) CE + w T^2 KL + h distance, put together by hand from two stock models."""
    student, teacher = cast(nn.Module, pruned().model), build("llama")
    settings = Recovery(distill_weight=0.25, distill_temperature=2.0, hidden_weight=0.5)
    batch = unpacked(text).batch(0, 1)
    found = Objective(student, inputs_of(student), teacher, settings)(batch)
    given: dict[str, Any] = {
        "input_ids": batch["input_ids"],
        "attention_mask": batch["attention_mask"],
        "output_hidden_states": True,
    }
    a, b = student(**given), teacher(**given)
    labels = batch["labels"][:, 1:]
    ce = functional.cross_entropy(a.logits[:, :-1].transpose(1, 2), labels, reduction="sum")
    kl = functional.kl_div((a.logits / 2).log_softmax(-1), (b.logits / 2).softmax(-1), reduction="none").sum(-1)[:, :-1]
    kept = labels != -100
    far = [((x - y) ** 2).sum(-1) / (y**2).sum(-1) for x, y in zip(a.hidden_states[1:], b.hidden_states[1:], strict=True)]
    expected = 0.75 * ce + 0.25 * 4 * kl[kept].sum() + 0.5 * sum(f[:, :-1][kept].sum() for f in far) / 2
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-4)


def test_learning_from_the_dense_model(text: Path) -> None:
    """The divergence falls; the teacher stays as it was, and may be a directory or a graph."""
    teacher = build("llama").train()
    before = weights(teacher)
    options: dict[str, Any] = {"distill_weight": 1.0, "distill_temperature": 2.0, "packing": "off"}
    result = trained(pruned(units=None, ratio=0.5), str(text), teacher=teacher, **options)
    assert losses(result)[-1] < losses(result)[0]
    assert all(torch.equal(before[n], p) for n, p in teacher.named_parameters())
    assert teacher.training
    assert result.report.teacher == "LlamaForCausalLM, 35,616 parameters"
    graph = fxprune.trace(teacher.eval(), {"input_ids": tokens(2, 7)})
    assert losses(trained(pruned(units=None, ratio=0.5), str(text), teacher=graph, **options)) == pytest.approx(
        losses(result), abs=1e-4
    )


def test_a_model_learns_nothing_from_itself(text: Path) -> None:
    model = build("llama")
    result = trained(model, str(text), tokenizer=tokenizer(), teacher=model, distill_weight=1.0, hidden_weight=1.0, max_steps=2)
    assert losses(result) == pytest.approx([0.0, 0.0], abs=1e-5)


@pytest.mark.parametrize(
    ("teacher", "settings", "said"),
    [
        (None, {"distill_weight": 0.5}, "distill_weight is 0.5 and there is no teacher: pass the dense model, teacher="),
        (None, {"hidden_weight": 1}, "hidden_weight is 1 and there is no teacher: pass the dense model, teacher="),
        (lambda: build("llama"), {}, "there is a teacher and nothing to learn from it: set distill_weight or hidden_weight"),
        (
            lambda: build("llama", vocab_size=101),
            {"distill_weight": 0.5},
            "the teacher predicts 101 tokens, the model 97: it must be the dense model",
        ),
        (
            lambda: build("llama", num_hidden_layers=3),
            {"hidden_weight": 0.5},
            (
                "hidden_weight needs a teacher with the same layers and hidden size: it has 3 layers of 48, the model 2 of 48; "
                "distill_weight needs neither"
            ),
        ),
        (
            lambda: fxprune.trace(build("llama"), {"input_ids": tokens(2, 7)}),
            {"hidden_weight": 0.5},
            "hidden_weight compares hidden states, and this teacher gives none: it is no Hugging Face model",
        ),
    ],
    ids=["none", "none-hidden", "unused", "vocabulary", "layers", "graph"],
)
def test_teachers_that_do_not_fit(teacher: Callable[[], nn.Module] | None, settings: Any, said: str, text: Path) -> None:
    with pytest.raises(UsageError) as caught:
        trained(pruned(), str(text), teacher=teacher and teacher(), **settings)
    assert str(caught.value) == said


# --- saving -----------------------------------------------------------------------------------------------------------------------


def test_the_checkpoint_in_stock_transformers(text: Path, tmp_path: Path) -> None:
    result = trained(pruned(), str(text))
    result.save_pretrained(tmp_path / "out")
    stock: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(stock).__module__.startswith("transformers.models.llama")
    assert torch.equal(logits(stock), logits(result.model))
    written = json.loads((tmp_path / "out" / "fxprune_report.json").read_text())
    assert written["fxprune_report"] == 1
    assert written["recovery"]["steps"] == SMALL["max_steps"]
    assert written["recovery"]["history"]["loss"] == losses(result)
    assert fxprune.PrunePlan.load(tmp_path / "out" / "fxprune_plan.json").counts() == pruned().plan.counts()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_a_per_layer_checkpoint_and_its_own_recovery(text: Path, tmp_path: Path) -> None:
    """From the prune's result, then from the directory: the same form each time, with the plan and every report in it."""
    first = trained(uneven(), str(text))
    first.save_pretrained(tmp_path / "one")
    second = trained(str(tmp_path / "one"), str(text), seed=3)
    second.save_pretrained(tmp_path / "two")
    for name, result in (("one", first), ("two", second)):
        loaded = fxprune.load(tmp_path / name)
        assert torch.equal(logits(loaded), logits(result.model))
        assert "fxprune" in json.loads((tmp_path / name / "config.json").read_text())
    assert (tmp_path / "one" / "fxprune_plan.json").read_text() == (tmp_path / "two" / "fxprune_plan.json").read_text()
    written = json.loads((tmp_path / "two" / "fxprune_report.json").read_text())
    assert (written["form"], written["recovery"]["settings"]["seed"]) == ("per-layer", 3)
    assert written["recovery"]["earlier"]["settings"]["seed"] == 0


def test_a_per_layer_model_takes_padding() -> None:
    """With a mask, attention repeats keys and values by an attribute that it does not read without one."""
    model: Any = uneven().model
    ids = tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    with torch.no_grad():
        padded = model(input_ids=ids, attention_mask=mask).logits
        alone = model(input_ids=ids[1:, :6]).logits
    assert error(alone[0], padded[1, :6]) < 1e-5


def test_a_plain_model_gets_a_report_too(text: Path, tmp_path: Path) -> None:
    result = trained(build("gpt2"), str(text), tokenizer=tokenizer(), output=tmp_path / "out")
    stock: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(stock), logits(result.model))
    assert set(json.loads((tmp_path / "out" / "fxprune_report.json").read_text())) == {"data", "recovery"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_a_damaged_checkpoint_never_appears(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = trained(build("gpt2"), str(text), tokenizer=tokenizer(), max_steps=1)
    kind: Any = type(result.model)
    read = kind.from_pretrained.__func__

    def wrong(cls: Any, *args: Any, **options: Any) -> Any:
        model = read(cls, *args, **options)
        model.transformer.h[0].mlp.c_fc.weight.data[0] += 1
        return model

    monkeypatch.setattr(kind, "from_pretrained", classmethod(wrong))
    with pytest.raises(
        CheckpointError, match=r"the checkpoint read back differs from the recovered model \(relative error .*\); nothing"
    ):
        result.save_pretrained(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_graph_has_no_checkpoint(text: Path, tmp_path: Path) -> None:
    graph = pruned().graph_module
    with pytest.raises(UsageError, match=r"a GraphModule has no checkpoint form: leave output out, and keep result.model"):
        trained(graph, str(text), tokenizer=tokenizer(), output=tmp_path / "out")
    result = trained(graph, str(text), tokenizer=tokenizer(), max_steps=1)
    with pytest.raises(CheckpointError, match="a GraphModule has no checkpoint form: keep its weights with safetensors"):
        result.save_pretrained(tmp_path / "out")
    assert not list(tmp_path.iterdir())


# --- what is refused --------------------------------------------------------------------------------------------------------------


def quantised() -> nn.Module:
    model = build("llama")
    model.config.quantization_config = {"quant_method": "gptq"}  # type: ignore[union-attr]
    return model


def on_meta() -> nn.Module:
    return build("llama").to("meta")


def adapted() -> nn.Module:
    return get_peft_model(cast(Any, build("llama")), LoraConfig(target_modules=["q_proj"]))


def traced() -> nn.Module:
    return fxprune.trace(build("llama"), {"input_ids": tokens(2, 7)})


@pytest.mark.parametrize(
    ("target", "said"),
    [
        (lambda: 3, "cannot recover a int: expected fxprune.prune's result, a checkpoint's directory or a model"),
        (lambda: "nowhere", "there is no directory 'nowhere'"),
        (
            quantised,
            "this LlamaForCausalLM is quantised (its configuration has a quantization_config of kind gptq) and cannot be trained",
        ),
        (on_meta, "this LlamaForCausalLM is on the meta device: it has no weights to train"),
        (adapted, "has adapters already: merge them first (model.merge_and_unload() in peft)"),
        (traced, "a traced GraphModule cannot be trained: recover what fxprune.rewrite makes of it, or the eager model"),
        (nn.Identity, "this Identity has no parameters to train"),
    ],
    ids=["number", "nowhere", "quantised", "meta", "adapted", "traced", "empty"],
)
def test_targets_of_recovery_that_cannot_be(target: Callable[[], Any], said: str, text: Path) -> None:
    with pytest.raises(UsageError) as caught:
        trained(target(), str(text), tokenizer=tokenizer())
    assert said in str(caught.value)


def test_data_that_cannot_be_used(text: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "numbers.jsonl").write_text('{"number": 3}\n')
    (tmp_path / "same.jsonl").write_text(json.dumps({"text": " ".join(f"w{i}" for i in range(30))}))
    (tmp_path / "held.jsonl").write_text(json.dumps({"text": " ".join(f"w{i}" for i in range(25))}))
    cases: list[tuple[dict[str, Any], str]] = [
        ({"data": str(tmp_path / "empty.jsonl")}, "'empty.jsonl' is empty: it has no rows"),
        ({"data": str(tmp_path / "numbers.jsonl")}, "'numbers.jsonl' has no column of text; it has number, wanted one of text, "),
        ({"data": f"{text}[words]"}, "'text.jsonl' has no column 'words'; Choose from: text"),
        ({"data": "nowhere.jsonl"}, "there is no file 'nowhere.jsonl'"),
        (
            {"data": str(tmp_path / "same.jsonl"), "validation": str(tmp_path / "held.jsonl")},
            "the evaluation text 'held.jsonl' overlaps with the training text 'same.jsonl': 100.0% of its 13-word sequences",
        ),
        ({"cutoff": 80}, "the model reads at most 64 tokens, and cutoff is 80: lower it"),
        ({"length": 80}, "the model reads at most 64 tokens, and length is 80: lower it"),
    ]
    for changes, said in cases:
        given = {"data": str(text), **changes}
        with pytest.raises(UsageError) as caught:
            trained(pruned(), given.pop("data"), **given)
        assert said in str(caught.value)
    with pytest.raises(UsageError, match="text needs a tokenizer, and there is none beside the model: pass tokenizer="):
        trained(build("llama"), str(text))
    with pytest.raises(UsageError, match=r"the data has token \d+, and the model knows 50: the tokenizer belongs to another model"):
        trained(build("llama", vocab_size=50), str(text), tokenizer=tokenizer())


def test_examples_that_were_read_already(text: Path) -> None:
    examples = load_examples(str(text), tokenizer(), cutoff=24)
    assert losses(trained(pruned(), examples)) == losses(trained(pruned(), str(text)))
    assert losses(trained(pruned(), examples, cutoff=12)) == losses(trained(pruned(), str(text)))
    with pytest.raises(UsageError, match="there are no examples to learn from"):
        trained(pruned(), examples.select([]))
    with pytest.raises(UsageError, match="an example has 22 tokens, more than cutoff=12: set it to 22"):
        trained(pruned(), str(text), cutoff=12, validation=examples)


def test_a_graph_of_fixed_sizes(text: Path) -> None:
    gm = fxprune.trace(build("llama"), {"input_ids": tokens(2, 7)}, dynamic_shapes={})
    groups = fxprune.find_groups(gm)
    small = fxprune.rewrite(gm, fxprune.PrunePlan.from_keep(groups, {}))
    with pytest.raises(
        UsageError, match=r"the graph does not take token ids of any size \(.*symbolic sizes, or recover the eager model"
    ):
        trained(small, str(text), tokenizer=tokenizer())


def test_a_loss_that_is_not_finite(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state before the bad step stays, and the message says where."""
    monkeypatch.setattr(Objective, "__call__", failing(Objective.__call__, 5, lambda loss: loss * math.nan))
    with pytest.raises(FxPruneError) as caught:
        trained(pruned(), str(text), output=tmp_path / "out", checkpoint_every=2)
    state = f"{tmp_path / 'out'}.recovering"
    assert str(caught.value) == (
        "the loss is nan at step 5: training diverged; lower lr (it is 0.003) and start over with --restart (restart=True); "
        f"the last good state, of step 4, is kept in '{state}'"
    )
    assert sorted(p.name for p in Path(state).iterdir()) == ["lock", "step-000000002", "step-000000004"]
    assert [p.name for p in tmp_path.iterdir()] == ["out.recovering"]
    with pytest.raises(FxPruneError, match=r"the loss is nan at step 1: training diverged; lower lr \(it is 0.003\)$"):
        trained(pruned(), str(text), packing="off")


def test_a_gradient_that_is_not_finite(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Explodes(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad * math.inf

    monkeypatch.setattr(Objective, "__call__", failing(Objective.__call__, 2, Explodes.apply))
    with pytest.raises(FxPruneError, match=r"the gradient is not finite at step 2: training diverged; lower lr"):
        trained(pruned(), str(text))


def failing(real: Callable[..., Tensor], call: int, change: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """A loss that is changed from one call on."""
    count = [0]

    def loss(self: Any, batch: Any) -> Tensor:
        count[0] += 1
        found = real(self, batch)
        return change(found) if count[0] >= call else found

    return loss


@pytest.mark.parametrize(
    "raised",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"
        ),
        MemoryError(),
    ],
    ids=lambda e: type(e).__name__,
)
def test_out_of_memory_says_what_to_lower(raised: Exception, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And then the same command with fewer rows at a time goes on, to the same end."""

    def out(_: Tensor) -> Tensor:
        raise raised

    expected = trained(pruned(), str(text))
    with monkeypatch.context() as patch:
        patch.setattr(Objective, "__call__", failing(Objective.__call__, 4, out))
        with pytest.raises(FxPruneError) as caught:
            trained(pruned(), str(text), output=tmp_path / "out", checkpoint_every=3)
    assert str(caught.value) == (
        "out of memory at step 4: lower micro_batch_size (it is 6), or set gradient_checkpointing=on, and run again (it goes on "
        f"from step 3: the state in '{tmp_path / 'out'}.recovering' is kept); if that does not help, lower length and cutoff (they "
        "are 48 and 24)"
    )
    result = trained(pruned(), str(text), output=tmp_path / "out", checkpoint_every=3, micro_batch_size=2)
    assert losses(result) == pytest.approx(losses(expected), abs=1e-5)


def test_another_runtime_error_stays_itself(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def out(_: Tensor) -> Tensor:
        raise RuntimeError("something else")

    monkeypatch.setattr(Objective, "__call__", failing(Objective.__call__, 1, out))
    with pytest.raises(RuntimeError, match=r"^something else$"):
        trained(pruned(), str(text))


# --- memory -----------------------------------------------------------------------------------------------------------------------


def test_what_fits_is_chosen() -> None:
    model = build("llama", tied=False)
    inside = sum(sum(m.weight.shape) for m in model.modules() if isinstance(m, nn.Linear))
    each = token_bytes(model, 2, checkpointing=False)
    assert each == int(3 * inside + 16 * VOCABULARY)
    saved = token_bytes(model, 2, checkpointing=True)
    assert saved == int(3 * inside / 2 + 2 * 48 * 2 + 16 * VOCABULARY) < each

    def chosen(rows: float, wanted: int = 8, able: bool = True, **settings: Any) -> Sizes:
        return fitting(model, Recovery(**settings), wanted, able, free=rows * each * 32, length=32, width=2)

    assert chosen(5.5) == Sizes(5, False)
    assert chosen(50) == Sizes(8, False)
    assert chosen(0.9) == Sizes(1, True)
    assert chosen(0.9, able=False) == Sizes(1, False)
    assert chosen(0.9, gradient_checkpointing="off") == Sizes(1, False)
    assert chosen(5.5, gradient_checkpointing="on").checkpointing
    assert chosen(5.5, wanted=7, micro_batch_size=7) == Sizes(7, True)
    assert chosen(8, wanted=7, micro_batch_size=7) == Sizes(7, False)


def test_checkpointing_that_a_model_does_not_have(text: Path) -> None:
    with pytest.raises(
        UsageError, match="gradient_checkpointing=on: this GraphModule has no gradient checkpointing; lower micro_batch"
    ):
        trained(pruned().graph_module, str(text), tokenizer=tokenizer(), gradient_checkpointing="on")


def test_the_report_is_json_and_says_what_was_read(text: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    result = trained(pruned(), str(text), progress=lambda *a: seen.append(a))
    data = json.loads(json.dumps(result.report.to_json()))
    assert data["data"]["training"]["sources"] == "text.jsonl (108 examples)"
    assert data["data"]["validation"]["sources"] == "held out of text.jsonl"
    assert data["data"]["validation"]["examples"] == 12
    assert data["data"]["sketches"]["text.jsonl"]["ngrams"]
    assert data["versions"]["peft"]
    assert (data["recipe"], data["stopped"]) == ("default", "all steps done")
    steps = [done for what, done, total in seen if what.startswith("recovery (loss ") and total == 8]
    assert steps == list(range(1, 9))
    assert data["tokens_per_second"] > 0
    assert loop.UNTIMED < 8
    assert recover is fxprune.recover
