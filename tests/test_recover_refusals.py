"""Recovery: what is refused, what is said when training breaks off, and what fits into memory."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import fxprune
from fxprune.data import load_examples
from fxprune.errors import FxPruneError, UsageError
from fxprune.recovery.memory import Sizes, fitting, token_bytes
from fxprune.recovery.objective import Objective
from fxprune.recovery.settings import Recovery

from .recovering import losses, pruned, trained, write_text
from .zoo import VOCABULARY, build, tokenizer, tokens


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
        (
            {"data": str(tmp_path / "numbers.jsonl")},
            "'numbers.jsonl' has no column of text; it has number, wanted text, content or document; ",
        ),
        ({"data": f"{text}[words]"}, "'text.jsonl' has no column 'words'; choose from: text"),
        ({"data": "nowhere.jsonl"}, "there is no file 'nowhere.jsonl'"),
        (
            {"data": str(tmp_path / "same.jsonl"), "validation": str(tmp_path / "held.jsonl")},
            "the evaluation text 'held.jsonl' overlaps with the training text 'same.jsonl': 100.0% of its 13-word sequences",
        ),
    ]
    for changes, said in cases:
        given = {"data": str(text), **changes}
        with pytest.raises(UsageError) as caught:
            trained(pruned(), given.pop("data"), **given)
        assert said in str(caught.value)
    with pytest.raises(UsageError, match="text needs a tokenizer, and there is none beside the model: copy its files"):
        trained(build("llama"), str(text))
    with pytest.raises(UsageError, match=r"the data has token \d+, and the model knows 50: the tokenizer belongs to another model"):
        trained(build("llama", vocab_size=50), str(text), tokenizer=tokenizer())


def test_examples_that_were_read_already(text: Path, tmp_path: Path) -> None:
    examples = load_examples(str(text), tokenizer(), cutoff=24)
    assert losses(trained(pruned(), examples)) == losses(trained(pruned(), str(text)))
    assert losses(trained(pruned(), examples, cutoff=12)) == losses(trained(pruned(), str(text)))
    with pytest.raises(UsageError, match="there are no examples to learn from"):
        trained(pruned(), examples.select([]))
    with pytest.raises(UsageError, match="an example has 22 tokens, more than cutoff=12: set it to 22"):
        trained(pruned(), str(text), cutoff=12, validation=examples)
    (long := tmp_path / "long.jsonl").write_text(
        json.dumps({"text": " ".join(f"w{i % 94}" for i in range(80))}) + "\n" + text.read_text()
    )
    with pytest.raises(UsageError, match="the model reads at most 64 tokens, and an example has 80"):
        trained(pruned(), load_examples(str(long), tokenizer(), cutoff=80))
    with pytest.raises(UsageError, match="the model reads at most 64 tokens, and an example has 80"):
        trained(pruned(), str(text), validation=load_examples(str(long), tokenizer(), cutoff=80))


def test_lengths_that_a_model_does_not_read(text: Path) -> None:
    result = trained(pruned(), str(text), cutoff=80, length=90)
    assert losses(result) == losses(trained(pruned(), str(text), cutoff=64, length=64))
    assert (result.report.settings["cutoff"], result.report.settings["length"]) == (64, 64)
    assert "cutoff 80 and length 90 became 64: the model reads no more tokens" in result.report.notes


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
    with pytest.raises(FxPruneError, match=r"the loss is nan at step 1, before anything was trained: the model is damaged, or "):
        trained(pruned(), str(text), packing="off")


def test_a_validation_loss_that_is_not_finite(text: Path) -> None:
    model = build("llama")
    with torch.no_grad():
        next(model.parameters()).fill_(math.nan)
    with pytest.raises(FxPruneError, match="at step 1, before anything was trained: the model is damaged"):
        trained(model, str(text), tokenizer=tokenizer())


def test_tokens_that_the_model_does_not_know(text: Path, tmp_path: Path) -> None:
    few = write_text(tmp_path / "few.jsonl")
    few.write_text(few.read_text().replace("w9", "w1").replace("w8", "w1"))  # to train on, all tokens are known
    (tmp_path / "more.jsonl").write_text('{"text": "w93 w93 w93"}')
    model = build("llama", vocab_size=91)
    said = r"the data has token \d+, and the model knows 91: the tokenizer belongs to another model"
    for options in ({"data": str(text)}, {"data": str(few), "validation": str(tmp_path / "more.jsonl")}):
        with pytest.raises(UsageError, match=said):
            trained(model, tokenizer=tokenizer(), **options)
    wide = build("gpt2", n_positions=1024, vocab_size=91)  # more positions than tokens
    with pytest.raises(UsageError, match=said):
        trained(wide, str(text), tokenizer=tokenizer())


@pytest.mark.parametrize("packing", ["auto", "off"])
def test_a_pad_token_that_the_model_does_not_know(packing: str, text: Path) -> None:
    """Padding is masked and not learned, so that any token will do."""
    other = tokenizer()
    other.add_special_tokens({"pad_token": "[PAD]"})
    assert other.pad_token_id >= VOCABULARY
    how = {"packing": packing, "max_steps": 2}
    assert losses(trained(build("llama"), str(text), tokenizer=other, **how)) == losses(
        trained(build("llama"), str(text), tokenizer=tokenizer(), **how)
    )


def test_more_positions_than_tokens(text: Path) -> None:
    assert trained(build("gpt2", n_positions=1024), str(text), tokenizer=tokenizer(), max_steps=1).report.steps == 1


def test_what_peft_refuses(text: Path) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, state_size=4))
    with pytest.raises(UsageError, match=r"peft refuses an adapter in this MambaForCausalLM \(.*out_proj.*\): name other targets"):
        trained(model, str(text), tokenizer=tokenizer(), max_steps=1)
    assert trained(model, str(text), tokenizer=tokenizer(), max_steps=1, targets="in_proj").report.steps == 1


def test_settings_of_text_beside_ready_examples(text: Path) -> None:
    examples = load_examples(str(text), tokenizer(), cutoff=24)
    result = trained(build("llama"), examples, tokenizer=tokenizer(), samples=20, max_steps=1)
    assert "(18 examples)" in result.report.data["training"]["sources"], "two are held out"


@pytest.mark.parametrize(("rows", "same"), [(["w1 w2 w3", "w4 w5"] * 20, 4), ([f"w1 w{n}" for n in range(40)], 0)])
def test_short_examples_that_are_trained_and_measured_on(rows: list[str], same: int, tmp_path: Path) -> None:
    path = tmp_path / "short.jsonl"
    path.write_text("\n".join(json.dumps({"text": row}) for row in rows))
    notes = trained(build("llama"), str(path), tokenizer=tokenizer(), max_steps=1).report.notes
    said = [note for note in notes if "word by word" in note]
    whole = f"{same} of the 4 examples that recovery measures on are trained on too, word by word: what it measures looks better "
    whole += "than it is"
    assert said == [whole] * bool(same)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"device": "nowhere"}, "cannot use device 'nowhere': "),
        ({"device": "meta"}, "cannot use device 'meta': it holds no numbers"),
        ({"device": "cuda:63"}, "cannot use device 'cuda:63': "),
        (
            {"method": "full", "rank": 4},
            "rank is of adapters, and method=full trains every weight: leave it out, or say method=lora",
        ),
        ({"method": "full", "targets": "q_proj"}, "targets is of adapters, and method=full trains every weight: leave it out"),
        ({"seed": -1}, "seed must be a whole number of at least 0, got -1"),
        ({"seed": 2**63}, "seed must be below 9223372036854775808, got 9223372036854775808"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], said: str, text: Path) -> None:
    with pytest.raises(UsageError, match=f"^{re.escape(said)}"):
        fxprune.recover(build("llama"), str(text), tokenizer=tokenizer(), **options)
    if "seed" in options:
        with pytest.raises(UsageError, match=f"^{re.escape(said)}$"):
            fxprune.prune(build("llama"), 0.2, criterion="random", **options)


def test_the_same_file_to_train_and_to_measure_on(tmp_path: Path) -> None:
    """Rows of a few words have no sequences of 13 that could be compared."""
    short = tmp_path / "short.jsonl"
    short.write_text('{"text": "w1 w2 w3"}\n' * 20)
    with pytest.raises(UsageError, match=r"the validation text 'short\.jsonl' is the training text"):
        trained(build("llama"), str(short), tokenizer=tokenizer(), validation=str(short))


def test_sources_with_the_same_name_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "y").mkdir()
    one = write_text(tmp_path / "x" / "train.jsonl")
    other = write_text(tmp_path / "y" / "train.jsonl", seed=1)
    (tmp_path / "held.jsonl").write_text(one.read_text())
    data = f"{one},{other}"
    with pytest.raises(UsageError, match=r"the evaluation text 'held.jsonl' overlaps with the training text '.*x/train.jsonl'"):
        trained(build("llama"), data, tokenizer=tokenizer(), validation=str(tmp_path / "held.jsonl"))
    assert len(trained(build("llama"), data, tokenizer=tokenizer(), max_steps=1).report.data["sketches"]) == 2


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
