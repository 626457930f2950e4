"""LHSPG in recovery's training loop: the same steps, and a state from which a killed run goes on bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..recovery.loop import Training
from .budget import Schedule
from .lhspg import LHSPG, STATE

PREFIX = "lhspg/"
"""Of the names of LHSPG's tensors in a state."""


@dataclass
class ShearTraining(Training):
    """A run of LHSPG.

    Attributes:
        wrap: Makes LHSPG of the adapters' optimizer.
        schedule: What each step is for.
    """

    wrap: Callable[[torch.optim.Optimizer], LHSPG] = field(kw_only=True)
    schedule: Schedule = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.lhspg = self.wrap(self.optimizer)
        self.optimizer = self.lhspg

    def _after(self) -> None:
        position, steps = self.position, self.plan.steps
        position.periods = [dict(entry) for entry in self.lhspg.history]
        if self.progress is not None and self.world.main:
            pace = f", {self.pace:,.0f} tokens/s" if self.pace else ""
            part = self.schedule.part(position.step - 1)
            self.progress(f"shearing ({part}, loss {position.history['loss'][-1]:.3f}{pace})", position.step, steps)
        every = self.plan.settings.checkpoint_every
        if self.state is not None and every and position.step % every == 0 and position.step < steps:
            self._write()

    def _tensors(self) -> dict[str, Tensor]:
        return {**super()._tensors(), **_flat(self.lhspg.state_dict()[STATE])}

    def _restore(self, tensors: Mapping[str, Tensor]) -> None:
        super()._restore(tensors)
        state = self.lhspg.state_dict()
        here = {"step": self.position.step, "history": self.position.periods}
        self.lhspg.load_state_dict({**state, STATE: {**state[STATE], **here, **_nested(tensors)}})


def _flat(own: Mapping[str, Any]) -> dict[str, Tensor]:
    """LHSPG's tensors by one name each, on the CPU."""
    found = {f"{PREFIX}zero/{name}": units for name, units in own["zero"].items()}
    for name, active in own["active"].items():
        found |= {f"{PREFIX}{part}/{name}": active[part] for part in ("units", "alive")}
        found |= {f"{PREFIX}values/{name}/{key}": values for key, values in active["values"].items()}
    return {name: tensor.cpu().contiguous() for name, tensor in found.items()}


def _nested(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What `_flat` gave, as LHSPG has it."""
    zero: dict[str, Tensor] = {}
    active: dict[str, dict[str, Any]] = {}
    for path, tensor in tensors.items():
        if not path.startswith(PREFIX):
            continue
        part, _, rest = path.removeprefix(PREFIX).partition("/")
        name, _, key = rest.partition("/")
        if part == "zero":
            zero[name] = tensor
        elif part == "values":
            active.setdefault(name, {"values": {}})["values"][key] = tensor
        else:
            active.setdefault(name, {"values": {}})[part] = tensor
    return {"zero": zero, "active": active}
