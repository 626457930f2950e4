"""Recovery's training against plain torch and transformers' Trainer: losses, packing, precision, how long it runs, what is kept."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainingArguments

import fxprune
from fxprune.data import Examples, load_examples, packs_apart
from fxprune.errors import UsageError
from fxprune.recovery import loop
from fxprune.recovery.adapters import merged, prepare
from fxprune.recovery.adapters import trained as trained_parameters
from fxprune.recovery.run import recover
from fxprune.recovery.settings import Recovery

from .closeness import relative
from .recovering import logits, losses, pruned, trained, unpacked, weights, write_instructions, write_text
from .zoo import VOCABULARY, build, tokenizer


def test_the_eager_model_and_its_graph_learn_the_same(text: Path) -> None:
    result = pruned()
    eager = trained(result, str(text), packing="off")
    graph = trained(result.graph_module, str(text), packing="off", tokenizer=tokenizer())
    assert losses(eager) == pytest.approx(losses(graph), abs=1e-4)
    assert eager.report.validation == [pytest.approx(v, rel=1e-4) for v in graph.report.validation]
    assert relative(logits(eager.model), logits(graph.model)) < 1e-4
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
    assert relative(logits(merged(cast(nn.Module, pruned().model), final, settings)), logits(result.model)) < 1e-4


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


def mean_loss(model: Any, examples: Examples) -> float:
    """Over all tokens that are learned, each example run alone."""
    total, count = 0.0, 0
    with torch.no_grad():
        for ids, labels in (examples[i] for i in range(len(examples))):
            total += float(functional.cross_entropy(model(input_ids=ids[None]).logits[0, :-1], labels[1:], reduction="sum"))
            count += len(labels) - 1
    return total / count


def test_packed_rows_give_the_loss_of_their_examples(text: Path) -> None:
    """The first step's loss over all packed rows is the mean over all tokens of the examples, each run alone."""
    result = trained(pruned(), str(text), batch_size=500, max_steps=1, validation_samples=0, micro_batch_size=7, lr=1e-9)
    assert result.report.choices["packing"] is True
    examples = load_examples(str(text), tokenizer(), cutoff=24)
    assert losses(result) == pytest.approx([mean_loss(pruned().model, examples)], rel=1e-5)
    assert result.report.tokens == examples.tokens


def test_a_model_that_counts_its_positions_otherwise(text: Path) -> None:
    """RoBERTa's begin behind the padding's: what recovery measures is what the model says of each example alone."""
    from transformers import RobertaConfig, RobertaForCausalLM

    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    torch.manual_seed(0)
    model = RobertaForCausalLM(RobertaConfig(vocab_size=VOCABULARY, is_decoder=True, max_position_embeddings=40, **sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)  # so that positions matter
    held = load_examples(str(write_text(text.parent / "held.jsonl", rows=20, seed=3)), tokenizer(), cutoff=24)
    result = trained(model, str(text), tokenizer=tokenizer(), validation=held, packing="off", max_steps=1, cutoff=24)
    assert result.report.validation[0]["perplexity"] == pytest.approx(math.exp(mean_loss(model, held)), rel=1e-4)


@pytest.mark.parametrize(("warmup", "noted"), [(3, False), (4, True), (100, True), (0.9, False)])
def test_a_warm_up_that_never_ends_is_told(warmup: float, noted: bool, text: Path, caplog: pytest.LogCaptureFixture) -> None:
    result = trained(pruned(), str(text), warmup=warmup, max_steps=4, lr=1e-3)
    found = [n for n in result.report.notes if n.startswith("the warm-up takes")]
    assert bool(found) is noted
    if noted:
        share = max(result.report.history["lr"]) / 1e-3
        said = f"the warm-up takes {warmup} steps and the run has 4: the learning rate gets no further than {share:.0%} of lr; "
        assert found == [said + "set a shorter warmup, or a share such as 0.03"]
        assert found[0] in caplog.messages


@pytest.mark.parametrize(("family", "apart"), [("llama", True), ("gpt2", True), ("mpt", False)])
def test_packing_only_where_examples_are_kept_apart(family: str, apart: bool, text: Path) -> None:
    model = build(family).eval()
    model.config.use_cache = False  # type: ignore[union-attr]
    assert packs_apart(model, vocabulary=VOCABULARY) is apart
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
    short = "max_tokens is 1 and a step reads about 82: one step is taken; for less, lower batch_size or length"
    assert [note for note in result.report.notes if "max_tokens" in note] == [short] * (limits.get("max_tokens") == 1)


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
