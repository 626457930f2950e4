"""The surgery that a per-layer checkpoint describes: lists that are shortened, fields of a module's own, and two in a row."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from torch import nn
from transformers import PhiConfig

from fxprune.checkpoint.eager import combined, renamed
from fxprune.checkpoint.surgery import apply_surgery, set_attribute


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
