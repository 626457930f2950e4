"""The training state on disk: whole at any moment, in safetensors and JSON, so that a killed run goes on as if nothing had been."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import CheckpointError, UsageError
from ..wording import changes

SUFFIX = ".recovering"
GENERATIONS = 2
_NAME = re.compile(r"step-(\d{9})")


@dataclass
class Position:
    """How far a run has come: all that is not a tensor.

    Attributes:
        step: Optimizer steps taken.
        tokens: Tokens read by them.
        seconds: Spent in them.
        history: Columns ``step``, ``loss``, ``lr`` and ``tokens`` (so far), one entry a step.
        validation: Measurements, each ``step`` and ``perplexity``.
        best_step: The step whose weights are kept, None before the first measurement.
        best: Its validation perplexity.
        waited: Measurements since then.
        stopped: Why the run ended; empty while it goes on.
        dense: With a curriculum, the dense model's held-out loss on each source.
        rounds: With a curriculum, each measurement with the weights of the round that followed (`fxprune.recovery.staged`).
        final: With a curriculum, the measurement of every source at the end.
        periods: With LHSPG, an entry for each period that has begun (`fxprune.LHSPG.history`).
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    history: dict[str, list[float]] = field(default_factory=lambda: {"step": [], "loss": [], "lr": [], "tokens": []})
    validation: list[dict[str, float]] = field(default_factory=list)
    best_step: int | None = None
    best: float | None = None
    waited: int = 0
    stopped: str = ""
    dense: dict[str, float] = field(default_factory=dict)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    final: dict[str, dict[str, Any]] = field(default_factory=dict)
    periods: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def read(cls, data: Mapping[str, Any]) -> Position:
        """What a state says.

        Raises:
            TypeError: It has not all of the entries, others, or some of another type.
        """
        made, usual = cls(**data), cls()
        if wrong := [f.name for f in fields(cls) if f.name not in data or not _alike(data[f.name], getattr(usual, f.name))]:
            raise TypeError(f"no {wrong[0]}")
        if list(made.history) != list(usual.history) or len({len(column) for column in made.history.values()}) > 1:
            raise TypeError("no whole history")
        return made


class StateDirectory:
    """``OUT.recovering``: the two newest states of a run, each in a directory that appears in one step.

    A state is written under another name, flushed to the disk and renamed; the one before it stays until then and after, so that
    whatever happens at whatever moment, a whole one can be read.

    Args:
        output: The directory that the run will write.
        identity: What the run is made of (settings, data, model), as text by what it is; a state of another run is refused.
        restart: Drop a state that is there.
        main: False for a process that only reads.
        suffix: What is put behind the output's name.
        of: What kind of run it is.

    Raises:
        UsageError: It holds the state of another run, another process is writing to it, or it cannot be written to.
    """

    def __init__(
        self,
        output: str | os.PathLike[str],
        identity: Mapping[str, Any],
        *,
        restart: bool = False,
        main: bool = True,
        suffix: str = SUFFIX,
        of: str = "recovery",
    ) -> None:
        self.path = Path(os.path.abspath(output) + suffix)
        self.typed, self.of = f"{os.fspath(output).rstrip('/')}{suffix}", of
        self.identity = json.loads(json.dumps(identity))
        self._lock: int | None = None
        self._damaged: list[Path] = []
        if main:
            self._open(restart)

    def _open(self, restart: bool) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path / "lock", os.O_CREAT | os.O_RDWR)
        except OSError as error:
            raise UsageError(f"cannot write the training state '{self.typed}': {error.strerror}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)  # and no more: what is in it is the other's
            self._lock = None
            raise UsageError(f"another process is writing to '{self.typed}': wait for it, or choose another output") from error
        for entry in self.path.iterdir():
            if entry.is_dir() and (restart or not _NAME.fullmatch(entry.name)):
                shutil.rmtree(entry)

    def read(self) -> tuple[Position, dict[str, Tensor]] | None:
        """The newest whole state, or None if there is none.

        Raises:
            UsageError: It is the state of another run; says what differs.
            CheckpointError: There are states and none is whole.
        """
        damaged: Exception | None = None
        for directory in sorted(self._generations(), reverse=True):
            try:
                data = json.loads((directory / "state.json").read_text(encoding="utf-8"))
                position, identity = Position.read(data["position"]), data["identity"]
                tensors = load_file(directory / "tensors.safetensors")
                if not isinstance(identity, dict) or data["tensors"] != _shapes(tensors):
                    raise ValueError("it is not what was written")
            except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
                damaged = error
                self._damaged.append(directory)
                continue
            self._check(identity)
            return position, tensors
        if damaged is not None:
            raise CheckpointError(
                f"the training state in '{self.typed}' is damaged ({damaged}); start over with --restart (restart=True)"
            ) from damaged
        return None

    def _check(self, theirs: Mapping[str, Any]) -> None:
        refuse_other(self.typed, self.of, theirs, self.identity)

    def write(self, position: Position, tensors: Mapping[str, Tensor]) -> None:
        """Write a state; the last one stays until this one is on the disk.

        Args:
            position: How far the run is.
            tensors: On the CPU, none of them sharing memory.

        Raises:
            CheckpointError: The disk is full, or writing failed otherwise; the states before it are whole.
        """
        work = self.path / ".part"
        target = self.path / f"step-{position.step:09d}"
        while self._damaged:  # once: the run may write a whole state of the same step
            shutil.rmtree(self._damaged.pop(), ignore_errors=True)
        if target.exists():
            return
        try:
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
            save_file(dict(tensors), work / "tensors.safetensors")
            text = json.dumps({"format": 1, "identity": self.identity, "position": asdict(position), "tensors": _shapes(tensors)})
            (work / "state.json").write_text(text, encoding="utf-8")
            for path in (*work.iterdir(), work):
                _flush(path)
            work.rename(target)
            _flush(self.path)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(work, ignore_errors=True)
            step, said = self.last_step(), getattr(error, "strerror", None) or str(error)
            kept = (
                "none was written before" if step is None else f"that of step {step} is whole, and the same command goes on from it"
            )
            raise CheckpointError(f"could not write the training state '{self.typed}': {said}; {kept}") from error
        for old in sorted(self._generations())[:-GENERATIONS]:
            shutil.rmtree(old, ignore_errors=True)

    def last_step(self) -> int | None:
        """Step of the newest state, None if there is none."""
        last = max(self._generations(), default=None)
        return None if last is None else _step(last)

    def remove(self) -> None:
        """Remove it all: the run is over."""
        self.close()
        shutil.rmtree(self.path, ignore_errors=True)

    def close(self) -> None:
        """Let go of it; an empty one vanishes."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
            if not self._generations():
                with contextlib.suppress(OSError):
                    (self.path / "lock").unlink()
                    self.path.rmdir()

    def _generations(self) -> list[Path]:
        return [p for p in self.path.iterdir() if _NAME.fullmatch(p.name)] if self.path.is_dir() else []


def _alike(value: object, usual: object) -> bool:
    return usual is None or isinstance(value, type(usual)) or (isinstance(usual, float) and isinstance(value, int))


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, list[int]]:
    return {name: list(tensors[name].shape) for name in sorted(tensors)}


def _step(path: Path) -> int:
    return int(path.name.partition("-")[2])


def refuse_other(typed: str, of: str, theirs: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Stop where a state is another run's.

    Args:
        typed: What the user calls the state's directory.
        of: What kind of run it is.
        theirs: What the state belongs to.
        own: What this run is made of.

    Raises:
        UsageError: They are not the same; says what differs.
    """
    if said := changes(theirs, own):
        raise UsageError(
            f"'{typed}' holds the state of another {of}: {'; '.join(said[:4])}. Repeat the settings it was started with, or start "
            "over with --restart (restart=True)"
        )


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
