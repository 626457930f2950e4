"""The settings of a recovery: recipes, what is refused and how, and the schedules against transformers' own."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from transformers import get_scheduler

from fxprune.errors import UsageError
from fxprune.recovery.settings import RECIPES, Recovery, settings_of


def test_the_papers_recipe() -> None:
    paper = settings_of("llm-pruner")
    lora = (paper.method, paper.rank, paper.alpha, paper.dropout, paper.targets)
    assert lora == ("lora", 8, 16.0, 0.05, "all")
    assert (paper.epochs, paper.lr, paper.batch_size, paper.cutoff, paper.warmup) == (2.0, 1e-4, 64, 256, 100)
    assert (paper.schedule, paper.packing, paper.completion_only, paper.patience) == ("linear", "off", True, 0)


def test_overrides_may_be_texts() -> None:
    texts = {"lr": "2e-5", "max_steps": "7", "samples": "none", "completion_only": "true", "targets": "q_proj, *.mlp.*"}
    made = settings_of("default", texts)
    assert made == dataclasses.replace(
        RECIPES["default"], lr=2e-5, max_steps=7, samples=None, completion_only=True, targets=("q_proj", "*.mlp.*")
    )
    assert settings_of(made, {"targets": ["v_proj"], "alpha": 3}).targets == ("v_proj",)
    assert settings_of(made, {"alpha": 3}).to_json()["targets"] == ["q_proj", "*.mlp.*"]
    assert Recovery(**settings_of(made).to_json()) == made


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lrr": 1}, "there is no recovery setting 'lrr'; did you mean 'lr'?"),
        ({"learning_rate": 1}, "there is no recovery setting 'learning_rate'; it is called lr here"),
        ({"method": "lore"}, "unknown method 'lore'; did you mean 'lora'? Choose from: full, lora"),
        ({"schedule": "cosin"}, "unknown schedule 'cosin'; did you mean 'cosine'?"),
        ({"precision": "fp16"}, "unknown precision 'fp16'; did you mean 'bf16'? Choose from: auto, bf16, fp32"),
        ({"packing": "yes"}, "unknown packing 'yes'; choose from: auto, off, on"),
        ({"compile": "o"}, "unknown compile 'o'; did you mean 'on'?"),
        ({"gradient_checkpointing": "of"}, "unknown gradient_checkpointing 'of'; did you mean 'off'?"),
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"rank": "two"}, "rank must be a whole number, got 'two'"),
        ({"rank": 2.5}, "rank must be a whole number, got 2.5"),
        ({"lr": 0}, "lr must be above 0, got 0.0"),
        ({"lr": "fast"}, "lr must be a number, got 'fast'"),
        ({"lr": float("nan")}, "lr must be a number, got nan"),
        ({"max_steps": 0}, "max_steps must be at least 1, got 0"),
        ({"max_steps": "few"}, "max_steps must be a whole number or none, got 'few'"),
        ({"completion_only": "maybe"}, "completion_only must be true or false, got 'maybe'"),
        ({"completion_only": 1}, "completion_only must be True or False, got 1"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
        ({"warmup": -1}, "warmup must be at least 0, got -1.0"),
        ({"cutoff": 1}, "cutoff must be at least 2, got 1"),
        ({"distill_weight": 2}, "distill_weight must lie between 0 and 1, got 2.0"),
        ({"micro_batch_size": 64}, "micro_batch_size 64 is more than batch_size 32"),
        ({"targets": ()}, "targets is 'all' or patterns of module names, such as q_proj,v_proj"),
        ({"schedule": 3}, "schedule must be a text, got 3"),
    ],
    ids=str,
)
def test_what_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        settings_of("default", changes)
    assert said in str(caught.value)


def test_lengths_are_no_more_than_a_model_reads() -> None:
    whole = Recovery(cutoff=512, length=1024)
    assert whole.within(None) == whole.within(1024) == (whole, [])
    assert whole.within(512) == (Recovery(cutoff=512, length=512), ["length 1,024 became 512: the model reads no more tokens"])
    assert whole.within(64) == (
        Recovery(cutoff=64, length=64),
        ["cutoff 512 and length 1,024 became 64: the model reads no more tokens"],
    )


def test_an_unknown_recipe() -> None:
    with pytest.raises(
        UsageError, match=r"unknown recipe 'llm_pruner'; did you mean 'llm-pruner'\? Choose from: default, llm-pruner"
    ):
        settings_of("llm_pruner")


@pytest.mark.parametrize(("ours", "theirs"), [("linear", "linear"), ("cosine", "cosine"), ("constant", "constant_with_warmup")])
@pytest.mark.parametrize("warmup", [0, 5, 0.1])
def test_schedules_are_those_of_transformers(ours: str, theirs: str, warmup: float) -> None:
    settings, steps = Recovery(lr=0.25, schedule=ours, warmup=warmup), 30
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.25)
    scheduler = get_scheduler(
        theirs, optimizer, num_warmup_steps=int(warmup if warmup >= 1 else warmup * steps), num_training_steps=steps
    )
    expected = []
    for _ in range(steps):
        expected.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert [settings.rate(step, steps) for step in range(steps)] == pytest.approx(expected)
