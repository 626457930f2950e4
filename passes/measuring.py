"""What has been measured so far, on the disk: a measurement that was cut short goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError
from ..files import write_whole
from ..wording import changes

FORMAT = 1


class State:
    """A JSON file of measurements by name, whole at any time, that belongs to one model, one text and one set of settings.

    Args:
        path: The file; it is written when the first entry comes.
        identity: What the measurement depends on, as text by what it is; a state of another measurement is refused.

    Attributes:
        entries: What has been measured, by name; plain data.

    Raises:
        UsageError: The file holds the state of another measurement, or something else, or there is no directory to write it to.
    """

    def __init__(self, path: str | os.PathLike[str], identity: Mapping[str, str]) -> None:
        self.path, self.typed, self.identity = Path(path), os.fspath(path), dict(identity)
        self.entries: dict[str, Any] = {}
        if not self.path.exists():
            if not self.path.parent.is_dir():
                raise UsageError(f"there is no directory '{self.path.parent}' to write '{self.path.name}' to")
            return
        try:
            data = json.loads(self.path.read_text(encoding="utf-8"))
            if data["fxprune_measuring"] != FORMAT:
                raise ValueError(f"format {data['fxprune_measuring']}")
            theirs, self.entries = dict(data["identity"]), dict(data["entries"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(f"'{self.typed}' is not the state of a measurement: it will not be replaced ({error})") from error
        if said := changes(theirs, self.identity):
            raise UsageError(
                f"'{self.typed}' holds the state of another measurement: {'; '.join(said)}. Repeat what it was started with, or "
                "delete it"
            )

    def add(self, name: str, entry: Any) -> None:
        """Keep an entry; it is on the disk afterwards."""
        self.entries[name] = entry
        write_whole(self.path, json.dumps({"fxprune_measuring": FORMAT, "identity": self.identity, "entries": self.entries}) + "\n")


def digest(tensors: Mapping[str, Tensor]) -> str:
    """A hash of tensors: their names, shapes, types and every bit."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]
