"""What the parts of a run share: where and how large, and the book that every result goes into as soon as it is known."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

import fxprune
from benchmarks.gpu.meter import Measured, free, measure
from benchmarks.gpu.scale import Scale
from benchmarks.paper.common import Book, Row


@dataclass
class Session:
    """A run.

    Attributes:
        name: Of the scale.
        scale: How large.
        device: Where.
        dtype: Of the weights.
        seed: Of weights, data and adapters.
        repeats: Of each latency measurement.
        peak_tflops: What the device is said to do at most, for the model FLOPs utilisation.
        forward_rows: Rows of a forward pass in training, to begin with.
        book: Where results go.
    """

    name: str
    scale: Scale
    device: torch.device
    dtype: torch.dtype
    seed: int
    repeats: int
    peak_tflops: float
    forward_rows: int
    book: Book

    @cached_property
    def model(self) -> Any:
        """The dense model; made when it is first asked for, gone with `forget`."""
        return self.scale.build(self.device, self.dtype, self.seed)

    @cached_property
    def trace(self) -> tuple[Any, Measured]:
        """Its trace, and what that took."""
        return measure(self.device, lambda: fxprune.trace(self.model, self.example))

    @property
    def example(self) -> dict[str, torch.Tensor]:
        """Token ids ``[2, 16]``."""
        return {"input_ids": self.tokens(2, 16)}

    def tokens(self, rows: int, length: int) -> torch.Tensor:
        """Random token ids ``[rows, length]`` on the device, the same for the same seed."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randint(0, self.scale.shape.vocabulary, (rows, length), generator=generator).to(self.device)

    def forget(self) -> None:
        """Let go of the dense model and its trace."""
        for name in ("model", "trace"):
            self.__dict__.pop(name, None)
        free(self.device)

    def attempt(self, part: str, case: dict[str, Any], work: Callable[[], Row]) -> Row | None:
        """Put what ``work`` finds into the book under part and case; an error too, and then None is returned."""
        key = {"part": part, "model": self.name, "device": self.device.type, "dtype": str(self.dtype).rpartition(".")[2], **case}
        label = ", ".join([part, *(f"{k} {v}" for k, v in case.items())])
        print(f"{label} ...", flush=True)
        try:
            found = work()
        except Exception as error:  # noqa: BLE001 - whatever it is, it is what this case gave, and the others go on
            traceback.print_exc()
            said = str(error).strip()
            self.book.add({"key": key, "error": f"{type(error).__name__}: {said.splitlines()[0][:400] if said else ''}"})
            free(self.device)
            return None
        self.book.add({"key": key, **found})
        return found
