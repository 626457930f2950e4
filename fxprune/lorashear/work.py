"""``OUTPUT.shearing``: what a shearing has reached, on the disk, until the output stands."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, UsageError
from ..files import write_whole
from ..names import REPORT_FILE
from ..recovery.state import refuse_other

SUFFIX = ".shearing"
FORMAT = 1
RUN = "run.json"
LOCK = "lock"


class WorkDirectory:
    """A shearing's own directory beside its output. Whatever is in it is whole at any moment.

    Attributes:
        path: Where it is.
        typed: As the user would name it.
        stages: What each stage that is over has to report, by the stage's name.

    Args:
        output: The directory that the run will write.
        restart: Whatever a shearing has left there will be dropped: it may be damaged.

    Raises:
        UsageError: Something else is in its place, or what is there is damaged.
    """

    def __init__(self, output: str | os.PathLike[str], *, restart: bool = False) -> None:
        self.output = Path(os.path.abspath(output))
        self.path = Path(f"{self.output}{SUFFIX}")
        self.typed = f"{os.fspath(output).rstrip('/')}{SUFFIX}"
        self.stages: dict[str, dict[str, Any]] = {}
        self.run = uuid.uuid4().hex
        self._lock: int | None = None
        self._identity: dict[str, Any] | None = None
        if self.path.exists():
            self._read(restart)

    @property
    def knowledge(self) -> Path:
        """What was measured; beside it what is being measured."""
        return self.path / "knowledge.json"

    @property
    def scores(self) -> Path:
        """Importance of units, where a criterion measured it."""
        return self.path / "scores.safetensors"

    @property
    def lhspg(self) -> Path:
        """The state of LHSPG."""
        return self.path / "lhspg"

    @property
    def pruned(self) -> Path:
        """The pruned checkpoint."""
        return self.path / "pruned"

    @property
    def recovered(self) -> Path:
        """The recovered checkpoint; beside it the state of recovery."""
        return self.path / "recovered"

    @property
    def delivered(self) -> bool:
        """True if the output is what this run made: it was killed while it cleared up."""
        try:
            report = json.loads((self.output / REPORT_FILE).read_text(encoding="utf-8"))
            return bool(report["shearing"]["run"] == self.run)
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def open(self, identity: Mapping[str, Any], *, restart: bool) -> None:
        """Make the directory, or go on in it.

        Args:
            identity: What the run is made of, as plain data by what it is.
            restart: Drop what is in it.

        Raises:
            UsageError: It belongs to another run, another process works in it, or it cannot be written.
        """
        wanted = json.loads(json.dumps(identity))
        if not restart and self._identity is not None:
            if not (self.lhspg.exists() or self.pruned.exists()):  # what was measured so far does not depend on the ratio
                if self._identity.get("ratio") != wanted.get("ratio"):
                    self.stages.pop("begun", None)
                self._identity = {**self._identity, "ratio": wanted.get("ratio")}
            refuse_other(self.typed, "shearing", self._identity, wanted)
        self._take()
        if restart:
            self._clear()
            self.stages, self.run = {}, uuid.uuid4().hex
        self._identity = wanted

    def finish(self, identity: Mapping[str, Any]) -> bool:
        """Remove what a run that delivered its output has left; True if this would be the same run.

        Raises:
            UsageError: Another process works in it.
        """
        self._take()
        same = bool(self._identity == json.loads(json.dumps(identity)))
        self.remove()
        return same

    def _take(self) -> None:
        """Make the directory, and keep other processes out of it."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path / LOCK, os.O_CREAT | os.O_RDWR)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._let_go()  # what is in it is the other's
            raise UsageError(f"another process is working in '{self.typed}': wait for it, or choose another output") from error
        except OSError as error:
            raise UsageError(f"cannot write the working directory '{self.typed}': {error.strerror}") from error

    def record(self, stage: str, facts: Mapping[str, Any]) -> None:
        """Keep what a stage has to report; it is on the disk afterwards.

        Raises:
            CheckpointError: It cannot be written.
        """
        self.stages[stage] = dict(facts)
        data = {"fxprune_shearing": FORMAT, "run": self.run, "identity": self._identity, "stages": self.stages}
        write_whole(self.path / RUN, json.dumps(data) + "\n", called="the state of the shearing", error=CheckpointError)

    def remove(self) -> None:
        """Remove it all: the run is over."""
        self._clear()
        self.close()
        shutil.rmtree(self.path, ignore_errors=True)

    def _clear(self) -> None:
        """Remove all but the lock; what says whose it is goes last."""
        for entry in sorted(self.path.iterdir(), key=lambda entry: entry.name == RUN):
            if entry.is_dir():
                shutil.rmtree(entry, ignore_errors=True)
            elif entry.name != LOCK:
                entry.unlink(missing_ok=True)

    def close(self) -> None:
        """Let go of it; an empty one vanishes."""
        if self._lock is not None:
            if self._blank():
                with contextlib.suppress(OSError):
                    shutil.rmtree(self.path)
            self._let_go()

    def _let_go(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _blank(self) -> bool:
        """True before anything was kept."""
        return all(entry.name == LOCK or entry.name.startswith(f".{RUN}.") for entry in self.path.iterdir())

    def _ours(self) -> bool:
        """True if there is nothing but what a shearing leaves, whole or not."""
        known = (LOCK, RUN, self.knowledge.name, self.scores.name, self.lhspg.name, self.pruned.name, self.recovered.name)
        names = [entry.name for entry in self.path.iterdir()]
        return LOCK in names and all(name.removeprefix(".").startswith(known) for name in names)

    def _read(self, restart: bool) -> None:
        foreign = f"'{self.typed}' is not the working directory of a shearing: it will not be replaced; choose another output"
        if not self.path.is_dir():
            raise UsageError(foreign)
        if self._blank():
            return
        try:
            data = json.loads((self.path / RUN).read_text(encoding="utf-8"))
            if data["fxprune_shearing"] != FORMAT:
                raise ValueError(f"format {data['fxprune_shearing']}")
            self.run, self._identity, self.stages = str(data["run"]), dict(data["identity"]), dict(data["stages"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            if not self._ours():
                raise UsageError(foreign) from error
            if not restart:
                raise UsageError(
                    f"the state of the shearing in '{self.typed}' is damaged: start over with --restart (restart=True)"
                ) from error
