"""Sliced copies of parameters for a compiled graph: shared between graphs, and made again when the dense ones change."""

from __future__ import annotations

import weakref
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..groups import Groups
from ..passes.rewrite import slice_tensor
from ..spaces import Axis, Space, kept


class Slice:
    """A sliced copy of a tensor.

    Attributes:
        tensor: The copy; it needs no gradient and never changes its identity.
    """

    def __init__(self, dense: Tensor, tensor: Tensor, dims: list[Space], choice: Mapping[Axis, Tensor]) -> None:
        self.tensor = tensor.detach() if not isinstance(tensor, nn.Parameter) else tensor.requires_grad_(False)
        self._dense, self._dims, self._choice = dense, dims, dict(choice)
        self._seen, self._storage = _state(dense), StorageWeakRef(dense.untyped_storage())

    def refresh(self) -> None:
        """Copy again if the dense tensor may have been written to since."""
        now = _state(self._dense)
        if now is not None and now == self._seen and not self._storage.expired():
            return
        with torch.no_grad():
            self.tensor.copy_(slice_tensor(self._dense, self._dims, self._choice))
        self._seen, self._storage = now, StorageWeakRef(self._dense.untyped_storage())


def _state(tensor: Tensor) -> tuple[int, int, int] | None:
    """What changes when a tensor is written to, or gets other ``data``.

    None where torch keeps no count of it: batch normalisation writes to its buffers without, and inference tensors have none.
    """
    if tensor.is_inference() or not isinstance(tensor, nn.Parameter):
        return None
    return tensor._version, tensor.data_ptr(), _Steps.taken


class _Steps:
    """Steps of all optimisers: a fused one writes to parameters without counting up their versions."""

    taken = 0

    @classmethod
    def count(cls, *_: object) -> None:
        """What every optimiser calls after a step."""
        cls.taken += 1


register_optimizer_step_post_hook(_Steps.count)


class Slices:
    """Every slice that is in use, so that recompiles of a graph share them."""

    def __init__(self) -> None:
        self._known: weakref.WeakValueDictionary[tuple[object, ...], Slice] = weakref.WeakValueDictionary()

    def freeze(self, small: GraphModule, groups: Groups, choice: Mapping[Axis, Tensor]) -> list[Slice]:
        """Put the shared slices into a pruned module, and the dense tensors themselves where nothing is cut.

        Args:
            small: What the rewrite made; its own copies go.
            groups: Of the dense graph.
            choice: What each axis keeps.

        Returns:
            The slices in it.
        """
        places: dict[int, list[tuple[dict[str, Tensor | None], str]]] = {}
        for module in small.modules():
            for table in (module._parameters, module._buffers):
                for leaf, tensor in table.items():
                    if tensor is not None:
                        places.setdefault(id(tensor), []).append((table, leaf))  # type: ignore[arg-type]
        slices = []
        for name, value in groups.inference.tensors.items():
            copy, dense = _lookup(small, name), value.tensor
            if copy is None or dense is None:
                continue
            put: Tensor = dense
            indices = [kept(space, choice.get) for space in value.dims]
            if any(index is not None for index in indices):
                cut = (None if i is None else tuple(i.tolist()) for i in indices)
                key = (name, id(dense), dense.dtype, dense.device, *cut)
                made = self._known.get(key)
                if made is None:
                    made = self._known[key] = Slice(dense, copy, value.dims, choice)
                made.refresh()
                slices.append(made)
                put = made.tensor
            for table, leaf in places[id(copy)]:
                table[leaf] = put
        return slices


def _lookup(module: nn.Module, name: str) -> Tensor | None:
    value: object = module
    for piece in name.split("."):
        value = getattr(value, piece, None)
    return value if isinstance(value, Tensor) else None
