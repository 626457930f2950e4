"""The other side of the recovery benchmark: transformers' Trainer and peft's `get_peft_model`, as their documentation uses them."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.examples import Setting
from benchmarks.gpu.pace import LORA, Pace
from fxprune.data import Examples

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Padded:
    """Collates examples to the longest of them, and counts the tokens that are no padding."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def __call__(self, rows: list[Tensor]) -> dict[str, Tensor]:
        """``input_ids``, ``attention_mask`` and ``labels`` ``[rows, longest]``; padding is on the right and not learned."""
        self.tokens.append(sum(map(len, rows)))
        width = max(map(len, rows))
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)], mask[i, : len(row)] = row, 1
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


class Rows(torch.utils.data.Dataset[Tensor]):
    """Token ids of each example."""

    def __init__(self, examples: Examples) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Tensor:
        return self.examples[index][0]


@dataclass(frozen=True)
class Done:
    """A run.

    Attributes:
        loss: The mean of all steps.
        trained: Parameters.
        tokens: Real ones read in the first step, the first two, and so on.
    """

    loss: float
    trained: int
    tokens: list[int]


def train(model: Any, setting: Setting, pace: Pace, *, bf16: bool, seed: int) -> Done:
    """Train adapters in a model, which gets them injected.

    Args:
        model: An eager Hugging Face model.
        setting: Data and batches.
        pace: Told of every step.
        bf16: Autocast.
        seed: Of adapters, dropout and the order of the examples.

    """
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Steps(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            pace.step(state.global_step)

    torch.manual_seed(seed)
    lora = LoraConfig(
        r=LORA["rank"], lora_alpha=LORA["alpha"], lora_dropout=LORA["dropout"], target_modules=SEVEN, task_type="CAUSAL_LM"
    )
    adapted: Any = get_peft_model(model, lora)
    collate = Padded()
    with tempfile.TemporaryDirectory() as nowhere:
        arguments = TrainingArguments(
            output_dir=nowhere,
            max_steps=pace.steps,
            per_device_train_batch_size=setting.forward_examples,
            gradient_accumulation_steps=setting.accumulate,
            learning_rate=LORA["lr"],
            bf16=bf16,
            seed=seed,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            use_cpu=pace.device.type == "cpu",
            dataloader_pin_memory=pace.device.type == "cuda",
        )
        trainer = Trainer(
            model=adapted, args=arguments, train_dataset=Rows(setting.examples), data_collator=collate, callbacks=[Steps()]
        )
        loss = trainer.train().training_loss
    read = list(accumulate(collate.tokens))[setting.accumulate - 1 :: setting.accumulate]
    return Done(loss, sum(p.numel() for p in adapted.parameters() if p.requires_grad), read)
