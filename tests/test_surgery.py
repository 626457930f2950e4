"""Surgery on eager models: which numbers follow a size and which do not, lists that are shortened, fields of a module's own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PhiConfig

import fxprune
from fxprune.api import example_inputs
from fxprune.checkpoint.eager import combined, renamed
from fxprune.checkpoint.judge import caches, judge
from fxprune.checkpoint.surgery import apply_surgery, set_attribute

from .zoo import build


def test_lists_inside_lists_are_renumbered_first() -> None:
    drop = {"a": [0], "a.1.b": [1], "a.2.b": [0]}
    names = ["a.0.b.0.w", "a.1.b.0.w", "a.1.b.1.w", "a.1.b.2.w", "a.2.b.0.w", "a.2.b.1.w", "a.3.b.1.w", "c.0.w"]
    assert [renamed(n, drop) for n in names] == [None, "a.0.b.0.w", None, "a.0.b.1.w", None, "a.1.b.0.w", "a.2.b.1.w", "c.0.w"]
    model = nn.ModuleDict(
        {"a": nn.ModuleList(nn.ModuleDict({"b": nn.ModuleList(nn.Linear(i + 1, j + 1) for j in range(3))}) for i in range(4))}
    )
    shapes = {n: p.shape for n, p in model.named_parameters()}
    apply_surgery(model, {"drop": drop})
    assert {n: p.shape for n, p in model.named_parameters()} == {renamed(n, drop): s for n, s in shapes.items() if renamed(n, drop)}


def test_a_module_with_fields_of_its_own_in_the_configuration() -> None:
    shared: Any = PhiConfig(num_attention_heads=6)
    module: Any = nn.Module()
    module.config = shared
    before = set_attribute(module, "config.num_attention_heads", 4)
    assert (module.config.num_attention_heads, shared.num_attention_heads) == (4, 6)
    shared.use_cache = False
    assert module.config.use_cache is False
    module.config.use_cache = True
    assert shared.use_cache is True
    twin = copy.deepcopy(module)
    assert (twin.config.num_attention_heads, twin.config.hidden_size) == (4, shared.hidden_size)
    set_attribute(module, "config.num_attention_heads", before)
    assert module.config.num_attention_heads == 6
    with pytest.raises(AttributeError, match="no_such_field"):
        _ = module.config.no_such_field


def test_two_surgeries_combined() -> None:
    first = {
        "drop": {"layers": [1]},
        "lengths": {"layers": 4},
        "renumber": {"layers": ["idx"]},
        "shapes": {"layers.0.w": [3], "layers.1.w": [2], "layers.2.w": [1], "head.w": [9]},
        "added": {"layers.0.bias": [3], "layers.1.bias": [2], "layers.2.bias": [1], "head.bias": [9]},
        "buffers": {},
        "attributes": {"layers.1": {"a": 1}, "head": {"a": 1, "b": 2}},
        "dense": {"n_layer": 4},
    }
    second = {
        "drop": {"layers": [0], "others": [2]},
        "lengths": {"layers": 3, "others": 5},
        "renumber": {"layers": ["idx"], "others": []},
        "shapes": {"layers.1.w": [7], "layers.1.bias": [7]},
        "added": {"others.0.bias": [4]},
        "buffers": {"b": [1]},
        "attributes": {"head": {"b": 3}},
    }
    assert combined(first, second) == {
        "drop": {"layers": [0, 1], "others": [2]},
        "lengths": {"layers": 4, "others": 5},
        "renumber": {"layers": ["idx"], "others": []},
        "shapes": {"layers.0.w": [2], "layers.1.w": [7], "head.w": [9]},
        "added": {"layers.0.bias": [2], "layers.1.bias": [7], "head.bias": [9], "others.0.bias": [4]},
        "buffers": {"b": [1]},
        "attributes": {"layers.0": {"a": 1}, "head": {"a": 1, "b": 3}},
        "dense": {"n_layer": 4},
    }


def llama(**more: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, **{**sizes, "num_hidden_layers": 4, **more})).eval()


def gpt2() -> Any:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=4, n_head=2, initializer_range=0.3, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize("masked", [False, True])  # with a mask given, candidates are not run with a cache
@pytest.mark.parametrize(
    ("dense", "units", "numbers"),
    [
        (partial(llama, initializer_range=0.3), {"query_groups": 0.5}, "model.layers.{}.self_attn"),
        (gpt2, {"kv_heads": 0.5}, "transformer.h.{}.attn"),
    ],
)
def test_a_number_of_a_layer_is_no_size(dense: Callable[[], Any], units: dict[str, float], numbers: str, masked: bool) -> None:
    """Two heads a group, or two heads, become one: layer 2 stays layer 2, or two layers would share a place in the cache."""
    shape: dict[str, Any] = {"inputs": {n: torch.ones(2, 8, dtype=torch.long) for n in ("input_ids", "attention_mask")}}
    options = shape if masked else {}
    result = fxprune.prune(dense(), units=units, recipe="magnitude", widths="per-layer", protect_first=1, **options)
    model: Any = result.model
    assert result.form == "per-layer"
    assert [model.get_submodule(numbers.format(i)).layer_idx for i in range(4)] == [0, 1, 2, 3]
    ids = torch.randint(1, 64, (1, 8), generator=torch.Generator().manual_seed(0))
    whole, cached = (model.generate(ids, max_new_tokens=12, do_sample=False, use_cache=c).tolist() for c in (False, True))
    assert whole == cached


def test_a_window_is_no_size() -> None:
    """As wide as all heads are, and too wide for the inputs that candidates are run on to tell."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    }
    dense = Gemma2ForCausalLM(Gemma2Config(vocab_size=64, num_hidden_layers=4, sliding_window=64, **sizes)).eval()
    result = fxprune.prune(dense, units={"query_groups": 0.5}, recipe="magnitude", widths="per-layer", protect_first=1)
    model: Any = result.model
    assert [block.self_attn.num_key_value_groups for block in model.model.layers] == [2, 1, 1, 1]
    assert [block.self_attn.sliding_window for block in model.model.layers] == [64, None, 64, None]


def test_what_a_cache_would_get_wrong_is_no_candidate() -> None:
    model: Any = build("llama")
    inputs = example_inputs(model)
    with torch.no_grad():
        reference = model(**inputs, use_cache=False)
    assert caches(model, inputs, 1e-4)
    blind, same = judge(reference, inputs, 1e-4), judge(reference, inputs, 1e-4, cached=True)
    assert blind(model) is None
    assert same(model) is None
    model.model.layers[1].self_attn.layer_idx = 0
    assert blind(model) is None
    assert "with a KV cache" in str(same(model))
    assert not caches(model, inputs, 1e-4)
    assert not caches(build("bert"), inputs, 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_coarse_dtype_hides_no_other_model(dtype: torch.dtype) -> None:
    """A stock class computes the scale of attention from the size of a head: smaller than rounding, and not rounding."""
    dense = llama(num_hidden_layers=2, initializer_range=0.03).to(dtype)
    result = fxprune.prune(dense, units={"head_dim": 0.125}, kinds=["head_dim"], recipe="magnitude")
    model: Any = result.model
    assert result.form == "per-layer"
    assert model.model.layers[0].self_attn.scaling == 0.25
    assert all(p.dtype == dtype for p in model.parameters())
