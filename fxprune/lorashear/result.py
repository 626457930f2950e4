"""What a shearing gives back."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..checkpoint.source import load_source
from ..errors import CheckpointError
from ..names import PLAN_FILE, REPORT_FILE
from ..plan import PrunePlan


@dataclass(frozen=True)
class ShearReport:
    """A shearing in numbers. In a checkpoint's report file it is the part ``shearing``, and ``recovery`` beside it.

    Attributes:
        recipe: Its name, or ``own``.
        settings: All of them, see `fxprune.lorashear.settings.Shearing`.
        ratio: Share of all parameters that was asked for.
        budget: ``tokens`` or ``steps`` that were asked for.
        removed: Share that went.
        parameters_before: Of the dense model.
        parameters_after: Of the pruned one.
        form: Of the checkpoint, as in `fxprune.PruneReport`.
        knowledge: What the knowledge distribution analysis found, as `fxprune.Knowledge.from_json` reads it, and ``protected``, the
            groups that stayed whole for it; None without one.
        lhspg: The schedule, ``criterion`` (what ranked units), ``periods`` (`fxprune.LHSPG.history`, each with its ``tokens``),
            ``history`` (columns ``step``, ``loss``, ``lr``, ``tokens``), ``left_out`` (why other groups stayed whole) and how
            adapters were trained.
        prune: How exact the removal is: ``zeros`` (numbers of the trained model that went, all of them exactly 0), ``verify``,
            ``eager_error``, and ``merged_error`` (of the pruned model against the trained one with its adapters beside the weights:
            what rounding the merge makes).
        recovery: `fxprune.RecoveryReport` as plain data; None without recovery.
        tokens: Read in training: ``warm-up``, ``periods`` (a list), ``after the periods``, ``recovery``, and ``total``. The
            knowledge analysis trains nothing and is not among them.
        seconds: Of each stage; training over all starts, the rest in its last one.
        notes: What else to know.
        versions: Software and machine.
        run: Tells this run from every other.
    """

    recipe: str
    settings: dict[str, Any]
    ratio: float
    budget: dict[str, int | None]
    removed: float
    parameters_before: int
    parameters_after: int
    form: str
    knowledge: dict[str, Any] | None
    lhspg: dict[str, Any]
    prune: dict[str, Any]
    recovery: dict[str, Any] | None
    tokens: dict[str, Any]
    seconds: dict[str, float]
    notes: list[str]
    versions: dict[str, str]
    run: str

    def to_json(self) -> dict[str, Any]:
        """Plain data, without recovery's: that has a place of its own in the report file."""
        data = {"fxprune_shearing": 1, **asdict(self)}
        del data["recovery"]
        return data

    @classmethod
    def read(cls, directory: Path) -> ShearReport:
        """The report in a checkpoint's report file.

        Raises:
            CheckpointError: There is none.
        """
        try:
            found = json.loads((directory / REPORT_FILE).read_text(encoding="utf-8"))
            own = {name: value for name, value in found["shearing"].items() if name != "fxprune_shearing"}
            return cls(**own, recovery=found.get("recovery"))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"'{directory}' holds no report of a shearing: {type(error).__name__}: {error}") from error


@dataclass(frozen=True)
class ShearResult:
    """A sheared model, as it stands on the disk.

    Attributes:
        model: An ordinary model in evaluation mode, read from the checkpoint.
        tokenizer: As given or found, or None.
        plan: The units that stay.
        report: Numbers.
        directory: The checkpoint.
    """

    model: nn.Module
    tokenizer: Any
    plan: PrunePlan
    report: ShearReport
    directory: Path

    def __repr__(self) -> str:
        report = self.report
        sizes = f"{report.parameters_before:,} -> {report.parameters_after:,} parameters ({-report.removed:+.1%})"
        return f"ShearResult({type(self.model).__name__}, {sizes}, {report.form}, '{self.directory}')"

    @classmethod
    def read(cls, directory: str | os.PathLike[str], tokenizer: Any = None) -> ShearResult:
        """Out of a directory that a shearing wrote.

        Raises:
            CheckpointError: It is damaged.
        """
        path = Path(directory)
        model, own = load_source(path)
        return cls(model, tokenizer or own, PrunePlan.load(path / PLAN_FILE), ShearReport.read(path), path)
