"""Perplexity against a computation by hand, latency, and what a plan is said to cost against what it costs."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import MusicgenConfig, RobertaConfig, RobertaForCausalLM

import fxprune
from fxprune import PrunePlan
from fxprune.calibration import longest_input
from fxprune.cost import Cost, costs
from fxprune.errors import FxPruneError, UsageError
from fxprune.evaluation import measure_latency, perplexity
from fxprune.groups import Groups
from fxprune.passes.selection import select

from .zoo import build, tokens


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return build("llama", tied=False, num_hidden_layers=1)


def negative_log_likelihood(model: Any, window: Tensor, first: int) -> list[float]:
    """Of each token of a window from number ``first`` on, in double precision, one by one."""
    with torch.no_grad():
        logits = model(input_ids=window[None]).logits[0].double()
    return [float(logits[i - 1].logsumexp(0) - logits[i - 1, int(window[i])]) for i in range(first, len(window))]


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_windows_that_do_not_overlap(model: nn.Module, batch_size: int) -> None:
    """LLM-Pruner's protocol: each window predicts all of its tokens but the first; what is left over is dropped."""
    ids = tokens(59)
    losses = [x for start in range(0, 48, 12) for x in negative_log_likelihood(model, ids[start : start + 12], 1)]
    measured = perplexity(model, ids, length=12, batch_size=batch_size)
    assert measured.tokens == len(losses) == 4 * 11
    assert measured.perplexity == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert (measured.windows, measured.length, measured.stride) == (4, 12, 12)


@pytest.mark.parametrize("stride", [1, 5, 11])
def test_windows_that_overlap_predict_only_what_is_new(model: nn.Module, stride: int) -> None:
    ids = tokens(40)
    losses = negative_log_likelihood(model, ids[:12], 1)
    starts = range(stride, 40 - 12 + 1, stride)
    for start in starts:
        losses += negative_log_likelihood(model, ids[start : start + 12], 12 - stride)
    measured = perplexity(model, ids, length=12, stride=stride, batch_size=2, text="a text")
    assert measured.tokens == len(losses) == 11 + len(starts) * stride
    assert measured.perplexity == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert (measured.windows, measured.stride, measured.text) == (1 + len(starts), stride, "a text")


def test_every_token_but_the_first_is_predicted_once(model: nn.Module) -> None:
    assert perplexity(model, tokens(12 + 3 * 4), length=12, stride=4).tokens == 12 + 3 * 4 - 1


class Certain(nn.Module):
    """Predicts the number after the one it reads, and is as sure of it as ``margin`` says."""

    def __init__(self, margin: float) -> None:
        super().__init__()
        self.margin = nn.Parameter(torch.tensor(margin))

    def forward(self, input_ids: Tensor) -> tuple[Tensor]:
        return (nn.functional.one_hot((input_ids + 1) % 8, 8) * self.margin,)


def test_known_perplexities() -> None:
    ids = torch.arange(80) % 8
    assert perplexity(Certain(0.0), ids, length=8).perplexity == pytest.approx(8)
    assert perplexity(Certain(100.0), ids, length=8).perplexity == pytest.approx(1)
    assert perplexity(Certain(-1e4), ids, length=8).perplexity == math.inf
    with pytest.raises(FxPruneError, match="the model's losses on a text are NaN: it is damaged"):
        perplexity(Certain(math.nan), ids, length=8, text="a text")


def test_limits_progress_and_the_training_mode(model: nn.Module) -> None:
    seen: list[tuple[str, int, int]] = []
    model.train()
    measured = perplexity(model, tokens(100), length=10, max_windows=5, batch_size=2, progress=lambda *a: seen.append(a))
    assert model.training
    model.eval()
    assert measured.windows == 5
    assert seen == [("perplexity", 2, 5), ("perplexity", 4, 5), ("perplexity", 5, 5)]
    assert measured.to_json()["perplexity"] == measured.perplexity
    assert perplexity(model, tokens(100), length=10, max_windows=5).perplexity == pytest.approx(measured.perplexity)


def test_what_perplexity_refuses(model: nn.Module) -> None:
    with pytest.raises(UsageError, match="the text has 11 tokens, fewer than one window of 12"):
        perplexity(model, tokens(11), length=12)
    with pytest.raises(UsageError, match="length must be at least 2 and stride between 1 and length, got length=1"):
        perplexity(model, tokens(11), length=1)
    for stride in (0, 13):
        with pytest.raises(UsageError, match=f"got length=12, stride={stride}"):
            perplexity(model, tokens(50), length=12, stride=stride)
    with pytest.raises(UsageError, match="batch_size must be a whole number of at least 1, got 0"):
        perplexity(model, tokens(50), length=12, batch_size=0)
    with pytest.raises(UsageError, match="max_windows must be a whole number of at least 1, got 0"):
        perplexity(model, tokens(50), length=12, max_windows=0)
    with pytest.raises(UsageError, match="the model reads at most 64 tokens, fewer than one window of 65"):
        perplexity(model, tokens(200), length=65)


def test_longest_input_of_positions_behind_the_paddings() -> None:
    sizes: dict[str, Any] = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
        "vocab_size": 11,
    }
    roberta = RobertaForCausalLM(RobertaConfig(**sizes, max_position_embeddings=12, is_decoder=True, pad_token_id=1))
    assert longest_input(roberta) == 10
    with torch.no_grad():
        assert roberta(torch.full((1, 10), 5)).logits.isfinite().all()
        with pytest.raises((IndexError, RuntimeError)):
            roberta(torch.full((1, 11), 5))


def test_longest_input_of_several_texts() -> None:
    parts: dict[str, Any] = {name: {"model_type": kind} for name, kind in (("text_encoder", "t5"), ("audio_encoder", "encodec"))}
    assert longest_input(cast(nn.Module, SimpleNamespace(config=MusicgenConfig(**parts, decoder={})))) is None


def test_longest_input(model: nn.Module) -> None:
    assert longest_input(model) == 64
    assert longest_input(build("gpt2", n_layer=1)) == 64  # called n_positions there
    assert longest_input(Certain(1.0)) is None
    nested = nn.Module()
    nested.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(max_position_embeddings=7))  # type: ignore[assignment]
    assert longest_input(nested) == 7


def test_latency(model: nn.Module) -> None:
    model.train()
    measured = measure_latency(model, prompt=40, new_tokens=3, repeats=2)
    assert model.training
    model.eval()
    assert (measured.prompt, measured.new_tokens, measured.repeats) == (40, 3, 2)
    assert 0 < measured.decode_ms < 10_000
    assert 0 < measured.prefill_ms < 10_000
    assert measured.to_json()["decode_ms"] == measured.decode_ms


class Counted(nn.Module):
    """Records how it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.config = SimpleNamespace(vocab_size=11)
        self.calls: list[tuple[tuple[int, ...], Any]] = []

    def forward(self, input_ids: Tensor, past_key_values: Any = None, use_cache: bool = False) -> Any:
        assert use_cache
        self.calls.append((tuple(input_ids.shape), past_key_values))
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 11), past_key_values=len(self.calls))


def test_latency_reads_once_and_decodes_with_the_cache() -> None:
    model = Counted()
    measure_latency(model, prompt=9, new_tokens=2, repeats=2)
    one = [(1, 9), (1, 1), (1, 1)]
    assert [shape for shape, _ in model.calls] == [(1, 1), *one * 3]  # a trial, and a warm-up
    assert [cache for _, cache in model.calls] == [None, None, 2, 3, None, 5, 6, None, 8, 9]
    model = Counted()
    assert measure_latency(model, prompt=9, new_tokens=1, repeats=1, batch=4).batch == 4
    assert [shape for shape, _ in model.calls] == [(1, 1), *[(4, 9), (4, 1)] * 2]


def test_what_latency_refuses(model: nn.Module) -> None:
    for name in ("prompt", "new_tokens", "repeats", "batch"):
        with pytest.raises(UsageError, match=f"{name} must be a whole number of at least 1, got 0"):
            measure_latency(model, **{name: 0})
    with pytest.raises(UsageError, match="the model reads at most 64 tokens, fewer than a prompt of 60 and 16 new ones"):
        measure_latency(model, prompt=60)
    from transformers import MambaConfig, MambaForCausalLM

    mamba = MambaForCausalLM(MambaConfig(vocab_size=97, hidden_size=16, num_hidden_layers=1, state_size=4))
    with pytest.raises(UsageError, match="latency is that of decoding with a KV cache, and MambaForCausalLM has none"):
        measure_latency(mamba)


def test_mpt_says_how_much_it_reads() -> None:
    assert longest_input(build("mpt")) == 64


# --- costs -----------------------------------------------------------------------------------------------------------------------


def traced(model: nn.Module) -> tuple[Any, Groups]:
    gm = fxprune.trace(model, {"input_ids": tokens(2, 16)})
    return gm, fxprune.find_groups(gm)


def macs_per_token(model: Any) -> float:
    """Products with weight matrices as torch counts them (two operations each), without those of the rotary frequencies."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(input_ids=tokens(3, 10))
    counted = counter.get_flop_counts()["Global"]
    return sum(n for op, n in counted.items() if op in (torch.ops.aten.mm, torch.ops.aten.addmm)) / 2 / 30


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "falcon_new", "opt"])
def test_costs_are_what_torch_counts(name: str) -> None:
    """Before and after, for a plan over three kinds and a dropped layer, tied and untied, Conv1D and fused projections."""
    model = build(name, tied=name != "gpt_neox")
    gm, groups = traced(model)
    half = {n: list(range(0, g.size, 2)) for n, g in groups.items() if g.prunable and g.kind in ("ffn", "kv_heads", "hidden")}
    block = list(groups.blocks)[-1]
    plan = PrunePlan.from_keep(groups, {n: u for n, u in half.items() if not n.startswith(f"{block}.")}, drop=[block])
    small = fxprune.rewrite(gm, plan)
    before, after = costs(groups, plan)
    for cost, network in ((before, model), (after, small)):
        assert cost.parameters == sum(p.numel() for p in network.parameters())
        assert cost.bytes == 4 * cost.parameters
        assert cost.macs == macs_per_token(network)
    assert after.macs < before.macs / 2
    assert Cost(**before.to_json()) == before


def test_costs_need_no_weights_and_know_the_dtype() -> None:
    with torch.device("meta"):
        model = build("llama").to(torch.bfloat16)
    _, groups = traced(model)
    scores = {n: torch.arange(g.size, dtype=torch.float32) for n, g in groups.items()}
    before, after = costs(groups, select(groups, scores, units=0.5, kinds=("ffn",)))
    assert before.bytes == 2 * before.parameters
    assert before.parameters - after.parameters == 2 * 3 * 32 * 48
    assert before.macs - after.macs == before.parameters - after.parameters
    real, _ = costs(traced(build("llama"))[1], PrunePlan({}))
    assert (real.parameters, real.macs) == (before.parameters, before.macs)
    matrices = [p.numel() for p in build("llama").parameters() if p.dim() == 2]  # tied: the embedding is read as the head
    assert real.macs == sum(matrices)


def test_a_token_pays_for_the_experts_that_it_goes_through() -> None:
    """Two of four; torch's counter does not see into the grouped products."""
    model: Any = build("mixtral")
    _, groups = traced(model)
    half = {n: list(range(0, g.size, 2)) for n, g in groups.items() if g.kind == "ffn"}
    before, after = costs(groups, PrunePlan.from_keep(groups, half))
    rest = macs_per_token(model)
    assert model.config.num_experts_per_tok == 2
    assert before.macs - rest == 2 * 2 * (48 * 128 + 64 * 48)
    assert after.macs - rest == 2 * 2 * (48 * 64 + 32 * 48)
