"""The step that brings redundant units to zero within a period.

With ``x`` the base weights of a unit as one vector and ``left`` the steps that are left in the period, this one among them:

    x^ = x - lr g - lr lambda x / |x|                the trial
    x  = 0                    if <x^, x> < eps |x|^2   (it left the half-space), from then on
    x  = x^ (left - 1) / left  otherwise               (so that the last step ends at zero)

``g`` is the update ``s B A`` of the weights' adapters. Where the wrapped optimizer trains a weight itself, its own step takes the
place of ``lr g``. With ``linear`` projection there is no trial: ``x`` becomes ``x (left - 1) / left``. Rows of ``B`` and columns of
``A`` that belong to a unit are multiplied by the same factor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from .adapters import update_factors, wide
from .saliency import by_position
from .units import Part, Structure


class Slice:
    """The positions of one part that some units of its group own.

    Attributes:
        part: The part.
        index: The positions, on the parameter's device.
        slot: For each of them which of the given units owns it.
        saved: Values from before the wrapped optimizer's step.
    """

    def __init__(self, part: Part, units: Tensor, size: int) -> None:
        self.part = part
        owners, positions = part.incidence
        slot = torch.full((size,), -1, dtype=torch.long)
        slot[units] = torch.arange(len(units))
        own = slot[owners] >= 0
        device = part.tensor.device
        self.index: Tensor = positions[own].to(device)
        self.slot: Tensor = slot[owners][own].to(device)
        self.saved: Tensor | None = None

    def read(self) -> Tensor:
        """The values, ``[positions, the rest]``, in float32 or better."""
        return by_position(wide(self.part.tensor.detach().index_select(self.part.member.dim, self.index)), self.part.member.dim)

    def write(self, rows: Tensor) -> None:
        """Put back what `read` gave."""
        tensor, dim = self.part.tensor, self.part.member.dim
        shape = [len(self.index), *(n for d, n in enumerate(tensor.shape) if d != dim)]
        tensor.index_copy_(dim, self.index, rows.to(tensor.dtype).reshape(shape).movedim(0, dim))

    def values(self) -> Tensor:
        """The values as they are stored, a copy."""
        return self.part.tensor.detach().index_select(self.part.member.dim, self.index)

    def put(self, values: Tensor) -> None:
        """Put back what `values` gave."""
        self.part.tensor.index_copy_(self.part.member.dim, self.index, values.to(self.part.tensor))

    def clear(self) -> None:
        """Set all of them to zero."""
        self.part.tensor.index_fill_(self.part.member.dim, self.index, 0)

    def update(self, tensors: Mapping[str, Tensor]) -> Tensor | float:
        """These rows of ``s B A``; 0 without an adapter."""
        if not self.part.adapters:
            return 0.0
        left, right = update_factors(self.part.adapters, self.part.member.dim, tensors)
        return left.index_select(0, self.index) @ right

    def sums(self, rows: Tensor, like: Tensor) -> Tensor:
        """The sums of rows, added up unit by unit, on the device of ``like``, which has an entry for each unit."""
        total = torch.zeros(len(like), dtype=rows.dtype, device=rows.device)
        return total.index_add_(0, self.slot, rows.sum(1)).to(like.device)


class Redundant:
    """The units of one group that go to zero in the current period.

    Attributes:
        structure: The group.
        units: Which of its units, rising.
        alive: Which of these are not zero yet: a bool tensor on the weights' device.
    """

    def __init__(self, structure: Structure, units: Tensor, alive: Tensor | None = None) -> None:
        self.structure, self.units = structure, units
        self.weights = [Slice(part, units, structure.group.size) for part in structure.parts]
        self.followers = [Slice(part, units, structure.group.size) for part in structure.followers]
        device = structure.parts[0].tensor.device
        self.alive = torch.ones(len(units), dtype=torch.bool, device=device) if alive is None else alive.to(device)

    @property
    def slices(self) -> list[Slice]:
        """All that shrinks."""
        return [*self.weights, *self.followers]

    @torch.no_grad()
    def remember(self) -> None:
        """Before the wrapped optimizer steps: keep the values of what it trains."""
        for own in self.weights:
            own.saved = own.read() if own.part.trained else None

    @torch.no_grad()
    def hold(self) -> None:
        """After the wrapped optimizer stepped: units that are zero already stay so."""
        for own in (*(s for s in self.weights if s.part.trained), *self.followers):
            own.write(torch.where(self._of(own, self.alive), own.read(), 0))

    @torch.no_grad()
    def half_space(
        self, left: int, penalty: float, epsilon: float, lr_of: Callable[[Part], float], tensors: Mapping[str, Tensor]
    ) -> None:
        """One step of the half-space projection; see the module.

        Args:
            left: Steps left in the period, this one among them.
            penalty: ``lambda``.
            epsilon: ``eps``.
            lr_of: The learning rate of a part.
            tensors: Every parameter by name.
        """
        if left == 1:
            self.finish()
            return
        rates = [lr_of(own.part) for own in self.weights]
        old, new = [], []
        for own, lr in zip(self.weights, rates, strict=True):
            values = own.read()
            old.append(values if own.saved is None else own.saved)
            new.append(values - lr * own.update(tensors) if own.saved is None else values)
        squares = [own.sums(x * x, self.alive) for own, x in zip(self.weights, old, strict=True)]
        square = torch.stack(squares).sum(0)
        norm = square.sqrt()
        scale = torch.where(norm > 0, penalty / norm.clamp_min(torch.finfo(norm.dtype).tiny), 0)
        inner = torch.zeros_like(square)
        for own, lr, x, trial, share in zip(self.weights, rates, old, new, squares, strict=True):
            inner += own.sums(trial * x, self.alive) - lr * scale * share
        self.alive &= ~((inner < epsilon * square) | (square == 0))
        for own, lr, x, trial in zip(self.weights, rates, old, new, strict=True):
            own.write(self._shrunk(own, trial - lr * self._of(own, scale) * x, left))
        for own in self.followers:
            own.write(self._shrunk(own, own.read(), left))

    @torch.no_grad()
    def linear(self, left: int) -> None:
        """One step of the linear decay."""
        if left == 1:
            self.finish()
            return
        for own in (*self.weights, *self.followers):
            own.write(self._shrunk(own, own.read(), left))

    @torch.no_grad()
    def finish(self) -> None:
        """All of the units are zero."""
        self.alive.zero_()
        for own in (*self.weights, *self.followers):
            own.clear()

    def _shrunk(self, own: Slice, rows: Tensor, left: int) -> Tensor:
        return torch.where(self._of(own, self.alive), rows * ((left - 1) / left), 0)

    @staticmethod
    def _of(own: Slice, per_unit: Tensor) -> Tensor:
        """One value for each unit as one for each row."""
        return per_unit.to(own.slot.device)[own.slot][:, None]
