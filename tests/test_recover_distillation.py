"""Recovery from the dense model: the distillation losses against plain torch, and teachers that do not fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn
from torch.nn import functional

import fxprune
from fxprune.errors import UsageError
from fxprune.recovery.objective import Objective, divergence, hidden_distance, inputs_of
from fxprune.recovery.settings import Recovery

from .recovering import losses, pruned, trained, unpacked, weights
from .zoo import build, tokenizer, tokens


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


def test_a_teacher_that_mixes_packed_examples_teaches_them_alone(text: Path) -> None:
    teacher = build("llama")
    graph = fxprune.trace(teacher, {"input_ids": tokens(2, 7)})
    told = "not packed: the teacher GraphModule does not keep packed examples apart (a graph takes the inputs it was traced with)"
    options: dict[str, Any] = {"distill_weight": 1.0, "max_steps": 3}
    alone = trained(pruned(), str(text), teacher=teacher, packing="off", **options)
    made = trained(pruned(), str(text), teacher=graph, **options)
    assert (made.report.choices["packing"], told in made.report.notes) == (False, True)
    assert losses(made) == pytest.approx(losses(alone), rel=1e-4)
    with pytest.raises(UsageError, match="packing=on: this teacher GraphModule does not keep packed examples apart"):
        trained(pruned(), str(text), teacher=graph, packing="on", **options)
    positions = fxprune.trace(teacher, {"input_ids": tokens(2, 7), "position_ids": torch.arange(7).repeat(2, 1)})
    packed = trained(pruned(), str(text), teacher=positions, **options)
    assert packed.report.choices["packing"]
    assert losses(packed) == pytest.approx(losses(trained(pruned(), str(text), teacher=teacher, **options)), rel=1e-4)


def test_a_model_learns_nothing_from_itself(text: Path) -> None:
    model = build("llama")
    result = trained(model, str(text), tokenizer=tokenizer(), teacher=model, distill_weight=1.0, hidden_weight=1.0, max_steps=2)
    assert losses(result) == pytest.approx([0.0, 0.0], abs=1e-5)


@pytest.mark.parametrize(
    ("teacher", "settings", "said"),
    [
        (None, {"distill_weight": 0.5}, "distill_weight is 0.5 and there is no teacher: pass the dense model, teacher="),
        (None, {"hidden_weight": 1}, "hidden_weight is 1 and there is no teacher: pass the dense model, teacher="),
        (
            lambda: build("llama"),
            {},
            "there is a teacher and nothing to learn from it: set distill_weight (--set distill_weight=0.5) or hidden_weight",
        ),
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
