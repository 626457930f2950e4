"""One process or many: which rows are whose, and how gradients come together (DDP, or FSDP where accelerate asks for it)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ..data.examples import IGNORED
from ..errors import UsageError


@dataclass(frozen=True)
class World:
    """The processes of a run.

    Attributes:
        device: Of this process.
        rank: Its number.
        size: How many there are.
        sharded: FSDP instead of DDP: every process holds a part of each parameter.
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    sharded: bool = False

    @property
    def main(self) -> bool:
        """True for the process that writes and prints."""
        return self.rank == 0

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model as it is called in training; `nn.Module` parameters keep their names in ``model`` itself.

        Raises:
            UsageError: A graph cannot be sharded: its blocks are not called as modules.
        """
        if self.size == 1:
            return model
        if self.sharded:
            return _sharded(model, self.device)
        from torch.nn.parallel import DistributedDataParallel

        index = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=index, gradient_as_bucket_view=True)

    @contextmanager
    def gathering(self, wrapped: nn.Module, last: bool) -> Iterator[None]:
        """Gradients of the backward pass inside are exchanged if it is the ``last`` of a step."""
        if self.size > 1 and self.sharded:
            wrapped.set_requires_gradient_sync(last)  # type: ignore[operator]
        held = self.size > 1 and not self.sharded and not last
        with wrapped.no_sync() if held else nullcontext():  # type: ignore[operator]
            yield

    def share(self, batch: Mapping[str, Tensor], micro: int) -> list[dict[str, Tensor]]:
        """This process's rows of a batch, some at a time: as many rows in as many parts on every process.

        Args:
            batch: Tensors ``[rows, tokens]``, ``labels`` among them; the same on every process.
            micro: Rows of a part.

        Returns:
            The parts, on the device. Rows that had to be added have no labels, and so no loss.
        """
        rows = len(batch["labels"])
        own = -(-rows // self.size)
        micro = min(micro, own)
        own = -(-own // micro) * micro
        missing = own * self.size - rows
        padded = dict(batch)
        if missing:
            for name, tensor in batch.items():
                more = torch.full_like(tensor[:1], IGNORED) if name == "labels" else tensor[:1]
                padded[name] = torch.cat([tensor, more.expand(missing, -1)])
        starts = range(self.rank * own, (self.rank + 1) * own, micro)
        return [{name: self._moved(tensor[i : i + micro]) for name, tensor in padded.items()} for i in starts]

    def _moved(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor

    def total(self, value: Tensor) -> Tensor:
        """The sum of a tensor over all processes."""
        if self.size > 1:
            value = value.clone()
            torch.distributed.all_reduce(value)
        return value

    def whole(self, tensor: Tensor) -> Tensor:
        """A copy on the CPU of a parameter or of an optimizer's tensor, put together again; all processes call this."""
        from torch.distributed.tensor import DTensor

        tensor = tensor.detach()
        return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).to("cpu", copy=True).contiguous()

    def place(self, value: Tensor, like: Tensor) -> Tensor:
        """What `whole` gave, back where ``like`` is and sharded as it is."""
        from torch.distributed.tensor import DTensor, distribute_tensor

        if isinstance(like, DTensor) and value.dim():
            return distribute_tensor(value.to(self.device), like.device_mesh, like.placements)
        return value.to(self.device)

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            torch.distributed.barrier()


def find_world(device: torch.device) -> World:
    """The world that ``torchrun`` or ``accelerate launch`` made, or a process alone.

    Args:
        device: Where the model is; its kind decides between NCCL and gloo.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        index = torch.cuda.current_device() if device.type == "cuda" and device.index is None else device.index
        return World(torch.device(device.type, index) if index is not None else device)
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    state = PartialState(cpu=device.type == "cpu")
    own = torch.device("cpu") if device.type == "cpu" else state.device
    return World(own, state.process_index, state.num_processes, parse_flag_from_env("ACCELERATE_USE_FSDP"))


def _sharded(model: nn.Module, device: torch.device) -> nn.Module:
    """FSDP2, one unit for each block and one for the rest."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if isinstance(model, GraphModule):
        raise UsageError("a GraphModule cannot be sharded (FSDP): use DDP, or recover the eager model")
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for block in list(blocks(model)):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def blocks(model: nn.Module) -> Iterator[nn.Module]:
    """Entries of the outermost module lists."""
    for child in model.children():
        if isinstance(child, nn.ModuleList):
            yield from _holding(child.children())
        else:
            yield from blocks(child)


def _holding(modules: Iterable[Any]) -> Iterator[nn.Module]:
    return (m for m in modules if next(m.parameters(), None) is not None)
