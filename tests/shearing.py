"""Tiny models with adapters for LHSPG: traced once, and set back to how they began before every use; and short shearings."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.fx import GraphModule

import fxprune
from fxprune import ShearResult
from fxprune.groups import Groups
from fxprune.lorashear import parts

from .curricula import dense, write_sources
from .recovering import write_instructions
from .zoo import build, tokenizer, tokens

SHEAR: dict[str, Any] = {
    "cutoff": 60,
    "length": 60,
    "batch_size": 4,
    "lr": 3e-3,
    "rank": 4,
    "alpha": 8.0,
    "checkpoint_every": 1,
    "knowledge_samples": 4,
    "knowledge_length": 20,
    "criterion_samples": 8,
    "periods": 2,
    "rounds": 2,
    "patience": 0,
}
"""Settings of a shearing that takes a moment."""

_TRACES: dict[str, GraphModule] = {}


def traced_once(model: nn.Module, inputs: Any) -> GraphModule:
    """`fxprune.trace`, in whose place models of one shape share a trace: with parameters of their own."""
    shapes = [(n, tuple(p.shape), p.dtype) for n, p in model.named_parameters()]
    key = f"{type(model).__name__} {shapes} {[(n, t.shape) for n, t in inputs.items()]}"
    if key not in _TRACES:
        gm = fxprune.trace(model, inputs)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of torch's own deprecated class
            _TRACES[key] = copy.deepcopy(gm)
    own = dict(model.named_parameters(remove_duplicate=False))
    known: dict[int, Any] = {id(p): own[n] for n, p in _TRACES[key].named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return copy.deepcopy(_TRACES[key], known)


def sheared(output: Path, data: Any, *, model: Any = None, ratio: float = 0.2, **settings: Any) -> ShearResult:
    """A short shearing of the model that knows two sources."""
    budget = {} if "tokens" in settings else {"steps": 20}
    chosen = {"tokenizer": tokenizer(), **budget, **SHEAR, **settings}
    return fxprune.shear(dense() if model is None else model, ratio, data, output=output, **chosen)


def three_sources(place: Path) -> list[str]:
    """Two sources of text, and instructions."""
    return [*write_sources(place), str(write_instructions(place / "alpaca.jsonl"))]


def uninterrupted(output: Path, files: Sequence[str]) -> ShearResult:
    """A shearing of two stages."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "trace", traced_once)
        return sheared(output, list(files[:2]), then=[files[2]])


def weights(directory: Path) -> dict[str, Tensor]:
    """Of a checkpoint."""
    return load_file(directory / "model.safetensors")


class Killed(BaseException):
    """As sudden as a signal, for the code inside."""


def killed(*_: Any, **__: Any) -> None:
    """In place of a function."""
    raise Killed


def killed_at(begin: str, done: int) -> Callable[[str, int, int], None]:
    """Progress that ends the run when something has come so far."""

    def progress(what: str, reached: int, total: int) -> None:
        if what.startswith(begin) and reached == done:
            raise Killed

    return progress


RANK = 5
SCALE = 2.0
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BASE = "base_model.model.model.layers"
IDS = {"input_ids": tokens(2, 7)}


@functools.cache
def _traced(
    family: str,
    targets: Sequence[str] | None,
    changes: tuple[tuple[str, Any], ...],
    options: tuple[tuple[str, Any], ...],
    dtype: torch.dtype,
) -> tuple[nn.Module, GraphModule, Groups, dict[str, Tensor]]:
    model: Any = build(family, **dict(changes)).to(dtype)
    if targets is not None:
        config = LoraConfig(
            r=RANK, lora_alpha=int(RANK * SCALE), target_modules=list(targets), task_type="CAUSAL_LM", **dict(options)
        )
        torch.manual_seed(1)
        model = get_peft_model(model, config)
    gm = fxprune.trace(model, IDS)
    return model, gm, fxprune.find_groups(gm), {n: t.clone() for n, t in model.state_dict().items()}


def fresh(
    family: str = "llama",
    targets: Sequence[str] | None = ALL,
    *,
    dtype: torch.dtype = torch.float32,
    changes: Mapping[str, Any] | None = None,
    **options: Any,
) -> tuple[Any, GraphModule, Groups]:
    """(model, graph, groups), as they were at the start; without targets there is no adapter and everything is trained.

    Args:
        family: A key of `tests.zoo.ZOO`.
        targets: Modules with an adapter.
        dtype: Of the base weights.
        changes: Of the family's configuration.
        **options: Of peft's.
    """
    model, gm, groups, start = _traced(
        family, targets, tuple(sorted((changes or {}).items())), tuple(sorted(options.items())), dtype
    )
    model.load_state_dict(start)
    model.zero_grad()
    return model.eval(), gm, groups


def trained(model: nn.Module) -> list[nn.Parameter]:
    """What an optimizer is given."""
    return [p for p in model.parameters() if p.requires_grad]


def batch(seed: int = 0, samples: int = 4, length: int = 12) -> dict[str, Tensor]:
    """Random ids, and themselves to predict."""
    ids = tokens(samples, length, seed=seed)
    return {"input_ids": ids, "labels": ids}


def train(
    model: Any, optimizer: torch.optim.Optimizer, steps: int, *, start: int = 0, after: Callable[[int], object] | None = None
) -> list[float]:
    """The losses of some steps on three batches, one after another."""
    losses = []
    for step in range(start, start + steps):
        loss = model(**batch(step % 3)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if after is not None:
            after(step)
    return losses


def logits(model: Any) -> Tensor:
    """Of ids that were not trained on."""
    with torch.no_grad():
        out = model(input_ids=tokens(3, 11, seed=9))
    found: Tensor = out[0] if isinstance(out, tuple) else out.logits
    return found


def slices(groups: Groups, units: dict[str, Tensor]) -> Iterable[Tensor]:
    """Everything that some units own, of base weights and adapters."""
    for name, own in units.items():
        for member in groups[name].members:
            if member.trainable:
                tensor = groups.parameters[member.name].tensor
                assert tensor is not None
                yield tensor.detach().index_select(member.dim, member.indices(own))


def named(groups: Groups, kind: str, layer: int) -> str:
    """The group of a kind in a layer."""
    (name,) = (n for n, g in groups.items() if (g.kind, g.layer) == (kind, layer))
    return name
