"""A model in another mode for a while: evaluation instead of training, without a KV cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode within, and afterwards every module's own mode again; traced graph modules, which refuse ``eval()``, too."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """No ``use_cache`` in any configuration of a model within; afterwards it is as it was."""
    configs: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    caching: list[Any] = []
    for config in {id(c): c for c in configs if c is not None}.values():
        parts = (config, getattr(config, "text_config", None), getattr(config, "decoder", None))
        caching += [part for part in parts if getattr(part, "use_cache", None) is True]
    for part in caching:
        part.use_cache = False
    try:
        yield
    finally:
        for part in caching:
            part.use_cache = True


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Both: evaluation mode and no KV cache, as a model is traced and compared."""
    with evaluating(model), without_cache(model):
        yield
