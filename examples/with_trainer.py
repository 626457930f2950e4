"""Prune a model, train what is left with transformers' own Trainer, save it and load it with stock transformers.

Run it:  python examples/with_trainer.py

A tiny random Llama learns to count on, loses half of its heads and a quarter of its FFN channels, and learns again. What fxprune
gives is an ordinary `LlamaForCausalLM`: nothing here but `fxprune.prune` knows of pruning. No network; a few seconds on one core.
With a real model use `fxprune.recover`, which adds LoRA, distillation and a state that survives a kill.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)
from transformers.utils import logging

import fxprune

VOCABULARY, LENGTH = 32, 16


def rows(count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Sequences that count on by 1, 2 or 3, from anywhere."""
    generator = torch.Generator().manual_seed(seed)
    starts, steps = (
        torch.randint(0, VOCABULARY, (count, 1), generator=generator),
        torch.randint(1, 4, (count, 1), generator=generator),
    )
    ids = (starts + steps * torch.arange(LENGTH)) % VOCABULARY
    return [{"input_ids": row, "labels": row} for row in ids]


def train(model: PreTrainedModel, directory: Path, steps: int) -> None:
    """Stock Trainer."""
    arguments = TrainingArguments(
        str(directory),
        max_steps=steps,
        per_device_train_batch_size=32,
        learning_rate=5e-3,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows(1024, seed=1))
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    model.eval()


@torch.no_grad()
def loss(model: PreTrainedModel) -> float:
    """Of sequences that were not trained on."""
    ids = torch.stack([row["input_ids"] for row in rows(64, seed=2)])
    return float(model(input_ids=ids, labels=ids).loss)


def main() -> None:
    """Train, prune, train again, save, load."""
    logging.disable_progress_bar()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        pad_token_id=0,
    )
    dense = LlamaForCausalLM(config)
    with tempfile.TemporaryDirectory() as place:
        train(dense, Path(place, "dense"), steps=150)
        print(f"dense                 {dense.num_parameters():6,} parameters, loss {loss(dense):.3f}")

        calibration = [{"input_ids": torch.stack([row["input_ids"] for row in rows(32, seed=3)])}]
        result = fxprune.prune(
            dense, units={"kv_heads": 0.5, "ffn": 0.25}, recipe={"criterion": "taylor1"}, calibration=calibration
        )
        small = result.model
        assert result.form == "uniform", result.report.note  # a stock class and configuration; another form says why it is none
        print(f"pruned                {small.num_parameters():6,} parameters, loss {loss(small):.3f}")

        train(small, Path(place, "small"), steps=60)
        print(f"trained again         {small.num_parameters():6,} parameters, loss {loss(small):.3f}")

        small.save_pretrained(Path(place, "saved"))
        loaded = AutoModelForCausalLM.from_pretrained(Path(place, "saved")).eval()
        print(f"saved and loaded      {loaded.num_parameters():6,} parameters, loss {loss(loaded):.3f}")
        print(f"its configuration     {loaded.config.num_attention_heads} heads, {loaded.config.intermediate_size} FFN channels")
        prompt = torch.tensor([[3, 5, 7, 9]])
        told = loaded.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False)
        print(f"3 5 7 9 goes on with  {' '.join(map(str, told[0, 4:].tolist()))}")


if __name__ == "__main__":
    main()
