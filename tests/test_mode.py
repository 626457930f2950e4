"""Evaluation mode and no KV cache for a while: afterwards a model is as it was, whatever happened."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from fxprune.mode import evaluating, quiet, without_cache


def half_training() -> nn.Sequential:
    """Modules of both modes."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout(), nn.Linear(2, 2)))
    model[1].eval()
    return model


def modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


def test_every_module_gets_its_own_mode_back() -> None:
    model = half_training()
    before = modes(model)
    assert set(before) == {True, False}
    with evaluating(model):
        assert not any(modes(model))
    assert modes(model) == before
    with pytest.raises(ZeroDivisionError), evaluating(model):
        _ = 1 / 0
    assert modes(model) == before


def test_an_exported_module_too() -> None:
    """It refuses ``eval()``."""
    made: Any = torch.export.export(half_training(), (torch.ones(1, 2),)).module()
    with pytest.raises(NotImplementedError, match="eval"):
        made.eval()
    made.training = True
    with evaluating(made):
        assert not made.training
    assert made.training


def configured() -> tuple[nn.Module, Any]:
    """A model whose configuration has parts; some of them cache, one does not, one says nothing."""
    text, decoder = SimpleNamespace(use_cache=True), SimpleNamespace(use_cache=False)
    config = SimpleNamespace(use_cache=True, text_config=text, decoder=decoder)
    model: Any = half_training()
    model.config = config
    model[0].config = config  # modules share it
    model[1].config = SimpleNamespace()
    return model, config


def caches(config: Any) -> list[bool]:
    return [part.use_cache for part in (config, config.text_config, config.decoder)]


def test_no_cache_in_any_part_of_a_configuration() -> None:
    model, config = configured()
    with without_cache(model):
        assert caches(config) == [False, False, False]
    assert caches(config) == [True, True, False]
    assert not hasattr(model.get_submodule("1").config, "use_cache")
    with pytest.raises(ZeroDivisionError), without_cache(model):
        _ = 1 / 0
    assert caches(config) == [True, True, False]


def test_quiet_is_both() -> None:
    model, config = configured()
    before = modes(model)
    with quiet(model):
        assert not any(modes(model))
        assert not any(caches(config))
    assert modes(model) == before
    assert caches(config) == [True, True, False]
